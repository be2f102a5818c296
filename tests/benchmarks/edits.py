"""Strips of edited pictures: a source, and what edits at several settings make of it.

    python -m tests.benchmarks.edits [--model DIR] [--source PROMPT] [--edit PROMPT] [--blend WORD] [--seed N]
                                     [--steps N] [--guidance X] [--output DIR]

Each strip of `STRIPS` is one PNG. The first picture is the source, the second the plain picture of the edited prompt
from the same noise, beside which an edit shows what it keeps.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hubgen.controls.prompt_to_prompt import PromptToPrompt
from hubgen.hub.bundled import bundled_model
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.benchmarks import report

RESULTS = Path(__file__).parent / "results" / "edits"
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Of the steps in which an edit attends as its source"""


@dataclass(frozen=True)
class Request:
    """What is drawn."""

    source: str
    edit: str
    blend: str | None
    seed: int
    call: Mapping[str, Any]
    """Further arguments of every call"""

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


Pictures = list[tuple[str, torch.Tensor]]
"""Captions and pictures, (3, H, W) in [0, 1]"""


def prompt_to_prompt(pipe: TextToImagePipeline, request: Request) -> Pictures:
    """The source, the edited prompt without an edit, and edits that follow the source for longer and longer."""
    pictures: Pictures = []
    words = len(request.source.split()) == len(request.edit.split())

    def pair(**settings: Any) -> torch.Tensor:
        edit = PromptToPrompt("replace" if words else "refine", **settings)
        prompts = [request.source, request.edit]
        return pipe(prompts, generator=request.generator, controls=[edit], **request.call).images

    source, plain = pair(cross_steps=0, self_steps=0)
    pictures += [(request.source, source), (f"{request.edit}, plain", plain)]
    pictures += [(f"{request.edit}, {share:.0%}", pair(self_steps=share)[1]) for share in SHARES]
    if request.blend is not None:
        pictures.append((f"40%, only {request.blend}", pair(self_steps=0.4, blend=request.blend)[1]))
    return pictures


STRIPS: Mapping[str, Callable[[TextToImagePipeline, Request], Pictures]] = {"prompt_to_prompt": prompt_to_prompt}
"""By the names of their files"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder of a pipeline; the bundled model if not given")
    parser.add_argument("--source", default="a red apple")
    parser.add_argument("--edit", default="a green apple")
    parser.add_argument("--blend", default=None, help="a word to whose places one more edit is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="the model's default if not given")
    parser.add_argument("--guidance", type=float, default=None, help="the model's default if not given")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    pipe = TextToImagePipeline.from_pretrained(options.model or bundled_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "output_type": "pt"}
    request = Request(options.source, options.edit, options.blend, options.seed, call)
    for name, draw in STRIPS.items():
        captions, pictures = zip(*draw(pipe, request), strict=True)
        path = options.output / f"{name}.png"
        report.draw_grid([torch.stack(pictures) * 2 - 1], captions, path)
        print(path)


if __name__ == "__main__":
    main()
