import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from hubgen.data.errors import DataError
from hubgen.data.web.shards import Outcome, key_of, open_shards, read_table, write_shard, write_stats
from hubgen.data.webdataset import WebDataset
from tests.data.web.site import file_of, picture


def write(folder: Path, number: int = 0, count: int = 5, rows: int = 10) -> None:
    """A shard whose every third row failed."""
    folder.mkdir(exist_ok=True)
    table = pa.table(
        {"caption": [f"caption {n}" for n in range(count)], "url": [f"http://a/{n}" for n in range(count)]}
    )
    outcomes = [
        Outcome("failed_to_download", "HTTP Error 404: Not Found")
        if n % 3 == 2
        else Outcome("success", None, file_of(picture(8, 8, seed=n)), 8, 8, 8, 8, "{}", "00")
        for n in range(count)
    ]
    stats = write_shard(folder, number, rows, table, outcomes)
    write_stats(folder / f"{number:05d}_stats.json", stats)


def test_keys_are_those_of_img2dataset() -> None:
    def theirs(number: int, row: int, rows: int) -> str:
        digits = math.ceil(math.log10(rows))
        return "{0:0{1}d}".format(10**digits * number + row, digits + 5)

    places = [(0, 0, 10_000), (12, 9_999, 10_000), (99_999, 3, 1000), (7, 11, 12), (123_456, 1, 10), (5, 0, 1)]
    assert [key_of(*place) for place in places] == [theirs(*place) for place in places]
    assert key_of(12, 34, 10_000) == "000120034"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path, 1)
    first, second = open_shards(tmp_path)
    rows = second.read().to_pylist()
    assert [row["key"] for row in rows] == ["000010", "000011", "000012", "000013", "000014"]
    assert [row["caption"] for row in rows] == [f"caption {n}" for n in range(5)]
    for n, row in enumerate(rows):
        if n == 2:
            assert (row["status"], row["offset"], row["size"]) == ("failed_to_download", None, None)
        else:
            assert first.picture(row["offset"], row["size"]) == file_of(picture(8, 8, seed=n))
    assert first.read(["key", "size"]).column_names == ["key", "size"]
    assert len(WebDataset(str(tmp_path))) == 8


def test_tables_without_places_are_read_by_the_headers_of_the_tar(tmp_path: Path) -> None:
    write(tmp_path)
    whole = open_shards(tmp_path)[0].read()
    table = read_table(tmp_path / "00000.parquet").select(
        [n for n in whole.column_names if n not in ("offset", "size")]
    )
    shuffled = table.take([3, 0, 4, 2, 1])  # as img2dataset has them: whoever came first
    pa.parquet.write_table(shuffled, tmp_path / "00000.parquet")
    stats = json.loads((tmp_path / "00000_stats.json").read_text())
    del stats["tar_bytes"]
    write_stats(tmp_path / "00000_stats.json", stats)
    read = open_shards(tmp_path)[0].read()
    assert read.to_pylist() == whole.take([3, 0, 4, 2, 1]).to_pylist()
    assert open_shards(tmp_path)[0].read(["offset"]).to_pydict() == {"offset": read.column("offset").to_pylist()}


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    for name in ("00000.tar", "00000.parquet", "00000_stats.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def cut(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(length)


def without_places(folder: Path) -> None:
    table = read_table(folder / "00000.parquet")
    pa.parquet.write_table(table.drop_columns(["offset", "size"]), folder / "00000.parquet")


def truncated_as_img2dataset_writes_it(folder: Path) -> None:
    without_places(folder)
    cut(folder / "00000.tar", 700)


def row_less(folder: Path) -> None:
    table = read_table(folder / "00000.parquet")
    pa.parquet.write_table(table.slice(1), folder / "00000.parquet")


def picture_less(folder: Path) -> None:
    table = read_table(folder / "00000.parquet")
    places = [None, *table.column("offset").to_pylist()[1:]]
    where = table.column_names.index("offset")
    pa.parquet.write_table(table.set_column(where, "offset", pa.array(places, pa.int64())), folder / "00000.parquet")


def doubled(folder: Path) -> None:
    for path in list(folder.glob("00000*")):
        shutil.copyfile(path, folder / path.name.replace("00000", "00001"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "00000.parquet").unlink(), "00000.tar: got no 00000.parquet beside it"),
        (lambda folder: (folder / "00000.tar").unlink(), "00000.parquet: got no 00000.tar beside it"),
        (lambda folder: (folder / "00000_stats.json").unlink(), "got no 00000_stats.json beside it"),
        (lambda folder: cut(folder / "00000.tar", 3000), "00000.tar: is cut off at 3000, expected"),
        (truncated_as_img2dataset_writes_it, "00000.tar: is cut off at 700, expected"),
        (lambda folder: cut(folder / "00000.parquet", 500), "00000.parquet: not a readable parquet file"),
        (row_less, "00000.parquet: got 4 rows, expected 5"),
        (picture_less, "00000.tar: got 3 pictures, expected 4"),
        (doubled, "00001.parquet: got the key 000000 of 00000.parquet, expected each key once"),
        (lambda folder: (folder / ".ready-00003").mkdir(), "a run was stopped before this shard was in its place"),
        (
            lambda folder: (folder / "00000_stats.json").write_text("{}"),
            "00000_stats.json: got no whole number `count`",
        ),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_a_line(harm: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write(folder)
    assert len(open_shards(folder)) == 1
    harm(folder)
    with pytest.raises(DataError) as caught:
        open_shards(folder)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_twice_in_a_table_is_found(tmp_path: Path) -> None:
    write(tmp_path)
    table = read_table(tmp_path / "00000.parquet")
    pa.parquet.write_table(table.take([0, 1, 2, 3, 3]), tmp_path / "00000.parquet")
    with pytest.raises(DataError, match="got the key 000003 twice"):
        open_shards(tmp_path)
