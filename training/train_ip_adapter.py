"""Train an IP-Adapter (2308.06721): a picture beside the prompt, to whose tokens the base attends.

    accelerate launch -m hubgen.training.train_ip_adapter --config training/recipes/ip-adapter-emoji.yaml \
        --data.source data/fluent --run.output_dir runs/ip-adapter

    picture -> image encoder -> tokens;  base(x_t, t, caption) that looks at the tokens too -> the base's own loss

The base and the image encoder are frozen; what makes tokens of the encoder's answer, and keys and values of the tokens,
learns. Base and adapter meet as in sampling. The same command goes on where it was stopped, bit for bit. At the end
`output_dir/ip_adapter` holds a file in the official layout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image

from hubgen.controls.image_attention import FILE, Adapter
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.data.cache import module_digest
from hubgen.training.kit import bases
from hubgen.training.kit.bases import IPAdapterBase
from hubgen.training.kit.beside import Seen
from hubgen.training.kit.conditioned import ConditionedPictures, losses_of, told_pictures
from hubgen.training.kit.controlled import WithPicture, adapter_for, image_encoder_for, in_dtype, opening_lines
from hubgen.training.kit.grids import draw_rows, draw_told, first_rows
from hubgen.training.kit.groups import (
    Objective,
    Optim,
    PictureAdapter,
    Publish,
    RunOptions,
    ShownData,
    ShownValidation,
)
from hubgen.training.kit.held_out import HeldOut
from hubgen.training.kit.objectives import objective_from
from hubgen.training.kit.parse import FREE, identity_of
from hubgen.training.kit.publishing import check_push, control_usage, publish_control, record_of
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    base: IPAdapterBase = IPAdapterBase()
    data: ShownData
    adapter: PictureAdapter = PictureAdapter()
    objective: Objective = Objective()
    optim: Optim = Optim(learning_rate=1e-4, lr_schedule="constant", lr_warmup_steps=0, ema_decay=None)
    run: RunOptions
    validation: Annotated[ShownValidation, FREE] = ShownValidation()
    publish: Annotated[Publish, FREE] = Publish(summary="An IP-Adapter trained with hubgen.")


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)
    check_push(s.publish)

    # The base, what sees pictures for it, and the pictures
    pipe = bases.adapted_base(s.base)
    space = pipe.latent_space
    encoder, extractor = image_encoder_for(pipe, s.adapter, s.data.size or space.default_size[0])
    adapter = adapter_for(pipe, s.base.ip_adapter, s.adapter, encoder)
    found: list[ConditionedPictures] = []
    for split in [s.data.split] if s.validation.split is None else [s.data.split, s.validation.split]:
        one = told_pictures(pipe, s.data, split, run, s.base.guidance_scale, train=not found)
        one.beside = Seen(one.pictures, encoder, extractor, adapter)
        found.append(one)
    pictures, *others = found
    objective = objective_from(s.objective, pipe.scheduler, pictures.tokens, bases.learns_variance(pipe.backbone))
    base = bases.digests(pipe) | {"seen by": module_digest(encoder)}
    if s.base.ip_adapter is not None:
        base["ip_adapter"] = module_digest(adapter.network)
    run.open({"settings": identity_of(s), "base": base, "data": pictures.fingerprint}, s.optim)

    # What the frozen parts say about it
    pipe.to(run.device)
    encoder.to(run.device)
    for one in found:
        one.encode((s.data.cache_dir or s.run.output_dir / "cache") if s.data.cache else None)

    # What is trained, and where it stands
    learner = WithPicture(pipe, adapter)
    trained = run.trains("ip_adapter", adapter.network, s.optim, learner)
    run.describe(len(pictures.row()), *pictures.notes())
    run.restore()
    measured = [HeldOut(objective, one.pictures, one.measured, s.validation.pictures, run) for one in others]

    def validate(step: int) -> None:
        drawn = found[-1]
        with trained.averaged():
            for held_out in measured if step else []:
                with learner.looking():
                    run.report(step, held_out(learner))
            weights = Adapter(adapter.layout, in_dtype(adapter.network, pipe.backbone.dtype))
            columns = columns_of(s, drawn, weights, encoder, extractor)
            draw_rows(run, columns, first_rows(drawn.pictures, s.validation.samples), step)

    if run.first_step == 0:
        validate(0)
    batches = run.batches(pictures.row(), pictures.read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if measured else ""):
        for draws, batch in run.micro_batches(batches):
            shown = pictures.shown(draws, batch)
            with learner.looking():  # in the backward pass too, which may compute blocks again
                losses, t = losses_of(trained.module, objective, shown)
                trained.backward(losses.mean(), pictures.names(draws))
            run.window.note_losses(losses, t)
        run.update(step)

    trained.settle()
    record = record_of(run, "hubgen.training.train_ip_adapter", s, pictures.pictures, s.data.source, "held_out_loss")

    def save(folder: Path) -> None:
        adapter.network.to(getattr(torch, s.publish.dtype))
        adapter.save(folder / FILE)

    opening = opening_lines(s.adapter.image_encoder, encoder)
    usage = control_usage("ip-adapter", adapter.network, pipe, s.base.model, ["IPAdapter"], opening)
    publish_control(run, "ip_adapter", "IP-Adapter", save, record, s.publish, usage)
    run.finish()


def columns_of(
    settings: Settings, pictures: ConditionedPictures, adapter: Any, encoder: Any, extractor: Any
) -> list[Callable[[Sequence[int]], list[Image.Image]]]:
    """Of a validation grid: the picture; what the base draws that is shown it, at each scale; and without."""

    def drawn(rows: Sequence[int], scale: float | None) -> list[Image.Image]:
        found = []
        for row in rows:  # all pictures of a call are shown to all results alike
            controls = []
            if scale is not None:
                seen = [pictures.pictures.examples.picture(row)]
                options = {"image_encoder": encoder, "feature_extractor": extractor}
                controls.append(IPAdapter(adapter, image=seen, scale=scale, **options))
            found += draw_told(pictures, settings.validation, [row], controls=controls)
        return found

    scales = [*settings.validation.scales, None]
    return [pictures.pictures.plain, *(lambda rows, scale=scale: drawn(rows, scale) for scale in scales)]  # type: ignore[misc]


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
