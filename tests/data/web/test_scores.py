import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hubgen.data.errors import DataError
from hubgen.data.web.engines.engine import Report, run
from hubgen.data.web.scoring.scores import Joined, LaionHash, Language, Part, Score
from hubgen.data.web.shards import open_shards
from tests.data.web.pairs import write_pairs


def scored(folder: Path, *parts: Part) -> Report:
    shards = open_shards(folder)
    stage = pickle.loads(pickle.dumps(Score(parts)))  # as an engine sends it
    report = run(stage, stage.works(shards), folder)
    assert report.failed == {}
    return report


def column(folder: Path, name: str) -> list[Any]:
    return [value for shard in open_shards(folder) for value in shard.read([name]).column(name).to_pylist()]


# ---- of texts and addresses ----


def test_the_hash_is_laions(tmp_path: Path) -> None:
    write_pairs(tmp_path, {"url": ["http://a/b.jpg", None], "caption": ["cat", None]}, failed={(0, 1)})
    scored(tmp_path, LaionHash())
    assert column(tmp_path, "hash")[0] == 6072314784749653518
    assert open_shards(tmp_path)[0].read().schema.field("hash").type == pa.int64()


def test_languages_are_those_of_the_captions(tmp_path: Path) -> None:
    texts = ["a cat on a red sofa in the garden", "ein Hund läuft durch den großen Garten", None]
    write_pairs(tmp_path, {"caption": texts}, failed={(0, 0)})
    scored(tmp_path, Language("cld3"))
    assert column(tmp_path, "language") == ["en", "de", None]
    scores = column(tmp_path, "language_score")
    assert scores[2] is None and all(0.8 < score <= 1 for score in scores[:2])


def test_a_folder_is_scored_bit_by_bit_and_nothing_is_written_over(tmp_path: Path) -> None:
    write_pairs(tmp_path, {"score": [1, 2]}, {"score": [3]})
    before = [shard.read() for shard in open_shards(tmp_path)]
    scored(tmp_path, LaionHash())
    scored(tmp_path, Language())
    assert scored(tmp_path, LaionHash()).there == 2
    for shard, table in zip(open_shards(tmp_path), before, strict=True):
        assert shard.read().drop_columns(["hash", "language", "language_score"]).equals(table)
        assert shard.stats["scored"] == {name: len(table) for name in ("hash", "language", "language_score")}
    with pytest.raises(DataError, match='was made with detector "cld3", and this run has "fasttext"'):
        scored(tmp_path, Language("fasttext"))
    with pytest.raises(DataError, match="00000.parquet: has a column 'hash' already, expected none: it would be lost"):
        Score((LaionHash(), Language())).works(open_shards(tmp_path))


def test_a_column_that_is_read_must_be_there(tmp_path: Path) -> None:
    write_pairs(tmp_path, {"score": [1, 2]})
    table = open_shards(tmp_path)[0].read().drop_columns(["caption"])
    pa.parquet.write_table(table, tmp_path / "00000.parquet")
    with pytest.raises(DataError, match="00000.parquet: got the columns .*, expected 'caption' too"):
        scored(tmp_path, Language())


# ---- of other tables ----


def table_of(path: Path, **columns: Any) -> Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


def test_a_join_with_a_third_missing_keeps_every_row(tmp_path: Path) -> None:
    write_pairs(tmp_path / "s", {"number": list(range(9))}, {"number": [9, 10, 11]}, failed={(0, 4)})
    shards = open_shards(tmp_path / "s")
    scored(tmp_path / "s", LaionHash())
    hashes = column(tmp_path / "s", "hash")
    there = [row for row in range(12) if row % 3 != 1]
    path = table_of(
        tmp_path / "punsafe.parquet",
        hash=[hashes[row] for row in reversed(there)] + [hashes[0], None],
        punsafe=pa.array([row / 100 for row in reversed(there)] + [0.99, 0.98], pa.float32()),
        more=[[str(row)] for row in reversed(there)] + [["x"], ["y"]],
        url=["elsewhere"] * (len(there) + 2),
    )
    scored(tmp_path / "s", Joined.of(path))
    expected = [None if row % 3 == 1 else pytest.approx(row / 100) for row in range(12)]
    assert column(tmp_path / "s", "punsafe") == expected  # of two rows with one hash, the first
    assert column(tmp_path / "s", "more") == [None if row % 3 == 1 else [str(row)] for row in range(12)]
    assert column(tmp_path / "s", "number") == list(range(12))
    assert [len(shard.read()) for shard in open_shards(tmp_path / "s")] == [len(shard.read()) for shard in shards]


def test_a_hash_that_shards_do_not_have_is_computed_for_a_join(tmp_path: Path) -> None:
    write_pairs(tmp_path / "s", {"url": ["http://a/b.jpg", "http://a/c.jpg"], "caption": ["cat", "cat"]})
    path = table_of(tmp_path / "t.parquet", hash=[6072314784749653518], similarity=[0.5])
    scored(tmp_path / "s", Joined.of(path))
    assert column(tmp_path / "s", "similarity") == [0.5, None]
    assert "hash" not in open_shards(tmp_path / "s")[0].read().column_names


@pytest.mark.parametrize("key", ["url", "key"])
def test_addresses_and_keys_join_too(key: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "s", {"url": ["http://a/0", None, "http://a/2"]})
    path = table_of(tmp_path / "t.parquet", url=["http://a/2", None], key=["000002", None], grade=[1, 2], other=[3, 4])
    scored(tmp_path / "s", Joined.of(path, key, ["grade"]))
    assert column(tmp_path / "s", "grade") == [None, None, 1]
    assert "other" not in open_shards(tmp_path / "s")[0].read().column_names


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"id": [1], "a": [1]}, {}, "t.parquet: got the columns ['id', 'a'], expected hash, url, key to join by"),
        ({"url": ["a"], "a": [1]}, {"on": "hash"}, "expected hash to join by"),
        ({"url": ["a"]}, {}, "expected some beside the keys"),
        ({"url": ["a"], "a": [1]}, {"names": ["b"]}, "expected 'b', to add, among them"),
        ({"hash": ["x"], "a": [1]}, {}, "t.parquet: got string in 'hash', expected int64"),
        ({"hash": [[1]], "a": [1]}, {}, "t.parquet: got list<"),
        ({"url": ["a"], "number": [1]}, {}, "00000.parquet: has a column 'number' already"),
    ],
)
def test_a_table_that_cannot_be_joined_is_refused(
    columns: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "s", {"number": [1]})
    path = table_of(tmp_path / "t.parquet", **columns)
    with pytest.raises(DataError) as caught:
        scored(tmp_path / "s", Joined.of(path, **options))
    assert said in str(caught.value) and "\n" not in str(caught.value)
