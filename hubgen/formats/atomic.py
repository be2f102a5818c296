"""Files and folders that are whole or not there: written beside their name and renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"


@contextmanager
def written(path: Path, durable: bool = True) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end of the block; after an error neither is there.

    Args:
        path: The file, in a folder that exists; what it held stays until the new one is whole.
        durable: Whether the content is on the disk before the name is, so that a machine that fails leaves a whole
            file, too.

    Raises:
        OSError: The folder does not take it, for example because the disk is full.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{path.name}"[:250])
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill, which takes its place at the end of the block; after an error the old one stays.

    What a killed process left beside it is removed first.
    """
    temporary, replaced = (path.with_name(f"{TEMPORARY}{prefix}{path.name}") for prefix in ("", "replaced-"))
    if replaced.exists() and not path.exists():  # killed between the two renames: the old one comes back
        replaced.rename(path)
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield temporary
        if path.exists():
            path.rename(replaced)
        try:
            temporary.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
