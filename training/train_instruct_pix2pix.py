"""Teach a text-to-image pipeline to edit pictures by instructions: InstructPix2Pix (2211.09800), whatever the backbone.

    hubgen data edits data/fluent --out data/edits
    accelerate launch -m hubgen.training.train_instruct_pix2pix --config training/recipes/instruct-pix2pix-emoji.yaml \
        --data.source data/edits --run.output_dir runs/editor

    latents of the edited picture, t, noise -> x_t;  backbone([x_t, original], t, instruction) -> the base's own loss

The backbone gets further input channels for the original picture, which begin at zero, and learns as a whole.
Instruction, picture and both are left out now and then, for guidance towards each. Originals and edits are cropped and
mirrored alike. The same command goes on where it was stopped, bit for bit. At the end `output_dir/pipeline` holds the
averaged weights as a whole pipeline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image

from hubgen.hub.card import EDITOR
from hubgen.training.kit import bases
from hubgen.training.kit.adapters import backbone_name
from hubgen.training.kit.bases import AdaptedBase
from hubgen.training.kit.beside import Originals
from hubgen.training.kit.conditioned import PromptedPictures, losses_of
from hubgen.training.kit.controlled import Editing, made_editor
from hubgen.training.kit.grids import draw_rows, draw_told, first_rows
from hubgen.training.kit.groups import EditData, EditValidation, Objective, Optim, Publish, RunOptions
from hubgen.training.kit.held_out import HeldOut
from hubgen.training.kit.objectives import objective_from
from hubgen.training.kit.parse import FREE, identity_of
from hubgen.training.kit.publishing import check_push, publish_pipeline, record_of
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    base: AdaptedBase = AdaptedBase()
    data: EditData
    objective: Objective = Objective()
    optim: Optim = Optim(learning_rate=5e-5, lr_schedule="constant", lr_warmup_steps=0)
    run: RunOptions
    validation: Annotated[EditValidation, FREE] = EditValidation()
    publish: Annotated[Publish, FREE] = Publish(summary="An editor of pictures by instructions, trained with hubgen.")


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)
    check_push(s.publish)

    # What it starts from, and the edits
    pipe = bases.adapted_base(s.base)
    base = bases.digests(pipe)
    kind = made_editor(pipe)
    splits = [s.data.split, *([] if s.validation.split is None else [s.validation.split])]
    edits = [PromptedPictures(pipe, s.data, one, run, s.base.guidance_scale, one is splits[0]) for one in splits]
    for one in edits:
        one.beside = Originals(pipe, one.pictures, s.data.original_column, kind)
    objective = objective_from(s.objective, pipe.scheduler, edits[0].tokens)
    run.open({"settings": identity_of(s), "base": base, "data": edits[0].fingerprint}, s.optim)

    # What the frozen parts say about it
    pipe.to(run.device)
    for one in edits:
        one.encode((s.data.cache_dir or s.run.output_dir / "cache") if s.data.cache else None)

    # What is trained, and where it stands
    learner = Editing(pipe)
    trained = run.trains("backbone", learner.learns, s.optim, learner)
    row = edits[0].row()
    run.describe(len(row), *edits[0].notes())
    run.restore()
    measured = [HeldOut(objective, one.pictures, one.measured, s.validation.pictures, run) for one in edits[1:]]

    def validate(step: int) -> None:
        with trained.averaged():
            for held_out in measured:
                run.report(step, held_out(learner))
            draw_rows(run, columns_of(s, edits[-1]), first_rows(edits[-1].pictures, s.validation.samples), step)

    batches = run.batches(row, edits[0].read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if measured else ""):
        for draws, batch in run.micro_batches(batches):
            losses, t = losses_of(trained.module, objective, edits[0].shown(draws, batch))
            run.window.note_losses(losses, t)
            trained.backward(losses.mean(), edits[0].names(draws))
        run.update(step)

    trained.settle()
    name, seen = "hubgen.training.train_instruct_pix2pix", edits[0].pictures
    records = {backbone_name(pipe): record_of(run, name, s, seen, s.data.source, "held_out_loss")}
    publish_pipeline(run, pipe, records, EDITOR, s.publish, licence_of=Path(s.data.source))
    run.finish()


def columns_of(settings: Settings, edits: PromptedPictures) -> list[Callable[[Sequence[int]], list[Image.Image]]]:
    """Of a validation grid: the original; what the model makes of it, at each scale; and the edit as it should be."""

    def originals(rows: Sequence[int]) -> list[Image.Image]:
        return edits.pictures.plain(rows, settings.data.original_column)

    def drawn(rows: Sequence[int], scale: float) -> list[Image.Image]:
        return draw_told(edits, settings.validation, rows, image=originals(rows), image_guidance_scale=scale)

    scales: list[Any] = [lambda rows, scale=scale: drawn(rows, scale) for scale in settings.validation.scales]
    return [originals, *scales, edits.pictures.plain]


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
