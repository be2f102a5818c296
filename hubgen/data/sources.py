"""The one door of training to its data.

a folder                pictures with a table, with text files, or in folders of kohya's kind (`image_folder`)
shards with counts      00000.tar, .parquet and _stats.json, as `hubgen data` and img2dataset write them: a folder, or a
                        URL such as `s3://bucket/kept`; any number of them (`shard_feed`)
shards of a WebDataset  `data/{0000..0009}.tar`, or a folder of .tar files (`webdataset`)
a data set on the Hub   `owner/name` (`hub_dataset`)
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubgen.data.errors import DataError
from hubgen.data.examples import Examples
from hubgen.data.hub_dataset import stream_to_shards
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.metadata import IMAGE
from hubgen.data.pictures import MAX_PIXELS
from hubgen.data.webdataset import WebDataset, has_counts, is_shards

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


FILTERED = "shards are not read at the start, and `hubgen data filter` leaves rows out"


def is_counted(source: str, split: str = "train") -> bool:
    """Whether a source is one of shards with counts, which are opened one by one."""
    if "://" in source:
        return True
    folder = Path(source).expanduser()
    return has_counts(folder / split) or has_counts(folder)


def open_examples(
    source: str,
    split: str = "train",
    *,
    caption_column: str | None = "text",
    columns: Sequence[str] = (),
    on_error: str = "fail",
    max_pixels: int = MAX_PIXELS,
    cache_dir: Path | None = None,
    beside: Sequence[str] = (),
    picture: str = IMAGE,
    shards: Mapping[str, Any] | None = None,
) -> Examples:
    """The examples of a source, all of them checked; those of shards with counts when they are read.

    Args:
        source: See the head of this file.
        split: Of the data set.
        caption_column: Column of the caption; `None`: none is needed.
        columns: Further columns to read.
        on_error: "fail" at the first row that cannot be used, or "skip" such rows and say so.
        max_pixels: Pixels of a picture at most.
        cache_dir: Where data sets of the Hub and shards of a URL are copied to; hubgen's folder in the user's cache if
            not given.
        beside: Columns of further pictures, of which each row has one, of its picture's size.
        picture: Column of the picture itself.
        shards: Further arguments of `ShardExamples`.

    Raises:
        DataError: There is no such source, or a row of it cannot be used.
    """
    options: dict[str, Any] = {"on_error": on_error, "max_pixels": max_pixels, "columns": columns}
    options |= {"beside": beside, "picture": picture}
    path = Path(source).expanduser()
    inner = path / split
    copies = cache_dir or Path("~/.cache/hubgen/datasets").expanduser()
    if is_counted(source, split):
        if on_error != "fail":
            raise DataError(f"`on_error`: got {on_error!r} for {source}, expected 'fail': {FILTERED}")
        if beside or picture != IMAGE:
            raise DataError(f"{source}: got shards, whose rows have one picture, expected also {', '.join(beside)}")
        try:
            from hubgen.data.shard_feed import ShardExamples
        except ImportError as error:
            raise DataError(f"{source}: needs pyarrow to be read: pip install 'hubgen[train]' ({error})") from error
        options = {"caption_column": caption_column, "columns": columns, "max_pixels": max_pixels, **(shards or {})}
        return ShardExamples(source, split, copies=copies, **options)
    if is_shards(source) or (inner.is_dir() and is_shards(str(inner))):
        return WebDataset(source, split, caption_column=caption_column, **options)
    if path.is_dir():
        return ImageTextFolder(path, split=split, caption_column=caption_column, **options)
    if HUB_ID.fullmatch(source) and not path.exists():
        copied = stream_to_shards(source, split, copies, picture, beside)
        return WebDataset(str(copied), caption_column=caption_column, **options)
    raise DataError(
        f"{source}: no such folder, expected pictures with a metadata.jsonl, shards (.tar), or owner/name of a data "
        "set on the Hub"
    )
