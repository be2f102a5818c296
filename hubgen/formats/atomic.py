"""Files and folders that are whole or not there: written beside their name, brought to the disk, then renamed.

    with written(path) as temporary:
        temporary.write_text(text)          # or `temporary.mkdir()`, and files in it

What a killed process leaves beside the name starts with `.tmp-`; `sweep` removes it.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"
REPLACED = TEMPORARY + "replaced-"


@contextmanager
def written(path: str | os.PathLike[str], durable: bool = True) -> Iterator[Path]:
    """Yields a free name beside `path`; the file or folder that the block makes there becomes `path` at its end.

    Whoever reads `path` sees what was there before or all of the new, whenever the writer is killed. A folder that is
    replaced is set aside first, so for a moment there is none; after a kill at that moment, the next writer or `sweep`
    brings the old one back. An error in the block, or a full disk, removes the new and leaves the old.

    Args:
        path: File or folder; its parent exists.
        durable: Whether the content is on the disk before the rename, and the rename before the end. Without, the file
            may come out empty where the machine fails, not only the process.
    """
    target = Path(path)
    _restore(target)
    temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
        if durable:
            _sync_all(temporary)
        _rename(temporary, target)
        if durable:
            _sync_folder(target.parent)
    except BaseException as error:
        _remove(temporary)
        number = _number_of(error)
        if number is not None:
            raise OSError(number, os.strerror(number), str(target)) from error
        raise


def _number_of(error: BaseException) -> int | None:
    """The system's number of an error that safetensors tells in its text alone, of which there are several forms."""
    if type(error).__name__ != "SafetensorError":
        return None
    match = re.search(r"\(os error (\d+)\)|code: (\d+),", str(error))
    return int(match[1] or match[2]) if match else None


def sweep(folder: Path) -> None:
    """Removes what killed writers left in a folder that nobody else writes to now."""
    for leftover in folder.glob(f"{REPLACED}*"):
        _restore(folder / leftover.name.removeprefix(REPLACED))
    for leftover in folder.glob(f"{TEMPORARY}*"):
        _remove(leftover)


def _rename(source: Path, target: Path) -> None:
    if not (source.is_dir() and target.is_dir()):
        os.replace(source, target)
        return
    # A folder with something in it cannot be replaced in one step.
    aside = target.with_name(REPLACED + target.name)
    _remove(aside)
    os.replace(target, aside)
    try:
        os.replace(source, target)
    except BaseException:
        os.replace(aside, target)
        raise
    _remove(aside)


def _restore(target: Path) -> None:
    """Gives a folder that was set aside its name back, where the writer was killed before the new one took it."""
    aside = target.with_name(REPLACED + target.name)
    if aside.exists() and not target.exists():
        os.replace(aside, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _sync_all(inner)
        _sync_folder(path)
    else:
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system and its file system know how."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
