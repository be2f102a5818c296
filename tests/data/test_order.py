"""What a step takes is a function of the seed and the step, for one bucket and for several."""

import itertools
from collections import Counter

import pytest
import torch

from hubgen.data.errors import DataError
from hubgen.data.order import EndlessRow, generator_of

SIZES = [(64, 64)] * 11 + [(64, 128)] * 7 + [(128, 64)] * 5


def rows(row: EndlessRow, steps: range) -> list[list[int]]:
    return [[draw.row for draw in row.draws(step)] for step in steps]


@pytest.mark.parametrize("buckets", [SIZES, [None] * 23])
def test_any_step_can_be_asked_for_first(buckets: list) -> None:
    whole = rows(EndlessRow(buckets, 4, seed=3), range(60))
    for start in (0, 1, 17, 59):
        assert rows(EndlessRow(buckets, 4, seed=3), range(start, 60)) == whole[start:]


def test_places_count_up_over_all_steps() -> None:
    row = EndlessRow(SIZES, 4, seed=0)
    assert [draw.place for step in range(9) for draw in row.draws(step)] == list(range(36))


def test_batches_cross_the_border_of_an_epoch_and_drop_no_picture() -> None:
    taken = rows(EndlessRow([None] * 10, 4, seed=0), range(5))
    assert Counter(itertools.chain(*taken)) == Counter({index: 2 for index in range(10)})


def test_epochs_have_different_orders_and_so_do_seeds() -> None:
    first, second = rows(EndlessRow([None] * 50, 50, seed=0), range(2))
    (other,) = rows(EndlessRow([None] * 50, 50, seed=1), range(1))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(50))
    assert first != second and first != other


def test_a_step_has_one_bucket_and_every_picture_comes_equally_often() -> None:
    row = EndlessRow(SIZES, 4, seed=1)
    epochs = 40
    taken = rows(row, range(len(SIZES) * epochs // 4))
    assert all(len({SIZES[index] for index in step}) == 1 for step in taken)
    counts = Counter(itertools.chain(*taken))
    assert set(counts) == set(range(len(SIZES)))
    assert all(abs(count - epochs) <= 2 for count in counts.values())
    # within an epoch the buckets are mixed
    assert len({SIZES[step[0]] for step in taken[:5]}) > 1


def test_repeated_pictures_stand_in_an_epoch_as_often() -> None:
    row = EndlessRow([None] * 3, 5, seed=0, repeats=[1, 3, 1])
    assert len(row) == 5
    assert Counter(rows(row, range(1))[0]) == {0: 1, 1: 3, 2: 1}


def test_a_batch_larger_than_the_data_wraps_around() -> None:
    ((batch),) = rows(EndlessRow([None] * 3, 7, seed=0), range(1))
    assert set(Counter(batch).values()) <= {2, 3} and len(batch) == 7


def test_a_bucket_with_fewer_pictures_than_a_batch_is_named() -> None:
    with pytest.raises(DataError, match=r"\(128, 64\) has 5, \(64, 128\) has 7; expected at least 8"):
        EndlessRow(SIZES, 8, seed=0)


@pytest.mark.parametrize(("wrong", "named"), [({"buckets": []}, "`buckets`"), ({"batch_size": -1}, "`batch_size`")])
def test_wrong_sizes_are_named(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EndlessRow(**{"buckets": [None] * 4, "batch_size": 2, "seed": 0, **wrong})


def test_generators_repeat_and_differ_in_every_argument() -> None:
    def draw(*arguments: object, **keywords: object) -> float:
        return torch.rand((), generator=generator_of(*arguments, **keywords)).item()  # type: ignore[arg-type]

    draws = [draw(0, 0), draw(1, 0), draw(0, 1), draw(0, 0, stream="order"), draw(0, 10), draw(10, 0)]
    assert draw(0, 0) == draws[0]
    assert len(set(draws)) == len(draws)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    EndlessRow(SIZES, 4, seed=0).draws(12)
    assert torch.equal(before, torch.get_rng_state())
