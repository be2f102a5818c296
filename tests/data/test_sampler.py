"""Data order and random numbers are functions of (seed, step, rank)."""

import itertools
from collections import Counter

import pytest
import torch

from hubgen.data.sampler import StepBatchSampler, step_generator


def test_a_resumed_sampler_continues_the_uninterrupted_one() -> None:
    whole = list(StepBatchSampler(num_samples=11, batch_size=4, num_steps=20, seed=3))
    for start in (0, 1, 7, 20):
        resumed = StepBatchSampler(num_samples=11, batch_size=4, num_steps=20, seed=3, start_step=start)
        assert list(resumed) == whole[start:]
        assert len(resumed) == 20 - start


def test_batches_cross_the_border_of_an_epoch_and_drop_no_sample() -> None:
    batches = list(StepBatchSampler(num_samples=10, batch_size=4, num_steps=5, seed=0))
    assert all(len(batch) == 4 for batch in batches)
    assert Counter(itertools.chain(*batches)) == Counter({index: 2 for index in range(10)})


def test_epochs_have_different_orders_and_so_do_seeds() -> None:
    first, second = StepBatchSampler(num_samples=50, batch_size=50, num_steps=2, seed=0)
    (other,) = StepBatchSampler(num_samples=50, batch_size=50, num_steps=1, seed=1)
    assert sorted(first) == sorted(second) == sorted(other) == list(range(50))
    assert first != second and first != other


def test_ranks_share_a_step_without_overlap() -> None:
    ranks = [StepBatchSampler(12, 3, num_steps=2, seed=0, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(index for sampler in ranks for batch in sampler for index in batch) == list(range(12))


def test_a_batch_larger_than_the_data_wraps_around() -> None:
    (batch,) = StepBatchSampler(num_samples=3, batch_size=7, num_steps=1, seed=0)
    assert set(Counter(batch).values()) <= {2, 3} and len(batch) == 7


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_samples": 0}, "`num_samples`: got 0"),
        ({"batch_size": -1}, "`batch_size`: got -1"),
        ({"rank": 2, "world_size": 2}, "`rank`: got 2"),
    ],
)
def test_wrong_sizes_are_named(wrong: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        StepBatchSampler(**{"num_samples": 4, "batch_size": 2, "num_steps": 3, "seed": 0, **wrong})


def test_step_generators_repeat_and_differ_in_every_argument() -> None:
    def draw(*arguments: object, **keywords: object) -> float:
        return torch.rand((), generator=step_generator(*arguments, **keywords)).item()  # type: ignore[arg-type]

    draws = [draw(0, 0), draw(1, 0), draw(0, 1), draw(0, 0, 1), draw(0, 0, stream="order"), draw(0, 10), draw(10, 0)]
    assert draw(0, 0) == draws[0]
    assert len(set(draws)) == len(draws)


def test_step_generators_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=step_generator(0, 0))
    list(StepBatchSampler(5, 2, 4, seed=0))
    assert torch.equal(before, torch.get_rng_state())
