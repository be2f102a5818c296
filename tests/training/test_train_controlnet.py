"""A ControlNet learns on every family, and nothing else does; it is the same one in diffusers, and after a stop."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hubgen
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import BackboneCall, predict
from hubgen.controls.control import open_doors
from hubgen.controls.controlnet import ControlNet
from hubgen.controls.net_kinds import Hint
from hubgen.data.errors import DataError
from hubgen.data.hints import write_hints
from hubgen.data.order import Draw
from hubgen.training import train_controlnet
from hubgen.training.kit.beside import left_out, target_of
from hubgen.training.kit.controlled import WithControlNet, net_for
from hubgen.training.kit.finite import NonFiniteError
from hubgen.training.kit.groups import HintedData, Network
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.pictures import open_pictures
from tests import models
from tests.official_images import picture
from tests.parity import first_output, quiet_, randomize_
from tests.training.conftest import draw_pictures, example_of, quick_runs
from tests.training.processes import Running

Official = Callable[[str], Path]
Run = Callable[..., Path]
INPUTS = {
    "ControlNetModel": models.controlnet_inputs,
    "SD3ControlNetModel": models.sd3_net_inputs,
    "FluxControlNetModel": models.flux_net_inputs,
}
FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev", "flux-schnell"]


@pytest.fixture
def hinted(tmp_path: Path) -> Path:
    """Pictures with their negatives as hints, train and held out."""
    for split, count in (("train", 6), ("held_out", 3)):
        folder = tmp_path / "data" / split
        draw_pictures(folder, count)
        (folder / "hints").mkdir()
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            hint = Image.open(folder / row["file_name"]).point(lambda value: 255 - value)
            row |= {"conditioning_image_file_name": f"hints/{number}.png", "class": 7 + number}
            hint.save(folder / "hints" / f"{number}.png")
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


@pytest.fixture
def run(hinted: Path, tmp_path: Path) -> Iterator[Run]:
    with quick_runs(train_controlnet, tmp_path, {"data.source": str(hinted), "optim.lr_warmup_steps": 0}) as train:
        yield train


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_learns_on_every_family_and_is_the_same_in_diffusers(
    run: Run, official: Official, family: str
) -> None:
    folder = run({"base.model": str(official(family)), "data.mirror": True, "data.random_crops": 2})
    published = folder / "controlnet"
    name = json.loads((published / "config.json").read_text())["_class_name"]
    ours, theirs = (getattr(library, name).from_pretrained(published).eval() for library in (hubgen, diffusers))
    learnt = load_file(newest(folder) / "controlnet.safetensors")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert {key for key in ours.state_dict() if "ff_context" not in key and "to_add_out" not in key} <= learnt.keys()
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in learnt.items())
    zeros = [key for key in learnt if key.startswith(("controlnet_down_blocks", "controlnet_blocks"))]
    assert zeros and any(learnt[key].abs().max() > 0 for key in zeros)
    inputs = INPUTS[name]({key: value for key, value in ours.config.items() if value is not None})
    with torch.no_grad():
        found, expected = first_output(ours(**inputs)), first_output(theirs(**inputs))
    assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item()) and expected.abs().max() > 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_loss"] > 0
    with Image.open(folder / "validation" / "step-00000002.png") as grid:
        assert grid.size == (4 * 16, 2 * 16)  # hint, two scales, without; two rows
    assert {file.name for file in published.iterdir()} >= {"README.md", "training.json", "samples.png"}


def with_net(pipe: Any, folder: str | None = None) -> WithControlNet:
    """The base in evaluation mode, frozen, and a network whose weights are random and small."""
    pipe.backbone.eval().requires_grad_(False)
    net = quiet_(randomize_(net_for(pipe, folder, Network()), 7))
    return WithControlNet(pipe, net)


def told(pipe: Any, size: int = 32) -> tuple[torch.Tensor, torch.Tensor, Condition, Hint]:
    """x_t, timesteps, condition and hint of two rows."""
    x_t = models.drawn(*pipe.latent_space.shape(2, (size, size)))
    if isinstance(pipe, hubgen.ClassToImagePipeline):
        condition = Condition(labels=torch.tensor([3, 1]))
    else:
        condition = Condition.of_text(pipe.condition.encode(["a red cat", ""]))
        if "micro" in pipe.family.takes:
            condition = replace(condition, micro=torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2))
        condition = replace(condition, guidance_scale=1.0)
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(4))
    return x_t, torch.tensor([300.0, 700.0]), condition, Hint([pixels])


def opened(official: Official, family: str) -> Any:
    cls = hubgen.ClassToImagePipeline if family == "dit" else hubgen.TextToImagePipeline
    return cls.from_pretrained(official(family))


@pytest.mark.parametrize("family", [*FAMILIES, "dit"])
@torch.no_grad()
def test_training_asks_base_and_network_as_sampling_does(official: Official, family: str) -> None:
    pipe = opened(official, family)
    learner = with_net(pipe)
    x_t, timestep, condition, hint = told(pipe)
    seeds = models.seeded(1, 2)
    target = replace(target_of(pipe, (32, 32), 2, x_t.device), generator=seeds)
    beside = learner.kind.shown(hint, target)
    found = learner(x_t, timestep, condition, beside)

    control = ControlNet(learner.learns, image=hint.images[0])
    prepared = control.prepared(replace(target, generator=models.seeded(1, 2)))
    call = BackboneCall(x_t, timestep, ("positive",), condition)
    expected = predict(pipe.backbone, x_t, timestep, condition, open_doors([prepared])(call))
    assert torch.equal(found, expected)
    assert (found - predict(pipe.backbone, x_t, timestep, condition)).abs().max() > 1e-3


@pytest.mark.parametrize("family", [*FAMILIES, "dit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_lie_in_the_network_alone_also_where_blocks_are_computed_again(
    official: Official, family: str, checkpointing: bool
) -> None:
    pipe = opened(official, family)
    before = {key: value.clone() for key, value in pipe.backbone.state_dict().items()}
    learner = with_net(pipe)
    if checkpointing:
        learner.enable_gradient_checkpointing()
    x_t, timestep, condition, hint = told(pipe)
    beside = learner.kind.shown(hint, replace(target_of(pipe, (32, 32), 2, x_t.device), generator=models.seeded(1, 2)))
    learner(x_t, timestep, condition, beside).square().mean().backward()
    names = {key for key, value in learner.named_parameters() if value.grad is not None}
    asked = {f"learns.{key}" for key, _ in learner.learns.named_parameters()}
    assert names == {key for key, value in learner.named_parameters() if value.requires_grad} <= asked
    assert all("ff_context" in key or "to_add_out" in key for key in asked - names)
    assert all(value.grad is None and not value.requires_grad for value in pipe.backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in pipe.backbone.state_dict().items())


def test_a_fresh_network_leaves_the_base_as_it_is_and_its_zero_layers_learn_first(official: Official) -> None:
    for family in ("sd1", "sd3", "flux-dev", "dit"):
        pipe = opened(official, family)
        pipe.backbone.eval().requires_grad_(False)
        learner = WithControlNet(pipe, net_for(pipe, None, Network()))
        x_t, timestep, condition, hint = told(pipe)
        shown = learner.kind.shown(hint, target_of(pipe, (32, 32), 2, x_t.device))
        found = learner(x_t, timestep, condition, shown)
        assert torch.equal(found, predict(pipe.backbone, x_t, timestep, condition))
        found.square().mean().backward()
        moved = {key for key, value in learner.learns.named_parameters() if value.grad is not None and value.grad.any()}
        assert moved and all(key.startswith(("controlnet_", "controlnet_mid")) for key in moved)


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(newest(folder).glob("*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_that_is_killed_goes_on_to_the_same_weights(hinted: Path, tmp_path: Path) -> None:
    base = models.saved_pipeline(tmp_path / "base")
    recipe = {
        "base.model": str(base),
        "data.source": str(hinted),
        "data.size": 16,
        "data.mirror": True,
        "run.batch_size": 2,
        "run.max_train_steps": 12,
        "run.checkpoint_steps": 3,
        "run.log_steps": 1,
        "run.report_to": "none",
        "optim.learning_rate": 0.01,
        "optim.lr_warmup_steps": 0,
        "optim.ema_decay": 0.9,
        "validation.samples": 0,
        "publish.dtype": "float32",
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Running("train_controlnet", recipe | {"run.output_dir": str(whole)}, tmp_path).finish()
    running = Running("train_controlnet", recipe | {"run.output_dir": str(killed)}, tmp_path)
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("step-*")):
        assert running.alive() and time.monotonic() < deadline, running.output()
        time.sleep(0.002)
    running.kill()
    Running("train_controlnet", recipe | {"run.output_dir": str(killed)}, tmp_path).finish()
    ours, theirs = checkpoint(killed), checkpoint(whole)
    assert ours.keys() == theirs.keys() and any(key.startswith("ema.controlnet") for key in ours)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    published = [load_file(one / "controlnet" / "diffusion_pytorch_model.safetensors") for one in (whole, killed)]
    assert all(torch.equal(value, published[1][key]) for key, value in published[0].items())
    assert losses(whole) == losses(killed)


def test_hints_may_be_cached_read_or_made_and_the_losses_are_the_same(run: Run, tmp_path: Path) -> None:
    """Written by `hubgen data hints`, or made of each picture; kept as latents, or encoded at each use."""
    draw_pictures(tmp_path / "plain" / "train", 6)
    write_hints(tmp_path / "plain", "color", tmp_path / "written", cells=4)
    base = models.saved_pipeline(tmp_path / "base")
    shared = {"base.model": str(base), "data.mirror": True, "data.random_crops": 2, "data.upscale": True}
    shared |= {"validation.split": None, "validation.samples": 0, "run.max_train_steps": 3}
    made = {"data.source": str(tmp_path / "plain"), "data.hint": "color", "data.hint_options": {"cells": 4}}
    found = [
        losses(run({**shared, **changes, "data.cache": cache, "run.output_dir": str(tmp_path / f"{number} {cache}")}))
        for number, changes in enumerate(({"data.source": str(tmp_path / "written")}, made))
        for cache in (True, False)
    ]
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-5)
    other = losses(run({**shared, **made, "data.hint_options": {"cells": 1}, "run.output_dir": str(tmp_path / "one")}))
    assert other[0] == pytest.approx(found[0][0], rel=1e-5) and other[1:] != pytest.approx(found[0][1:], rel=1e-5)


def test_a_network_is_trained_further_and_the_run_knows_which_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(models.saved_pipeline(tmp_path / "base", "unet"))
    first = run({"base.model": base, "run.output_dir": str(tmp_path / "first")}) / "controlnet"
    assert example_of(first / "README.md", monkeypatch, picture()).size == (16, 16)  # as its card says
    start = load_file(first / "diffusion_pytorch_model.safetensors")
    still = run({"base.model": base, "base.controlnet": str(first), "optim.learning_rate": 0.0})
    found = load_file(still / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, start[key]) for key, value in found.items())
    other = run({"base.model": base, "run.output_dir": str(tmp_path / "other"), "run.seed": 1}) / "controlnet"
    with pytest.raises(ValueError, match=r"base\.controlnet: '.*' in the checkpoint"):
        run({"base.model": base, "base.controlnet": str(other), "optim.learning_rate": 0.0})


def test_a_network_learns_on_a_model_of_classes(run: Run, official: Official) -> None:
    folder = run({"base.model": str(official("dit")), "data.label_column": "class", "run.max_train_steps": 3})
    net = hubgen.DiTControlNetModel.from_pretrained(folder / "controlnet")
    assert any(one.weight.abs().max() > 0 for one in net.controlnet_blocks)
    assert "it needs hubgen" in (folder / "controlnet" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.hint_column": "pose"}, "row 1: got 'file_name', .*, expected 'pose_file_name' too"),
        ({"data.random_moves": 2}, "'data.random_moves': got 2, expected 0"),
        ({"data.hint_options": {"cells": 2}}, "'data.hint_options': got .*, expected none without data.hint"),
        ({"data.hint": "color", "data.hint_options": {"low": 2}}, "'data.hint_options': `low`: got 2, expected none"),
        ({"network.layers": 9}, "settings of 'network': .*num_layers"),
        ({"network.layers": 2}, "'network.layers': got 2, expected 1, of the base's 3: .* only 1 of 2 would add"),
        ({"base.controlnet": "/nowhere"}, "'base.controlnet': /nowhere"),
        ({"network.mode": 1}, "settings of 'network': .*`mode`: got"),
        ({"base.model": "/nowhere"}, "'base.model': /nowhere"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_before_anything_is_encoded(
    run: Run, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base = str(models.saved_pipeline(tmp_path / "base"))
    with pytest.raises((SettingsError, DataError), match=message) as error:
        run({"base.model": base, **changes})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "cache").exists()


def test_a_hint_that_is_missing_or_of_another_size_is_told_by_its_row(run: Run, hinted: Path, tmp_path: Path) -> None:
    base = {"base.model": str(models.saved_pipeline(tmp_path / "base"))}
    hint = hinted / "train" / "hints" / "3.png"
    Image.new("RGB", (16, 18)).save(hint)
    with pytest.raises(DataError, match=r"row 4: .*3.png: got 16x18 pixels, expected 16x16, those of 3.png, beside wh"):
        run(base)
    hint.unlink()
    with pytest.raises(DataError, match=r"row 4: .*hints/3.png: no such file, expected a picture"):
        run(base)
    folder = run({**base, "data.on_bad_picture": "skip"})  # 5 are left
    assert (folder / "controlnet" / "config.json").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(run: Run, tmp_path: Path) -> None:
    base = str(models.saved_pipeline(tmp_path / "base"))
    with pytest.raises(NonFiniteError, match="png"):
        run({"base.model": base, "optim.learning_rate": 1e30, "run.max_train_steps": 4, "validation.samples": 0})
    assert not (tmp_path / "run" / "controlnet").exists()


def test_hints_are_shown_in_the_views_of_their_pictures(hinted: Path, tmp_path: Path) -> None:
    table = hinted / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    lines = [json.dumps({**row, "conditioning_image_file_name": row["file_name"]}) + "\n" for row in rows]
    table.write_text("".join(lines))
    data = HintedData(source=str(hinted), size=12, mirror=True, random_crops=3)
    pictures = open_pictures(data, "train", 0, side=12, multiple=4)
    draws = [Draw(place, place % len(pictures)) for place in range(40)]
    shown = pictures.further(draws, "conditioning_image")
    assert torch.equal(shown, (pictures.pixels(draws) + 1) / 2)
    views = {pictures.shown(draw) for draw in draws}
    assert len(views) == 6 and any(pictures.views.view(0, number).mirrored for number in views)


def test_text_and_picture_are_left_out_at_the_rates_asked_for() -> None:
    drawn = [left_out(0.05, 3, place) for place in range(100_000)]
    rates = [
        sum(one == wanted for one in drawn) / len(drawn)
        for wanted in ((True, False), (False, True), (True, True), (False, False))
    ]
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.85], abs=0.003)
    assert left_out(0.05, 3, 7) == left_out(0.05, 3, 7) and left_out(0.0, 3, 7) == (False, False)
    assert [left_out(0.05, 4, place) for place in range(1000)] != drawn[:1000]
