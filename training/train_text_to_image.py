"""Train a text-to-image model on pictures with captions: from scratch, or from any pipeline that hubgen loads.

    accelerate launch -m hubgen.training.train_text_to_image --config training/recipes/text-to-image-emoji.yaml \
        --data.source emoji/fluent --base.autoencoder runs/autoencoder/autoencoder --run.output_dir runs/emoji

    latents, caption, t, noise -> x_t and target -> backbone(x_t, t, caption) -> weighted squared error

U-Nets (2112.10752), SDXL (2307.01952), MM-DiTs (2403.03206) and FLUX learn any path: what the base's scheduler says
unless the settings name another. Latents and text embeddings are computed once and kept. The same command goes on where
it was stopped, bit for bit. At the end `output_dir/pipeline` holds the averaged weights as a whole pipeline:
`TextToImagePipeline.from_pretrained` loads it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hubgen.hub.card import TEXT_TO_IMAGE
from hubgen.hub.records import TrainingRecord
from hubgen.training.kit import bases
from hubgen.training.kit.bases import TextToImageBase
from hubgen.training.kit.conditioned import PromptedPictures, losses_of
from hubgen.training.kit.grids import draw_prompts
from hubgen.training.kit.groups import CaptionedData, Objective, Optim, PromptValidation, Publish, RunOptions
from hubgen.training.kit.held_out import HeldOut
from hubgen.training.kit.objectives import objective_from, sampler_of
from hubgen.training.kit.parse import FREE, SettingsError, identity_of
from hubgen.training.kit.publishing import check_push, publish_pipeline, record_of
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
    check_push(s.publish)

    # What training starts from, and what it is given
    pipe = bases.text_to_image(s.base, s.validation, s.data.size)
    if pipe.config.requires_aesthetics_score:
        raise SettingsError(
            "setting 'base.model': got a refiner, which is told a score of each picture; expected another."
        )
    pictures = PromptedPictures(pipe, s.data, s.data.split, run, s.base.guidance_scale)
    others = None
    if s.validation.split is not None:
        others = PromptedPictures(pipe, s.data, s.validation.split, run, s.base.guidance_scale, train=False)
    objective = objective_from(s.objective, pipe.scheduler if s.base.model else None, pictures.tokens)
    scheduler = sampler_of(s.objective, objective, pipe.scheduler)
    run.open({"settings": identity_of(s), "base": bases.digests(pipe), "data": pictures.fingerprint}, s.optim)

    # What the frozen parts say about it
    pipe.register_modules(scheduler=scheduler)
    pipe.to(run.device)
    cache_dir = (s.data.cache_dir or s.run.output_dir / "cache") if s.data.cache else None
    for one in (pictures, others):
        if one is not None:
            one.encode(cache_dir)

    # What is trained, and where it stands
    trained = run.trains("backbone", pipe.backbone.requires_grad_(True), s.optim)
    row = pictures.row()
    run.describe(len(row), *pictures.notes())
    run.restore()
    held_out = (
        None if others is None else HeldOut(objective, others.pictures, others.measured, s.validation.pictures, run)
    )

    def validate(step: int) -> None:
        with trained.averaged() as backbone:
            if held_out is not None:
                run.report(step, held_out(backbone))
            draw_prompts(run, pipe, s.validation, pictures.side, step)

    batches = run.batches(row, pictures.read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if held_out else ""):
        for draws, batch in run.micro_batches(batches):
            losses, t = losses_of(trained.module, objective, pictures.shown(draws, batch))
            trained.backward(losses.mean(), pictures.names(draws))
            run.window.note_losses(losses, t)
        run.update(step)

    trained.settle()
    seen = pictures.pictures
    record = record_of(run, "hubgen.training.train_text_to_image", s, seen, s.data.source, "held_out_loss")
    name = "transformer" if pipe.transformer is not None else "unet"
    records = {name: record, "vae": None if s.base.autoencoder is None else TrainingRecord.load(s.base.autoencoder)}
    data, prompts = Path(s.data.source), s.validation.prompts
    publish_pipeline(run, pipe, records, TEXT_TO_IMAGE, s.publish, licence_of=data, prompts=prompts)
    run.finish()


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
