"""A data set on the Hub, streamed once into shards: whoever trains on it shuffles and resumes as on a folder.

Pictures are kept as they come, byte for byte, beside the other columns; nothing is decoded on the way. A copy that was
interrupted goes on behind the last whole shard.
"""

import fcntl
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hubgen.data.errors import DataError
from hubgen.errors import one_line
from hubgen.formats.atomic import written

SHARD = 1000
"""Rows of a shard"""
DONE = "done.json"


def stream_to_shards(name: str, split: str, folder: Path) -> Path:
    """The folder of tar files that a split of a data set is copied to, complete.

    Several processes may ask: one copies, the others wait for it.

    Args:
        name: `owner/name` on the Hub, or whatever `datasets.load_dataset` takes.
        split: Of it.
        folder: Where copies are kept; each data set and split has a folder of its own in it.

    Raises:
        DataError: There is no such data set or split, or it has no pictures.
    """
    target = folder / f"{name.strip('/').replace('/', '--')}--{split}"
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / DONE).is_file():
            _copy(name, split, target)
    return target


def _copy(name: str, split: str, target: Path) -> None:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: needs the package datasets: pip install 'hubgen[train]'") from None
    whole = sorted(target.glob("*.tar"))
    done = SHARD * len(whole)
    try:
        stream: Any = datasets.load_dataset(name, split=split, streaming=True)
        column = _picture_column(datasets, stream, name)
        stream = stream.cast_column(column, datasets.Image(decode=False))
        rows = iter(stream.skip(done) if done else stream)
        total = done
        with tqdm(desc=f"copying {name}", initial=done, unit=" rows") as progress:
            for number, part in enumerate(_parts(rows), start=len(whole)):
                with written(target / f"{number:05d}.tar") as temporary:
                    _write_shard(temporary, part, column, total)
                total += len(part)
                progress.update(len(part))
    except DataError:
        raise
    except Exception as error:  # the Hub, its files and its client fail in every way there is
        raise DataError(f"{name}, split {split!r}: {one_line(error)}") from error
    if not total:
        raise DataError(f"{name}, split {split!r}: got no rows, expected some")
    with written(target / DONE) as temporary:
        temporary.write_text(json.dumps({"source": name, "split": split, "rows": total}), encoding="utf-8")


def _picture_column(datasets: Any, stream: Any, name: str) -> str:
    features = stream.features or {}
    pictures = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    for column in ("image", *pictures):
        if column in pictures:
            return column
    raise DataError(f"{name}: got the columns {sorted(features)}, expected one of pictures")


def _parts(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == SHARD:
            yield part
            part = []
    if part:
        yield part


def _write_shard(path: Path, rows: list[dict[str, Any]], column: str, first: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows, start=first):
            picture = row.pop(column)
            content = picture["bytes"]
            if content is None:
                content = Path(picture["path"]).read_bytes()
            suffix = Path(picture.get("path") or "").suffix.lower() or ".png"
            _add(tar, f"{number:09d}{suffix}", content)
            plain = {name: value for name, value in row.items() if _is_json(value)}
            _add(tar, f"{number:09d}.json", json.dumps(plain, ensure_ascii=False).encode())


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
