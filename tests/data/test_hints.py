"""Hints of pictures, and image-text folders with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hubgen.cli import main
from hubgen.data.errors import DataError
from hubgen.data.hints import KINDS, hint_of, write_hints
from hubgen.data.image_folder import ImageTextFolder

SIDE = 32


def square() -> Image.Image:
    """A red square on white."""
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[8:24, 8:24] = (200, 0, 0)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    for split, count in (("train", 3), ("test", 1)):
        (source / split).mkdir(parents=True)
        rows = []
        for i in range(count):
            square().save(source / split / f"{i}.png")
            rows.append(
                {"file_name": f"{i}.png", "text": f"a red square {i}", "captions": [f"a red square {i}", "red"]}
            )
        (source / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "LICENSE").write_text("MIT")
    return source


def test_each_hint_is_what_its_name_says() -> None:
    edges = np.asarray(hint_of(square(), "canny"))
    assert set(np.unique(edges)) == {0, 255} and edges[7:9, 8:24].any() and not edges[10:22, 10:22].any()
    grid = np.asarray(hint_of(square(), "color", cells=4))
    assert len(np.unique(grid.reshape(-1, 3), axis=0)) == 2 and (grid[0, 0] == 255).all()
    assert (grid[12, 12] == (200, 0, 0)).all()
    grey = np.asarray(hint_of(square(), "grey"))
    assert (grey[..., 0] == grey[..., 1]).all() and grey[12, 12, 0] == 60
    blur = np.asarray(hint_of(square(), "blur", radius=2)).astype(float)
    assert (
        np.abs(np.diff(blur[..., 1], axis=0)).max()
        < 100
        < np.abs(np.diff(np.asarray(square())[..., 1].astype(float), axis=0)).max()
    )
    assert all(hint_of(square(), kind).size == (SIDE, SIDE) for kind in KINDS)


def test_a_folder_keeps_pictures_captions_and_licence_and_gets_a_column(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "out"
    assert write_hints(folder, "color", out) == 4
    assert (out / "LICENSE").read_text() == "MIT"
    assert (out / "train/0.png").read_bytes() == (folder / "train/0.png").read_bytes()
    assert ImageTextFolder(out, "train").captions == ImageTextFolder(folder, "train").captions
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "test": 1}
    row = loaded["train"][0]
    assert row["image"].size == row["conditioning_image"].size == (SIDE, SIDE) and row["text"] == "a red square 0"
    assert np.array_equal(np.asarray(row["conditioning_image"]), np.asarray(hint_of(square(), "color")))
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    (out / "train/metadata.jsonl").unlink()
    assert write_hints(folder, "color", out) == 4  # finishes what is missing
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="`kind`: got 'depth', expected one of canny, color, grey, blur"):
        hint_of(square(), "depth")
    with pytest.raises(ValueError, match="`cells`: got 4, expected none: canny has low, high"):
        hint_of(square(), "canny", cells=4)
    write_hints(folder, "grey", tmp_path / "out")
    with pytest.raises(DataError, match="was begun with other hints"):
        write_hints(folder, "color", tmp_path / "out")
    with pytest.raises(DataError, match="holds other files"):
        write_hints(folder, "color", folder)
    commands = {
        "--radius: got 2.0, expected none": [str(folder), "--kind", "grey", "--radius", "2", "--out", "x"],
        "no such file or folder": ["nowhere", "--kind", "grey", "--out", "x"],
        "expected a name with the ending of a picture": [str(folder / "train/0.png"), "--kind", "grey", "--out", "x"],
    }
    for message, arguments in commands.items():
        assert main(["data", "hints", *arguments]) == 2 and message in capsys.readouterr().err


def test_the_command_line_writes_folders_and_single_hints(folder: Path, tmp_path: Path) -> None:
    main(["data", "hints", str(folder), "--kind", "canny", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out/train/hints").iterdir())) == 3
    main(
        [
            "data",
            "hints",
            str(folder / "train/0.png"),
            "--kind",
            "canny",
            "--low",
            "50",
            "--out",
            str(tmp_path / "e.png"),
        ]
    )
    assert Image.open(tmp_path / "e.png").size == (SIDE, SIDE)
