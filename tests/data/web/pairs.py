"""Shards of small pictures with captions, for the tests of scores and filters."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from hubgen.data.web.shards import Outcome, write_shard, write_stats
from tests.data.web.site import file_of, picture

ROWS = 10
"""Of a full shard"""


def write_pairs(
    folder: Path,
    *shards: Mapping[str, Any],
    failed: Collection[tuple[int, int]] = (),
    stages: Collection[Mapping[str, Any]] = (),
    ending: str = "jpg",
) -> Path:
    """Writes shards with these columns, `caption` and `url` if they are not given.

    Args:
        folder: Where to.
        *shards: The columns of each.
        failed: (shard, row) of those without a picture.
        stages: Records of what was done to them.
        ending: Of the pictures' names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, columns in enumerate(shards):
        count = len(next(iter(columns.values())))
        usual = {
            "caption": [f"picture {row} of {number}" for row in range(count)],
            "url": [f"http://a.org/{number}/{row}" for row in range(count)],
        }
        outcomes = [
            Outcome("failed_to_download", "HTTP Error 404: Not Found")
            if (number, row) in failed
            else Outcome(
                "success",
                None,
                file_of(picture(16 + row, 16, seed=100 * number + row)),
                *(16 + row, 16, 300 + row, 200),
                "{}",
                f"{100 * number + row:064x}",
            )
            for row in range(count)
        ]
        stats = write_shard(folder, number, ROWS, pa.table({**usual, **columns}), outcomes, ending=ending)
        record = {"stages": [dict(record) for record in stages]} if stages else {}
        write_stats(folder / f"{number:05d}_stats.json", stats | record)
    return folder
