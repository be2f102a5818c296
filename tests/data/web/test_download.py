import hashlib
import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from hubgen.cli import main
from hubgen.data.web.downloading.download import Columns, Download, Manners
from hubgen.data.web.downloading.fetch import Limits
from hubgen.data.web.downloading.resize import Resizing
from hubgen.data.web.engines.engine import run
from hubgen.data.web.shards import open_shards
from tests.data.web import layout
from tests.data.web.site import Answer, Site, file_of, in_turn, picture, reply, serving

QUICK = Limits(timeout=2, deadline=5, retries=1, backoff=0.01)
HERE = Manners(allowed_hosts=("127.0.0.1",), threads=4)


def table(path: Path, **columns: list[Any]) -> Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


def download(source: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    """Downloads with short waits; the rows."""
    stage = replace(Download(limits=QUICK, manners=HERE, resizing=Resizing(16)), **changes)
    report = run(stage, stage.works(source), out)
    assert report.failed == {}
    return [row for shard in open_shards(out) for row in shard.read().to_pylist()]


def files_of(folder: Path) -> dict[str, bytes]:
    """The tars and tables of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*")) if path.suffix != ".json"}


# ---- the layout ----

DIFFERENCES = {
    # img2dataset does not turn pictures as their EXIF says
    "/turned.jpg": ("width", "height", "original_width", "original_height", "exif"),
    # it has OpenCV's own words here
    "/empty.jpg": ("error_message",),
    # the same facts, in exifread's words
    "/print.tiff": ("exif",),
}


def ours(folder: Path, site: Site, mode: str) -> dict[str, Any]:
    source = folder / "urls.parquet"
    layout.candidates(site, source)
    stage = Download(
        resizing=Resizing(layout.SIZE, mode), limits=replace(QUICK, retries=0), manners=HERE, rows=layout.ROWS
    )
    assert run(stage, stage.works(source), folder / "out").failed == {}
    return layout.described(folder / "out", site)


def test_shards_are_those_of_img2dataset(tmp_path: Path) -> None:
    record = json.loads(layout.RECORD.read_text(encoding="utf-8"))
    with serving(layout.answers()) as site:
        found = ours(tmp_path, site, layout.FULL)
    expected = record["modes"][layout.FULL]
    assert len(record["urls"]) == 30 and list(found) == list(expected) == ["00000", "00001", "00002"]
    for name, shard in expected.items():
        mine = found[name]
        # Columns come in the same order with the same types; then ours.
        assert mine["columns"] == shard["columns"] | {"offset": "int64", "size": "int64"}
        assert list(mine["columns"]) == [*shard["columns"], "offset", "size"]
        assert mine["json_fields"] == shard["json_fields"]
        assert mine["members"] == shard["members"] and mine["texts"] == shard["texts"]
        for row, theirs in zip(mine["rows"], shard["rows"], strict=True):
            places = (row.pop("offset"), row.pop("size"))
            assert (None in places) == (theirs["status"] != "success")
            for column in DIFFERENCES.get(theirs["url"], ()):
                assert row.pop(column) != theirs.pop(column), (theirs["url"], column)
            assert row == theirs
        counts = ("count", "successes", "failed_to_download", "failed_to_resize")
        assert [mine["stats"][field] for field in counts] == [shard["stats"][field] for field in counts]
        assert sum(mine["stats"]["status_dict"].values()) == shard["stats"]["count"]
        assert list(mine["stats"])[:5] == list(shard["stats"])
        same = {word: n for word, n in shard["stats"]["status_dict"].items() if "OpenCV" not in word}
        assert {word: mine["stats"]["status_dict"][word] - n for word, n in same.items()} == {
            word: int(word == "Image decoding error" and name == "00001") for word in same
        }


@pytest.mark.parametrize("mode", [mode for mode in layout.MODES if mode != layout.FULL])
def test_sides_are_those_of_img2dataset(mode: str, tmp_path: Path) -> None:
    record = json.loads(layout.RECORD.read_text(encoding="utf-8"))
    with serving(layout.answers()) as site:
        found = layout.sides(ours(tmp_path, site, mode))
    expected = record["modes"][mode]
    turned = list(expected)[-1]
    if mode in ("no", "keep_ratio_largest"):
        assert found[turned] == expected[turned][::-1]  # it stands upright here
        found[turned] = expected[turned]
    assert found == expected


def test_the_tar_is_in_the_order_of_the_rows_and_offsets_are_those_of_the_pictures(tmp_path: Path) -> None:
    def late(handler: Any) -> None:
        import time

        time.sleep(0.4)
        reply(file_of(picture(20, 20)))(handler)

    answers: dict[str, Answer] = {"/0.jpg": late} | {
        f"/{n}.jpg": reply(file_of(picture(20, 20, seed=n))) for n in (1, 2, 3)
    }
    with serving(answers) as site:
        source = table(tmp_path / "c.parquet", url=[site.url(path) for path in answers], text=["a", "b", "c", "d"])
        rows = download(source, tmp_path / "out")
    shard = open_shards(tmp_path / "out")[0]
    with tarfile.open(shard.tar) as tar:
        assert [m.name for m in tar] == [f"{row['key']}.{end}" for row in rows for end in ("jpg", "json", "txt")]
        for row in rows:
            inside = tar.extractfile(f"{row['key']}.jpg")
            assert inside is not None and inside.read() == shard.picture(row["offset"], row["size"])
    assert [row["sha256"] for row in rows] == [
        hashlib.sha256(file_of(picture(20, 20, seed=n))).hexdigest() for n in range(4)
    ]


def test_datasets_and_webdataset_read_a_shard(tmp_path: Path) -> None:
    import datasets
    import webdataset

    with serving({"/a.jpg": reply(file_of(picture(40, 20))), "/b.jpg": reply(file_of(picture(20, 40)))}) as site:
        urls = [site.url(path) for path in ("/a.jpg", "/none.jpg", "/b.jpg")]
        rows = download(table(tmp_path / "c.parquet", url=urls, text=["a", "b", "c"]), tmp_path / "out")
    tar = str(tmp_path / "out" / "00000.tar")
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": tar}, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["txt"] == ["a", "c"] and [image.size for image in loaded["jpg"]] == [(32, 16), (16, 32)]
    assert [entry["key"] for entry in loaded["json"]] == [rows[0]["key"], rows[2]["key"]]
    read = list(webdataset.WebDataset(tar, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [rows[0]["key"], rows[2]["key"]]
    table_read = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table_read["status"] == ["success", "failed_to_download", "success"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "csv.gz", "jsonl.gz"])
def test_tables_of_all_kinds_give_the_same_shards(ending: str, tmp_path: Path) -> None:
    import gzip

    with serving({"/a.jpg": reply(file_of(picture(20, 20)))}) as site:
        rows = [{"text": f"{n}, a", "url": site.url("/a.jpg"), "uid": f"u{n}"} for n in range(5)]
        separator = "\t" if ending == "tsv" else ","
        lines = [separator.join(rows[0]), *(separator.join(f'"{value}"' for value in row.values()) for row in rows)]
        text = "\n".join(map(json.dumps, rows) if "jsonl" in ending else lines).encode() + b"\n"
        path = tmp_path / f"c.{ending}"
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        download(path, tmp_path / "one", rows=2)
        download(table(tmp_path / "c.parquet", **columns), tmp_path / "two", rows=2)
    for name in ("00000", "00001", "00002"):
        for kind in ("tar", "parquet"):
            assert (tmp_path / "one" / f"{name}.{kind}").read_bytes() == (
                tmp_path / "two" / f"{name}.{kind}"
            ).read_bytes()


# ---- pictures ----


def test_pictures_are_upright_on_white_and_of_eight_bits() -> None:
    from tests.data.web.site import turned

    to = Resizing(8, "no", encoding="png")
    upright = Image.open(io.BytesIO(to(turned(120, 80)).picture or b""))
    assert upright.size == (80, 120)
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    white = Image.open(io.BytesIO(to(file_of(clear, "PNG")).picture or b""))
    assert white.mode == "RGB" and white.getcolors() == [(81, (255, 255, 255))]
    deep = picture(30, 20, "I;16")
    shown = np.asarray(Image.open(io.BytesIO(to(file_of(deep, "PNG")).picture or b"")))
    assert np.array_equal(shown[..., 0], np.asarray(picture(30, 20, "L")))


def test_a_picture_that_needs_no_change_keeps_its_bytes_only_if_it_may() -> None:
    from tests.data.web.site import turned

    content = file_of(picture(8, 8))
    assert Resizing(8, skip_reencode=True)(content).picture == content
    assert Resizing(8)(content).picture != content
    for other in (file_of(picture(8, 8), "PNG"), turned(8, 8), file_of(picture(12, 10)), file_of(picture(8, 8, "L"))):
        assert Resizing(8, skip_reencode=True)(other).picture != other


def test_smaller_pictures_stay_as_they_are_if_asked() -> None:
    for mode in ("border", "keep_ratio", "center_crop", "keep_ratio_largest"):
        outcome = Resizing(64, mode, only_if_bigger=True)(file_of(picture(20, 30)))
        assert (outcome.width, outcome.height) == (20, 30)


def test_limits_keep_what_is_just_within_them() -> None:
    content = file_of(picture(40, 20))
    kept = [{"min_bytes": len(content)}, {"min_side": 20}, {"max_pixels": 800}, {"max_aspect_ratio": 2.0}]
    dropped = [{"min_bytes": len(content) + 1}, {"min_side": 21}, {"max_pixels": 799}, {"max_aspect_ratio": 1.99}]
    words = ["file too small", "image too small", "image area too large", "aspect ratio too large"]
    assert [Resizing(8, **options)(content).status for options in kept] == ["success"] * 4
    assert [Resizing(8, **options)(content).error_message for options in dropped] == words
    assert Resizing(8, formats=("png",))(content).error_message == "Image decoding error"


# ---- hashes, failed rows ----


def test_a_file_of_another_hash_is_not_kept(tmp_path: Path) -> None:
    good, bad = file_of(picture(20, 20)), file_of(picture(20, 20, seed=1))
    with serving({"/a.jpg": reply(good), "/b.jpg": reply(bad)}) as site:
        md5 = hashlib.md5(good).hexdigest()
        source = table(
            tmp_path / "c.parquet", url=[site.url("/a.jpg"), site.url("/b.jpg")], text=["a", "b"], md5=[md5, md5]
        )
        rows = download(source, tmp_path / "out", columns=Columns(digest="md5", expected_digest="md5"))
    assert [(row["status"], row["error_message"], row["md5"]) for row in rows] == [
        ("success", None, md5),
        ("failed_to_download", "hash mismatch", None),
    ]


def test_failed_rows_alone_are_asked_for_again(tmp_path: Path) -> None:
    content = file_of(picture(20, 20))
    answers = {f"/{n}.jpg": reply(content) for n in range(6)}
    late = reply(file_of(picture(20, 20, seed=9)))
    with serving(answers | {"/2.jpg": in_turn(reply(status=404), late), "/5.jpg": reply(status=410)}) as site:
        source = table(tmp_path / "c.parquet", url=[site.url(f"/{n}.jpg") for n in range(6)], text=list("abcdef"))
        download(source, tmp_path / "out", rows=2)
        first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}
        site.asked.clear()
        rows = download(source, tmp_path / "out", rows=2, retry_failed=True)
        del site.asked["/robots.txt"]
        assert dict(site.asked) == {"/2.jpg": 1, "/5.jpg": 1}
        download(source, tmp_path / "once", rows=2)
    assert [row["status"] == "success" for row in rows] == [True] * 5 + [False]
    assert files_of(tmp_path / "once") == files_of(tmp_path / "out")  # as if the picture had been there at once
    for name in ("00000.tar", "00000.parquet", "00000_stats.json"):  # without failures, and so not touched
        assert (tmp_path / "out" / name).read_bytes() == first[name]


# ---- the command ----


def test_the_command_says_what_was_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"/a.jpg": reply(file_of(picture(20, 20)))}) as site:
        source = table(tmp_path / "c.parquet", url=[site.url("/a.jpg"), site.url("/b.jpg")], text=["a", "b"])
        command = ["data", "download", str(source), "--out", str(tmp_path / "out"), "--size", "16"]
        assert main([*command, "--allow-host", "127.0.0.1"]) == 0
        said = capsys.readouterr()
        assert "1 pictures of 2 URLs in 1 shards" in said.out and "1 x HTTP Error 404: Not Found" in said.err
        assert main([*command, "--allow-host", "127.0.0.1", "--size", "32"]) == 2
        assert "was made with size 16, and this run has 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"link": ["a"], "text": ["b"]}, [], "expected 'url' too"),
        ({"url": ["a"]}, [], "expected 'text' too"),
        ({"url": ["a"], "text": ["b"], "status": ["c"]}, [], "'status', a name that shards use"),
        ({"url": ["a"], "text": ["b"]}, ["--encoding", "png", "--quality", "95"], "--quality: got 95, expected 0 to 9"),
        ({"url": ["a"], "text": ["b"]}, ["--user-agent", "a b"], "--user-agent: got 'a b'"),
        ({"url": ["a"], "text": ["b"]}, ["--retry-failed"], "has no shards yet"),
        ({"url": [], "text": []}, [], "got no rows"),
        ({"url": ["a"], "text": [["b"]]}, [], "got list<element: string> in 'text', expected text"),
    ],
)
def test_bad_input_is_one_line_before_any_request(
    columns: dict[str, list[str]], options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "c.parquet", **columns)
    assert main(["data", "download", str(source), "--out", str(tmp_path / "out"), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not list((tmp_path / "out").glob("0*"))


def test_an_engine_that_is_not_installed_says_how_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as Python marks what cannot be imported
    source = table(tmp_path / "c.parquet", url=["a"], text=["b"])
    assert main(["data", "download", str(source), "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert 'pip install "hubgen[ray]"' in capsys.readouterr().err
    stage = Download()
    with pytest.raises(ValueError, match="Ray is not installed"):
        run(stage, stage.works(source), tmp_path / "out", engine="ray")
