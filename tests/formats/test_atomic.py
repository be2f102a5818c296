"""A name holds the old content or all of the new, whatever ends the writing; nothing is left beside it."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hubgen.formats.atomic import sweep, written


def write(path: Path, text: str) -> None:
    with written(path) as temporary:
        temporary.write_text(text)


def write_folder(path: Path, text: str) -> None:
    with written(path) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text(text)


def content(path: Path) -> str | None:
    if path.is_dir():
        return (path / "inner" / "file").read_text()
    return path.read_text() if path.exists() else None


KINDS = pytest.mark.parametrize("make", [write, write_folder])


@KINDS
def test_the_new_replaces_the_old_and_nothing_stays_beside(make: Callable[..., None], tmp_path: Path) -> None:
    for text in ("old", "new"):
        make(tmp_path / "name", text)
        assert content(tmp_path / "name") == text
        assert os.listdir(tmp_path) == ["name"]


@KINDS
def test_an_error_in_the_block_leaves_the_old_and_nothing_beside(make: Callable[..., None], tmp_path: Path) -> None:
    make(tmp_path / "name", "old")
    for problem in (OSError, KeyboardInterrupt):
        with pytest.raises(problem), written(tmp_path / "name") as temporary:
            make(temporary, "half")
            raise problem
        assert content(tmp_path / "name") == "old"
        assert os.listdir(tmp_path) == ["name"]


def test_a_folder_that_cannot_take_the_name_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "name", "old")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if content(source) == "new":
            raise OSError("no such luck")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no such luck"):
        write_folder(tmp_path / "name", "new")
    assert content(tmp_path / "name") == "old"
    assert os.listdir(tmp_path) == ["name"]


def test_a_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write(tmp_path / "name", "new")
    assert (tmp_path / "name").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_next_writer_brings_a_folder_back_that_was_set_aside(tmp_path: Path) -> None:
    write_folder(tmp_path / ".tmp-replaced-name", "old")
    with pytest.raises(KeyboardInterrupt), written(tmp_path / "name"):
        raise KeyboardInterrupt
    assert content(tmp_path / "name") == "old"
    assert os.listdir(tmp_path) == ["name"]


class PowerLoss(BaseException):
    """Ends the writing where it stands: nothing is cleaned up."""


@KINDS
def test_a_cut_at_any_step_leaves_the_old_or_the_new_and_what_is_beside_is_swept(
    make: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[str | None] = []
    for cut_after in itertools.count():
        folder = tmp_path / str(cut_after)
        folder.mkdir()
        make(folder / "name", "old")
        calls = itertools.count()

        def cut(original: Any, calls: Iterator[int] = calls, cut_after: int = cut_after) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if next(calls) >= cut_after:
                    raise PowerLoss
                return original(*arguments, **keywords)

            return call

        finished = False
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, cut(getattr(os, name)))
            with suppress(PowerLoss):
                make(folder / "name", "new")
                finished = True
        outcomes.append(content(folder / "name"))
        sweep(folder)
        assert os.listdir(folder) == ["name"]
        assert content(folder / "name") == (outcomes[-1] or "old")
        if finished:
            break
    # A folder has one moment without the name: the old one is set aside, and comes back.
    assert {"old", "new"} <= set(outcomes) and outcomes.count(None) == (make is write_folder)
