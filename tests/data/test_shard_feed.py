"""Shards are read in an order that is a function of seed and step, by any number of readers; each is checked first."""

import itertools
import json
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from hubgen.data.captions import SYNTHETIC, Captions
from hubgen.data.encoded import LatentSource
from hubgen.data.errors import DataError
from hubgen.data.order import Draw, EndlessRow
from hubgen.data.shard_feed import ShardExamples
from hubgen.data.shard_store import Manifest, key_of, manifest_file
from hubgen.data.sources import open_examples
from hubgen.data.views import Views, bucket_of
from hubgen.data.web.shards import Outcome, read_table, write_shard, write_stats
from hubgen.data.webdataset import WebDataset
from tests import models
from tests.data.web.site import file_of, picture

COUNTS = (700, 600, 500, 200)
SIZES = ((8, 8), (8, 12), (12, 8))
KNOWN = [(8, 8), (8, 12), (12, 8)]


def write(folder: Path, number: int, count: int, sizes: Sequence[tuple[int, int]] = SIZES[:1]) -> None:
    """A shard of `count` pictures (width, height), between them rows that failed and, of two of three, new captions."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [file_of(picture(*size, seed=number)) for size in sizes]
    outcomes, captions, written = [], [], []
    for row in range(count):
        size = sizes[row % len(sizes)]
        outcomes.append(
            Outcome("success", None, files[row % len(sizes)], *size, *size, "{}", f"{number:032x}{row:032x}")
        )
        captions.append(f"shard {number} row {row}")
        written.append(None if row % 3 == 0 else f"model's {number}.{row}")
        if row % 7 == 3:
            outcomes.append(Outcome("failed_to_download", "HTTP Error 404: Not Found"))
            captions.append("")
            written.append(None)
    stats = write_shard(folder, number, 10_000, pa.table({"caption": captions}), outcomes)
    path = folder / f"{number:05d}.parquet"
    pa.parquet.write_table(read_table(path).append_column(SYNTHETIC, pa.array(written, pa.string())), path)
    write_stats(folder / f"{number:05d}_stats.json", stats)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 pictures in 4 shards."""
    root = tmp_path_factory.mktemp("shards")
    for number, count in enumerate(COUNTS):
        write(root, number, count)
    return root


def opened(folder: Path | str, copies: Path | None = None, **options: Any) -> ShardExamples:
    return ShardExamples(str(folder), copies=copies or Path("/nonexistent"), **options)


def row_of(folder: Path, batch_size: int = 60, seed: int = 3, window: int = 2) -> EndlessRow:
    return opened(folder, window=window).endless_row([], [None], batch_size, seed)


def rows(row: EndlessRow, steps: range) -> list[list[int]]:
    return [[draw.row for draw in row.draws(step)] for step in steps]


# ---- the order ----


def test_every_epoch_has_each_picture_once_and_an_order_of_its_own(folder: Path) -> None:
    taken = list(itertools.chain(*rows(row_of(folder, 100), range(60))))
    epochs = [taken[first : first + 2000] for first in (0, 2000, 4000)]
    assert all(sorted(epoch) == list(range(2000)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    starts = np.cumsum((0, *COUNTS))
    shards = [np.searchsorted(starts, epoch, "right") - 1 for epoch in epochs]
    for epoch in shards:  # of each window of two shards all, before any of the next
        first = set(epoch[: sum(COUNTS[number] for number in set(epoch[:100]))].tolist())
        assert len(first) == 2
    assert len({tuple(sorted(set(epoch[:100].tolist()))) for epoch in shards}) > 1  # other shards stand together


def test_any_step_can_be_asked_for_first(folder: Path) -> None:
    whole = rows(row_of(folder), range(120))
    for start in (0, 1, 32, 33, 67, 119):  # 33 steps are an epoch and a bit
        assert rows(row_of(folder), range(start, 120)) == whole[start:]
    backwards = row_of(folder)
    assert [rows(backwards, range(step, step + 1))[0] for step in reversed(range(120))] == whole[::-1]
    assert rows(row_of(folder, seed=4), range(120)) != whole


def test_two_ranks_together_have_the_order_of_one_even_of_a_single_shard(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, 0, 50)
    for source in (folder, tmp_path):
        one, ranks = row_of(source), [row_of(source), row_of(source)]
        for step in range(40):
            halves = [rank.draws(step, 30 * number, 30) for number, rank in enumerate(ranks)]
            assert halves[0] + halves[1] == one.draws(step)


def test_in_one_window_the_order_is_that_of_a_folder_of_the_same_pictures(folder: Path) -> None:
    for repeats in (1, 3):
        shards = opened(folder, window=4).endless_row([], [None], 64, 5, repeats)
        plain = opened(folder, window=4).endless_row([], [None], 64, 5)
        assert len(shards) == 2000 * repeats
        counts = Counter(itertools.chain(*rows(shards, range(125 * repeats))))  # 4 epochs
        assert set(counts.values()) == {4 * repeats} and len(counts) == 2000
        assert rows(plain, range(80)) == rows(EndlessRow([None] * 2000, 64, 5), range(80))


def test_steps_of_buckets_have_one_size_and_take_every_picture(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, number, 40, SIZES if number else SIZES[:2])
    examples = opened(tmp_path, window=2)
    views = Views(examples.sizes, examples.digests, KNOWN, names=examples.file_names)
    assert views.buckets[0] == bucket_of((8, 8), KNOWN) and len(views.buckets) == 120
    row = examples.endless_row(views.buckets, views.known, 4, 1)
    taken = rows(row, range(30 * 20))
    assert all(len({examples.sizes[one] for one in step}) == 1 for step in taken)
    counts = Counter(itertools.chain(*taken))
    assert len(counts) == 120 and all(abs(count - 20) <= 2 for count in counts.values())
    again = opened(tmp_path, window=2).endless_row(views.buckets, views.known, 4, 1)
    assert rows(again, range(77, 90)) == taken[77:90]


BILLIONS = """
    import sys, time
    from pathlib import Path
    from hubgen.data.sources import open_examples

    def memory(name):
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024

    open_examples(sys.argv[3])  # pyarrow's own memory does not depend on how many shards there are
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, started = memory("VmRSS"), time.process_time()
    examples = open_examples(sys.argv[1], cache_dir=Path(sys.argv[2]))
    row = examples.endless_row([], [None], 2048, 0)
    assert len(row) == len(examples) > 5.84e9, len(row)
    draws = row.draws(7_654_321) + row.draws(123) + row.draws(2_999_999)  # in the third, first and second epoch
    assert len({draw.row for draw in draws}) > 6000 and max(draw.row for draw in draws) > 5e9
    print(time.process_time() - started, memory("VmHWM") - before)
"""


def test_585_000_shards_open_and_seek_in_a_second_and_100_mb(tmp_path: Path) -> None:
    count = 585_000
    write(tmp_path / "data", 0, 10)
    small = opened(tmp_path / "data").manifest
    generator = np.random.default_rng(0)
    arrays = {
        "names": np.array([b"%05d" % number for number in range(count)]),
        "rows": np.full(count, 10_500, np.int32),
        "pictures": generator.integers(9_900, 10_100, count).astype(np.int32),
        "tar_bytes": np.full(count, 270_000_000, np.int64),
        "digests": generator.integers(0, 2**63, count).astype(np.uint64),
    }
    for name, values in arrays.items():
        values[0] = getattr(small, name)[0]  # the one that is there, and is opened
    Manifest(**arrays).save(manifest_file(tmp_path / "copies", key_of(tmp_path / "data")))
    write(tmp_path / "small", 0, 10)
    folders = [str(tmp_path / name) for name in ("data", "copies", "small")]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BILLIONS), *folders], capture_output=True, text=True, check=True
    )
    seconds, megabytes = map(float, result.stdout.split())
    assert seconds <= 1 and megabytes <= 100, result.stdout


# ---- what is read ----


def test_rows_are_the_successes_with_their_pictures_captions_and_columns(folder: Path) -> None:
    examples = open_examples(str(folder), columns=[SYNTHETIC])
    assert isinstance(examples, ShardExamples) and len(examples) == 2000
    plain = WebDataset(str(folder / "00003.tar"))
    for row in (0, 3, 4, 199):
        assert examples.captions[1800 + row] == plain.captions[row] == [f"shard 3 row {row}"]
        assert examples.sizes[1800 + row] == plain.sizes[row] == (8, 8)
        assert examples.picture(1800 + row).tobytes() == plain.picture(row).tobytes()
        assert examples.file_names[1800 + row] == f"00003.tar {plain.file_names[row]}"
    assert examples.columns[SYNTHETIC][3:6] == [None, "model's 0.4", "model's 0.5"]
    assert [examples.part_of(row) for row in (0, 699, 700, 1999)] == [0, 0, 1, 3] and len(examples.parts) == 4
    assert len(set(examples.digests[690:710])) == 20
    assert examples.distinct("caption")[699:701] == ["shard 0 row 699", "shard 1 row 0"]


def test_tables_of_img2dataset_are_read_by_the_headers_of_the_tar(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, 0, 12)
    path, expected = tmp_path / "00000.parquet", opened(tmp_path)
    order = [5, 3, 0, 1, 2, 4, *range(6, 14)]  # as pictures came; the fourth of seven rows failed
    table = read_table(path).take(order).drop_columns(["offset", "size"])
    pa.parquet.write_table(table, path)
    found = opened(tmp_path)
    places = {found.captions[row][0]: row for row in range(12)}
    for row in range(12):
        assert found.picture(places[expected.captions[row][0]]).tobytes() == expected.picture(row).tobytes()


def test_a_caption_that_a_model_wrote_is_taken_as_often_as_asked_where_there_is_one(folder: Path) -> None:
    examples = opened(folder, columns=[SYNTHETIC])
    written = examples.columns[SYNTHETIC]
    captions = Captions(examples.captions, written=written, synthetic=0.5)
    row = examples.endless_row([], [None], 100, 0)
    told = {draw: captions.drawn(0, draw.place, draw.row) for step in range(301) for draw in row.draws(step)}
    both = [text for draw, text in told.items() if written[draw.row] is not None][:20_000]
    assert len(both) == 20_000 and abs(sum(text.startswith("model") for text in both) / 20_000 - 0.5) < 0.01
    assert all(not text.startswith("model") for draw, text in told.items() if written[draw.row] is None)
    again = opened(folder, columns=[SYNTHETIC])
    resumed = Captions(again.captions, written=again.columns[SYNTHETIC], synthetic=0.5)
    for draw in again.endless_row([], [None], 100, 0).draws(217):
        assert resumed.drawn(0, draw.place, draw.row) == told[draw]
    only = Captions(examples.captions, written=written, synthetic=1.0)
    assert only.drawn(0, 1, 4) == "model's 0.4" and only.drawn(0, 1, 3) == "shard 0 row 3"
    assert captions.all([4]) == ["", "model's 0.4", "shard 0 row 4"] and only.all([3, 4])[1:] == [
        "model's 0.4",
        "shard 0 row 3",
    ]


def test_latents_and_texts_are_kept_in_a_file_for_each_shard(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "data", number, 5, ((16, 16), (16, 24)))
    examples, cache = opened(tmp_path / "data"), tmp_path / "cache"
    views = Views(examples.sizes, examples.digests, [(16, 16)], crops=2, seed=1)
    vae, device = models.vae(scaling_factor=0.7, shift_factor=0.1), torch.device("cpu")
    cached = LatentSource(vae, examples, views, 3, cache, batch_size=4)
    cached.fill(1, 2, show_progress=False)
    files = sorted(cache.glob("latents-*.safetensors"))
    assert len(files) == 3
    live, draws = LatentSource(vae, examples, views, 3), [Draw(place, 7 * place % 15) for place in range(15)]
    ours, theirs = (one.latents(one.read(draws), draws, device) for one in (cached, live))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    # a column more is no reason to encode anew, another picture is
    before = [file.stat().st_mtime_ns for file in files]
    path = tmp_path / "data" / "00001.parquet"
    pa.parquet.write_table(read_table(path).append_column("similarity", pa.array([0.3] * 6)), path)
    write(tmp_path / "data", 2, 6, ((16, 16), (16, 24)))
    again = opened(tmp_path / "data")
    LatentSource(vae, again, Views(again.sizes, again.digests, [(16, 16)], crops=2, seed=1), 3, cache).fill()
    assert [file.stat().st_mtime_ns for file in files] == before
    assert len(list(cache.glob("latents-*.safetensors"))) == 4


# ---- what is refused ----


def harmed(folder: Path, harm: str) -> None:
    stats = json.loads((folder / "00001_stats.json").read_text())
    if harm == "no table":
        (folder / "00001.parquet").unlink()
    elif harm == "no stats":
        (folder / "00001_stats.json").unlink()
    elif harm == "cut off":
        path = folder / "00001.tar"
        path.write_bytes(path.read_bytes()[:3000])
    elif harm == "rows":
        write_stats(folder / "00001_stats.json", {**stats, "count": stats["count"] + 1})
    elif harm == "successes":
        write_stats(folder / "00001_stats.json", {**stats, "successes": stats["successes"] - 1})
    elif harm == "no count":
        write_stats(folder / "00001_stats.json", {"count": 3})
    elif harm == "no words":
        path = folder / "00001.parquet"
        table = read_table(path)
        at = table.column_names.index("caption")
        captions = [*table.column("caption").to_pylist()[:-1], "  "]
        pa.parquet.write_table(table.set_column(at, "caption", pa.array(captions)), path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("no table", r"00001\.tar: got no 00001\.parquet beside it, expected both"),
        ("no stats", r"00001\.tar: got no 00001_stats\.json beside it, expected both, so the shard is not whole"),
        ("cut off", r"00001\.tar: got 3000 bytes, expected \d+; it is cut off"),
        ("rows", r"00001\.parquet: got 7 rows, expected 8 as its stats say"),
        ("successes", r"00001\.parquet: got 6 successes, expected 5 as its stats say"),
        ("no count", r"00001_stats\.json: 'successes', expected the counts of a shard"),
        ("no words", r"00001\.parquet: got no words in 'caption' of 000010006, expected a caption for each picture"),
    ],
)
def test_a_damaged_shard_is_named_when_it_is_first_read(tmp_path: Path, harm: str, message: str) -> None:
    write(tmp_path, 0, 6)
    write(tmp_path, 1, 6)
    harmed(tmp_path, harm)
    with pytest.raises(DataError, match=message):
        found = open_examples(str(tmp_path))
        assert found.captions[5] == ["shard 0 row 5"] or "the first shard is whole"
        found.captions[6]


def test_what_shards_cannot_give_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            open_examples(str(folder), **options)

    refused(r"00000\.parquet: got the columns \[.*\], expected 'aesthetic' too", columns=["aesthetic"])
    refused(r"00000\.parquet: got the columns .* expected 'prompt' too", caption_column="prompt")
    refused("`on_error`: got 'skip' .* expected 'fail': .* `hubgen data filter` leaves rows out", on_error="skip")
    refused("held_out: got no shards, expected a folder of them for the split 'held_out'", split="held_out")
    refused("rows have one picture, expected also conditioning_image", beside=["conditioning_image"])
    examples = opened(folder)
    small = Views(examples.sizes, examples.digests, [(16, 16)], names=examples.file_names)
    with pytest.raises(DataError, match=r"00000\.tar 000000003: got 8x8 pixels, expected at least 16x16"):
        small.view(3, 0)
    write(tmp_path, 0, 7)
    sizes = read_table(tmp_path / "00000.parquet")
    wide = sizes.set_column(sizes.column_names.index("width"), "width", pa.array([9] * len(sizes), pa.int32()))
    pa.parquet.write_table(wide, tmp_path / "00000.parquet")
    with pytest.raises(DataError, match=r"00000\.tar 000000000: got 8x8 pixels, expected 9x8 as 00000\.parquet says"):
        opened(tmp_path).picture(0)


# ---- URLs ----


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """The shards in fsspec's file system in memory."""
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/train", recursive=True)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def copied(copies: Path) -> set[str]:
    return {path.name[:5] for path in copies.glob("shards/*/0*")}


def test_shards_of_a_url_are_copied_as_they_are_needed_and_read_as_those_of_a_folder(
    bucket: str, folder: Path, tmp_path: Path
) -> None:
    examples, local = open_examples(bucket, cache_dir=tmp_path), opened(folder)
    assert isinstance(examples, ShardExamples) and copied(tmp_path) == {"00000"}
    for row in (0, 700, 1999):
        assert examples.captions[row] == local.captions[row] and examples.digests[row] == local.digests[row]
        assert examples.picture(row).tobytes() == local.picture(row).tobytes()
    assert copied(tmp_path) == {"00000", "00001", "00003"} and examples.fingerprint == local.fingerprint
    fsspec.filesystem("memory").rm("/bucket/train/00001.tar")
    fsspec.filesystem("memory").rm("/bucket/train/00001.parquet")
    with pytest.raises(DataError, match="bucket/train/00001_stats.json: got no 00001.tar beside it"):
        open_examples(bucket, cache_dir=tmp_path)
    assert examples.captions[710] == local.captions[710]  # what is copied stays
    with pytest.raises(DataError, match="memory://nothing.*expected a shard folder"):
        open_examples("memory://nothing", cache_dir=tmp_path)
    with pytest.raises(DataError, match="nosuch"):
        open_examples("nosuch://bucket", cache_dir=tmp_path)


def test_the_next_window_is_copied_ahead_and_old_shards_make_room(bucket: str, folder: Path, tmp_path: Path) -> None:
    examples = opened(bucket, tmp_path, window=1, most=2)
    row = examples.endless_row([], [None], 100, 0)
    first = examples.part_of(row.draws(0)[0].row)
    plain = opened(folder, window=1)
    (after,) = {plain.part_of(draw.row) for draw in plain.endless_row([], [None], 100, 0).draws(COUNTS[first] // 100)}
    deadline = time.monotonic() + 20
    while f"{after:05d}" not in copied(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for step in range(20):
        assert all(examples.captions[draw.row] for draw in row.draws(step))
    assert len(copied(tmp_path)) <= 3  # two, and one that a thread is at
    with pytest.raises(DataError, match="`most`: got 2 shards that stay, expected at least 4, two windows"):
        opened(bucket, tmp_path, window=2, most=2)
