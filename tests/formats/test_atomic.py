"""A reader sees the old content or the new one, and never a part of it."""

import os
from pathlib import Path

import pytest

from hubgen.formats.atomic import written, written_folder


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with written(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.json"]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    with written(tmp_path / "one") as temporary:
        temporary.write_text("")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_folder_changes_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("first", "second"):
        with written_folder(folder) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
        assert os.listdir(folder) == [content]
    with pytest.raises(RuntimeError), written_folder(folder) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert os.listdir(folder) == ["second"]
    assert os.listdir(tmp_path) == ["model"]


def test_the_old_folder_stays_where_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(FileNotFoundError), written_folder(folder):
        pass  # nothing was written, so that there is nothing to rename
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["model"]


def test_the_old_folder_comes_back_after_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".tmp-replaced-model").mkdir()
    (tmp_path / ".tmp-replaced-model" / "old").write_text("old")
    with pytest.raises(RuntimeError), written_folder(tmp_path / "model"):
        raise RuntimeError
    assert os.listdir(tmp_path / "model") == ["old"]
