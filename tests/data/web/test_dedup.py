"""Repeats are what a dictionary says they are, however the keys are parted; a Bloom filter errs as rarely as asked."""

import random
from itertools import pairwise
from pathlib import Path

import pytest

from hubgen.data.web.crawling.dedup import Bloom, laion_hash, repeats_in, row_key, write_keys

NAMES = 200_000


@pytest.fixture(scope="module")
def shards() -> list[list[int]]:
    """200,000 keys in 8 shards of different sizes, of which 30 % repeat an earlier one."""
    draw = random.Random(0)
    names: list[int] = []
    for number in range(NAMES):
        names.append(draw.choice(names) if names and draw.random() < 0.3 else number)
    keys = [row_key((f"http://pictures.org/{name}.jpg", "a cat")) for name in names]
    edges = [0, *sorted(draw.sample(range(NAMES), 6)), NAMES, NAMES]  # the last one is empty
    return [keys[start:stop] for start, stop in pairwise(edges)]


@pytest.fixture(scope="module")
def expected(shards: list[list[int]]) -> list[tuple[int, int]]:
    """(shard, row) of what a dictionary has already."""
    seen: dict[int, tuple[int, int]] = {}
    again = []
    for shard, keys in enumerate(shards):
        for row, key in enumerate(keys):
            if seen.setdefault(key, (shard, row)) != (shard, row):
                again.append((shard, row))
    assert 0.29 * NAMES < len(again) < 0.31 * NAMES
    return again


@pytest.mark.parametrize("buckets", [1, 8, 256])
def test_repeats_are_those_of_a_dictionary_in_any_number_of_buckets(
    shards: list[list[int]], expected: list[tuple[int, int]], buckets: int, tmp_path: Path
) -> None:
    files = [tmp_path / f"{number}.keys" for number in range(len(shards))]
    for path, keys in zip(files, shards, strict=True):
        write_keys(path, keys)
    found = []
    for bucket in random.Random(1).sample(range(buckets), buckets):  # in whatever order workers come
        shard, row = repeats_in(files, bucket, buckets)
        assert list(zip(shard, row, strict=True)) == sorted(zip(shard, row, strict=True))
        found += zip(shard.tolist(), row.tolist(), strict=True)
    assert sorted(found) == expected


def test_the_least_and_the_largest_key_are_in_the_first_and_last_bucket(tmp_path: Path) -> None:
    keys = [2**128 - 1, 0, 2**128 - 1, 0]
    write_keys(tmp_path / "a", keys)
    assert [repeats_in([tmp_path / "a"], bucket, 4)[1].tolist() for bucket in range(4)] == [[3], [], [], [2]]
    assert repeats_in([], 0, 1)[0].tolist() == []


def test_a_bloom_filter_forgets_nothing_and_drops_hardly_more_than_was_asked(shards: list[list[int]]) -> None:
    distinct = len({key for keys in shards for key in keys})
    for error in (0.01, 0.001):
        bloom, seen, false_drops = Bloom(distinct, error), set(), 0
        for keys in shards:
            for key in keys:
                new = bloom.add(key)
                assert not (new and key in seen)
                false_drops += not new and key not in seen
                seen.add(key)
        assert false_drops <= 1.5 * error * distinct
        told = bloom.expected_error()
        assert 0.5 * error < told < 1.5 * error
        never = sum(not bloom.add(row_key((str(number), "never"))) for number in range(5000))
        assert abs(never / 5000 - told) < 4 * (told / 5000) ** 0.5  # the share that the report tells


def test_a_saved_bloom_filter_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Bloom(1000, 0.01)
    assert all(first.add(row_key((str(number),))) for number in range(100))
    first.save(tmp_path / "filter")
    second = Bloom(1000, 0.01, tmp_path / "filter")
    assert not any(second.add(row_key((str(number),))) for number in range(100))
    assert second.expected_error() == first.expected_error()


def test_bloom_filters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="`capacity`: got 0, expected a whole number"):
        Bloom(0, 0.01)
    for error in (0, 1, float("nan"), "0.1"):
        with pytest.raises(ValueError, match="`error`: got .*, expected a number above 0 and below 1"):
            Bloom(10, error)  # type: ignore[arg-type]


def test_the_hash_is_laions() -> None:
    assert laion_hash("http://a/b.jpg", "cat") == 6072314784749653518
    assert laion_hash("http://a/b.jpgcat", None) == 6072314784749653518 == laion_hash(None, "http://a/b.jpgcat")
    hashes = [laion_hash("http://a/", str(number)) for number in range(50)]
    assert min(hashes) < 0 and all(-(2**63) <= number < 2**63 for number in hashes)


def test_columns_do_not_run_into_each_other_in_a_key() -> None:
    assert row_key(("ab", "c")) != row_key(("a", "bc"))
    assert 0 <= row_key((None,)) == row_key(("",)) < 2**128
