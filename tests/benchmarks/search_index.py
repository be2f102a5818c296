"""Does an index find the nearest vectors, and how fast, on data of easy and hard kinds?

    python -m tests.benchmarks.search_index [--output DIR]

20,000 vectors of 512 numbers. *clusters*: 300 centres, and noise of the same length around them; *wide clusters*: noise
of twice the length; *noise*: no structure at all, where no index helps and all cells have to be searched. Questions are
500 further vectors of the same kind; recall is the share of their ten nearest that a search finds.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from hubgen.data.web.embedding.embeddings import StoredEmbeddings
from hubgen.data.web.embedding.index import build_index, nearest, unit
from tests.benchmarks import report

RESULTS = Path(__file__).parent / "results" / "web_data"
COUNT, DIMENSION, QUESTIONS, NEIGHBOURS, CENTRES = 20_000, 512, 500, 10, 300
KINDS = {"clusters": 1.0, "wide clusters": 2.0, "noise": None}
"""Length of the noise beside centres of length 1"""


def vectors_of(spread: float | None, count: int, dimension: int = DIMENSION, seed: int = 0) -> np.ndarray:
    """(count, dimension) float32, around centres, or of noise alone for `None`."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(count, dimension)) / dimension**0.5
    if spread is None:
        return noise.astype(np.float32)
    centres = unit(random.normal(size=(CENTRES, dimension)))
    return (centres[random.integers(0, CENTRES, count)] + spread * noise).astype(np.float32)


def stored(vectors: np.ndarray, folder: Path) -> StoredEmbeddings:
    """Vectors in a new folder, as clip-retrieval has them; keys count the rows."""
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", vectors)
    table = pa.table({"key": [f"{row:09d}" for row in range(len(vectors))]})
    pa.parquet.write_table(table, folder / "metadata" / "metadata_0.parquet")
    return StoredEmbeddings.open(folder)


def measure(spread: float | None, folder: Path, count: int = COUNT, dimension: int = DIMENSION) -> dict[str, Any]:
    """Recall and seconds of an index of one kind of vectors; the seconds are those of one processor."""
    vectors = vectors_of(spread, count + QUESTIONS, dimension)
    embeddings, questions = stored(vectors[:count], folder / "embeddings"), vectors[count:]
    started = time.process_time()
    index = build_index(embeddings, folder / "index")
    built = time.process_time()
    found = index.search(questions, NEIGHBOURS)[1]
    searched = time.process_time()
    true = nearest(unit(questions), embeddings, NEIGHBOURS)
    hits = sum(len(set(one).intersection(other)) for one, other in zip(true.tolist(), found.tolist(), strict=True))
    return {
        "cells": index.info["cells"],
        "probes": index.info["probes"],
        "recall": hits / true.size,
        "build_seconds": round(built - started, 2),
        "search_milliseconds": round(1000 * (searched - built) / len(questions), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = {}
    for name, spread in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(spread, Path(folder))
    content = {"vectors": COUNT, "dimension": DIMENSION, "kinds": rows, "environment": report.environment()}
    report.write_json(arguments.output / "search_index.json", content)
    print(report.markdown_table(["", *rows["noise"]], [[name, *map(str, row.values())] for name, row in rows.items()]))


if __name__ == "__main__":
    main()
