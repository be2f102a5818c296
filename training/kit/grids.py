"""Pictures that show how a run is getting on."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers.utils import make_image_grid
from PIL import Image

from hubgen.errors import one_line
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from hubgen.training.kit.conditioned import ConditionedPictures
from hubgen.training.kit.groups import PromptValidation, Validation
from hubgen.training.kit.pictures import Pictures
from hubgen.training.kit.run import Run

Draw = Callable[[Sequence[int]], list[Image.Image]]


def draw_grid(run: Run, draw: Draw, count: int, step: int, columns: int | None = None) -> None:
    """A grid of `count` pictures as a PNG and to the tracker; the processes share the work.

    Args:
        run: The processes, and the folder.
        draw: The pictures of some numbers from 0 to `count` - 1; each has a seed of its own.
        count: Of pictures.
        step: Number of the step, for the file's name.
        columns: Of the grid; about a square if not given.

    Raises:
        RuntimeError: A process could not draw.
    """
    share = -(-count // run.world_size)
    numbers = [min(run.rank * share + index, count - 1) for index in range(share)]
    try:
        with run.accelerator.autocast(), torch.no_grad():
            found: list[Any] = list(zip(numbers, draw(numbers), strict=True))
    except Exception as error:
        if run.world_size == 1:
            raise
        found = [(None, one_line(error))]
    gathered = gather_object(found) if run.world_size > 1 else found
    failed = [message for number, message in gathered if number is None]
    if failed:  # said by all, because all wait for each other
        raise RuntimeError(f"drawing failed: {failed[0]}")
    if run.writer:
        pictures = dict(gathered)
        save_grid(run, [pictures[number] for number in range(count)], step, columns)


def draw_rows(run: Run, columns: Sequence[Draw], rows: Sequence[int], step: int) -> None:
    """A grid with a row for each of `rows`, and in it what each of `columns` draws of it; see `draw_grid`."""

    def draw(numbers: Sequence[int]) -> list[Image.Image]:
        found: dict[int, Image.Image] = {}
        for place, column in enumerate(columns):
            own = [number for number in dict.fromkeys(numbers) if number % len(columns) == place]
            if own:
                found |= zip(own, column([rows[number // len(columns)] for number in own]), strict=True)
        return [found[number] for number in numbers]

    if rows:
        draw_grid(run, draw, len(rows) * len(columns), step, len(columns))


def first_rows(pictures: Pictures, count: int) -> list[int]:
    """The first rows of a split whose pictures have one size, at most `count`."""
    sizes = pictures.views.buckets
    return [row for row in range(len(sizes)) if sizes[row] == sizes[0]][:count]


def draw_told(
    pictures: ConditionedPictures, validation: Validation, rows: Sequence[int], **more: Any
) -> list[Image.Image]:
    """What a model draws that is told what it is told about some rows, each on the seed of its row.

    Args:
        pictures: Of one size, with captions or classes.
        validation: The settings.
        rows: Which.
        **more: Arguments of the call.
    """
    height, width = pictures.pictures.views.buckets[rows[0]]
    size = {} if isinstance(pictures.pipe, ClassToImagePipeline) else {"height": height, "width": width}
    options = {"num_inference_steps": validation.inference_steps, "guidance_scale": validation.guidance_scale}
    return sample_seeds(pictures.pipe, rows, **{**pictures.words(rows), **size, **options, **more})


def draw_prompts(run: Run, pipeline: Any, validation: PromptValidation, side: int, step: int) -> None:
    """A grid of the validation prompts, if there are any, each on the seed of its number; see `draw_grid`.

    To a model of classes a prompt is the name or number of one.
    """

    def draw(numbers: Sequence[int]) -> list[Image.Image]:
        words = [validation.prompts[number] for number in numbers]
        of_classes = isinstance(pipeline, ClassToImagePipeline)
        labels = [int(word) if word.isdecimal() else word for word in words]
        return sample_seeds(
            pipeline,
            numbers,
            **({"class_labels": labels} if of_classes else {"prompt": words}),
            height=side,
            width=side,
            num_inference_steps=validation.inference_steps,
            guidance_scale=validation.guidance_scale,
        )

    if validation.prompts:
        draw_grid(run, draw, len(validation.prompts), step)


def save_grid(run: Run, pictures: Sequence[Image.Image], step: int, columns: int | None = None) -> None:
    """A grid as `validation/step-N.png` and to the tracker; about a square if `columns` does not say otherwise."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    empty = [Image.new("RGB", pictures[0].size, "white")] * (-len(pictures) % columns)
    shown = [picture.convert("RGB") for picture in [*pictures, *empty]]
    grid = make_image_grid(shown, rows=len(shown) // columns, cols=columns)
    folder = run.options.output_dir / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"step-{step:08d}.png")
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation": [grid]}, step=step)


def last_grid(run: Run) -> Path | None:
    """The newest of the files of `save_grid`; `None` where nothing was drawn."""
    return max((run.options.output_dir / "validation").glob("step-*.png"), default=None)


def cut_grid(grid: Path, count: int) -> list[Image.Image]:
    """The pictures of a file of `save_grid`, which were `count`, in about a square."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    with Image.open(grid) as opened:
        width, height = opened.width // columns, opened.height // rows
        places = [(number % columns * width, number // columns * height) for number in range(count)]
        return [opened.crop((left, top, left + width, top + height)) for left, top in places]


def sample_seeds(pipeline: Any, numbers: Sequence[int], **arguments: Any) -> list[Image.Image]:
    """Pictures of a pipeline, called without its progress bar, each of the seed of its number."""
    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        return pipeline(generator=[torch.Generator().manual_seed(number) for number in numbers], **arguments).images
    finally:
        pipeline.set_progress_bar_config(**bar)
