"""Folders of every kind, shards and data sets of the Hub give the same examples."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hubgen.data.errors import DataError
from hubgen.data.hub_dataset import stream_to_shards
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.sources import open_examples
from hubgen.data.webdataset import WebDataset
from tests.training.conftest import draw_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_pictures(tmp_path / "data" / "train", 7)
    return tmp_path / "data"


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, target: Path, captions: str = "txt") -> None:
    """Two shards with the pictures of a folder."""
    target.mkdir()
    for shard, part in enumerate((rows(folder)[:4], rows(folder)[4:])):
        with tarfile.open(target / f"{shard:03d}.tar", "w") as tar:
            for row in part:
                name = f"pictures/{Path(row['file_name']).stem}"
                add(tar, f"{name}.png", (folder / "train" / row["file_name"]).read_bytes())
                if captions == "txt":
                    add(tar, f"{name}.txt", "\n".join(row["captions"]).encode())
                add(tar, f"{name}.json", json.dumps({"text": row["text"], "number": row["file_name"]}).encode())


def assert_same_pictures(found: Any, expected: ImageTextFolder) -> None:
    assert len(found) == len(expected) and found.sizes == expected.sizes and found.digests == expected.digests
    assert found.texts == expected.texts
    for row in (3, 0, len(expected) - 1):
        assert found.picture(row).tobytes() == expected.picture(row).tobytes()


@pytest.mark.parametrize("spelling", ["{folder}", "{folder}/{{000..001}}.tar", "{folder}/*.tar"])
def test_shards_hold_what_a_folder_holds(folder: Path, tmp_path: Path, spelling: str) -> None:
    write_shards(folder, tmp_path / "shards")
    found = open_examples(spelling.format(folder=tmp_path / "shards"), columns=["number"])
    expected = ImageTextFolder(folder, split="train")
    assert isinstance(found, WebDataset)
    assert_same_pictures(found, expected)
    assert found.captions == expected.captions and found.columns["number"] == expected.file_names


def test_shards_without_text_files_have_captions_in_json_and_splits_are_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_shards(folder, tmp_path / "set" / "train", captions="json")
    found = open_examples(str(tmp_path / "set"), "train")
    assert_same_pictures(found, ImageTextFolder(folder, split="train"))
    with pytest.raises(DataError, match=r"pictures/0: got \['json', 'png'\], expected a caption .* in 'prompt' of"):
        open_examples(str(tmp_path / "set"), "train", caption_column="prompt")


def test_webdataset_itself_reads_the_same_shards(folder: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shards(folder, tmp_path / "shards")
    theirs = list(webdataset.WebDataset(str(tmp_path / "shards" / "{000..001}.tar"), shardshuffle=False))
    ours = WebDataset(str(tmp_path / "shards"))
    assert [one["__key__"] for one in theirs] == ours.file_names
    assert [one["txt"].decode().splitlines() for one in theirs] == ours.captions


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("cut", "not a whole tar file|damaged|cut off"),
        ("picture", r"pictures/4\.png: truncated or damaged picture"),
        ("missing", "no such file: .*002.tar; expected shards of a WebDataset"),
    ],
)
def test_damaged_shards_are_named(folder: Path, tmp_path: Path, harm: str, message: str) -> None:
    if harm == "picture":
        path = folder / "train" / "4.png"
        path.write_bytes(path.read_bytes()[:60])
    write_shards(folder, tmp_path / "shards")
    if harm == "cut":
        path = tmp_path / "shards" / "001.tar"
        path.write_bytes(path.read_bytes()[:700])
    source = str(tmp_path / "shards" / "{000..002}.tar") if harm == "missing" else str(tmp_path / "shards")
    with pytest.raises(DataError, match=message):
        open_examples(source)
    if harm == "picture":
        assert len(open_examples(source, on_error="skip")) == 6


def test_a_data_set_is_streamed_once_and_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from hubgen.data import hub_dataset

    monkeypatch.setattr(hub_dataset, "SHARD", 3)
    pictures = [{"image": str(folder / "train" / row["file_name"]), "text": row["text"]} for row in rows(folder)]
    built = datasets.Dataset.from_list(pictures).cast_column("image", datasets.Image())
    home = tmp_path / "home" / "owner" / "name"
    home.mkdir(parents=True)
    built.to_parquet(home / "train.parquet")
    write = hub_dataset._write_shard

    def killed(path: Path, part: list, column: str, first: int) -> None:
        if first >= 3:
            raise KeyboardInterrupt
        write(path, part, column, first)

    monkeypatch.setattr(hub_dataset, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        hub_dataset.stream_to_shards(str(home), "train", tmp_path / "cache")
    monkeypatch.setattr(hub_dataset, "_write_shard", write)
    copy = hub_dataset.stream_to_shards(str(home), "train", tmp_path / "cache")
    before = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.tar")}
    assert len(before) == 3
    assert hub_dataset.stream_to_shards(str(home), "train", tmp_path / "cache") == copy
    assert before == {path.name: path.stat().st_mtime_ns for path in copy.glob("*.tar")}
    assert_same_pictures(open_examples(str(copy)), ImageTextFolder(folder, split="train"))
    with pytest.raises(DataError, match="split 'test'"):
        hub_dataset.stream_to_shards(str(home), "test", tmp_path / "cache")


# ---- further pictures ----


def negative(picture: Image.Image) -> Image.Image:
    return picture.point(lambda value: 255 - value)


@pytest.fixture
def beside(folder: Path) -> Path:
    """The folder with the negative of each picture beside it."""
    (folder / "train" / "negatives").mkdir()
    found = []
    for row in rows(folder):
        with Image.open(folder / "train" / row["file_name"]) as opened:
            negative(opened.convert("RGB")).save(folder / "train" / "negatives" / row["file_name"])
        found.append({**row, "conditioning_image_file_name": f"negatives/{row['file_name']}"})
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def test_every_source_has_the_pictures_beside_the_pictures(beside: Path, tmp_path: Path) -> None:
    """A folder, shards, and a data set as the Hub has them."""
    datasets = pytest.importorskip("datasets")
    column = "conditioning_image"
    plain = open_examples(str(beside), "train", beside=[column])
    assert plain.left_out() == []
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for number, row in enumerate(rows(beside)):
            for name, file in (("png", row["file_name"]), (f"{column}.png", row[f"{column}_file_name"])):
                tar.add(beside / "train" / file, f"{number:03}.{name}")
            text = tmp_path / "caption.txt"
            text.write_text(row["text"])
            tar.add(text, f"{number:03}.txt")
    home = tmp_path / "home" / "owner" / "name"
    home.mkdir(parents=True)
    names = {"before": f"{column}_file_name", "after": "file_name"}
    built = datasets.Dataset.from_list(
        [
            {**{name: str(beside / "train" / row[key]) for name, key in names.items()}, "text": row["text"]}
            for row in rows(beside)
        ]
    )
    for name in ("before", "after"):
        built = built.cast_column(name, datasets.Image())
    built.to_parquet(home / "train.parquet")
    shards = stream_to_shards(str(home), "train", tmp_path / "cache", "after", ["before"])
    for found, name in (
        (plain, column),
        (open_examples(str(tmp_path / "one.tar"), beside=[column]), column),
        (open_examples(str(shards), beside=["before"], picture="after"), "before"),
    ):
        assert len(found) == len(plain)
        for row in range(len(found)):
            picture = found.picture(row)
            assert np.array_equal(np.asarray(picture), np.asarray(plain.picture(row)))
            assert np.array_equal(np.asarray(found.further(row, name)), np.asarray(negative(picture)))
    assert open_examples(str(beside), "train").fingerprint != plain.fingerprint
    with pytest.raises(DataError, match=r"one.tar: 000: got .*, expected a picture pose.png too"):
        open_examples(str(tmp_path / "one.tar"), beside=["pose"])
    with pytest.raises(DataError, match="expected one of pictures, 'pose'"):
        stream_to_shards(str(home), "train", tmp_path / "cache", "after", ["pose"])


def test_a_further_picture_of_other_bytes_changes_the_fingerprint_and_one_outside_is_refused(
    beside: Path, tmp_path: Path
) -> None:
    before = open_examples(str(beside), "train", beside=["conditioning_image"]).fingerprint
    first = beside / "train" / rows(beside)[0]["conditioning_image_file_name"]
    with Image.open(first) as opened:
        negative(opened.convert("RGB")).save(first)
    assert open_examples(str(beside), "train", beside=["conditioning_image"]).fingerprint != before
    table = beside / "train" / "metadata.jsonl"
    table.write_text(table.read_text().replace("negatives/", "../../", 1))
    with pytest.raises(DataError, match="conditioning_image_file_name '../../.*' leaves the folder"):
        open_examples(str(beside), "train", beside=["conditioning_image"])


def test_a_source_that_is_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder, expected pictures"):
        open_examples(str(tmp_path / "nowhere"))


# ---- kohya's folders, pictures without captions, masks ----


def square(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)


def test_kohyas_folders_say_repeats_and_captions(tmp_path: Path) -> None:
    for name in ("10_sks cat/a.png", "10_sks cat/b.png", "2_dog/c.png"):
        square(tmp_path / name)
    (tmp_path / "10_sks cat" / "b.caption").write_text("sks cat, on a chair\na chair")
    found = open_examples(str(tmp_path))
    assert found.file_names == ["10_sks cat/a.png", "10_sks cat/b.png", "2_dog/c.png"]
    assert found.captions == [["sks cat"], ["sks cat, on a chair", "a chair"], ["dog"]]
    assert found.repeats == [10, 10, 2] and found.left_out() == []


def test_pictures_alone_are_enough_where_no_captions_are_asked_for(tmp_path: Path) -> None:
    for name in ("a.png", "deep/b.png"):
        square(tmp_path / name)
    assert open_examples(str(tmp_path), caption_column=None).file_names == ["a.png", "deep/b.png"]
    with pytest.raises(DataError, match="expected a row of file_name and text"):
        ImageTextFolder(tmp_path)


def test_masks_are_named_by_a_column_and_have_their_pictures_size(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        square(tmp_path / name)
    Image.new("L", (16, 16), 128).save(tmp_path / "mask.png")
    Image.new("L", (8, 16), 128).save(tmp_path / "small.png")
    table = [{"file_name": "a.png", "text": "a", "mask": "mask.png"}, {"file_name": "b.png", "text": "b"}]
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    found = ImageTextFolder(tmp_path, columns=["mask"])
    mask = found.mask(0, "mask")
    assert mask is not None and mask.getextrema() == (128, 128) and found.mask(1, "mask") is None
    table[1]["mask"] = "small.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    other = ImageTextFolder(tmp_path, columns=["mask"])
    assert other.fingerprint != found.fingerprint
    with pytest.raises(DataError, match="small.png: got 8x16 pixels, expected 16x16, those of b.png"):
        other.mask(1, "mask")


def test_rows_that_are_dropped_are_gone_from_everything(tmp_path: Path) -> None:
    draw_pictures(tmp_path, 6)
    found = ImageTextFolder(tmp_path)
    before = found.fingerprint
    found.drop({1: "1.png: too small", 4: "4.png: too small"})
    assert len(found) == 4 and found.file_names == ["0.png", "2.png", "3.png", "5.png"]
    assert len(found.sizes) == len(found.digests) == len(found.captions) == 4 and found.fingerprint != before
    assert found.left_out()[0].startswith("left out, 2 rows")
    with pytest.raises(DataError, match="1 of 6 rows can be used, expected most; the first: 1.png: too small"):
        found.drop({0: "x", 1: "y", 2: "z"})
