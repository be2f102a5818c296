"""The one door of training to its data.

a folder                pictures with a table, with text files, or in folders of kohya's kind (`image_folder`)
shards of a WebDataset  `data/{0000..0009}.tar`, or a folder of .tar files (`webdataset`)
a data set on the Hub   `owner/name` (`hub_dataset`)
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubgen.data.errors import DataError
from hubgen.data.examples import Examples
from hubgen.data.hub_dataset import stream_to_shards
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.metadata import IMAGE
from hubgen.data.pictures import MAX_PIXELS
from hubgen.data.webdataset import WebDataset, is_shards

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
) -> Examples:
    """The examples of a source, all of them checked.

    Args:
        source: See the head of this file.
        split: Of the data set.
        caption_column: Column of the caption; `None`: none is needed.
        columns: Further columns to read.
        on_error: "fail" at the first row that cannot be used, or "skip" such rows and say so.
        max_pixels: Pixels of a picture at most.
        cache_dir: Where data sets of the Hub are copied to; hubgen's folder in the user's cache if not given.
        beside: Columns of further pictures, of which each row has one, of its picture's size.
        picture: Column of the picture itself.

    Raises:
        DataError: There is no such source, or a row of it cannot be used.
    """
    options: dict[str, Any] = {"on_error": on_error, "max_pixels": max_pixels, "columns": columns}
    options |= {"beside": beside, "picture": picture}
    path = Path(source).expanduser()
    inner = path / split
    if is_shards(source) or (inner.is_dir() and is_shards(str(inner))):
        return WebDataset(source, split, caption_column=caption_column, **options)
    if path.is_dir():
        return ImageTextFolder(path, split=split, caption_column=caption_column, **options)
    if HUB_ID.fullmatch(source) and not path.exists():
        copies = cache_dir or Path("~/.cache/hubgen/datasets").expanduser()
        shards = stream_to_shards(source, split, copies, picture, beside)
        return WebDataset(str(shards), caption_column=caption_column, **options)
    raise DataError(
        f"{source}: no such folder, expected pictures with a metadata.jsonl, shards (.tar), or owner/name of a data "
        "set on the Hub"
    )
