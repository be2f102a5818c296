"""An average of any length is put together after the run from the few that were stored (2312.02696)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hubgen.training import choose_average
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.post_hoc import PowerFunctionAverage, chosen, combination, exponent_of, store

Train = Callable[[dict[str, Any]], Path]


def test_lengths_and_exponents_are_the_papers() -> None:
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.01) and exponent_of(0.10) == pytest.approx(6.94, abs=0.01)
    gamma = exponent_of(0.2)
    assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(0.2)
    for wrong in (0.0, 0.3):
        with pytest.raises(SettingsError, match="'optim.ema_lengths': got"):
            exponent_of(wrong)


def test_the_average_weighs_step_t_by_the_power_of_t() -> None:
    module, length = nn.Linear(1, 1, bias=False), 0.15
    average = PowerFunctionAverage(module, length)
    values = torch.randn(200).tolist()
    for value in values:
        nn.init.constant_(module.weight, value)
        average.update(module)
    gamma = exponent_of(length)
    t = np.arange(1, 201, dtype=float)
    profile = t ** (gamma + 1) - (t - 1) ** (gamma + 1)
    assert average.averages["weight"].item() == pytest.approx(np.average(values, weights=profile), abs=1e-5)


def test_another_length_at_another_step_is_found_from_what_was_stored(tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    kept = [PowerFunctionAverage(module, length) for length in (0.05, 0.1)]
    wanted = {length: PowerFunctionAverage(module, length) for length in (0.05, 0.07, 0.15)}
    expected: dict[tuple[float, int], torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 801):
        with torch.no_grad():
            module.weight += 0.05 * torch.randn(3, 4, generator=generator)
        for average in [*kept, *wanted.values()]:
            average.update(module)
        if step % 50 == 0:
            store(tmp_path, step, kept, writer=True)
            expected |= {(length, step): one.averages["weight"].clone() for length, one in wanted.items()}
    for (length, step), value in expected.items():
        if step >= 400:
            torch.testing.assert_close(chosen(tmp_path, length, step)["weight"], value, rtol=0, atol=0.01)
    moved = expected[0.15, 800] - expected[0.05, 800]
    assert moved.abs().mean() > 0.05  # lengths differ by far more than the error
    weights = combination([(400, 0.1), (800, 0.05), (800, 0.1)], 800, 0.1)
    assert weights == pytest.approx([0, 0, 1], abs=1e-6)
    with pytest.raises(SettingsError, match="got 900, expected at most 800"):
        chosen(tmp_path, 0.1, 900)
    with pytest.raises(SettingsError, match="got no stored averages"):
        chosen(tmp_path / "nothing", 0.1)


def test_a_run_stores_its_averages_and_the_chosen_one_becomes_a_pipeline(
    recipe: dict[str, Any], train: Train, tmp_path: Path
) -> None:
    run = train(recipe | {"optim.ema_lengths": [0.05, 0.1], "run.checkpoint_steps": 2})
    assert sorted(path.name for path in (run / "averages").iterdir()) == [
        f"step-{step:08d}.safetensors" for step in (2, 4, 6, 8)
    ]
    choose_average.main([str(run), "--length", "0.1", "--out", str(tmp_path / "chosen")])
    found = load_file(tmp_path / "chosen" / "transformer" / "diffusion_pytorch_model.safetensors")
    stored = load_file(run / "averages" / "step-00000008.safetensors")
    name = "proj_out.weight"
    torch.testing.assert_close(found[name], stored[f"0.1/{name}"].float(), rtol=1e-3, atol=1e-3)
    with pytest.raises(SettingsError, match=r"got no model_index.json"):
        choose_average.main([str(tmp_path), "--length", "0.1", "--out", str(tmp_path / "other")])
