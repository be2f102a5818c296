"""What do edits keep, and what do inversions bring back? Figures of the bundled model, or of another one of prompts.

    python -m tests.benchmarks.edit_figures [--model DIR] [--split test|validation] [--parts PART ...] [--steps N]
                                            [--output DIR]

- `there-and-back`: the mean squared error of the latents after an inversion and the way back, without guidance, of a
  picture that the model drew, by each method.
- `null-text`: the same with guidance 4, without and with null-text, for colours that run from corner to corner, which
  no prompt describes.
- `prompt-to-prompt`: pairs of prompts that differ in a colour. *kept* is one minus the squared error between edit and
  source, in grey, as a part of that between source and the plain picture of the edited prompt from the same noise: 1 is
  the source's shapes, 0 those of a picture that was not edited. *shown* is how much more of the asked colour the edit
  has than the source, as a part of how much more the plain picture has: 1 is all of the edit, 0 none.

What is chosen is chosen with `--split validation`, which also runs other settings; stored are the figures of "test", as
edits.json and edits.md.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hubgen.controls.prompt_to_prompt import PromptToPrompt
from hubgen.data.colours import COLOURS, colour_shares, colour_words
from hubgen.hub.bundled import bundled_model
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.schedulers.inversion import METHODS, is_flow
from tests.benchmarks import report
from tests.benchmarks.edits import RESULTS

PAIRS: dict[str, Sequence[tuple[str, str]]] = {
    "test": [
        ("a red apple", "a green apple"),
        ("a blue heart", "a red heart"),
        ("a yellow car", "a purple car"),
        ("a green book", "an orange book"),
        ("a purple circle", "a yellow circle"),
        ("an orange square", "a blue square"),
    ],
    "validation": [
        ("a red heart", "a green heart"),
        ("a blue book", "a red book"),
        ("an orange circle", "a purple circle"),
        ("a green square", "a yellow square"),
        ("a red car", "a blue car"),
        ("a yellow heart", "an orange heart"),
    ],
}
SHARES = (0.4, 0.7, 1.0)
"""Of the steps in which an edit attends as its source"""
BACK, NULL, EDITS = "there-and-back", "null-text", "prompt-to-prompt"
SCALE = 4.0
"""Of the guidance with null-text"""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(pipe: Any, inversion: Any, **options: Any) -> float:
    """The mean squared error of the latents that come back."""
    found = pipe.reconstruct(inversion, output_type="latent", **options).images
    return float((found - inversion.data).square().mean())


def there_and_back(pipe: Any, prompt: str, steps: int) -> dict[str, float]:
    """By method."""
    picture = pipe(prompt, num_inference_steps=steps, generator=seeded(), output_type="pt").images
    methods = METHODS if is_flow(pipe.scheduler) else ("euler",)
    return {one: error(pipe, pipe.invert(picture, prompt, one, steps, generator=seeded())) for one in methods}


def corner_to_corner(side: int) -> Image.Image:
    """Colours that no model has drawn."""
    y, x = np.mgrid[0:side, 0:side] * 252 // side
    return Image.fromarray(np.stack([x, y, 252 - (x + y) // 2], -1).astype(np.uint8))


def null_text(pipe: Any, steps: int) -> dict[str, float]:
    """With guidance, without and with null-text."""
    inversion = pipe.invert(corner_to_corner(pipe.default_size[0]), "a rainbow", num_inference_steps=steps)
    null = pipe.null_text(inversion, guidance_scale=SCALE)
    controls: dict[str, list[Any]] = {"without": [], "with": [null]}
    return {name: error(pipe, inversion, guidance_scale=SCALE, controls=some) for name, some in controls.items()}


def drawn(pipe: Any, pair: tuple[str, str], steps: int, **settings: Any) -> torch.Tensor:
    """The source and its edit with these settings of `PromptToPrompt`, (2, 3, H, W) in [0, 1]."""
    words = len(pair[0].split()) == len(pair[1].split())
    edit = PromptToPrompt("replace" if words else "refine", **settings)
    call = {"num_inference_steps": steps, "generator": seeded(), "output_type": "pt", "controls": [edit]}
    found: torch.Tensor = pipe(list(pair), **call).images
    return found


def kept_and_shown(source: torch.Tensor, plain: torch.Tensor, edit: torch.Tensor, colour: str) -> tuple[float, float]:
    """See above.

    Args:
        source: (3, H, W) in [0, 1], as the other two.
        plain: The edited prompt's picture from the same noise.
        edit: The edited one.
        colour: That was asked for.
    """
    grey = [one.mean(dim=0) for one in (source, plain, edit)]
    kept = 1 - (grey[2] - grey[0]).square().mean() / (grey[1] - grey[0]).square().mean()
    shares = colour_shares(torch.stack([source, plain, edit]) * 2 - 1)[:, COLOURS.index(colour)]
    shown = (shares[2] - shares[0]) / (shares[1] - shares[0]).clamp(min=0.05)
    return kept.item(), shown.item()


def settings_of(pipe: Any, split: str) -> dict[str, dict[str, Any]]:
    """What is measured of Prompt-to-Prompt; where it is to be chosen, also of half of the blocks."""
    found: dict[str, dict[str, Any]] = {"as it comes": {}}
    found |= {f"{share:.0%} of the steps": {"self_steps": share} for share in SHARES}
    if split == "validation":
        layers = len(pipe.backbone.attn_processors)
        for name, blocks in {"first": range(layers // 2 + 1), "last": range(layers // 2, layers)}.items():
            found[f"all steps, {name} blocks"] = {"self_steps": 1.0, "blocks": list(blocks)}
    return found


def prompt_to_prompt(pipe: Any, split: str, steps: int) -> dict[str, dict[str, float]]:
    """Medians over the pairs, by settings."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for pair in PAIRS[split]:
        source, plain = drawn(pipe, pair, steps, cross_steps=0, self_steps=0)
        for name, settings in settings_of(pipe, split).items():
            edit = drawn(pipe, pair, steps, **settings)[1]
            rows.setdefault(name, []).append(kept_and_shown(source, plain, edit, colour_words(pair[1])[0]))
            print(f"{pair}, {name}: kept {rows[name][-1][0]:.2f}, shown {rows[name][-1][1]:.2f}", flush=True)
    kept, shown = ({name: statistics.median(row[i] for row in own) for name, own in rows.items()} for i in (0, 1))
    return {name: {"kept": kept[name], "shown": shown[name]} for name in rows}


def written(found: dict[str, Any]) -> str:
    """As Markdown, of the parts that there are."""
    parts = [f"{found['steps']} steps.\n"]
    if (back := found.get(BACK)) is not None:
        below = {method: back["euler"] / value for method, value in back.items()}
        rows = [
            [method, f"{value:.1e}", f"{below[method]:,.0f}" if below[method] >= 10 else f"{below[method]:.1f}"]
            for method, value in back.items()
        ]
        table = report.markdown_table(["method", "error", "below Euler's, times"], rows)
        parts += ["There and back, error of the latents:\n", table]
    if (null := found.get(NULL)) is not None:
        times = null["without"] / null["with"]
        errors = f"error {null['without']:.3f} without, {null['with']:.3f} with, {times:.1f} times less"
        parts.append(f"Null-text at guidance {SCALE:g}: {errors}.\n")
    if (edits := found.get(EDITS)) is not None:
        rows = [[name, f"{row['kept']:.2f}", f"{row['shown']:.2f}"] for name, row in edits.items()]
        parts += ["Prompt-to-Prompt:\n", report.markdown_table(["attends as the source", "kept", "shown"], rows)]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder of a pipeline; the bundled model if not given")
    parser.add_argument("--split", choices=PAIRS, default="test", help="which pairs of prompts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some of the figures")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    pipe = TextToImagePipeline.from_pretrained(options.model or bundled_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if options.split != "test":
        print(prompt_to_prompt(pipe, options.split, options.steps))
        return
    path = options.output / "edits.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("steps") != options.steps:
        found = {"steps": options.steps}
    for part in options.parts:  # each is stored as soon as it is there
        found |= {part: PARTS[part](pipe, options.steps), "environment": report.environment()}
        report.write_json(path, found)
        report.write_text(options.output / "edits.md", written(found))
    print(written(found))


PARTS: dict[str, Callable[[Any, int], Any]] = {
    BACK: lambda pipe, steps: there_and_back(pipe, PAIRS["test"][0][0], steps),
    NULL: null_text,
    EDITS: lambda pipe, steps: prompt_to_prompt(pipe, "test", steps),
}
"""By their names in edits.json"""


if __name__ == "__main__":
    main()
