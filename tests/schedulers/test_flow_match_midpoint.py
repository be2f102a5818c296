"""Midpoint, FireFlow and RF-inversion's steps along flows: their order, their identities, and the way back."""

import itertools

import pytest
import torch

from hubgen.schedulers.flow_match_controlled import Controller, FlowMatchControlledScheduler
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from hubgen.schedulers.flow_match_heun import FlowMatchHeunDiscreteScheduler
from hubgen.schedulers.flow_match_midpoint import FlowMatchFireFlowScheduler, FlowMatchMidpointScheduler

METHODS = [
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchMidpointScheduler,
    FlowMatchFireFlowScheduler,
    FlowMatchControlledScheduler,
]
SECOND_ORDER = [FlowMatchMidpointScheduler, FlowMatchFireFlowScheduler]
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A smooth nonlinear field."""
    return torch.tanh(1.3 * x.roll(1, -1) + 0.7 * x + timestep / 500 - 1)


def walk(scheduler, x: torch.Tensor, steps: int, field=velocity, ascending: bool = False, **grid) -> torch.Tensor:
    scheduler.ascending = ascending
    scheduler.set_timesteps(steps, **grid)
    for t in scheduler.timesteps:
        x = scheduler.step(field(x, t), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("cls", SECOND_ORDER)
def test_half_the_step_is_a_quarter_of_the_error(cls) -> None:
    """On sigmas evenly spaced, against very many steps."""
    even = lambda n: {"sigmas": torch.linspace(1, 1 / n, n).tolist()}  # noqa: E731
    exact = walk(FlowMatchMidpointScheduler(), X.float(), 400, **even(400))
    errors = [(walk(cls(), X.float(), n, **even(n)) - exact).abs().max().item() for n in (5, 10, 20)]
    assert 3 < errors[0] / errors[1] < 6 and 3 < errors[1] / errors[2] < 6
    euler = walk(FlowMatchEulerDiscreteScheduler(), X.float(), 20, **even(20))
    assert errors[2] < 0.1 * (euler - exact).abs().max()


def test_midpoint_is_rf_solver() -> None:
    """2411.04746: x + h u + h^2 / 2 (u_mid - u) / (h / 2)."""
    scheduler = FlowMatchMidpointScheduler(shift=3.0)
    found = walk(scheduler, X.float(), 6)
    x, sigmas = X, scheduler.sigmas[::2].double()
    for sigma, sigma_next in itertools.pairwise(sigmas):
        h = sigma_next - sigma
        u = velocity(x, 1000 * sigma)
        u_mid = velocity(x + h / 2 * u, 1000 * (sigma + h / 2))
        x = x + h * u + h**2 / 2 * (u_mid - u) / (h / 2)
    assert (found - x).abs().max() < 1e-5


def test_fireflow_takes_each_first_velocity_from_the_middle_of_the_step_before() -> None:
    scheduler = FlowMatchFireFlowScheduler(shift=3.0)
    found = walk(scheduler, X.float(), 6)
    assert len(scheduler.timesteps) == 7
    ends = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ends.set_timesteps(6)
    x, sigmas = X, ends.sigmas.double()
    u = velocity(x, 1000 * sigmas[0])
    for sigma, sigma_next in itertools.pairwise(sigmas):
        h = sigma_next - sigma
        u = velocity(x + h / 2 * u, 1000 * (sigma + h / 2))
        x = x + h * u
    assert (found - x).abs().max() < 1e-5


def test_a_single_step_of_fireflow_is_a_midpoint_step_to_the_last_bit() -> None:
    one, other = (walk(cls(shift=3.0), X.float(), 1) for cls in SECOND_ORDER)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        *((cls, config) for cls in METHODS for config in ({}, {"shift": 3.0})),
        *((cls, {"use_dynamic_shifting": True, "shift": 3.0}) for cls in METHODS if cls is not METHODS[1]),
    ],
)
def test_an_ascending_grid_is_the_descending_one_from_below(cls, config) -> None:
    down, up, grid = cls(**config), cls(**config), {"mu": 0.7} if "use_dynamic_shifting" in config else {}
    up.ascending = True
    down.set_timesteps(5, **grid)
    up.set_timesteps(5, **grid)
    assert torch.equal(up.sigmas, down.sigmas.flip(0)) and up.sigmas[0] == 0 and up.sigmas[-1] == 1
    assert torch.equal(up.timesteps[1:], down.timesteps[1:].flip(0)) and up.timesteps[0] == 0
    assert len(up.timesteps) == len(down.timesteps)


def test_an_ascending_grid_tells_the_model_the_timesteps_that_were_given() -> None:
    up, given = FlowMatchEulerDiscreteScheduler(shift=3.0), [900.0, 500.0, 100.0]
    up.ascending = True
    up.set_timesteps(sigmas=[1.0, 0.6, 0.2], timesteps=given)
    assert up.timesteps.tolist() == [0.0, 100.0, 500.0]


@pytest.mark.parametrize("cls", METHODS)
def test_a_straight_way_is_walked_back_exactly(cls) -> None:
    noise = torch.randn(X.shape)
    straight = lambda x, t: noise - X.float()  # noqa: E731
    up = walk(cls(shift=3.0), X.float(), 7, straight, ascending=True)
    assert (up - noise).abs().max() < 1e-5
    assert (walk(cls(shift=3.0), up, 7, straight) - X.float()).abs().max() < 1e-5


def test_a_crooked_way_is_walked_back_better_by_the_midpoint_rule() -> None:
    def error(cls) -> float:
        return (walk(cls(), walk(cls(), X.float(), 24, ascending=True), 24) - X.float()).square().mean().item()

    assert error(FlowMatchMidpointScheduler) < 0.01 * error(FlowMatchEulerDiscreteScheduler)
    assert error(FlowMatchFireFlowScheduler) < 0.05 * error(FlowMatchEulerDiscreteScheduler)


def test_what_is_changed_in_the_middle_of_fireflows_steps_is_carried_on() -> None:
    """As a blend after each step does: in a field that ignores x, all shifts add up at the end."""
    scheduler, field = FlowMatchFireFlowScheduler(), lambda t: torch.full(X.shape, t.item() / 1000)
    plain = walk(scheduler, X.float(), 4, lambda x, t: field(t))
    scheduler.set_timesteps(4)
    x = X.float()
    for t in scheduler.timesteps:
        x = scheduler.step(field(t), t, x, return_dict=False)[0] + 0.25
    assert (x - plain - 0.25 * 5).abs().max() < 1e-5


@pytest.mark.parametrize("ascending", [True, False])
def test_a_controller_of_full_strength_ends_at_its_anchor_and_one_of_none_is_eulers(ascending: bool) -> None:
    anchor = torch.randn(1, 4, 8, 8)
    drawn, plain = FlowMatchControlledScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    drawn.controller = Controller(anchor, 1.0)
    assert (walk(drawn, X.float(), 9, ascending=ascending) - anchor).abs().max() < 1e-5
    expected = walk(plain, X.float(), 9, ascending=ascending)
    for controller in (None, Controller(anchor, 0.0), Controller(anchor, 1.0, (0.0, 0.0))):
        drawn.controller = controller
        assert torch.equal(walk(drawn, X.float(), 9, ascending=ascending), expected)


def test_a_controller_draws_in_its_span_alone() -> None:
    drawn, plain = FlowMatchControlledScheduler(), FlowMatchEulerDiscreteScheduler()
    drawn.controller = Controller(torch.zeros(2, 4, 8, 8), 0.5, (0.25, 0.5))
    x = X.float()
    for scheduler in (drawn, plain):
        scheduler.set_timesteps(8)
    for i, t in enumerate(plain.timesteps):
        one, other = (s.step(velocity(x, t), t, x, return_dict=False)[0] for s in (drawn, plain))
        assert torch.equal(one, other) == (i not in (2, 3))
        x = other


def test_what_cannot_be_walked_is_said() -> None:
    with pytest.raises(ValueError, match="`stochastic_sampling`: got True, expected False"):
        FlowMatchMidpointScheduler(stochastic_sampling=True).set_timesteps(3)
    with pytest.raises(ValueError, match="`begin_index`: got 2, expected 0: FireFlow"):
        FlowMatchFireFlowScheduler().set_begin_index(2)
    scheduler = FlowMatchMidpointScheduler()
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match="`begin_index`: got 1, the middle of a step"):
        scheduler.step(X, scheduler.timesteps[1], X)
    scheduler = FlowMatchFireFlowScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="`timestep`: got number 2 of the grid"):
        scheduler.step(X, scheduler.timesteps[2], X)
    for strength in (1.5, -0.1, float("nan"), "a"):
        with pytest.raises(ValueError, match="`strength`: got .*, expected a number in"):
            Controller(X, strength)
    for span in ((0.5, 0.2), 0.3, (0, 2)):
        with pytest.raises(ValueError, match="`span`: got .*, expected"):
            Controller(X, 0.5, span)
