"""How fast is a stage of web data on each engine, how soon does it begin, and in how much memory?

    python -m tests.benchmarks.web_stages [--pictures N] [--pages N] [--runs N] [--engines NAME ...] [--output DIR]

Two stages: `download`, of JPEG files of 640×480 from a server on loopback, which shares the machine, to 256 pixels and
JPEG again; and `parse`, the first of a crawl, of WAT files by LAION-5B's recipe. The engines take turns, each run in a
fresh process; what they wrote is compared, byte by byte.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet

from hubgen.data.web.crawling.crawl import Parse, digest_of
from hubgen.data.web.downloading.download import Download, Manners
from hubgen.data.web.downloading.resize import Resizing
from hubgen.data.web.engines.engine import run
from hubgen.data.web.rules import load_recipe
from hubgen.data.web.shards import read_stats
from hubgen.data.web.stages import Stage, Work
from tests.data.web.site import file_of, picture, reply, serving
from tests.data.web.wats import TEXT, WebPage, image, write_wat

RESULTS = Path(__file__).parent / "results" / "web_data"
ENGINES = {"loop": ("local", 1), "pool of 2": ("local", 2), "Ray, 2 actors": ("ray", 2)}
SHARDS = 8
FILES = 40
"""Different pictures; their URLs are more"""
LOOKS = 0.2
"""Seconds between two looks at the memory"""


def stage_of(name: str, source: Path) -> tuple[Stage, list[Work]]:
    """A stage, and what it is done to."""
    if name == "download":
        rows = pyarrow.parquet.read_metadata(source / "candidates.parquet").num_rows
        manners = Manners(allowed_hosts=("127.0.0.1",), threads=8, per_host=8)
        stage = Download(resizing=Resizing(256), manners=manners, rows=-(-rows // SHARDS))
        return stage, stage.works(source / "candidates.parquet")
    files = sorted(source.glob("*.wat.gz"))
    return Parse(load_recipe("laion-5b")), [Work(n, path, 0, 1, digest_of(path)) for n, path in enumerate(files)]


def once(name: str, engine: str, source: Path, out: Path) -> dict[str, float]:
    """Runs a stage in this process: seconds in all and before the first shard is begun; rows."""
    stage, works = stage_of(name, source)
    kind, workers = ENGINES[engine]
    began, clock = time.time(), time.perf_counter()
    outcome = run(stage, works, out, engine=kind, workers=workers)
    seconds = time.perf_counter() - clock
    assert not outcome.failed, outcome.failed
    stats = [read_stats(out / f"{work.name}_stats.json") for work in works]
    rows = sum(entry["count" if name == "download" else "links"] for entry in stats)
    return {"seconds": seconds, "start": min(entry["start_time"] for entry in stats) - began, "rows": rows}


def measured(name: str, engine: str, source: Path, out: Path) -> dict[str, float]:
    """`once` in a fresh process, with the most memory of it and its kin: MB, pages that n share counting 1/n each."""
    command = [sys.executable, "-m", __spec__.name, "--one", name, engine, str(source), str(out)]
    load = os.getloadavg()[0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    most = 0.0
    while process.poll() is None:
        most = max(most, memory_of(process.pid))
        time.sleep(LOOKS)
    assert process.stdout is not None and process.returncode == 0
    figures = json.loads(process.stdout.read().splitlines()[-1])
    return {**figures, "rows_per_second": figures["rows"] / figures["seconds"], "memory": most, "load": load}


def memory_of(pid: int) -> float:
    """Proportional set size of a process and all below it, in MB."""
    total = 0
    try:
        kin = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in kin:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


@contextmanager
def sources(folder: Path, pictures: int, pages: int) -> Iterator[dict[str, Path]]:
    """The input of each stage; the server runs as long."""
    served = {f"/{n}": reply(file_of(picture(640, 480, seed=n), quality=90)) for n in range(FILES)}
    wats = folder / "parse"
    wats.mkdir()
    for number in range(SHARDS):
        links = [f"http://pictures.org/{number}/{page}" for page in range(pages)]
        write_wat(
            wats / f"{number}.wat.gz",
            [
                WebPage(f"http://page.org/{page}", [image(f"{url}-{n}.jpg", f"{TEXT} {page} {n}") for n in range(4)])
                for page, url in enumerate(links)
            ],
        )
    with serving(served) as site:
        urls = [f"{site.url(f'/{n % FILES}')}" for n in range(pictures)]
        (folder / "download").mkdir()
        table = pa.table({"url": urls, "text": [f"picture {n}" for n in range(pictures)]})
        pyarrow.parquet.write_table(table, folder / "download" / "candidates.parquet")
        yield {"download": folder / "download", "parse": wats}


def files_of(folder: Path) -> dict[str, bytes]:
    """What a run wrote, but for the times."""
    return {path.name: path.read_bytes() for path in folder.glob("0*") if path.suffix != ".json"}


def of_runs(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, with the least and the largest."""
    found: dict[str, Any] = {"rows": runs[0]["rows"], "runs": len(runs)}
    for name in ("rows_per_second", "seconds", "start", "memory", "load"):
        values = [entry[name] for entry in runs]
        found[name] = {name: round(f(values), 2) for name, f in
                       (("median", statistics.median), ("least", min), ("largest", max))}  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> None:
    """Measures, and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1600)
    parser.add_argument("--pages", type=int, default=1000, help="of each of 8 WAT files, with 4 pictures each")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        name, engine, source, out = options.one
        print(json.dumps(once(name, engine, Path(source), Path(out))))
        return
    from tests.benchmarks import report  # not above: fresh processes of a pool import this file too, and no torch

    runs: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, sources(Path(folder), options.pictures, options.pages) as given:
        for number in range(options.runs):
            for name, source in given.items():
                for engine in options.engines:
                    out = Path(folder) / f"{name}-{engine}-{number}"
                    runs[name, engine].append(measured(name, engine, source, out))
                    print(name, engine, {key: round(value, 2) for key, value in runs[name, engine][-1].items()})
                    first = Path(folder) / f"{name}-{options.engines[0]}-0"
                    assert files_of(out) == files_of(first), f"{engine} wrote other bytes"
    rows = [{"stage": name, "engine": engine, **of_runs(entries)} for (name, engine), entries in runs.items()]
    machine = {"cores": os.cpu_count(), "shared": "other programs were at work; see `load`, the average of a minute"}
    units = {"memory": "MB, proportional, of all processes", "start": "seconds to the first shard's begin"}
    content = {"environment": report.environment(), "machine": machine, "units": units, "rows": rows}
    report.write_json(options.output / "stages.json", content)
    report.write_text(options.output / "stages.md", table_of(rows))
    print(table_of(rows))


def table_of(rows: list[dict[str, Any]]) -> str:
    """Medians of three, and in brackets the least and the largest."""
    from tests.benchmarks.report import markdown_table

    def shown(figures: dict[str, float], digits: int = 0) -> str:
        return " ".join(
            [f"{figures['median']:.{digits}f}", f"({figures['least']:.{digits}f}–{figures['largest']:.{digits}f})"]
        )

    return markdown_table(
        ["stage, engine", "rows/s", "seconds", "start, s", "memory, MB", "load of the machine"],
        [
            [f"{row['stage']}, {row['engine']}", shown(row["rows_per_second"]), shown(row["seconds"], 1),
             shown(row["start"], 1), shown(row["memory"]), shown(row["load"], 1)]
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
