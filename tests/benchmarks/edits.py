"""Strips of edited pictures: a source, and what edits at several settings make of it.

    python -m tests.benchmarks.edits [--model DIR] [--source PROMPT] [--edit PROMPT] [--blend WORD] [--seed N]
                                     [--steps N] [--guidance X] [--image FILE] [--output DIR]

Each strip of `STRIPS` is one PNG, whose first picture is the source: one of its prompt, or for inversion and FlowEdit
the file that was given. In that of Prompt-to-Prompt, the second is the plain picture of the edited prompt from the same
noise, beside which an edit shows what it keeps.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hubgen.controls.prompt_to_prompt import PromptToPrompt
from hubgen.data.pictures import on_white, standard
from hubgen.hub.bundled import bundled_model
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.schedulers.inversion import METHODS, is_flow
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
    image: Image.Image | None = None
    """What inversion and FlowEdit edit; `None`: a picture of the source's prompt"""

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


def source_picture(pipe: TextToImagePipeline, request: Request) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    if request.image is None:
        found: torch.Tensor = pipe(request.source, generator=request.generator, **request.call).images
        return found
    height, width = pipe.default_size
    return pipe.image_processor.preprocess(request.image, height, width) / 2 + 0.5


def inversion(pipe: TextToImagePipeline, request: Request) -> Pictures:
    """The source, what each method brings back of it, and the edited prompt from its noise, also with null-text."""
    image = source_picture(pipe, request)
    scale = pipe.defaults().guidance_scale if request.call["guidance_scale"] is None else request.call["guidance_scale"]
    call = {"guidance_scale": scale, "output_type": "pt"}
    steps = request.call["num_inference_steps"]
    pictures: Pictures = [(request.source, image[0])]
    for method in METHODS if is_flow(pipe.scheduler) else ("euler",):
        found = pipe.invert(image, request.source, method, steps, generator=request.generator)
        pictures.append((f"{method}, back", pipe.reconstruct(found, output_type="pt").images[0]))
        pictures.append((f"{method}, {request.edit}", pipe.reconstruct(found, request.edit, **call).images[0]))
    found = pipe.invert(image, request.source, num_inference_steps=steps)
    pictures.append(("guided, back", pipe.reconstruct(found, **call).images[0]))
    if not pipe.family.distilled:
        controls = [pipe.null_text(found, guidance_scale=scale)]
        pictures.append(("null-text, back", pipe.reconstruct(found, **call, controls=controls).images[0]))
        edited = pipe.reconstruct(found, request.edit, **call, controls=controls).images[0]
        pictures.append((f"null-text, {request.edit}", edited))
    return pictures


def flow_edit(pipe: TextToImagePipeline, request: Request) -> Pictures:
    """The source, and FlowEdit over more and more of the steps; nothing for models of other paths."""
    if not is_flow(pipe.scheduler):
        return []
    image = source_picture(pipe, request)
    steps = (
        pipe.defaults().steps if request.call["num_inference_steps"] is None else request.call["num_inference_steps"]
    )
    call = {"guidance_scale": request.call["guidance_scale"], "output_type": "pt", "num_inference_steps": steps}
    pictures: Pictures = [(request.source, image[0])]
    for share in (*SHARES, 1.0):
        done = max(round(share * steps), 1)
        edited = pipe.flow_edit(image, request.source, request.edit, n_max=done, generator=request.generator, **call)
        pictures.append((f"{request.edit}, {share:.0%}", edited.images[0]))
    return pictures


STRIPS: Mapping[str, Callable[[TextToImagePipeline, Request], Pictures]] = {
    "prompt_to_prompt": prompt_to_prompt,
    "inversion": inversion,
    "flow_edit": flow_edit,
}
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
    parser.add_argument("--image", type=Path, default=None, help="a picture of --source, for inversion and FlowEdit")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    pipe = TextToImagePipeline.from_pretrained(options.model or bundled_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "output_type": "pt"}
    image = None if options.image is None else on_white(standard(Image.open(options.image), str(options.image)))
    request = Request(options.source, options.edit, options.blend, options.seed, call, image)
    for name, draw in STRIPS.items():
        drawn = draw(pipe, request)
        if not drawn:
            print(f"{name}: not for this model")
            continue
        captions, pictures = zip(*drawn, strict=True)
        path = options.output / f"{name}.png"
        report.draw_grid([torch.stack(pictures) * 2 - 1], captions, path)
        print(path)


if __name__ == "__main__":
    main()
