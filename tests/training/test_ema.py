"""The average follows the model by its definition and never touches a random number generator."""

import copy

import pytest
import torch
from torch import nn

from hubgen.training.ema import ExponentialMovingAverage


def tiny_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def scramble(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(
                torch.randint(0, 100, tensor.shape) if not tensor.is_floating_point() else torch.randn_like(tensor)
            )


def test_the_average_is_the_weighted_sum_of_the_history() -> None:
    model = tiny_model()
    ema = ExponentialMovingAverage(model, decay=0.75, warmup=False)
    expected = model[0].weight.detach().double()
    for _ in range(5):
        scramble(model)
        ema.update(model)
        expected = 0.75 * expected + 0.25 * model[0].weight.detach().double()
    torch.testing.assert_close(ema.shadow[0].weight.double(), expected, rtol=0, atol=1e-6)


def test_warmup_forgets_the_start_and_ends_at_the_decay() -> None:
    model = tiny_model()
    ema = ExponentialMovingAverage(model, decay=0.9)
    assert ema.current_decay() == pytest.approx(2 / 11)
    for _ in range(200):
        ema.update(model)
    assert ema.current_decay() == 0.9


def test_buffers_are_copied_and_half_precision_is_averaged_in_float32() -> None:
    model = tiny_model().to(torch.bfloat16)
    ema = ExponentialMovingAverage(model, decay=0.999)
    scramble(model)
    ema.update(model)
    assert ema.shadow[0].weight.dtype == torch.float32
    assert torch.equal(ema.shadow[1].running_mean, model[1].running_mean.float())
    assert torch.equal(ema.shadow[1].num_batches_tracked, model[1].num_batches_tracked)


def test_applied_lends_the_average_and_returns_the_own_weights() -> None:
    model = tiny_model()
    ema = ExponentialMovingAverage(model, decay=0.5)
    scramble(model)
    own = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), ema.applied(model):
        assert torch.equal(model[0].weight, ema.shadow[0].weight)
        assert not torch.equal(model[0].weight, own["0.weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def test_a_restored_average_goes_on_as_the_saved_one() -> None:
    model = tiny_model()
    ema = ExponentialMovingAverage(model, decay=0.9)
    for _ in range(3):
        scramble(model)
        ema.update(model)
    restored = ExponentialMovingAverage(tiny_model(), decay=0.9)
    restored.load_state_dict(ema.state_dict())
    scramble(model)
    ema.update(model)
    restored.update(model)
    assert all(torch.equal(value, restored.state_dict()[key]) for key, value in ema.state_dict().items())


def test_no_random_number_is_drawn() -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    ema = ExponentialMovingAverage(model, decay=0.9)
    ema.update(model)
    with ema.applied(model):
        ema.state_dict()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_an_impossible_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="`decay`: got"):
        ExponentialMovingAverage(tiny_model(), decay=decay)
