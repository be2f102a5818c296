"""What a run leaves: a folder that loads, with a card that says how it came about; on request it is sent to the Hub."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from hubgen.formats.atomic import sweep, written
from hubgen.hub.card import (
    CLASS_TO_IMAGE,
    About,
    ControlUsage,
    Usage,
    control_card,
    draw_curve,
    parts_of,
    pipeline_card,
)
from hubgen.hub.publish import PublishError, check_licence, check_name, check_token, prepare
from hubgen.hub.records import TrainingRecord, describe_data
from hubgen.training.kit.grids import cut_grid, last_grid
from hubgen.training.kit.groups import Publish
from hubgen.training.kit.parse import SettingsError, settings_to_dict
from hubgen.training.kit.pictures import Pictures
from hubgen.training.kit.run import Run

SAMPLES = 9
"""Pictures that a card shows, at most"""


def check_push(publish: Publish) -> None:
    """Raises SettingsError, before anything is trained, where the result could not be sent to the Hub, or its card."""
    if publish.license is not None or publish.push_to_hub is not None:
        try:
            check_licence({"license": publish.license}, "setting 'publish.license'")
        except PublishError as error:
            raise SettingsError(str(error)) from error
    if publish.push_to_hub is None:
        return
    try:
        check_name(publish.push_to_hub)
        check_token(publish.push_to_hub)
    except PublishError as error:
        raise SettingsError(f"setting 'publish.push_to_hub': {error}") from error


def record_of(run: Run, script: str, settings: Any, pictures: Pictures, source: str, measured: str) -> TrainingRecord:
    """How the weights of a run came about.

    Args:
        run: With its metrics.
        script: Module that was run.
        settings: All of them; folders of this machine are left out.
        pictures: That it was trained on.
        source: Where they were.
        measured: Name of what the curve shows beside the loss.
    """
    return TrainingRecord(
        script=script,
        settings=_without_places(settings_to_dict(settings)) | {"mixed_precision": run.accelerator.mixed_precision},
        data=describe_data(Path(source), len(pictures), pictures.examples.fingerprint),
        curve=run.metrics.curve(measured, "loss"),
    )


def _without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without folders, which are nobody's business; a model on the Hub keeps its name."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            kept[name] = _without_places(value)
        elif name in ("model", "source", "text_encoder") and isinstance(value, str) and Path(value).exists():
            kept[name] = Path(value).resolve().name
        elif not name.endswith("_dir") and name != "autoencoder":
            kept[name] = value
    return kept


def publish_folder(
    run: Run, name: str, what: str, publish: Publish, write: Callable[[Path], Sequence[str] | None]
) -> None:
    """Writes a folder in `output_dir`, whole or not at all, and sends it to the Hub if the settings say so.

    Args:
        run: That is done; only its main process writes.
        name: Of the folder.
        what: It is, for messages.
        publish: The settings.
        write: Given where to write, which is not there yet, and returns lines to be said after it.
    """
    folder = run.options.output_dir / name
    if not run.writer:
        return
    before = len(run.survived.failures)
    with run.survived(f"writing the {what} to {folder}"):
        sweep(folder.parent)  # the run has its output folder to itself
        with written(folder) as temporary:
            lines = write(temporary) or []
        run.print(f"{what} written to {folder}", *lines)
    if len(run.survived.failures) == before:
        push(run, folder, publish)


def publish_pipeline(
    run: Run,
    pipeline: Any,
    records: Mapping[str, TrainingRecord | None],
    usage: Usage,
    publish: Publish,
    licence_of: Path | None = None,
    prompts: Sequence[str] = (),
) -> None:
    """Writes `output_dir/pipeline`, whole or not at all, and sends it to the Hub if the settings say so.

    Args:
        run: That is done; only its main process writes.
        pipeline: With the weights as they are published; changes its precision.
        records: Of the parts that were trained, here or before.
        usage: What the card shows.
        publish: The settings.
        licence_of: Folder of the data, whose LICENSE goes along.
        prompts: Of the pictures in the grids; none for models that read no words.
    """

    def write(temporary: Path) -> None:
        write_weights(pipeline, temporary, publish)
        for part, known in records.items():
            if known is not None:
                known.save(temporary / part)
        about = about_run(run, temporary, publish, records, prompts)
        grid = last_grid(run) if not prompts else None
        if grid is not None:
            shutil.copyfile(grid, temporary / "samples.png")
        card = pipeline_card(
            about,
            parts_of(pipeline),
            records,
            usage=usage,
            native=pipeline.native_index() is not None,
            grid=None if grid is None else "samples.png",
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if licence_of is not None and (licence_of / "LICENSE").is_file():
            shutil.copyfile(licence_of / "LICENSE", temporary / "LICENSE-data")

    publish_folder(run, "pipeline", "pipeline", publish, write)


def publish_control(
    run: Run,
    name: str,
    what: str,
    save: Callable[[Path], None],
    record: TrainingRecord,
    publish: Publish,
    usage: ControlUsage,
) -> None:
    """Writes what a base is steered by into a folder with a card, a record and the last grid; see `publish_folder`.

    Args:
        run: That is done.
        name: Of the folder.
        what: It is, for messages.
        save: Writes the weights into a folder that there is.
        record: How they came about.
        publish: The settings.
        usage: What the card says about the use.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        save(temporary)
        record.save(temporary)
        grid = last_grid(run)
        if grid is not None:
            shutil.copyfile(grid, temporary / "samples.png")
        about = about_run(run, temporary, publish, {name: record}, ())
        card = control_card(about, record, usage, grid=None if grid is None else "samples.png")
        (temporary / "README.md").write_text(card, encoding="utf-8")

    publish_folder(run, name, what, publish, write)


def control_usage(
    kind: str, weights: nn.Module, pipe: Any, model: str | None, imports: Sequence[str], opened: Sequence[str]
) -> ControlUsage:
    """What a card says about the use of something that steers a base.

    Args:
        kind: Tag on the Hub.
        weights: What was trained.
        pipe: The base.
        model: Its folder or repository; `None` for the model of the package.
        imports: See `ControlUsage`.
        opened: See `ControlUsage`.
    """
    name = type(weights).__name__
    elsewhere = "diffusers' `load_ip_adapter` reads it too, for the models that it has IP-Adapters for."
    if kind == "controlnet":
        native = hasattr(diffusers, name)
        elsewhere = f"diffusers' `{name}` loads it too." if native else f"diffusers has no `{name}`: it needs hubgen."
    return ControlUsage(
        kind=kind,
        parameters=sum(one.numel() for one in weights.parameters()),
        base_model=place_of(model),
        pipeline=type(pipe).__name__,
        argument="0" if type(pipe).__name__ == CLASS_TO_IMAGE.pipeline else '""',
        imports=imports,
        opened=opened,
        elsewhere=elsewhere,
    )


def save_network(net: Any, folder: Path, publish: Publish) -> None:
    """A network in the precision of the settings, without the places of this machine."""
    if net.dtype != getattr(torch, publish.dtype):
        net.to(dtype=getattr(torch, publish.dtype))
    net.save_pretrained(folder, safe_serialization=True)
    without_place(folder / "config.json")


def without_place(config: Path) -> None:
    """Takes out of a config where its model came from."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def place_of(model: str | None) -> str | None:
    """What a card names as the base: a repository of the Hub as it is, a folder by its name."""
    if model is None:
        return None
    return Path(model).resolve().name if Path(model).exists() else model


def write_weights(pipeline: Any, folder: Path, publish: Publish) -> None:
    """A pipeline in the precision of the settings, without the places of this machine."""
    for module in pipeline.components.values():
        if isinstance(module, nn.Module) and module.dtype != getattr(torch, publish.dtype):
            module.to(dtype=getattr(torch, publish.dtype))
    pipeline.save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("*/config.json"):
        without_place(config)


def about_run(
    run: Run,
    folder: Path,
    publish: Publish,
    records: Mapping[str, TrainingRecord | None],
    prompts: Sequence[str],
) -> About:
    """What the card of a run's result says, with the pictures that it shows: curves, and samples of the last grid.

    Args:
        run: That is done.
        folder: Where the pictures are written.
        publish: The settings.
        records: By the component that they are of.
        prompts: Of the pictures in the grids.
    """
    curves = {part: f"curve-{part}.png" for part, record in records.items() if record is not None}
    drawn = {part: name for part, name in curves.items() if draw_curve(records[part].curve, folder / name)}
    grid, samples = last_grid(run), {}
    if grid is not None and prompts:
        for number, picture in enumerate(cut_grid(grid, len(prompts))[:SAMPLES]):
            picture.save(folder / f"sample-{number}.png")
            samples[f"sample-{number}.png"] = prompts[number]
    return About(
        title=publish.title or run.options.output_dir.resolve().name,
        summary=publish.summary,
        repo=publish.push_to_hub,
        licence=publish.license,
        samples=samples,
        curves=drawn,
    )


def push(run: Run, folder: Path, publish: Publish) -> None:
    """Sends a folder to the repository that the settings name; a failure names the command that tries again."""
    repo = publish.push_to_hub
    if repo is None:
        return
    with run.survived(f"sending {folder} to {repo} (`hubgen publish {folder} {repo}` tries again)"):
        address = prepare(folder, repo, private=publish.private, message="Trained with hubgen").send()
        run.print(f"sent to {address}")
