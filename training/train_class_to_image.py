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

import torch
from PIL import Image

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.data.encoded import LatentSource
from hubgen.data.order import Draw, generator_of
from hubgen.hub.card import CLASS_TO_IMAGE, TrainingRecord
from hubgen.training.kit import bases
from hubgen.training.kit.bases import ClassToImageBase
from hubgen.training.kit.grids import draw_grid, sample_seeds
from hubgen.training.kit.groups import CountValidation, LabelledData, Objective, Optim, Publish, RunOptions
from hubgen.training.kit.held_out import HeldOut
from hubgen.training.kit.labels import Labels, label_names
from hubgen.training.kit.objectives import objective_from, sampler_of
from hubgen.training.kit.parse import FREE, identity_of
from hubgen.training.kit.pictures import Pictures, open_pictures
from hubgen.training.kit.publishing import publish_pipeline, record_of
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

    # What training starts from, and what it is given
    start = bases.ClassToImageStart(s.base, s.data.size)
    columns = [] if s.data.label_column is None else [s.data.label_column]

    def opened(split: str, train: bool) -> Pictures:
        return open_pictures(
            s.data, split, s.run.seed, side=start.side, multiple=start.multiple, columns=columns, train=train
        )

    pictures = opened(s.data.split, train=True)
    others = None if s.validation.split is None else opened(s.validation.split, train=False)
    names = label_names(pictures, s.data.label_column)
    pipe = start.pipeline(s.objective, s.validation, pictures.side, names)
    space = pipe.latent_space
    labels = Labels(pictures, s.data, pipe)
    objective = objective_from(
        s.objective,
        pipe.scheduler if s.base.model else None,
        space.tokens((pictures.side, pictures.side)),
        learns_variance=bases.learns_variance(pipe.backbone),
    )
    pipe.register_modules(scheduler=sampler_of(s.objective, objective, pipe.scheduler))
    data = {"pictures": pictures.examples.fingerprint, "labels": labels.fingerprint}
    run.open({"settings": identity_of(s), "base": bases.digests(pipe), "data": data}, s.optim)

    # What the autoencoder says about it
    pipe.to(run.device)
    cache_dir = (s.data.cache_dir or s.run.output_dir / "cache") if s.data.cache else None
    latents = LatentSource(pipe.vae, pictures.examples, pictures.views, s.run.seed, cache_dir)
    latents.fill(run.rank, run.world_size, show_progress=run.writer)
    row = pictures.row(s.data, run.batch_size)

    def read(draws: Sequence[Draw]) -> dict[str, Any]:
        found = torch.tensor([labels.drawn(s.run.seed, draw) for draw in draws])
        return {"latents": latents.read(draws), "labels": found, "masks": pictures.masks(draws, space.factor)}

    # What is trained, and where it stands
    pipe.backbone.class_dropout = 0.0  # labels are dropped as they are drawn
    trained = run.trains("backbone", pipe.backbone.requires_grad_(True), s.optim)
    run.describe(len(row), *pictures.examples.left_out(), f"{len(names)} classes: {', '.join(names[:8])} ...")
    run.restore()
    held_out = None if others is None else measured_loss(run, s, others, objective, pipe, cache_dir)

    def validate(step: int) -> None:
        with trained.averaged() as backbone:
            if held_out is not None:
                run.report(step, held_out(backbone))
            if s.validation.samples:
                draw_grid(run, lambda numbers: drawn(pipe, s, len(names), numbers), s.validation.samples, step)

    batches = run.batches(row, read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if held_out else ""):
        for draws, batch in run.micro_batches(batches):
            x_0 = latents.latents(batch["latents"], draws, run.device)  # (B, C, h, w)
            sample = objective.draw(x_0, [generator_of(s.run.seed, draw.place) for draw in draws])
            condition = Condition(labels=batch["labels"].to(run.device))
            prediction = predict(trained.module, sample.x_t, objective.timestep(sample), condition)
            mask = None if batch["masks"] is None else batch["masks"].to(run.device)
            losses = objective.loss(prediction, sample, mask)  # (B,)
            trained.backward(losses.mean(), pictures.names(draws))
            run.window.note_losses(losses, sample.t)
        run.update(step)

    trained.settle()
    record = record_of(run, "hubgen.training.train_class_to_image", s, pictures, s.data.source, "held_out_loss")
    name = "transformer" if pipe.transformer is not None else "unet"
    records = {name: record, "vae": None if s.base.autoencoder is None else TrainingRecord.load(s.base.autoencoder)}
    publish_pipeline(run, pipe, records, CLASS_TO_IMAGE, s.publish, licence_of=Path(s.data.source))
    run.finish()


def measured_loss(
    run: Run, settings: Settings, pictures: Pictures, objective: Any, pipe: Any, cache_dir: Path | None
) -> HeldOut:
    """The loss on pictures that are not trained on, with their classes."""
    labels = Labels(pictures, settings.data, pipe)
    latents = LatentSource(pipe.vae, pictures.examples, pictures.views, seed=0, cache_dir=cache_dir)
    latents.fill(run.rank, run.world_size, show_progress=run.writer)

    def load(draws: Sequence[Draw]) -> tuple[torch.Tensor, Condition]:
        found = torch.tensor([labels.numbers[draw.row] for draw in draws], device=run.device)
        return latents.latents(latents.read(draws), draws, run.device), Condition(labels=found)

    return HeldOut(objective, pictures, load, settings.validation.pictures, run)


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
