import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hubgen.cli import main
from hubgen.data.errors import DataError
from hubgen.data.web.engines.engine import run
from hubgen.data.web.filtering.filters import Filter, write_report
from hubgen.data.web.filtering.hash_lists import HashList
from hubgen.data.web.filtering.where import parse_where
from hubgen.data.web.rules import load_recipe, recipe_of
from hubgen.data.web.shards import open_shards, read_stats
from hubgen.data.webdataset import WebDataset
from hubgen.formats.digests import file_digest
from tests.data.web.pairs import write_pairs

TAGGED = {
    "similarity": pa.array([0.27, 0.29, 0.31, 0.31, 0.31, 0.27, None, 0.31], pa.float32()),
    "language": ["en", "en", "en", "en", "en", "de", "en", "en"],
    "nsfw": ["UNLIKELY", "UNLIKELY", "UNLIKELY", "UNSURE", "NSFW", "UNSURE", "UNLIKELY", "UNSURE"],
    "under_age_prompts": [[5, 6]] * 8,
    "animal_prompts": [[1, 2]] * 7 + [[2, 22]],
    "caption": ["a cat", "a cat", "a child", "a child", "a beach", "a beach", "a dog", "a farm"],
}


def filtered(source: Path, out: Path, **asked: Any) -> dict[str, Any]:
    shards = open_shards(source)
    stage = pickle.loads(pickle.dumps(Filter.of(shards, **asked)))  # as an engine sends it
    assert run(stage, stage.works(shards), out).failed == {}
    return write_report(stage, out)


def counted(report: dict[str, Any]) -> dict[str, int]:
    assert report["rows"] == sum(report["dropped"].values()) + report["kept"]
    return {name: number for name, number in report["dropped"].items() if number}


def keys(folder: Path) -> list[list[str]]:
    return [shard.read(["key"]).column("key").to_pylist() for shard in open_shards(folder)]


def test_a_recipe_leaves_what_its_rules_leave(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "shards", TAGGED, failed={(0, 1)})
    report = filtered(source, tmp_path / "5b", recipe=load_recipe("laion-5b"))
    # Row 5 is German, so 0.27 is enough; row 2 has a child, and is UNLIKELY; row 7's second prompt is an animal.
    assert keys(tmp_path / "5b") == [["000002", "000004", "000005", "000007"]]
    assert counted(report) == {"no_picture": 1, "similarity": 2, "under_age": 1}
    report = filtered(source, tmp_path / "400m", recipe=load_recipe("laion-400m"))
    assert keys(tmp_path / "400m") == [["000002", "000004"]]
    assert counted(report) == {"no_picture": 1, "similarity": 3, "under_age": 1, "animals": 1}


def test_what_stays_is_as_it_was(tmp_path: Path) -> None:
    columns = {"score": pa.array([0.5, 0.1, None, 0.9, 0.3], pa.float32()), "caption": ["a", "b", "c", "d", "é"]}
    source = write_pairs(tmp_path / "shards", columns, {"score": pa.array([0.9, 0.1], pa.float32())}, ending="webp")
    filtered(source, tmp_path / "kept", where=parse_where("score >= 0.3 or score is null"))
    for before, after in zip(open_shards(source), open_shards(tmp_path / "kept"), strict=True):
        rows = {row["key"]: row for row in before.read().to_pylist()}
        assert after.read().schema == before.read().schema
        for row in after.read().to_pylist():
            known = rows[row["key"]]
            assert after.picture(row["offset"], row["size"]) == before.picture(known["offset"], known["size"])
            assert row | {"offset": 0} == known | {"offset": 0}
    with tarfile.open(tmp_path / "kept" / "00000.tar") as tar:
        names = [f"00000{row}.{kind}" for row in (0, 2, 3, 4) for kind in ("webp", "json", "txt")]
        assert tar.getnames() == names
        content = json.loads(tar.extractfile("000004.json").read())  # type: ignore[union-attr]
        assert content["score"] == pytest.approx(0.3) and content["caption"] == "é" and "offset" not in content
    assert len(WebDataset(str(tmp_path / "kept"))) == 5
    stats = read_stats(tmp_path / "kept" / "00000_stats.json")
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (4, 4, 0)
    assert (stats["rows_before"], stats["status_dict"]) == (5, {"success": 4})


def test_a_shard_that_loses_all_rows_is_still_one(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "shards", {"score": [1, 2]}, {"score": [3, 4]})
    report = filtered(source, tmp_path / "kept", where=parse_where("score >= 3"))
    assert keys(tmp_path / "kept") == [[], ["000010", "000011"]] and report["shards"] == 2
    assert filtered(tmp_path / "kept", tmp_path / "again", where=parse_where("score >= 4"))["kept"] == 1
    before = read_stats(tmp_path / "again" / "00001_stats.json")["before"]
    assert [record["stage"] for record in before] == ["filter"]


def test_parts_of_a_condition_are_counted_and_rows_without_an_answer_by_themselves(tmp_path: Path) -> None:
    columns = {"score": pa.array([0.1, 0.5, None, 0.9, 0.8], pa.float32()), "side": pa.array([9, 9, 9, 1, None])}
    source = write_pairs(tmp_path / "shards", columns, failed={(0, 1)})
    report = filtered(source, tmp_path / "kept", where=parse_where("score >= 0.3 and not side < 5"))
    assert report["kept"] == 0
    names = {"no_picture": 1, "score >= 0.3": 1, "score >= 0.3 (null)": 1, "not side < 5": 1, "not side < 5 (null)": 1}
    assert counted(report) == names
    assert json.loads((tmp_path / "kept" / "report.json").read_text()) == report


def test_the_top_is_that_of_all_shards_and_part_of_the_settings(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "shards", {"score": [0.1, 0.2, 0.9, 0.8]}, {"score": [0.7, 0.3, 0.4, 0.6]})
    report = filtered(source, tmp_path / "kept", where=parse_where("top(score, 0.3)"))
    assert keys(tmp_path / "kept") == [["000002", "000003"], ["000010"]] and report["kept"] == 3
    write_pairs(source, {"score": [0.1, 0.2, 0.9, 0.8]}, {"score": [0.75, 0.3, 0.4, 0.6]})
    with pytest.raises(DataError, match=r"was made with top\(score, 3/10\) 0.7, and this run has 0.75"):
        filtered(source, tmp_path / "kept", where=parse_where("top(score, 0.3)"))


def test_datacomp_drops_by_sides_and_the_condition_by_score(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "shards", {"score": [1, 2, 3]})
    table = open_shards(source)[0].read()
    sides = {"original_width": [199, 601, 600], "original_height": [300, 200, 200]}
    for name, values in sides.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.int32()))
    pa.parquet.write_table(table, source / "00000.parquet")
    report = filtered(source, tmp_path / "kept", recipe=load_recipe("datacomp-basic"), where=parse_where("score > 3"))
    assert counted(report) == {"smaller_side": 1, "aspect_ratio": 1, "score > 3": 1}
    assert report["not_applied"] == []


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, ["file_size", "picture_format"]),
        ({"min_bytes": 4999, "formats": ["jpeg", "gif"]}, ["file_size", "picture_format"]),
        ({"min_bytes": 5000, "formats": ["jpeg", "webp"]}, []),
    ],
)
def test_rules_on_the_downloaded_files_are_named_where_nobody_applied_them(
    settings: dict[str, Any], left: list[str], tmp_path: Path
) -> None:
    record = {"stage": "download", "input": "a", "settings": settings, "output": "b"}
    source = write_pairs(tmp_path / "shards", TAGGED, stages=[record])
    assert filtered(source, tmp_path / "kept", recipe=load_recipe("laion-5b"))["not_applied"] == left
    assert filtered(tmp_path / "kept", tmp_path / "more", recipe=load_recipe("laion-5b"))["not_applied"] == left


# ---- hash lists ----


def test_listed_rows_go_unseen(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "shards", {"score": [1, 2, 3, 4]}, {"score": [5, 6]}, failed={(0, 3)})
    (tmp_path / "list.txt").write_text(
        f"# blocked\n\nhttp://a.org/0/0\n{1:064X}\nhttps://a.org/0/2\n{3:064x}\n{9:064x}\n"
    )
    pa.parquet.write_table(
        pa.table({"url": ["http://a.org/1/1", None], "sha256": [None, f"{100:064x}"], "why": ["a", "b"]}),
        tmp_path / "list.parquet",
    )
    lists = [tmp_path / "list.txt", tmp_path / "list.parquet"]
    (source / "00000.tar").write_bytes(bytes((source / "00000.tar").stat().st_size))  # pictures are not looked at
    report = filtered(source, tmp_path / "kept", hash_lists=lists, where=parse_where("score != 3"))
    assert counted(report) == {"no_picture": 1, "hash_list": 4, "score != 3": 1} and report["kept"] == 0


def test_a_long_list_finds_what_a_set_finds(tmp_path: Path) -> None:
    listed = [file_digest_of(number) for number in range(0, 3000, 3)]
    (tmp_path / "list.txt").write_text("\n".join(listed))
    table = pa.table({"md5": [file_digest_of(number) for number in range(3000)] + [None, ""]})
    names = HashList.read([tmp_path / "list.txt"]).names(table)
    assert names.tolist() == [number % 3 == 0 for number in range(3000)] + [False, False]


def file_digest_of(number: int) -> str:
    import hashlib

    return hashlib.md5(str(number).encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "list.txt: found no line, expected an MD5, SHA-256 or SHA-512"),
        ("http://a.org/1\nftp://a.org/1\n", "list.txt: line 2: found 'ftp://a.org/1', expected an MD5"),
        ("0123", "list.txt: line 1: found '0123'"),
        ("z" * 64, "list.txt: line 1: found 'zzz"),
        (
            "0" * 32,
            "00000.parquet: found no column md5, and the hash list names md5; expected it; `hubgen data download",
        ),
        (None, "list.txt: cannot be read"),
    ],
)
def test_a_list_that_cannot_match_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "shards", {"score": [1]})
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    with pytest.raises(DataError) as caught:
        Filter.of(open_shards(source), hash_lists=[tmp_path / "list.txt"])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_without_a_known_column_is_no_list(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"link": ["a"]}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"list.parquet: found the columns \['link'\], expected one of md5, sha256"):
        HashList.read([tmp_path / "list.parquet"])


# ---- commit ----


def content_of(folder: Path) -> dict[str, str]:
    """Digests of files; of stats all but the times."""
    found = {path.name: file_digest(path) for path in folder.glob("0*") if path.suffix != ".json"}
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        found[path.name] = json.dumps({name: content[name] for name in sorted(content) if "time" not in name and
                                       name != "duration"})  # fmt: skip
    return found


class Killed(BaseException):
    """Stands for the end of the process: nothing of it is caught."""


def test_a_run_cut_at_any_rename_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pairs(tmp_path / "shards", {"score": [1, 2, 3]}, {"score": [4, 5]})
    asked = {"where": parse_where("score != 2 and top(score, 0.9)")}
    filtered(source, tmp_path / "whole", **asked)
    expected, real, cut = content_of(tmp_path / "whole"), os.replace, 0

    def until(last: int) -> Callable[[Any, Any], None]:
        calls = 0

        def replace(source: Any, target: Any) -> None:
            nonlocal calls
            if calls == last:
                raise Killed
            calls += 1
            real(source, target)

        return replace

    while True:
        monkeypatch.setattr(os, "replace", until(cut))
        try:
            filtered(source, tmp_path / f"{cut}", **asked)
            break
        except Killed:
            monkeypatch.setattr(os, "replace", real)
            filtered(source, tmp_path / f"{cut}", **asked)
            assert content_of(tmp_path / f"{cut}") == expected, cut
        cut += 1
    assert cut == 9  # of each shard the folder, tar, table and stats; the report


# ---- the command ----


def test_the_command_says_what_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_pairs(tmp_path / "shards", TAGGED, failed={(0, 1)})
    command = ["data", "filter", str(source), "--recipe", "laion-5b", "--where", "width > 18", "--out"]
    assert main([*command, str(tmp_path / "kept")]) == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'kept'}: 3 of 8 rows in 1 shards (report.json)" in said.out
    assert "dropped: no_picture 1, similarity 2, under_age 1, width > 18 1" in said.out
    assert "warning: file_size, picture_format: not applied" in said.err
    assert main([*command[:-2], "width > 19", "--out", str(tmp_path / "kept")]) == 2
    assert 'was made with where "width > 18", and this run has "width > 19"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--where", "similarty >= 0.28"], "--where: character 1: found 'similarty', expected a column of"),
        (["--where", "similarity >="], "--where: character 14: found the end, expected a number"),
        (["--where", "top(similarity, 2)"], "--where: character 17: found '2', expected a share above 0, up to 1"),
        (["--recipe", "laion-6b"], "recipe laion-6b: found none of that name, expected datacomp-basic"),
        (["--recipe", "mine.yaml"], "similarity: least: found 1.5, expected a number from -1 to 1"),
        (["--recipe", "laion-5b"], "no column nsfw, expected it for the rule under_age; `hubgen data score SHARDS "
                                   "--scorer clip:ID --nsfw` makes it"),
        (["--hash-list", "none.txt"], "none.txt: cannot be read"),
        ([], "expected --recipe, --where or --hash-list; got none of them"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_work(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "shards", {name: TAGGED[name] for name in ("similarity", "language", "caption")})
    (tmp_path / "mine.yaml").write_text("filter: [{similarity: {least: 1.5}}]")
    assert main(["data", "filter", "shards", "--out", "kept", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "kept").exists()


def test_shards_are_not_filtered_onto_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_pairs(tmp_path / "shards", {"score": [1]}))
    assert main(["data", "filter", source, "--where", "score > 1", "--out", source]) == 2
    assert "is the folder of the shards, expected another one" in capsys.readouterr().err


def test_a_recipe_without_rules_for_shards_is_refused(tmp_path: Path) -> None:
    shards = open_shards(write_pairs(tmp_path / "shards", {"score": [1]}))
    with pytest.raises(DataError, match="recipe mine: found no rule of download or filter"):
        Filter.of(shards, recipe=recipe_of({"crawl": ["has_alt"]}, "mine", "mine"))
