"""Edits of pictures with their instructions, which models of InstructPix2Pix's kind (2211.09800) learn from.

    edited("upside_down", picture)                           "turn it upside down"
    write_edits(Path("data/fluent"), Path("data/edits"))     each picture before and after each edit
    write_pairs(pipe, triples, Path("data/pairs"))           two prompts by Prompt-to-Prompt, as the paper did

Both write a folder whose rows are `original_image`, `edit_prompt`, `edited_image`, as `datasets` finds them.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from hubgen.data.colours import HUES, dominant_hue, recoloured
from hubgen.data.derived import begin, copy_licences, splits_of, write_table
from hubgen.data.errors import DataError
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.order import seed_of
from hubgen.formats.atomic import written

ORIGINAL, PROMPT, EDITED = "original_image", "edit_prompt", "edited_image"
"""The columns"""
LEAST_CONCENTRATION, LEAST_SHARE = 0.8, 0.3
"""Of the hue of a picture that is recoloured, as for emoji"""


def grey(picture: Image.Image) -> Image.Image:
    """Without its colours."""
    return picture.convert("L").convert("RGB")


def swapped(picture: Image.Image) -> Image.Image:
    """With what is red in blue, and what is blue in red."""
    red, green, blue = picture.split()
    return Image.merge("RGB", (blue, green, red))


def in_colour(picture: Image.Image, colour: str) -> Image.Image | None:
    """With its prevailing hue turned to a named colour; `None` where no one hue prevails."""
    pixels = np.asarray(picture)
    hue = dominant_hue(pixels)
    if hue.concentration < LEAST_CONCENTRATION or hue.share < LEAST_SHARE:
        return None
    return Image.fromarray(recoloured(pixels, hue, colour))


EDITS: Mapping[str, tuple[str, Callable[[Image.Image], Image.Image | None]]] = {
    "mirror": ("flip it left to right", ImageOps.mirror),
    "upside_down": ("turn it upside down", ImageOps.flip),
    "grey": ("make it black and white", grey),
    "swap_red_and_blue": ("swap red and blue", swapped),
    **{colour: (f"make it {colour}", lambda picture, colour=colour: in_colour(picture, colour)) for colour in HUES},
}
"""By name: the instruction, and what it does to an RGB picture; `None` where it means nothing"""
USUAL = ("mirror", "upside_down", "grey", "swap_red_and_blue")


def edited(name: str, picture: Image.Image) -> Image.Image | None:
    """An RGB picture after an edit, of the same size; `None` where the edit means nothing, or changes nothing.

    Raises:
        ValueError: There is no such edit.
    """
    check_edits([name])
    found = EDITS[name][1](picture)
    return None if found is None or not np.any(np.asarray(found) != np.asarray(picture)) else found


def check_edits(names: Sequence[str]) -> None:
    """Raises ValueError unless there are some, all of them known, none twice."""
    unknown = [name for name in names if name not in EDITS]
    if unknown or not names or len(set(names)) < len(names):
        found = repr(unknown[0]) if unknown else list(names)
        raise ValueError(f"`edits`: got {found}, expected some of {', '.join(EDITS)}, each once.")


def write_edits(source: Path, out: Path, edits: Sequence[str] = USUAL) -> int:
    """Writes the pictures of an image-text folder before and after edits, all its splits; each table comes last.

    A picture that an edit does not change, or that has no one hue to be turned, is left out of that edit.

    Args:
        source: The folder; its pictures keep their names, and the captions the column `original_prompt`.
        out: A folder that there is not yet, or what an interrupted run has left of it.
        edits: Names of `EDITS`.

    Returns:
        The number of rows.

    Raises:
        ValueError: No such edit.
        DataError: `source` is no such folder, or `out` holds something else.
    """
    check_edits(edits)
    folders = splits_of(source)
    begin(out, {"edits": {name: EDITS[name][0] for name in edits}}, "edits.json")
    copy_licences(source, out)
    return sum(_write_split(folder, edits, out / split) for split, folder in folders.items())


def _write_split(folder: ImageTextFolder, edits: Sequence[str], out: Path) -> int:
    rows = []
    for row, name in enumerate(tqdm(folder.file_names, desc=f"edits of {folder.folder.name}", leave=False)):
        original, picture = f"original/{name}", folder.picture(row)
        for edit in edits:
            after = edited(edit, picture)
            if after is None:
                continue
            file = f"edited/{edit}/{Path(name).with_suffix('.png').as_posix()}"
            _save(after, out / file)
            rows.append(_row(original, EDITS[edit][0], file, original_prompt=folder.captions[row][0], edit=edit))
        (out / original).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.folder / name, out / original)
    if not rows:
        raise DataError(f"{folder.folder}: {', '.join(edits)} change none of its pictures, expected some")
    write_table(out, rows)
    return len(rows)


def _row(original: str, instruction: str, after: str, **more: Any) -> dict[str, Any]:
    """A row as `datasets`' imagefolder reads it."""
    return {f"{ORIGINAL}_file_name": original, PROMPT: instruction, f"{EDITED}_file_name": after, **more}


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path, durable=False) as temporary:
        picture.save(temporary, "PNG")


# ---- pairs that a model draws ----


@dataclass(frozen=True)
class Triple:
    """Two prompts and what leads from one to the other, as InstructPix2Pix's language model wrote them."""

    input: str
    edit: str
    output: str


@dataclass(frozen=True)
class Drawing:
    """How a model draws pairs (2211.09800, section 3.1.2)."""

    seeds: int = 4
    """Pairs that are drawn of each triple"""
    kept: int = 1
    """Of which the best are kept, at most"""
    self_steps: tuple[float, float] = (0.1, 0.9)
    """Least and largest share of the steps in which pixels attend as in the first picture, drawn for each pair: how
    alike the two are to be differs from edit to edit"""
    steps: int | None = None
    """Denoising steps; the pipeline's own if not given"""
    guidance_scale: float | None = None
    seed: int = 0


Score = Callable[[Image.Image, Image.Image, Triple], float | None]
"""How good a pair is, of its pictures before and after; `None` for one that must not be kept"""


def read_triples(path: Path) -> list[Triple]:
    """The triples of a file with a JSON object of input, edit and output in each line.

    Raises:
        DataError: It is none.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable ({error}), expected lines of JSON") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = [row[name].strip() for name in ("input", "edit", "output")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} row {number}: got {line[:80]!r}, expected an object of the texts input, edit and output"
            ) from error
        if not all(values):
            raise DataError(f"{path} row {number}: got an empty text, expected words in input, edit and output")
        found.append(Triple(*values))
    if not found:
        raise DataError(f"{path}: got no rows, expected one for each edit")
    return found


def write_pairs(
    pipe: Any,
    triples: Sequence[Triple],
    out: Path,
    drawing: Drawing = Drawing(),
    score: Score | None = None,
    model: str = "",
) -> int:
    """Writes pictures that a model draws of both prompts of each triple, the second as an edit of the first.

    Pairs that are there already are not drawn again. Without a score the first ones are kept.

    Args:
        pipe: A `TextToImagePipeline`.
        triples: The prompts and instructions.
        out: A folder that there is not yet, or what an interrupted run has left of it.
        drawing: How.
        score: Of a pair.
        model: Name of the pipeline, so that a folder is not finished by another.

    Returns:
        The number of rows.

    Raises:
        DataError: `out` holds something else, or no pair is good enough.
    """
    begin(out, {"pairs": asdict(drawing), "model": model, "triples": [asdict(one) for one in triples]}, "pairs.json")
    rows = []
    for number, triple in enumerate(tqdm(triples, desc="pairs")):
        found = []
        for place in range(drawing.seeds if score else min(drawing.kept, drawing.seeds)):
            files = [f"{kind}/{number:06}-{place}.png" for kind in ("original", "edited")]
            if not all((out / file).is_file() for file in files):
                for file, picture in zip(files, draw_pair(pipe, triple, drawing, number, place), strict=True):
                    _save(picture, out / file)
            with Image.open(out / files[0]) as before, Image.open(out / files[1]) as after:
                value = 0.0 if score is None else score(before.convert("RGB"), after.convert("RGB"), triple)
            if value is not None:
                found.append((-value, place, files))
        for value, _, files in sorted(found)[: drawing.kept]:
            more = {"original_prompt": triple.input, "edited_prompt": triple.output}
            rows.append(_row(files[0], triple.edit, files[1], **more, **({} if score is None else {"score": -value})))
    if not rows:
        raise DataError(f"{out}: none of the pairs of {len(triples)} triples is good enough, expected some")
    write_table(out, rows)
    return len(rows)


def draw_pair(pipe: Any, triple: Triple, drawing: Drawing, number: int, place: int) -> list[Image.Image]:
    """The pictures of both prompts, from the same noise, by Prompt-to-Prompt (2208.01626).

    Args:
        pipe: A `TextToImagePipeline`.
        triple: The prompts.
        drawing: How.
        number: Of the triple.
        place: Of the pair among those of the triple.
    """
    from hubgen.controls.prompt_to_prompt import PromptToPrompt

    seed = seed_of(drawing.seed, number * drawing.seeds + place, "pair")
    least, most = drawing.self_steps
    share = least + (most - least) * torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    options: dict[str, Any] = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance_scale}
    given = {name: value for name, value in options.items() if value is not None}
    edit = PromptToPrompt("refine", self_steps=share)
    return list(pipe([triple.input, triple.output], controls=[edit], generator=generators, **given).images)


class DirectionalSimilarity:
    """CLIP's score of a pair, with the paper's bounds: whether pictures differ as their prompts do (2108.00946).

    Args:
        model: A CLIP of transformers, both halves.
        tokenizer: Its.
        processor: Its image processor.
        least_alike: Least cosine of the two pictures.
        least_true: Least cosine of each picture and its prompt.
        least: Least cosine of the change of the pictures and that of the prompts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        processor: Any,
        least_alike: float = 0.75,
        least_true: float = 0.2,
        least: float = 0.2,
    ) -> None:
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.least_alike, self.least_true, self.least = least_alike, least_true, least

    @classmethod
    def from_pretrained(cls, name: str, **bounds: float) -> "DirectionalSimilarity":
        """Of a folder or repository with a CLIP."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        model = CLIPModel.from_pretrained(name, use_safetensors=True)
        return cls(model, AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name), **bounds)

    @torch.no_grad()
    def __call__(self, before: Image.Image, after: Image.Image, triple: Triple) -> float | None:
        pixels = self.processor([before, after], return_tensors="pt").to(self.model.device)
        words = self.tokenizer([triple.input, triple.output], return_tensors="pt", padding=True, truncation=True)
        out = self.model(**words.to(self.model.device), **pixels)
        images, texts = (torch.nn.functional.normalize(one, dim=-1) for one in (out.image_embeds, out.text_embeds))
        alike = (images[0] @ images[1]).item()
        true = min((image @ text).item() for image, text in zip(images, texts, strict=True))
        change = torch.nn.functional.cosine_similarity(images[1] - images[0], texts[1] - texts[0], dim=0).item()
        good = alike >= self.least_alike and true >= self.least_true and change >= self.least
        return change if good else None
