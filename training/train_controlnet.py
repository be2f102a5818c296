"""Train a ControlNet (2302.05543) on pictures with hints: edges, colours, poses, whatever a picture can say of another.

    hubgen data hints data/fluent --kind canny --out data/fluent-canny
    accelerate launch -m hubgen.training.train_controlnet --config training/recipes/controlnet-emoji-canny.yaml \
        --data.source data/fluent-canny --run.output_dir runs/canny

    hint, x_t, caption, t -> ControlNet -> residuals;  (base + residuals)(x_t, t, caption) -> the base's own loss

The base is frozen, whatever its family; the network begins as a copy of its first half that adds nothing, or goes on
from another one. Hint, base and network meet as in sampling. The same command goes on where it was stopped, bit for
bit. At the end `output_dir/controlnet` holds a network that hubgen loads, and diffusers where it has the class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image

from hubgen.controls.controlnet import ControlNet
from hubgen.data.cache import module_digest
from hubgen.training.kit import bases
from hubgen.training.kit.bases import ControlNetBase
from hubgen.training.kit.beside import Hints
from hubgen.training.kit.conditioned import ConditionedPictures, losses_of, told_pictures
from hubgen.training.kit.controlled import WithControlNet, check_unpacked, in_dtype, net_for
from hubgen.training.kit.grids import draw_rows, draw_told, first_rows
from hubgen.training.kit.groups import HintedData, Network, Objective, Optim, Publish, RunOptions, ShownValidation
from hubgen.training.kit.held_out import HeldOut
from hubgen.training.kit.hints import COLUMN, with_hints
from hubgen.training.kit.objectives import objective_from
from hubgen.training.kit.parse import FREE, identity_of
from hubgen.training.kit.publishing import check_push, control_usage, publish_control, record_of, save_network
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    base: ControlNetBase = ControlNetBase()
    data: HintedData
    network: Network = Network()
    objective: Objective = Objective()
    optim: Optim = Optim(learning_rate=1e-5, lr_schedule="constant", lr_warmup_steps=500, ema_decay=None)
    run: RunOptions
    validation: Annotated[ShownValidation, FREE] = ShownValidation()
    publish: Annotated[Publish, FREE] = Publish(summary="A ControlNet trained with hubgen.")


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)
    check_push(s.publish)

    # The base, the network, and what both are given
    if s.base.controlnet is None:
        check_unpacked(s.base)
    pipe = bases.adapted_base(s.base)
    net = net_for(pipe, s.base.controlnet, s.network)
    learner = WithControlNet(pipe, net)

    def opened(split: str, train: bool) -> ConditionedPictures:
        pictures = told_pictures(pipe, s.data, split, run, s.base.guidance_scale, train)
        with_hints(pictures.pictures, s.data)
        pictures.beside = Hints(pipe, pictures.pictures, column_of(s), learner.kind, s.network.mode)
        return pictures

    pictures = opened(s.data.split, True)
    others = None if s.validation.split is None else opened(s.validation.split, False)
    variance = bases.learns_variance(pipe.backbone)
    objective = objective_from(s.objective, pipe.scheduler, pictures.tokens, variance)
    base = bases.digests(pipe) | ({} if s.base.controlnet is None else {"controlnet": module_digest(net)})
    run.open({"settings": identity_of(s), "base": base, "data": pictures.fingerprint}, s.optim)

    # What the frozen parts say about it
    pipe.to(run.device)
    cache_dir = (s.data.cache_dir or s.run.output_dir / "cache") if s.data.cache else None
    for one in [pictures] if others is None else [pictures, others]:
        one.encode(cache_dir)

    # What is trained, and where it stands
    trained = run.trains("controlnet", net, s.optim, learner)
    row, drawn = pictures.row(), others or pictures
    run.describe(len(row), *pictures.notes())
    run.restore()
    held_out = None
    if others is not None:
        held_out = HeldOut(objective, others.pictures, others.measured, s.validation.pictures, run)

    def validate(step: int) -> None:
        with trained.averaged():
            if held_out is not None and step > 0:
                run.report(step, held_out(learner))
            columns = columns_of(s, drawn, in_dtype(net, pipe.backbone.dtype))
            draw_rows(run, columns, first_rows(drawn.pictures, s.validation.samples), step)

    if run.first_step == 0:
        validate(0)
    batches = run.batches(row, pictures.read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "held_out_loss" if held_out else ""):
        for draws, batch in run.micro_batches(batches):
            losses, t = losses_of(trained.module, objective, pictures.shown(draws, batch))
            trained.backward(losses.mean(), pictures.names(draws))
            run.window.note_losses(losses, t)
        run.update(step)

    net = trained.settle()
    record = record_of(run, "hubgen.training.train_controlnet", s, pictures.pictures, s.data.source, "held_out_loss")
    opening = [f"net = {type(net).__name__}.from_pretrained(PLACE)", "control = ControlNet(net, image=image)"]
    usage = control_usage("controlnet", net, pipe, s.base.model, [type(net).__name__, "ControlNet"], opening)
    publish_control(
        run, "controlnet", "ControlNet", lambda folder: save_network(net, folder, s.publish), record, s.publish, usage
    )
    run.finish()


def column_of(settings: Settings) -> str:
    """Where the hints are."""
    return settings.data.hint_column if settings.data.hint is None else COLUMN


def columns_of(
    settings: Settings, pictures: ConditionedPictures, net: Any
) -> list[Callable[[Sequence[int]], list[Image.Image]]]:
    """Of a validation grid: the hint; what the base draws with it, at each scale; and without."""

    def hints(rows: Sequence[int]) -> list[Image.Image]:
        return pictures.pictures.plain(rows, column_of(settings))

    def drawn(rows: Sequence[int], scale: float | None) -> list[Image.Image]:
        controls = []
        if scale is not None:
            controls.append(ControlNet(net, image=hints(rows), scale=scale, mode=settings.network.mode))
        return draw_told(pictures, settings.validation, rows, controls=controls)

    scales = [*settings.validation.scales, None]
    return [hints, *(lambda rows, scale=scale: drawn(rows, scale) for scale in scales)]  # type: ignore[misc]


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
