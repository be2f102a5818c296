"""Teach a text-to-image pipeline a subject from 3 to 5 pictures: DreamBooth (2208.12242), by an adapter or as a whole.

    accelerate launch -m hubgen.training.train_dreambooth --config training/recipes/dreambooth-emoji.yaml \
        --data.source pictures --instance.prompt "a sks frog" --prior.prompt "a frog" --run.output_dir runs/frog

    loss of the subject's pictures, told the rare words + weight * loss of pictures that the base made of the class

The class pictures keep the base from taking the whole class for the subject (equation 2 of the paper). They are made
once, before anything learns. The same command goes on where it was stopped, bit for bit. At the end `output_dir/lora`
holds an adapter, or `output_dir/pipeline` the whole pipeline.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch

from hubgen.adaptation.header_keys import PROMPT
from hubgen.data.order import seed_of
from hubgen.hub.card import TEXT_TO_IMAGE
from hubgen.training.kit import bases
from hubgen.training.kit.adapters import (
    Asked,
    backbone_name,
    check_texts,
    check_whole,
    publish_adapter,
    whole,
    with_adapters,
)
from hubgen.training.kit.bases import AdaptedBase
from hubgen.training.kit.conditioned import PromptedPictures
from hubgen.training.kit.grids import draw_prompts
from hubgen.training.kit.groups import Adapter, Data, Objective, Optim, Prior, PromptValidation, Publish, RunOptions
from hubgen.training.kit.objectives import objective_from
from hubgen.training.kit.parse import FREE, identity_of
from hubgen.training.kit.prior import Unchanged, check_folder, check_prior, class_pictures
from hubgen.training.kit.publishing import check_push, publish_pipeline, record_of
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script


@dataclass(frozen=True, kw_only=True)
class Instance:
    """The subject."""

    prompt: str
    """Words of its pictures, with a rare one that will mean it: a photo of sks dog."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    base: AdaptedBase = AdaptedBase()
    data: Data
    instance: Instance
    prior: Prior = Prior()
    learns: Literal["adapter", "all"] = "adapter"
    """Whether an adapter learns, or the backbone itself; with adapter.text_encoder the text encoders too."""
    adapter: Adapter = Adapter()
    objective: Objective = Objective()
    optim: Optim = Optim(learning_rate=1e-4, lr_schedule="constant", lr_warmup_steps=0, ema_decay=None)
    run: RunOptions
    validation: Annotated[PromptValidation, FREE] = PromptValidation()
    publish: Annotated[Publish, FREE] = Publish(summary="A subject learnt with hubgen.")


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)
    check_push(s.publish)

    # What learns, and what it is given
    has_prior = check_prior(s.prior, run.batch_size)
    check_texts(s.adapter, s.data)
    pipe = bases.adapted_base(s.base)
    if s.learns == "all":
        check_whole(pipe, s.adapter.text_encoder)
    options: dict[str, Any] = {"run": run, "guidance_scale": s.base.guidance_scale}
    subject = PromptedPictures(pipe, s.data, s.data.split, prompt=s.instance.prompt, **options)
    objective = objective_from(s.objective, pipe.scheduler, subject.tokens)
    class_folder = s.prior.folder or s.run.output_dir / "class_pictures"
    if has_prior:
        check_folder(class_folder, s.prior)
    run.open({"settings": identity_of(s), "base": bases.digests(pipe), "data": subject.fingerprint}, s.optim)

    # Pictures of the class, and what the frozen parts say about all of them
    pipe.to(run.device)
    shown_to_it = [subject]
    if has_prior:
        folder = class_pictures(run, pipe, s.prior, class_folder, subject.side)
        plain = replace(s.data, source=str(folder), size=subject.side, repeats=1, mask_column=None)
        seed = seed_of(s.run.seed, 0, "prior") % 2**31
        shown_to_it.append(PromptedPictures(pipe, plain, "train", prompt=s.prior.prompt, seed=seed, **options))
        run.keeps("class_pictures", Unchanged(shown_to_it[1].fingerprint, folder))
    cache_dir = (s.data.cache_dir or s.run.output_dir / "cache") if s.data.cache else None
    for one in shown_to_it:
        one.encode(cache_dir)

    # What is trained, and where it stands
    adapted = with_adapters(pipe, s.adapter) if s.learns == "adapter" else None
    learner = whole(pipe, s.adapter.text_encoder) if adapted is None else adapted.learner
    trained = run.trains("adapter" if adapted else "pipeline", learner, s.optim)
    run.describe(len(subject.row()), *(note for one in shown_to_it for note in one.notes()))
    run.restore()

    def validate(step: int) -> None:
        with trained.averaged():
            draw_prompts(run, pipe, s.validation, subject.side, step)

    if run.first_step == 0:
        validate(0)
    batches, *others = [run.batches(one.row(), one.read, s.data.num_workers) for one in shown_to_it]
    weights = [1.0, s.prior.weight]
    for step in run.steps(validate, s.validation.steps):
        for draws, batch in run.micro_batches(batches):
            both = [(draws, batch), *(next(other) for other in others)]
            shown = [one.shown(*it, embedded=not learner.reads) for one, it in zip(shown_to_it, both, strict=True)]
            samples = [objective.draw(one.x_0, one.generators) for one in shown]
            predictions = trained.module(
                [
                    Asked(sample.x_t, objective.timestep(sample), one.condition, one.captions)
                    for one, sample in zip(shown, samples, strict=True)
                ]
            )
            losses = [
                objective.loss(prediction, sample, one.mask)  # (B,)
                for prediction, sample, one in zip(predictions, samples, shown, strict=True)
            ]
            total = torch.stack([weight * loss.mean() for weight, loss in zip(weights, losses, strict=False)]).sum()
            trained.backward(total, subject.names(draws))
            run.window.note_losses(losses[0], samples[0].t)
            if has_prior:
                run.window.note("prior_loss", losses[1].detach().sum(), len(losses[1]))
        run.update(step)

    trained.settle()
    record = record_of(run, "hubgen.training.train_dreambooth", s, subject.pictures, s.data.source, "prior_loss")
    if adapted is None:
        publish_pipeline(
            run, pipe, {backbone_name(pipe): record}, TEXT_TO_IMAGE, s.publish, prompts=s.validation.prompts
        )
    else:
        header = {PROMPT: s.instance.prompt}
        prompts = s.validation.prompts or (s.instance.prompt,)
        publish_adapter(run, adapted, record, s.publish, s.base.model, prompts, header)
    run.finish()


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
