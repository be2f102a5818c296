"""Train a class-conditional model on the latents of pictures: DiT (2212.09748), or a U-Net with class labels.

    accelerate launch -m hubgen.training.train_class_to_image --config training/recipes/class-to-image-emoji.yaml \
        --data.source emoji/fluent --base.autoencoder runs/autoencoder/autoencoder --run.output_dir runs/emoji-dit

    latents, class, t, noise -> x_t and target -> backbone(x_t, t, class) -> squared error + variational bound

A DiT on the path ddpm learns the variance of each step too, by the variational bound. The same command goes on where it
was stopped. At the end `output_dir/pipeline` holds the averaged weights as a whole pipeline:
`ClassToImagePipeline.from_pretrained` loads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image

from hubgen.hub.card import CLASS_TO_IMAGE
from hubgen.hub.records import TrainingRecord
from hubgen.training.kit import bases
from hubgen.training.kit.bases import ClassToImageBase
from hubgen.training.kit.conditioned import LabelledPictures, labelled_pictures, losses_of
from hubgen.training.kit.grids import draw_grid, sample_seeds
from hubgen.training.kit.groups import CountValidation, LabelledData, Objective, Optim, Publish, RunOptions
from hubgen.training.kit.held_out import HeldOut
from hubgen.training.kit.labels import label_names
from hubgen.training.kit.objectives import objective_from, sampler_of
from hubgen.training.kit.parse import FREE, identity_of
from hubgen.training.kit.publishing import check_push, publish_pipeline, record_of
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    base: ClassToImageBase = ClassToImageBase()
    data: LabelledData
    objective: Objective = Objective()
    optim: Optim = Optim()
    run: RunOptions
    validation: Annotated[CountValidation, FREE] = CountValidation()
    publish: Annotated[Publish, FREE] = Publish(summary="A class-to-image pipeline trained with hubgen.")


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)
    check_push(s.publish)

    # What training starts from, and what it is given
    start = bases.ClassToImageStart(s.base, s.data.size)
    splits = [s.data.split] if s.validation.split is None else [s.data.split, s.validation.split]
    found = [
        labelled_pictures(s.data, split, run, start.side, start.multiple, train=number == 0)
        for number, split in enumerate(splits)
    ]
    names = label_names(found[0], s.data.label_column)
    pipe = start.pipeline(s.objective, s.validation, found[0].side, names)
    pictures, *others = [
        LabelledPictures(pipe, one, s.data, run, train=number == 0) for number, one in enumerate(found)
    ]
    variance = bases.learns_variance(pipe.backbone)
    objective = objective_from(s.objective, pipe.scheduler if s.base.model else None, pictures.tokens, variance)
    pipe.register_modules(scheduler=sampler_of(s.objective, objective, pipe.scheduler))
    run.open({"settings": identity_of(s), "base": bases.digests(pipe), "data": pictures.fingerprint}, s.optim)

    # What the autoencoder says about it
    pipe.to(run.device)
    cache_dir = (s.data.cache_dir or s.run.output_dir / "cache") if s.data.cache else None
    for one in (pictures, *others):
        one.encode(cache_dir)

    # What is trained, and where it stands
    pipe.backbone.class_dropout = 0.0  # labels are dropped as they are drawn
    trained = run.trains("backbone", pipe.backbone.requires_grad_(True), s.optim)
    row = pictures.row()
    run.describe(len(row), *pictures.notes(), f"{len(names)} classes: {', '.join(names[:8])} ...")
    run.restore()
    measured = [HeldOut(objective, one.pictures, one.measured, s.validation.pictures, run) for one in others]

    def validate(step: int) -> None:
        with trained.averaged() as backbone:
            for held_out in measured:
                run.report(step, held_out(backbone))
            if s.validation.samples:
                draw_grid(run, lambda numbers: drawn(pipe, s, len(names), numbers), s.validation.samples, step)

    batches = run.batches(row, pictures.read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if measured else ""):
        for draws, batch in run.micro_batches(batches):
            losses, t = losses_of(trained.module, objective, pictures.shown(draws, batch))
            trained.backward(losses.mean(), pictures.names(draws))
            run.window.note_losses(losses, t)
        run.update(step)

    trained.settle()
    record = record_of(run, "hubgen.training.train_class_to_image", s, found[0], s.data.source, "held_out_loss")
    name = "transformer" if pipe.transformer is not None else "unet"
    records = {name: record, "vae": None if s.base.autoencoder is None else TrainingRecord.load(s.base.autoencoder)}
    publish_pipeline(run, pipe, records, CLASS_TO_IMAGE, s.publish, licence_of=Path(s.data.source))
    run.finish()


def drawn(pipe: Any, settings: Settings, classes: int, numbers: Sequence[int]) -> list[Image.Image]:
    """Pictures of some numbers, of the classes in turn, each on the seed of its number."""
    return sample_seeds(
        pipe,
        numbers,
        class_labels=[number % classes for number in numbers],
        num_inference_steps=settings.validation.inference_steps,
        guidance_scale=settings.validation.guidance_scale,
    )


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
