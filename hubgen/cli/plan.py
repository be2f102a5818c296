"""What `hubgen train` is about to do, in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hubgen.cli.inspect import size_text
from hubgen.hub.finding import BUNDLED
from hubgen.training.kit.usual import Material, control_of, disk_needed, what_learns


def plan(settings: Any, known: Collection[str], material: Material) -> dict[str, str]:
    """What will happen, by topic.

    Args:
        settings: All of them.
        known: Names of those that were given.
        material: Of the run.

    Raises:
        ValueError: No layer is meant to learn, or the disk is too small.
    """
    from hubgen.acceleration.device import fastest_device

    run, pictures = settings.run, material.pictures(settings.data.repeats)
    a_step = run.batch_size * run.gradient_accumulation_steps
    uses = run.max_train_steps * a_step / max(pictures, 1)
    learns, numbers = what_learns(settings, material.pipe)
    needed, free = disk_needed(settings, material, numbers), shutil.disk_usage(run.output_dir).free
    if needed > free:
        raise ValueError(f"--out {run.output_dir}: {size_text(free)} are free there, expected {size_text(needed)}")

    def says(name: str, text: str) -> str:
        return f"{text} ({'given' if name in known else 'chosen'})"

    side = material.side(settings.data.size)
    lines = {
        "base": f"{'the bundled model' if material.base == BUNDLED else material.base}: "
        f"{type(material.pipe.backbone).__name__}, {material.parameters:,} numbers in {settings.base.frozen_dtype}, "
        f"on {fastest_device()}",
        "learns": learns,
        "pictures": told_pictures(material, pictures, side),
        "captions": told_captions(settings, material.captioned),
        "batch": says("run.batch_size", f"{a_step} {'picture' if a_step == 1 else 'pictures'} a step"),
        "steps": says("run.max_train_steps", f"{run.max_train_steps}, each picture about {uses:.0f} times"),
        **size_of(settings, numbers, says),
        "rate": says("optim.learning_rate", f"{settings.optim.learning_rate:g}"),
        "samples": told_samples(settings.validation, settings.data),
        "folder": f"{run.output_dir}, about {size_text(needed)} of the {size_text(free)} that are free",
    }
    if settings.publish.push_to_hub is not None:
        lines["push"] = f"to {settings.publish.push_to_hub}, at the end"
    return lines


def size_of(settings: Any, numbers: int, says: Callable[[str, str], str]) -> dict[str, str]:
    """How much learns."""
    if control_of(settings) is None:
        return {"rank": says("adapter.rank", f"{settings.adapter.rank}: {numbers:,} numbers")}
    return {"size": f"{numbers:,} numbers", **told_beside(settings, says)}


def told_beside(settings: Any, says: Callable[[str, str], str]) -> dict[str, str]:
    """What is shown beside the pictures."""
    data = settings.data
    if hasattr(settings, "network"):
        made = f"{data.hint}, made of each picture" if data.hint else f"column {data.hint_column}"
        return {"hints": made}
    if hasattr(settings, "adapter"):
        return {"seen by": says("adapter.image_encoder", settings.adapter.image_encoder or "the base's image encoder")}
    return {"edits": f"from column {data.original_column} to {data.edited_column}"}


def told_pictures(material: Material, pictures: int, side: int) -> str:
    """How many pictures there are, and what is done to them."""
    count, small = len(material.examples), material.smaller(side)
    repeated = f", {pictures} an epoch" if pictures != count else ""
    enlarged = f"; {small} smaller ones are enlarged" if small else ""
    return f"{count}{repeated}, brought to {side}x{side} pixels{enlarged}"


def told_captions(settings: Any, captioned: bool) -> str:
    """What the pictures are told by."""
    if captioned:
        return "their own" + (f", behind {settings.data.caption_prefix!r}" if settings.data.caption_prefix else "")
    prior = settings.prior
    beside = f"; beside them {prior.pictures} of {prior.prompt!r}, drawn by the base" if prior.weight else ""
    return f"{settings.instance.prompt!r} for all of them{beside}"


def told_samples(validation: Any, data: Any) -> str:
    """What is drawn along the way."""
    if not hasattr(validation, "prompts"):
        split = validation.split or data.split
        return f"{validation.samples} pictures of {split}: before, every {validation.steps} steps and after"
    if not validation.prompts:
        return "none"
    prompts = ", ".join(f'"{prompt}"' for prompt in validation.prompts)
    return f"{prompts}: before, every {validation.steps} steps and after"


def column(lines: Mapping[str, str]) -> Sequence[str]:
    """The plan, a line each."""
    width = max(map(len, lines)) + 2
    return [f"{name:{width}}{text}" for name, text in lines.items()]
