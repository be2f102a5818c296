"""`hubgen data download`: pictures from the web, in shards."""

import argparse
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hubgen.cli.arguments import add_command, count, finite, positive, positive_number, whole

EXIT_SHARDS_FAILED = 3
SHOWN_REASONS, SHOWN_SHARDS = 5, 3
MODES = ("no", "border", "keep_ratio", "center_crop", "keep_ratio_largest")
ENGINES = {"local": "", "ray": "Ray", "slurm": "datatrove"}
"""Each with what it needs beside the extra `web`"""
EXTRA = 'pip install "hubgen[web]"'

ENGINE_HELP = """\
Needs pyarrow: pip install "hubgen[web]". --workers are processes of this machine. --engine ray makes them actors of the
cluster that RAY_ADDRESS names, or of this machine: pip install "hubgen[ray]". --engine slurm makes them jobs of one
array, and waits for them: pip install "hubgen[slurm]"; all machines see the same files, and sbatch's other options are
given by its variables (SBATCH_ACCOUNT, SBATCH_QOS). What is written does not depend on the engine.

exit status:
  0 done, 2 bad arguments or files (one line says what), 3 some shards failed and the others are done, 130 interrupted,
  1 a fault in hubgen"""
"""Ends the help of every stage's command"""

DOWNLOAD_DESCRIPTION = """\
Download the pictures of a table of URLs and captions, and write them in shards: 00000.tar with the pictures,
00000.parquet with a row for each URL, 00000_stats.json with the counts. The layout is img2dataset's; `datasets` and
webdataset read it too. A picture that cannot be had keeps its row, with a status and the reason.

Running it again after an interruption makes the shards that are missing. Only http and https are asked, and only hosts
with public addresses; robots.txt is heeded, and so are headers against the use for AI (X-Robots-Tag with noai and its
kin, TDM-Reservation).
"""

DOWNLOAD_EPILOG = f"""\
examples:
  hubgen data download cand --size 512 --resize keep_ratio --out shards
  hubgen data download urls.csv --url-col link --caption-col title --out shards --workers 8
  hubgen data download cand --size 512 --resize keep_ratio --out shards --retry-failed --deadline 60

--size and --resize, as img2dataset has them:
  no                   pictures stay as they are
  border               the longer side becomes SIZE, on a white square
  keep_ratio           the shorter side becomes SIZE
  center_crop          that, cut to a square
  keep_ratio_largest   the longer side becomes SIZE

{ENGINE_HELP}
"""


def add_download(kinds: Any) -> None:
    """Adds `hubgen data download`."""
    parser = add_command(
        kinds,
        "download",
        summary="pictures from the web, in shards",
        description=DOWNLOAD_DESCRIPTION,
        epilog=DOWNLOAD_EPILOG,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a table (.parquet, .csv, .tsv, .jsonl), or a folder of some")
    add("--out", type=Path, metavar="DIR", required=True, help="the folder of shards to write")
    add("--url-col", "--url_col", default="url", metavar="NAME", help="column of the URLs (default: url)")
    add("--caption-col", "--caption_col", metavar="NAME", help="column of the captions (default: text)")
    add("--no-captions", action="store_true", help="there is no column of captions")
    add("--rows", type=count, default=10_000, metavar="N", help="URLs of a shard (default: 10000)")

    pictures = parser.add_argument_group("pictures")
    add = pictures.add_argument
    add("--size", type=positive, default=256, metavar="N", help="pixels of a side (default: 256)")
    add("--resize", choices=MODES, default="keep_ratio", help="see below (default: keep_ratio)")
    add("--only-if-bigger", action="store_true", help="leave smaller pictures as they are")
    add("--encoding", choices=("jpg", "png", "webp"), default="jpg", help="of the files (default: jpg)")
    add("--quality", type=whole, metavar="N", help="of jpg and webp, 0 to 100 (95); of png the compression, 0 to 9 (6)")
    add("--skip-reencode", action="store_true", help="pictures that need no change keep their bytes")
    add("--formats", nargs="+", metavar="NAME", help="what is read (default: jpeg png webp gif bmp tiff avif)")
    add("--min-bytes", type=count, metavar="N", help="of a file (LAION: 5000)")
    add("--min-side", type=positive, metavar="N", help="pixels of the shorter side, before resizing")
    add("--max-pixels", type=count, metavar="N", help="width times height, before resizing (default: 89478484)")
    add("--max-aspect-ratio", type=positive_number, metavar="X", help="longer side to shorter")
    add("--compute-hash", choices=("md5", "sha256", "sha512", "none"), default="sha256", help="of the downloaded file")
    add("--verify-hash", metavar="NAME", help="column of the files' hashes: others are not kept (see --compute-hash)")

    sites = parser.add_argument_group("sites")
    add = sites.add_argument
    add("--timeout", type=positive_number, default=10.0, metavar="X", help="seconds without a byte (default: 10)")
    add("--deadline", type=positive_number, default=30.0, metavar="X", help="seconds for a URL in all (default: 30)")
    add("--retries", type=whole, default=2, metavar="N", help="after time-outs, 408, 425, 429 and 5xx (default: 2)")
    add("--backoff", type=positive_number, default=1.0, metavar="X", help="seconds before the first (default: 1)")
    add("--max-bytes", type=count, default=32 * 2**20, metavar="N", help="of a file (default: 33554432)")
    add("--user-agent", default="hubgen", metavar="NAME", help="word that robots.txt may name (default: hubgen)")
    add("--allow-host", nargs="+", default=[], metavar="HOST", help="hosts whose addresses need not be public")
    add("--threads", type=positive, default=64, metavar="N", help="of each worker (default: 64)")
    add("--per-host", type=positive, default=4, metavar="N", help="requests to a host at a time, of each worker (4)")
    add("--pause", type=finite, default=0.0, metavar="X", help="seconds between requests to a host, of each worker (0)")
    add("--retry-failed", action="store_true", help="ask again for the failed rows of shards that are there")
    add_engine(parser)
    parser.set_defaults(run=data_download)


def add_engine(parser: argparse.ArgumentParser, *, gpus: bool = False) -> None:
    """Adds what runs a stage's shards.

    Args:
        parser: Of a command that ends in `run_stage`, or hands `engine_of` on.
        gpus: Whether the stage has a model.
    """
    work = parser.add_argument_group("work")
    add = work.add_argument
    add("--engine", choices=ENGINES, default="local", help="what runs them: this machine (default), Ray or Slurm")
    add("--workers", type=positive, default=1, metavar="N", help="shards at a time (default: 1)")
    if gpus:
        add("--gpus-per-worker", type=finite, default=0.0, metavar="X",
            help="of its own; below 1 some share one (default: all of them with --engine local, else 0)")  # fmt: skip
    add("--slurm-partition", metavar="NAME", help="slurm: of the jobs (default: Slurm's own)")
    add("--slurm-time", metavar="TIME", help="slurm: limit of a job, as sbatch has it (default: 24:00:00)")
    add("--slurm-cpus", type=positive, metavar="N", help="slurm: of a job (default: 1)")
    add("--slurm-memory", type=positive, metavar="GB", help="slurm: of a job for each of its CPUs (default: 4)")


def engine_of(arguments: argparse.Namespace) -> Any:
    """The engine that the arguments ask for.

    Raises:
        ValueError: They do not fit together, or a package is missing.
    """
    check_packages(arguments.engine)
    gpus = getattr(arguments, "gpus_per_worker", 0.0)
    if gpus < 0 or (gpus > 1 and gpus % 1):
        raise ValueError(f"--gpus-per-worker: got {gpus:g}, expected a whole number, or a part of 1")
    slurm = {name: getattr(arguments, f"slurm_{name}") for name in ("partition", "time", "cpus", "memory")}
    options: dict[str, Any] = {name: value for name, value in slurm.items() if value is not None}
    if options and arguments.engine != "slurm":
        raise ValueError(f"--slurm-{next(iter(options))}: is for --engine slurm, and that is {arguments.engine}")
    if gpus % 1 and arguments.engine == "slurm":
        raise ValueError(f"--gpus-per-worker: got {gpus:g}, expected a whole number for --engine slurm")
    if gpus:
        options["gpus"] = int(gpus) if arguments.engine == "slurm" else gpus
    from hubgen.data.web.engines.engine import ENGINES as FOUND

    return FOUND[arguments.engine](**options)


def data_download(arguments: argparse.Namespace) -> None:
    """`hubgen data download`: candidates to shards."""
    engine_of(arguments)
    stage = download_of(arguments)
    from hubgen.data.web.shards import shard_names

    out: Path = arguments.out
    if arguments.retry_failed and not shard_names(out):
        raise ValueError(f"--retry-failed: {out} has no shards yet; expected those of an earlier download")
    works = stage.works(arguments.source)
    stats = run_stage(stage, works, out, arguments)
    total = {name: sum(entry[name] for entry in stats) for name in ("count", "successes")}
    print(f"{out}: {total['successes']} pictures of {total['count']} URLs in {len(stats)} shards")
    say_reasons(stats)


def download_of(arguments: argparse.Namespace) -> Any:
    """The stage that the arguments ask for.

    Raises:
        ValueError: They do not fit together, or a package is missing.
    """
    check_numbers(arguments)
    from hubgen.data.web.downloading.download import Columns, Download, Manners
    from hubgen.data.web.downloading.fetch import Limits
    from hubgen.data.web.downloading.resize import FORMATS, MAX_PIXELS, Resizing

    caption = None if arguments.no_captions else (arguments.caption_col or "text")
    digest = None if arguments.compute_hash == "none" else arguments.compute_hash
    formats = tuple(name.lower() for name in arguments.formats or FORMATS)
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"--formats: got {name!r}, expected some of {', '.join(FORMATS)}")
    return Download(
        Columns(arguments.url_col, caption, digest, arguments.verify_hash),
        Resizing(
            arguments.size,
            arguments.resize,
            arguments.only_if_bigger,
            arguments.encoding,
            arguments.quality,
            arguments.skip_reencode,
            formats,
            arguments.min_bytes or 0,
            arguments.min_side or 0,
            arguments.max_pixels or MAX_PIXELS,
            arguments.max_aspect_ratio,
        ),
        Limits(arguments.timeout, arguments.deadline, arguments.retries, arguments.backoff, arguments.max_bytes),
        Manners(
            arguments.user_agent,
            tuple(host.lower() for host in arguments.allow_host),
            arguments.threads,
            arguments.per_host,
            arguments.pause,
        ),
        arguments.rows,
        arguments.retry_failed,
    )


def check_packages(engine: str) -> None:
    """Raises ValueError where a package is missing, with the line that installs it."""
    if find_spec("pyarrow") is None:
        raise ValueError(f"shards need pyarrow: {EXTRA}")
    if ENGINES[engine] and find_spec(ENGINES[engine].lower()) is None:
        raise ValueError(f'--engine {engine}: needs {ENGINES[engine]}: pip install "hubgen[{engine}]"')


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that are out of range, or against each other."""
    if arguments.no_captions and arguments.caption_col is not None:
        raise ValueError("--no-captions: got --caption-col too, expected one of them")
    if arguments.retries < 0:
        raise ValueError(f"--retries: got {arguments.retries}, expected a whole number from 0")
    if arguments.pause < 0:
        raise ValueError(f"--pause: got {arguments.pause:g}, expected seconds from 0")
    if arguments.verify_hash is not None and arguments.compute_hash == "none":
        raise ValueError("--verify-hash: got --compute-hash none, expected the algorithm of that column")
    most = 9 if arguments.encoding == "png" else 100
    if arguments.quality is not None and not 0 <= arguments.quality <= most:
        raise ValueError(f"--quality: got {arguments.quality}, expected 0 to {most} for {arguments.encoding}")
    token = arguments.user_agent
    if not token or not all(letter.isascii() and (letter.isalpha() or letter in "_-") for letter in token):
        raise ValueError(f"--user-agent: got {token!r}, expected letters, - and _, as robots.txt has them")
    if arguments.source.is_dir() and arguments.source.resolve() == arguments.out.resolve():
        raise ValueError(f"--out {arguments.out}: is the folder of the candidates, expected another one")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out}: is a file, expected the folder to write")


def run_stage(stage: Any, works: Any, out: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs a stage over its shards, and says which failed; the stats of all.

    Raises:
        SystemExit: Of status 3: some shards failed.
    """
    from hubgen.cli.messages import say
    from hubgen.data.web.engines.engine import run
    from hubgen.data.web.shards import STATS, read_stats

    report = run(stage, works, out, engine=engine_of(arguments), workers=arguments.workers, show_progress=True)
    if report.there:
        say(f"{report.there} of {len(works)} shards were there already")
    if report.failed:
        for problem in dict.fromkeys(report.failed.values()):
            names = sorted(name for name, other in report.failed.items() if other == problem)
            more = f" and {len(names) - SHOWN_SHARDS} more" if len(names) > SHOWN_SHARDS else ""
            say(f"hubgen: shard {', '.join(names[:SHOWN_SHARDS])}{more} failed: {problem}")
        say(f"hubgen: {len(report.failed)} of {len(works)} shards failed; start the same command again for these")
        raise SystemExit(EXIT_SHARDS_FAILED)
    return [read_stats(out / f"{work.name}{STATS}") for work in works]


def say_reasons(stats: list[dict[str, Any]]) -> None:
    """Says why rows failed, the most frequent reasons."""
    from hubgen.cli.messages import say

    reasons = Counter[str]()
    for entry in stats:
        reasons.update({name: number for name, number in entry["status_dict"].items() if name != "success"})
    for reason, number in reasons.most_common(SHOWN_REASONS):
        say(f"  {number} x {reason}")
    if len(reasons) > SHOWN_REASONS:
        say(f"  {sum(reasons.values()) - sum(n for _, n in reasons.most_common(SHOWN_REASONS))} for other reasons")
