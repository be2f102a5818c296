"""Shards of drawn pictures, and a run of the recaption stage for processes of its own."""

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from hubgen.data.web.shards import NOT_DOWNLOADED, STATS, SUCCESS, Outcome, shard_name, write_shard, write_stats
from tests.captioning.taught import NAMED, SIDE

FAILED = 1
"""Row of each shard that has no picture, where there are any"""


def shards_of(
    folder: Path, shards: int, rows: int, failures: bool = False, synthetic: Callable[[str], str] | None = None
) -> Path:
    """A folder of shards of the pictures of `NAMED`, as another program may have written them."""
    folder.mkdir(parents=True)
    names = list(NAMED)
    for number in range(shards):
        captions = [names[(number * rows + row) % len(names)] for row in range(rows)]
        outcomes = []
        for row, caption in enumerate(captions):
            content = io.BytesIO()
            NAMED[caption].save(content, "png")
            made = Outcome(SUCCESS, picture=content.getvalue(), width=SIDE, height=SIDE, original_width=SIDE,
                           original_height=SIDE)  # fmt: skip
            outcomes.append(Outcome(NOT_DOWNLOADED, "HTTP Error 404") if failures and row == FAILED else made)
        columns = {"caption": captions, "url": [f"http://host/{number}/{row}.png" for row in range(rows)]}
        if synthetic is not None:
            columns["synthetic_caption"] = [synthetic(caption) for caption in captions]
        stats = write_shard(folder, number, rows, pa.table(columns), outcomes, digest=None, ending="png")
        write_stats(folder / f"{shard_name(number)}{STATS}", stats)
    return folder


def recaption(folder: Path, model: Path) -> None:
    """All of it, in this process."""
    import torch

    from hubgen.data.web.engines.engine import run
    from hubgen.data.web.recaption import Recaption
    from hubgen.data.web.stages import open_to_add

    torch.set_num_threads(1)
    stage = Recaption.of(str(model), max_new_tokens=12, batch_size=3)
    report = run(stage, stage.works(open_to_add(folder)), folder)
    assert report.failed == {}
