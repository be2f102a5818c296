"""The pictures of a shard in the order of its rows, decoded ahead of whoever looks at them.

    for row, picture in pictures_of(shard, shard.read(["key", "offset", "size"])):
        ...                               # `None` where the bytes are no picture

Threads decode, as Pillow lets go of Python's lock for it; a few pictures are ahead, so memory does not grow.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from PIL import Image

from hubgen.data.errors import DataError
from hubgen.data.pictures import decode_picture, on_white
from hubgen.data.web.shards import StoredShard

THREADS = 2
AHEAD = 16
"""Pictures that are decoded and not asked for yet, at most"""


def pictures_of(shard: StoredShard, table: Any) -> Iterator[tuple[int, Image.Image | None]]:
    """Row and picture of each row that has one, RGB, on white where it is transparent.

    Args:
        shard: Of the pictures.
        table: Its rows, with `key`, `offset` and `size`.

    Raises:
        DataError: The tar is cut off.
    """
    places = zip(*(table.column(name).to_pylist() for name in ("key", "offset", "size")), strict=True)
    waiting: deque[tuple[int, Future[Image.Image | None]]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        for row, (key, offset, size) in enumerate(places):
            if offset is None:
                continue
            content = shard.picture(offset, size)
            waiting.append((row, threads.submit(_decoded, content, f"{shard.tar}: {key}")))
            if len(waiting) > AHEAD:
                first, picture = waiting.popleft()
                yield first, picture.result()
        for row, picture in waiting:
            yield row, picture.result()


def _decoded(content: bytes, name: str) -> Image.Image | None:
    try:
        return on_white(decode_picture(content, name))
    except DataError:
        return None
