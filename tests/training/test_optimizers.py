"""Every optimizer learns, and resumes bit for bit: its state, nested or not, is all in the checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hubgen.training.kit.checkpoints import CheckpointError, Checkpoints
from hubgen.training.kit.groups import Optim
from hubgen.training.kit.optimizers import optimizers_of
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.schedules import learning_rate_schedule

Train = Callable[[dict[str, Any]], Path]
RATES = {"prodigy": 1.0, "muon": 1e-2, "sgd": 1e-2}
NAMES = ["adamw", "adafactor", "muon", "sgd", "adamw8bit", "prodigy", "schedule_free_adamw", "lion", "came"]
NEEDS = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free_adamw": "schedulefree"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    # 8-bit moments are kept from 4096 numbers on.
    return nn.Sequential(nn.Linear(32, 160), nn.SiLU(), nn.Linear(160, 8))


def optim(name: str) -> Optim:
    pytest.importorskip(NEEDS.get(name, "pytorch_optimizer" if name in ("lion", "came") else "torch"))
    return Optim(optimizer=name, learning_rate=RATES.get(name, 3e-3), betas=(0.9, 0.99))


def step(module: nn.Module, optimizers: dict[str, Any], number: int) -> float:
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(number))
    loss = (module(inputs) - inputs[:, :8]).square().mean()
    loss.backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def make(name: str) -> tuple[nn.Module, dict[str, Any]]:
    module = network()
    optimizers = optimizers_of(module, optim(name))
    for optimizer in optimizers.values():
        if hasattr(optimizer, "train"):
            optimizer.train()
    return module, optimizers


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_learns_and_goes_on_from_a_checkpoint_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, optimizers = make(name)
    losses = [step(whole, optimizers, number) for number in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])

    first, optimizers_first = make(name)
    for number in range(15):
        step(first, optimizers_first, number)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(15, {"module": first}, optimizers_first)
    again, optimizers_again = make(name)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    assert checkpoints.restore({"module": again}, optimizers_again) == (15, {})
    for number in range(15, 40):
        step(again, optimizers_again, number)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw8bit", "prodigy", "schedule_free_adamw", "muon"])
def test_validation_and_saving_do_not_touch_a_run_of_any_optimizer(
    recipe: dict[str, Any], train: Train, tmp_path: Path, name: str
) -> None:
    chosen = optim(name)
    recipe |= {"optim.optimizer": name, "optim.learning_rate": chosen.learning_rate, "optim.lr_schedule": "constant"}
    recipe |= {"optim.ema_decay": None} if name == "schedule_free_adamw" else {}
    never = train(recipe | {"run.output_dir": str(tmp_path / "never"), "run.checkpoint_steps": 1000})
    often = {"validation.split": "held_out", "validation.steps": 2, "run.checkpoint_steps": 2}
    train(recipe | often | {"run.max_train_steps": 4})
    run = train(recipe | often)
    found, expected = (
        {
            f"{file.name}/{key}": value
            for file in sorted((folder / "checkpoints" / "step-00000008").glob("*.safetensors"))
            for key, value in load_file(file).items()
        }
        for folder in (run, never)
    )
    assert [key for key, value in expected.items() if not torch.equal(value, found[key])] == []
    if name == "schedule_free_adamw":  # what is published is its average, not where it trains
        published = load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
        key = "proj_out.weight"
        assert not torch.equal(published[key], found[f"backbone.safetensors/{key}"])


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    module = network()
    optimizers = optimizers_of(module, optim("muon"))
    matrices, others = ([p for group in one.param_groups for p in group["params"]] for one in optimizers.values())
    assert list(optimizers) == ["muon", "adamw"]
    assert all(p.ndim == 2 for p in matrices) and all(p.ndim == 1 for p in others)
    assert len(matrices) + len(others) == len(list(module.parameters()))


def test_frozen_parameters_are_left_to_nobody() -> None:
    module = network()
    module[0].requires_grad_(False)
    (optimizer,) = optimizers_of(module, optim("adamw")).values()
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SettingsError, match=r"prodigy needs prodigyopt: pip install 'hubgen\[optimizers\]'"):
        optimizers_of(network(), Optim(optimizer="prodigy", learning_rate=1.0))


def test_what_is_neither_tensor_nor_plain_is_refused(tmp_path: Path) -> None:
    module, optimizers = make("adamw")
    optimizers["adamw"].param_groups[0]["something"] = object()
    with pytest.raises(CheckpointError, match=r"param_groups\.0\.something: got a object, expected tensors and plain"):
        Checkpoints(tmp_path).save(1, {"module": module}, optimizers)


# ---- learning rates ----


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "polynomial", "inverse_sqrt", "cosine_with_restarts"])
def test_a_schedule_is_transformers_behind_a_warm_up_that_learns_from_the_first_step(name: str) -> None:
    from transformers import get_scheduler

    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    theirs = get_scheduler("constant_with_warmup" if name == "constant" else name, optimizer, 5, 50)
    factor = learning_rate_schedule(name, 5, 50)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [factor(step) for step in range(5, 50)] == pytest.approx(
        [theirs.lr_lambdas[0](step) for step in range(5, 50)]
    )
    assert min(factor(step) for step in range(50)) > 0


def test_wrong_schedules_are_named() -> None:
    with pytest.raises(
        SettingsError, match=r"'optim.lr_schedule': got 'reduce_lr_on_plateau', expected one of constant"
    ):
        learning_rate_schedule("reduce_lr_on_plateau", 0, 10)
    with pytest.raises(SettingsError, match=r"'optim.lr_schedule_arguments': cosine: .*'x'"):
        learning_rate_schedule("cosine", 0, 10, {"x": 1})


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_parameters_whose_names_match_have_learning_rates_of_their_own(name: str) -> None:
    pytest.importorskip("pytorch_optimizer" if name == "lion" else NEEDS.get(name, "torch"))
    module = network()
    options = Optim(optimizer=name, learning_rate=1.0, learning_rates={r"^0\.": 0.0, "bias": 0.25})
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    optimizers = optimizers_of(module, options)
    rates = {
        id(parameter): group["lr"]
        for optimizer in optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = {key: rates[id(parameter)] for key, parameter in module.named_parameters()}
    assert found == {"0.weight": 0.0, "0.bias": 0.25, "2.weight": 1.0, "2.bias": 0.25}
    step(module, optimizers, 0)
    assert torch.equal(module[0].weight, before["0.weight"]) and not torch.equal(module[2].weight, before["2.weight"])


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"nothing": 1.0}, r"'optim.learning_rates': got 'nothing', which nothing that learns matches: 0.weight"),
        ({"(": 1.0}, r"'optim.learning_rates': got '\(', expected a regular expression"),
        ({"bias": -1.0}, "'optim.learning_rates': got -1.0 for 'bias', expected a number"),
    ],
)
def test_a_pattern_of_learning_rates_that_is_none_is_refused(rates: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match="'optim.learning_rates': got some with prodigy, expected none"):
        optimizers_of(network(), Optim(optimizer="prodigy", learning_rate=1.0, learning_rates={"bias": 0.5}))
    with pytest.raises(SettingsError, match=message):
        optimizers_of(network(), Optim(learning_rates=rates))
