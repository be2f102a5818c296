"""Train a model of pixels without a condition: DDPM (2006.11239), NCSN++ (2011.13456), NCSN (1907.05600).

    accelerate launch -m hubgen.training.train_unconditional --config training/recipes/unconditional-ddpm-emoji.yaml \
        --data.source emoji/fluent --run.output_dir runs/emoji-ddpm

    pixels, t, noise -> x_t and target -> U-Net(x_t, t) -> weighted squared error

The same command goes on where it was stopped. At the end `output_dir/pipeline` holds the averaged weights as a whole
pipeline: `UnconditionalPipeline.from_pretrained` loads it, and diffusers' pipelines for DDPM and NCSN++.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.data.order import Draw, generator_of
from hubgen.hub.card import UNCONDITIONAL
from hubgen.training.kit import bases
from hubgen.training.kit.grids import draw_grid, sample_seeds
from hubgen.training.kit.groups import CountValidation, Data, Objective, Optim, Publish, RunOptions
from hubgen.training.kit.held_out import HeldOut
from hubgen.training.kit.objectives import objective_from, sampler_of
from hubgen.training.kit.parse import FREE, SettingsError, identity_of
from hubgen.training.kit.pictures import Pictures, open_pictures
from hubgen.training.kit.publishing import check_push, publish_pipeline, record_of
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    base: bases.Base = bases.Base()
    data: Data
    objective: Objective = Objective(path="ddpm", beta_schedule="linear")
    optim: Optim = Optim()
    run: RunOptions
    validation: Annotated[CountValidation, FREE] = CountValidation(inference_steps=50)
    publish: Annotated[Publish, FREE] = Publish(
        dtype="float32", summary="A pipeline for pictures, trained with hubgen."
    )


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)
    check_push(s.publish)
    pipe = bases.unconditional(s.base, s.validation, s.data.size)
    side = pipe.size[0]

    def opened(split: str, train: bool) -> Pictures:
        return open_pictures(s.data, split, s.run.seed, side=side, multiple=bases.halved(pipe.unet), train=train)

    pictures = opened(s.data.split, train=True)
    others = None if s.validation.split is None else opened(s.validation.split, train=False)
    objective = objective_from(
        s.objective, pipe.scheduler if s.base.model else None, learns_variance=bases.learns_variance(pipe.unet)
    )
    pipe.register_modules(scheduler=sampler_of(s.objective, objective, pipe.scheduler))
    try:
        pipe.scheduler.set_timesteps(s.validation.inference_steps)
    except ValueError as error:
        raise SettingsError(f"setting 'validation.inference_steps': {error}") from error
    data = pictures.examples.fingerprint
    run.open({"settings": identity_of(s), "base": bases.digests(pipe), "data": data}, s.optim)

    def ranged(pixels: torch.Tensor) -> torch.Tensor:
        """Pixels as the network has them: in [-1, 1], or in [0, 1] where it learns scores."""
        return (pixels + 1) / 2 if pipe.learned_on_unit_range else pixels

    def load(draws: Sequence[Draw]) -> tuple[torch.Tensor, Condition]:
        assert others is not None
        return ranged(others.pixels(draws)).to(run.device), Condition()

    pipe.to(run.device)
    trained = run.trains("backbone", pipe.unet.requires_grad_(True), s.optim)
    row = pictures.row(s.data, run.batch_size)
    run.describe(len(row), *pictures.examples.left_out())
    run.restore()
    held_out = None if others is None else HeldOut(objective, others, load, s.validation.pictures, run)

    def validate(step: int) -> None:
        with trained.averaged() as backbone:
            if held_out is not None:
                run.report(step, held_out(backbone))
            if s.validation.samples:
                draw_grid(run, lambda numbers: drawn(pipe, s, numbers), s.validation.samples, step)

    def read(draws: Sequence[Draw]) -> dict[str, Any]:
        return {"pixels": ranged(pictures.pixels(draws)), "masks": pictures.masks(draws, 1)}

    batches = run.batches(row, read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if held_out else ""):
        for draws, batch in run.micro_batches(batches):
            x_0 = batch["pixels"].to(run.device)  # (B, 3, H, W)
            sample = objective.draw(x_0, [generator_of(s.run.seed, draw.place) for draw in draws])
            prediction = predict(trained.module, sample.x_t, objective.timestep(sample), Condition())
            mask = None if batch["masks"] is None else batch["masks"].to(run.device)
            losses = objective.loss(prediction, sample, mask)  # (B,)
            trained.backward(losses.mean(), pictures.names(draws))
            run.window.note_losses(losses, sample.t)
        run.update(step)

    trained.settle()
    record = record_of(run, "hubgen.training.train_unconditional", s, pictures, s.data.source, "held_out_loss")
    publish_pipeline(run, pipe, {"unet": record}, UNCONDITIONAL, s.publish, licence_of=Path(s.data.source))
    run.finish()


def drawn(pipe: Any, settings: Settings, numbers: Sequence[int]) -> list[Image.Image]:
    """Pictures of some numbers, each on the seed of its number."""
    steps = settings.validation.inference_steps
    return sample_seeds(pipe, numbers, batch_size=len(numbers), num_inference_steps=steps)


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
