"""Captions in every form that people keep them in."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hubgen.data.errors import DataError
from hubgen.data.image_folder import ImageTextFolder

CAPTIONS = {"red.png": "a red square", "sub/blue.png": "a blue square", "green.webp": "a green square"}


def pictures(folder: Path) -> Path:
    for name in CAPTIONS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), Path(name).stem).save(folder / name)
    return folder


def rows(column: str = "text") -> list[dict[str, Any]]:
    return [{"file_name": name, column: caption} for name, caption in CAPTIONS.items()]


def jsonl(folder: Path, mark: bytes = b"", end: str = "\n", backslashes: bool = False) -> None:
    table = [
        {**row, "file_name": row["file_name"].replace("/", "\\") if backslashes else row["file_name"]} for row in rows()
    ]
    (folder / "metadata.jsonl").write_bytes(mark + "".join(json.dumps(row) + end for row in table).encode())


def write_csv(folder: Path, column: str = "text", encoding: str = "utf-8") -> None:
    with open(folder / "metadata.csv", "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, ["file_name", column, "licence"])
        writer.writeheader()
        writer.writerows(rows(column))


def parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    table = [{**row, "captions": [row["text"], "square"] if number else None} for number, row in enumerate(rows())]
    write_table(pyarrow.Table.from_pylist(table), folder / "metadata.parquet")


def texts(folder: Path) -> None:
    for name, caption in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text(f"\ufeff{caption}\r\n", encoding="utf-8")


def tables_in_each_folder(folder: Path) -> None:
    for inner in (folder, folder / "sub"):
        own = [
            {**row, "file_name": Path(row["file_name"]).name}
            for row in rows()
            if (folder / row["file_name"]).parent == inner
        ]
        (inner / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


FORMS: dict[str, Callable[[Path], None]] = {
    "jsonl": jsonl,
    "jsonl with a byte order mark": lambda folder: jsonl(folder, mark=b"\xef\xbb\xbf"),
    "jsonl of Windows": lambda folder: jsonl(folder, end="\r\n", backslashes=True),
    "csv": write_csv,
    "csv with a byte order mark": lambda folder: write_csv(folder, encoding="utf-8-sig"),
    "parquet": parquet,
    "text files": texts,
    "a table in each folder": tables_in_each_folder,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_captions(form: str, tmp_path: Path) -> None:
    FORMS[form](pictures(tmp_path))
    folder = ImageTextFolder(tmp_path, split="train", size=16)  # without splits, all of it is for training
    assert dict(zip(folder.file_names, folder.texts, strict=True)) == CAPTIONS
    assert folder.without_row == 0 and folder.left_out() == []


def test_further_wordings_come_from_parquet_and_text_files(tmp_path: Path) -> None:
    parquet(pictures(tmp_path / "a"))
    assert ImageTextFolder(tmp_path / "a").captions[1] == ["a blue square", "square"]
    texts(pictures(tmp_path / "b"))
    (tmp_path / "b" / "red.txt").write_text("a red square\n\nred\n")
    folder = ImageTextFolder(tmp_path / "b")
    assert folder.captions[folder.file_names.index("red.png")] == ["a red square", "red"]


def test_another_column_is_read_from_csv(tmp_path: Path) -> None:
    write_csv(pictures(tmp_path), column="prompt")
    assert ImageTextFolder(tmp_path, caption_column="prompt").texts == list(CAPTIONS.values())
    with pytest.raises(DataError, match=r"metadata.csv row 2: got 'file_name', 'prompt', expected 'text' too"):
        ImageTextFolder(tmp_path)


def test_pictures_without_a_row_are_counted(tmp_path: Path) -> None:
    jsonl(pictures(tmp_path))
    for number in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.JPG", "JPEG")
    (tmp_path / ".hidden.png").write_bytes(b"")
    folder = ImageTextFolder(tmp_path)
    assert folder.without_row == 3
    assert folder.left_out() == [f"not used, 3 pictures of {tmp_path} without a row"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    tables_in_each_folder(pictures(tmp_path))
    (tmp_path / "sub" / "round").symlink_to(tmp_path)
    assert len(ImageTextFolder(tmp_path)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b"\xff\xfe{\0", "metadata.jsonl: got UTF-16, expected UTF-8"),
        ("metadata.jsonl", rb'{"file_name": "C:\\red.png", "text": "x"}', "file_name 'C:/red.png' leaves the folder"),
        ("metadata.csv", b"file_name,text\nred.png,caf\xe9", "metadata.csv: not UTF-8"),
        ("metadata.csv", b"file_name,text\n", "metadata.csv: got no rows"),
        ("metadata.parquet", b"PAR1", "metadata.parquet: not a whole parquet file"),
        ("red.txt", b"caf\xe9", "red.txt: not UTF-8"),
        ("red.txt", b" \n", "red.txt: text is empty"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (pictures(tmp_path) / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        ImageTextFolder(tmp_path)


def test_two_tables_in_one_folder_are_refused(tmp_path: Path) -> None:
    jsonl(pictures(tmp_path))
    write_csv(tmp_path)
    with pytest.raises(DataError, match=r"got metadata.jsonl and metadata.csv, expected one of them"):
        ImageTextFolder(tmp_path)


def test_a_picture_of_two_tables_is_named(tmp_path: Path) -> None:
    tables_in_each_folder(pictures(tmp_path))
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "sub/blue.png", "text": "again"}) + "\n")
    with pytest.raises(DataError, match=r"sub/metadata.jsonl row 1: sub/blue.png stands in row 3 already"):
        ImageTextFolder(tmp_path)


def test_a_folder_of_splits_is_not_taken_for_training_as_a_whole(tmp_path: Path) -> None:
    jsonl(pictures(tmp_path / "test"))
    with pytest.raises(DataError, match="`split`: got 'train', expected a folder of .*: test"):
        ImageTextFolder(tmp_path, split="train")
