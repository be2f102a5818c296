"""Train an adapter (LoRA or its kin) on pictures with captions, or with classes for models of classes.

    accelerate launch -m hubgen.training.train_lora --config training/recipes/lora-emoji-noto.yaml \
        --data.source emoji/noto --run.output_dir runs/noto

    latents, caption, t, noise -> x_t and target -> (base + adapter)(x_t, t, caption) -> weighted squared error

The base stays as it is; what it learned, and how it was told the time, decides what the adapter learns. The same
command goes on where it was stopped, bit for bit. At the end `output_dir/lora` holds a file that hubgen, diffusers,
ComfyUI and other programs load, with a card and pictures before and after.
"""

from dataclasses import dataclass
from typing import Annotated

from hubgen.adaptation.header_keys import PREFIX
from hubgen.training.kit import bases
from hubgen.training.kit.adapters import Asked, check_texts, publish_adapter, with_adapters
from hubgen.training.kit.bases import AdaptedBase
from hubgen.training.kit.conditioned import told_pictures
from hubgen.training.kit.grids import draw_prompts
from hubgen.training.kit.groups import (
    Adapter,
    CaptionedOrLabelledData,
    Objective,
    Optim,
    PromptValidation,
    Publish,
    RunOptions,
)
from hubgen.training.kit.held_out import HeldOut
from hubgen.training.kit.objectives import objective_from
from hubgen.training.kit.parse import FREE, identity_of
from hubgen.training.kit.publishing import check_push, record_of
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    base: AdaptedBase = AdaptedBase()
    data: CaptionedOrLabelledData
    adapter: Adapter = Adapter()
    objective: Objective = Objective()
    optim: Optim = Optim(learning_rate=1e-4, lr_schedule="constant", lr_warmup_steps=0, ema_decay=None)
    run: RunOptions
    validation: Annotated[PromptValidation, FREE] = PromptValidation()
    publish: Annotated[Publish, FREE] = Publish(summary="An adapter trained with hubgen.")


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)
    check_push(s.publish)

    # What the adapter is put on, and what it is given
    check_texts(s.adapter, s.data)
    pipe = bases.adapted_base(s.base)
    pictures = told_pictures(pipe, s.data, s.data.split, run, s.base.guidance_scale, train=True)
    others = None
    if s.validation.split is not None:
        others = told_pictures(pipe, s.data, s.validation.split, run, s.base.guidance_scale, train=False)
    variance = bases.learns_variance(pipe.backbone)
    objective = objective_from(s.objective, pipe.scheduler, pictures.tokens, variance)
    run.open({"settings": identity_of(s), "base": bases.digests(pipe), "data": pictures.fingerprint}, s.optim)

    # What the frozen parts say about it
    pipe.to(run.device)
    cache_dir = (s.data.cache_dir or s.run.output_dir / "cache") if s.data.cache else None
    for one in (pictures, others):
        if one is not None:
            one.encode(cache_dir)

    # What is trained, and where it stands
    adapted = with_adapters(pipe, s.adapter)
    trained = run.trains("adapter", adapted.learner, s.optim)
    row = pictures.row()
    run.describe(len(row), *pictures.notes())
    run.restore()
    held_out = (
        None if others is None else HeldOut(objective, others.pictures, others.measured, s.validation.pictures, run)
    )

    def validate(step: int) -> None:
        with trained.averaged() as learner:
            if held_out is not None and step > 0:
                run.report(step, held_out(learner.backbone))
            draw_prompts(run, pipe, s.validation, pictures.side, step)

    if run.first_step == 0:
        validate(0)
    batches = run.batches(row, pictures.read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if held_out else ""):
        for draws, batch in run.micro_batches(batches):
            shown = pictures.shown(draws, batch, embedded=not adapted.learner.reads)
            sample = objective.draw(shown.x_0, shown.generators)
            asked = Asked(sample.x_t, objective.timestep(sample), shown.condition, shown.captions)
            (prediction,) = trained.module([asked])
            losses = objective.loss(prediction, sample, shown.mask)  # (B,)
            trained.backward(losses.mean(), pictures.names(draws))
            run.window.note_losses(losses, sample.t)
        run.update(step)

    trained.settle()
    record = record_of(run, "hubgen.training.train_lora", s, pictures.pictures, s.data.source, "held_out_loss")
    header = {PREFIX: s.data.caption_prefix} if s.data.caption_prefix else {}
    publish_adapter(run, adapted, record, s.publish, s.base.model, s.validation.prompts, header)
    run.finish()


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
