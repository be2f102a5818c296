"""Train a text-to-image model on pictures with captions: from scratch, or from any pipeline that hubgen loads.

    accelerate launch -m hubgen.training.train_text_to_image --config training/recipes/text-to-image-emoji.yaml \
        --data.source emoji/fluent --base.autoencoder runs/autoencoder/autoencoder --run.output_dir runs/emoji

    latents, caption, t, noise -> x_t and target -> backbone(x_t, t, caption) -> weighted squared error

U-Nets (2112.10752), SDXL (2307.01952), MM-DiTs (2403.03206) and FLUX learn any path: what the base's scheduler says
unless the settings name another. Latents and text embeddings are computed once and kept. The same command goes on where
it was stopped, bit for bit. At the end `output_dir/pipeline` holds the averaged weights as a whole pipeline:
`TextToImagePipeline.from_pretrained` loads it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.data.encoded import LatentSource, TextSource
from hubgen.data.order import Draw, generator_of
from hubgen.hub.card import TEXT_TO_IMAGE, TrainingRecord
from hubgen.training.kit import bases
from hubgen.training.kit.bases import TextToImageBase
from hubgen.training.kit.grids import draw_grid, sample_seeds
from hubgen.training.kit.groups import CaptionedData, Objective, Optim, PromptValidation, Publish, RunOptions
from hubgen.training.kit.held_out import HeldOut
from hubgen.training.kit.objectives import objective_from, sampler_of
from hubgen.training.kit.parse import FREE, SettingsError, identity_of
from hubgen.training.kit.pictures import Pictures, captions_of, open_pictures
from hubgen.training.kit.publishing import publish_pipeline, record_of
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    base: TextToImageBase = TextToImageBase()
    data: CaptionedData
    objective: Objective = Objective()
    optim: Optim = Optim()
    run: RunOptions
    validation: Annotated[PromptValidation, FREE] = PromptValidation()
    publish: Annotated[Publish, FREE] = Publish(summary="A text-to-image pipeline trained with hubgen.")


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)

    # What training starts from, and what it is given
    pipe = bases.text_to_image(s.base, s.validation, s.data.size)
    if pipe.config.requires_aesthetics_score:
        raise SettingsError(
            "setting 'base.model': got a refiner, which is told a score of each picture; expected another."
        )
    space, family = pipe.latent_space, pipe.family

    def opened(split: str, train: bool) -> Pictures:
        sizes = {"side": space.default_size[0], "multiple": space.multiple}
        return open_pictures(s.data, split, s.run.seed, **sizes, caption_column=s.data.caption_column, train=train)

    pictures = opened(s.data.split, train=True)
    others = None if s.validation.split is None else opened(s.validation.split, train=False)
    tokens = space.tokens((pictures.side, pictures.side))
    objective = objective_from(s.objective, pipe.scheduler if s.base.model else None, tokens)
    scheduler = sampler_of(s.objective, objective, pipe.scheduler)
    data = pictures.examples.fingerprint
    run.open({"settings": identity_of(s), "base": bases.digests(pipe), "data": data}, s.optim)

    # What the frozen parts say about it
    pipe.register_modules(scheduler=scheduler)
    pipe.to(run.device)
    cache_dir = (s.data.cache_dir or s.run.output_dir / "cache") if s.data.cache else None
    captions = captions_of(pictures, s.data)
    texts = TextSource(pipe.condition, [*captions.all(), *first_captions(others, s)], cache_dir)
    latents = LatentSource(pipe.vae, pictures.examples, pictures.views, s.run.seed, cache_dir)
    for source in (texts, latents):
        source.fill(run.rank, run.world_size, show_progress=run.writer)
    row = pictures.row(s.data, run.batch_size)

    def read(draws: Sequence[Draw]) -> dict[str, Any]:
        return {
            "latents": latents.read(draws),
            "captions": [captions.drawn(s.run.seed, draw.place, draw.row) for draw in draws],
            "micro": pictures.micro(draws) if "micro" in family.takes else None,
            "masks": pictures.masks(draws, space.factor),
        }

    def condition_of(wordings: Sequence[str], micro: torch.Tensor | None) -> Condition:
        condition = Condition.of_text(texts(wordings, run.device))
        if micro is not None:
            condition = replace(condition, micro=micro.to(run.device))
        return replace(condition, guidance_scale=s.base.guidance_scale) if family.distilled else condition

    # What is trained, and where it stands
    trained = run.trains("backbone", pipe.backbone.requires_grad_(True), s.optim)
    run.describe(len(row), *pictures.examples.left_out(), *long_captions(texts))
    run.restore()
    held_out = None if others is None else measured_loss(run, s, others, objective, pipe, condition_of, cache_dir)

    def validate(step: int) -> None:
        with trained.averaged() as backbone:
            if held_out is not None:
                run.report(step, held_out(backbone))
            if s.validation.prompts:
                draw_grid(run, lambda numbers: drawn(pipe, s, pictures.side, numbers), len(s.validation.prompts), step)

    batches = run.batches(row, read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if held_out else ""):
        for draws, batch in run.micro_batches(batches):
            x_0 = latents.latents(batch["latents"], draws, run.device)  # (B, C, h, w)
            condition = condition_of(batch["captions"], batch["micro"])
            sample = objective.draw(x_0, [generator_of(s.run.seed, draw.place) for draw in draws])
            prediction = predict(trained.module, sample.x_t, objective.timestep(sample), condition)
            mask = None if batch["masks"] is None else batch["masks"].to(run.device)
            losses = objective.loss(prediction, sample, mask)  # (B,)
            trained.backward(losses.mean(), pictures.names(draws))
            run.window.note_losses(losses, sample.t)
        run.update(step)

    trained.settle()
    record = record_of(run, "hubgen.training.train_text_to_image", s, pictures, s.data.source, "held_out_loss")
    name = "transformer" if pipe.transformer is not None else "unet"
    records = {name: record, "vae": None if s.base.autoencoder is None else TrainingRecord.load(s.base.autoencoder)}
    publish_pipeline(run, pipe, records, TEXT_TO_IMAGE, s.publish, licence_of=Path(s.data.source))
    run.finish()


def first_captions(pictures: Pictures | None, settings: Settings) -> list[str]:
    """The captions that a validation split is measured with."""
    if pictures is None:
        return []
    captions = captions_of(pictures, settings.data)
    return [captions.first(row) for row in range(min(len(pictures), settings.validation.pictures))]


def long_captions(texts: TextSource) -> list[str]:
    """What to say about captions of which a part is not read."""
    found = texts.too_long()
    what = f"{len(found)} of {len(texts.captions)} captions are longer than the text encoder reads; the first:"
    return [f"{what} {found[0]}"] if found else []


def measured_loss(
    run: Run,
    settings: Settings,
    pictures: Pictures,
    objective: Any,
    pipe: Any,
    condition_of: Callable[[Sequence[str], torch.Tensor | None], Condition],
    cache_dir: Path | None,
) -> HeldOut:
    """The loss on pictures that are not trained on, with their first captions."""
    wordings, micro = first_captions(pictures, settings), "micro" in pipe.family.takes
    latents = LatentSource(pipe.vae, pictures.examples, pictures.views, seed=0, cache_dir=cache_dir)
    latents.fill(run.rank, run.world_size, show_progress=run.writer)

    def load(draws: Sequence[Draw]) -> tuple[torch.Tensor, Condition]:
        x_0 = latents.latents(latents.read(draws), draws, run.device)
        return x_0, condition_of([wordings[draw.row] for draw in draws], pictures.micro(draws) if micro else None)

    return HeldOut(objective, pictures, load, settings.validation.pictures, run)


def drawn(pipe: Any, settings: Settings, side: int, numbers: Sequence[int]) -> list[Image.Image]:
    """Pictures of the validation prompts of some numbers, each on the seed of its number."""
    options = settings.validation
    return sample_seeds(
        pipe,
        numbers,
        prompt=[options.prompts[number] for number in numbers],
        height=side,
        width=side,
        num_inference_steps=options.inference_steps,
        guidance_scale=options.guidance_scale,
    )


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
