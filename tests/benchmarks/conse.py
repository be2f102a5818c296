"""Does ConSE, the scorer that needs no Hub, find the picture of a caption among others?

    apt-get install tuxpaint-stamps-default                  # 161 MB of captioned stamps, GPL-2: used here, never kept
    python -m tests.benchmarks.conse                         # or --stamps DIR, of the unpacked package

The stamps of Tux Paint are photographs and drawings of things with a sentence each. Taken are those that ConSE could
know: no symbols (letters, flags, coins), nothing from a folder "cartoon", and the first picture of each caption.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from hubgen.data.pictures import read_picture
from hubgen.data.web.embedding.embedders import BATCH, embedder
from tests.benchmarks.report import environment, write_json

STAMPS = Path(os.environ.get("TUXPAINT_STAMPS", "/usr/share/tuxpaint/stamps"))
RESULTS = Path(__file__).parent / "results" / "web_data" / "conse.json"
PACKAGE = "tuxpaint-stamps-default 2022.06.04-1 (Debian)"
FIRST = (1, 5, 10)


def captioned(stamps: Path) -> dict[str, Path]:
    """Caption to picture, in the order of the files."""
    found: dict[str, Path] = {}
    for text in sorted(stamps.rglob("*.txt")):
        picture, folders = text.with_suffix(".png"), text.relative_to(stamps).parts
        if picture.is_file() and folders[0] != "symbols" and not any("cartoon" in folder for folder in folders):
            found.setdefault(text.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip(), picture)
    return found


def recall(scores: Any) -> dict[str, float]:
    """Of a matrix (N, N) whose matches are its diagonal: how many rows have theirs among the first."""
    better = (scores > scores.diagonal()[:, None]).sum(axis=1)  # (N,)
    return {f"R@{first}": round(float((better < first).mean()), 4) for first in FIRST}


def measured(stamps: Path) -> dict[str, Any]:
    """What ConSE finds."""
    pairs = captioned(stamps)
    model = embedder("conse", "cpu")
    model.setup()
    paths, started = list(pairs.values()), time.process_time()
    parts = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    pictures = np.concatenate([model.pictures([read_picture(path) for path in part]) for part in parts])
    seconds = time.process_time() - started
    scores = model.texts(list(pairs)) @ pictures.T  # (captions, pictures)
    matched, others = scores.diagonal(), scores[~np.eye(len(scores), dtype=bool)]
    below = np.searchsorted(np.sort(others), matched) / len(others)
    return {
        "captions": len(pairs),
        "picture_of_caption": recall(scores),
        "caption_of_picture": recall(scores.T),
        "chance": {f"R@{first}": round(first / len(pairs), 4) for first in FIRST},
        "auc": round(float(below.mean()), 4),
        "matched": {"mean": round(float(matched.mean()), 4), "deviation": round(float(matched.std()), 4)},
        "others": {"mean": round(float(others.mean()), 4), "deviation": round(float(others.std()), 4)},
        "cpu_seconds_a_picture": round(seconds / len(pairs), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=STAMPS, help=f"the stamps (default: {STAMPS})")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.stamps.is_dir():
        parser.error(f"--stamps {arguments.stamps}: no such folder; apt-get install tuxpaint-stamps-default")
    found = measured(arguments.stamps)
    for name, value in found.items():
        print(f"{name}: {value}")
    write_json(arguments.output, {"data": PACKAGE, **found, "environment": environment()})


if __name__ == "__main__":
    main()
