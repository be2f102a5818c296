"""A data set on the Hub, streamed once into shards: whoever trains on it shuffles and resumes as on a folder.

Pictures are kept as they come, byte for byte, beside the other columns; nothing is decoded on the way. A copy that was
interrupted goes on behind the last whole shard.
"""

import fcntl
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hubgen.data.errors import DataError
from hubgen.data.metadata import IMAGE
from hubgen.errors import one_line
from hubgen.formats.atomic import written

SHARD = 1000
"""Rows of a shard"""
DONE = "done.json"


def stream_to_shards(name: str, split: str, folder: Path, picture: str = IMAGE, beside: Sequence[str] = ()) -> Path:
    """The folder of tar files that a split of a data set is copied to, complete.

    Several processes may ask: one copies, the others wait for it.

    Args:
        name: `owner/name` on the Hub, or whatever `datasets.load_dataset` takes.
        split: Of it.
        folder: Where copies are kept; each data set and split has a folder of its own in it.
        picture: Column of the pictures; without `image`, the first one of pictures serves.
        beside: Columns of further pictures.

    Raises:
        DataError: There is no such data set or split, or it has no pictures.
    """
    which = "" if picture == IMAGE and not beside else "--" + "+".join((picture, *beside))
    target = folder / f"{name.strip('/').replace('/', '--')}--{split}{which}"
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / DONE).is_file():
            _copy(name, split, target, picture, beside)
    return target


def _copy(name: str, split: str, target: Path, picture: str, beside: Sequence[str]) -> None:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: needs the package datasets: pip install 'hubgen[train]'") from None
    whole = sorted(target.glob("*.tar"))
    done = SHARD * len(whole)
    try:
        stream: Any = datasets.load_dataset(name, split=split, streaming=True)
        columns = _picture_columns(datasets, stream, name, picture, beside)
        for column in columns:
            stream = stream.cast_column(column, datasets.Image(decode=False))
        rows = iter(stream.skip(done) if done else stream)
        total = done
        with tqdm(desc=f"copying {name}", initial=done, unit=" rows") as progress:
            for number, part in enumerate(_parts(rows), start=len(whole)):
                with written(target / f"{number:05d}.tar") as temporary:
                    _write_shard(temporary, part, columns, total)
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


def _picture_columns(datasets: Any, stream: Any, name: str, picture: str, beside: Sequence[str]) -> list[str]:
    """The column of the pictures, then those of the further ones."""
    features = stream.features or {}
    pictures = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    main = picture if picture in pictures or picture != IMAGE or not pictures else pictures[0]
    missing = [column for column in (main, *beside) if column not in pictures]
    if missing:
        raise DataError(f"{name}: got the columns {sorted(features)}, expected one of pictures, {missing[0]!r}")
    return [main, *beside]


def _parts(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == SHARD:
            yield part
            part = []
    if part:
        yield part


def _write_shard(path: Path, rows: list[dict[str, Any]], columns: Sequence[str], first: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows, start=first):
            for column in columns:
                picture = row.pop(column)
                content = picture["bytes"]
                if content is None:
                    content = Path(picture["path"]).read_bytes()
                suffix = Path(picture.get("path") or "").suffix.lower() or ".png"
                name = "" if column == columns[0] else f".{column}"
                _add(tar, f"{number:09d}{name}{suffix}", content)
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
