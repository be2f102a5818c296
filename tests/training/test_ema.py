"""The average is what its formula says, follows what is trained alone, and leaves no trace when it is taken off."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hubgen.training.kit.checkpoints import Checkpoints
from hubgen.training.kit.ema import ExponentialMovingAverage


def scramble(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_the_average_is_the_weighted_sum_of_the_history() -> None:
    model = network()
    ema = ExponentialMovingAverage(model, decay=0.75, warmup=False)
    expected = model[0].weight.detach().double()
    for _ in range(20):
        scramble(model)
        ema.update(model)
        expected = 0.75 * expected + 0.25 * model[0].weight.detach().double()
    torch.testing.assert_close(ema.averages["0.weight"].double(), expected, rtol=0, atol=1e-6)


def test_the_warm_up_forgets_the_random_start() -> None:
    ema = ExponentialMovingAverage(network(), decay=0.999)
    decays = []
    for _ in range(9000):
        decays.append(ema.current_decay())
        ema.num_updates += 1
    assert decays[0] == pytest.approx(2 / 11) and decays[-1] == 0.999
    assert all(before <= after for before, after in itertools.pairwise(decays))


def test_an_average_of_half_precision_weights_moves_by_less_than_half_precision_can_tell() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = ExponentialMovingAverage(model, decay=0.9999, warmup=False)
    nn.init.constant_(model.weight, 2.0)
    ema.update(model)
    assert ema.averages["weight"].item() == pytest.approx(1.0001)


def test_frozen_parameters_are_not_followed() -> None:
    model = network()
    model[1].requires_grad_(False)
    ema = ExponentialMovingAverage(model, decay=0.5)
    assert set(ema.averages) == {"0.weight", "0.bias"}
    scramble(model)
    frozen = model[1].weight.clone()
    ema.update(model)
    with ema.applied(model):
        assert torch.equal(model[1].weight, frozen)


def test_applied_leaves_no_trace() -> None:
    model = network()
    ema = ExponentialMovingAverage(model, decay=0.5)
    scramble(model)
    ema.update(model)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    before = torch.get_rng_state()
    with pytest.raises(KeyError), ema.applied(model) as averaged:
        assert torch.equal(averaged[0].weight, ema.averages["0.weight"])
        assert not torch.equal(averaged[0].weight, own["0.weight"])
        raise KeyError
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpoint_restores_it_with_its_count(tmp_path: Path) -> None:
    model = network()
    ema, again = (ExponentialMovingAverage(model, decay=0.9) for _ in range(2))
    for _ in range(3):
        scramble(model)
        ema.update(model)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"ema": ema})
    assert checkpoints.restore({"ema": again}) == (3, {})
    assert again.num_updates == 3 and again.current_decay() == ema.current_decay()
    assert all(torch.equal(value, ema.averages[key]) for key, value in again.averages.items())
    assert "ema.safetensors" in json.loads((tmp_path / "checkpoints/step-00000003/manifest.json").read_text())["files"]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_of_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="`decay`: got"):
        ExponentialMovingAverage(network(), decay=decay)
