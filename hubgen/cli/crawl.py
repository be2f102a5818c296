"""`hubgen data crawl`: candidates of image-text pairs from the files of Common Crawl."""

import argparse
from pathlib import Path
from typing import Any

from hubgen.cli.arguments import add_command, count, finite
from hubgen.cli.web import EXIT_SHARDS_FAILED, add_engine, engine_of

CRAWL_DESCRIPTION = """\
Find pictures with texts in files of a crawl, and write the pairs that a recipe's rules leave: DIR/00000.parquet, ...,
a table for each file (url, text, language, license, page_url, ...), and DIR/report.json, which says how many each rule
dropped. The next step is `hubgen data download DIR`.

The files are WAT files of Common Crawl, or WARC files, whose HTML is parsed then. No pair stands twice: of equal ones,
the first stays, by the order of the files. Pages that say noai, noimageai, noindex, noimageindex or noml are left out.

Running it again after an interruption does what is missing, and gives the same files.
"""

CRAWL_EPILOG = """\
examples:
  hubgen data crawl crawl/*.wat.gz --recipe laion-5b --out cand
  hubgen data crawl crawl/*.wat.gz --recipe mine.yaml --out cand --workers 8
  hubgen data crawl crawl/*.wat.gz --recipe laion-400m --out cand --dedup bloom --bloom-capacity 5000000000

Recipes: datacomp-basic, laion-400m, laion-5b, or a YAML file of your own; those that come along are in hubgen's folder
data/web/recipes, and show the form. It needs the extra: pip install "hubgen[web]".

exit status:
  0 done, 2 bad arguments or files (one line says what), 3 some files are broken (the others are done), 130 interrupted,
  1 a fault in hubgen
"""


def add_crawl(kinds: Any) -> None:
    """Adds `hubgen data crawl`."""
    crawl = add_command(
        kinds, "crawl", summary="pairs from files of a crawl", description=CRAWL_DESCRIPTION, epilog=CRAWL_EPILOG
    )
    crawl.add_argument("files", nargs="+", type=Path, metavar="FILE", help="WAT or WARC files, packed by gzip or not")
    crawl.add_argument("--recipe", required=True, metavar="NAME", help="which rules to apply, or a .yaml file of them")
    crawl.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    crawl.add_argument(
        "--dedup",
        choices=("exact", "bloom"),
        default="exact",
        help="how repeats are found: bloom takes fixed memory, drops some pairs that are no repeats, and lets a later "
        "run add files to the same folder (default: exact)",
    )
    crawl.add_argument(
        "--bloom-capacity", type=count, metavar="N", help="bloom: pairs that it is made for (default: 100000000)"
    )
    crawl.add_argument(
        "--bloom-error",
        type=finite,
        metavar="X",
        help="bloom: share of new pairs that it may drop when it holds that many (default: 0.001)",
    )
    crawl.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="of a file that is cut off or broken: say so at the end and write nothing yet, or take what stands before "
        "the fault (default: fail)",
    )
    add_engine(crawl)
    crawl.set_defaults(run=data_crawl)


def data_crawl(arguments: argparse.Namespace) -> None:
    """`hubgen data crawl`: tables of pairs, and the report."""
    from hubgen.cli.messages import say
    from hubgen.data.web.crawling.text import needed

    needed("pyarrow")
    engine = engine_of(arguments)
    from hubgen.data.web.crawling.crawl import IncompleteCrawl, crawl
    from hubgen.data.web.rules import load_recipe

    asked = {"capacity": arguments.bloom_capacity, "error": arguments.bloom_error}
    bloom = {name: value for name, value in asked.items() if value is not None}
    if bloom and arguments.dedup != "bloom":
        raise ValueError(f"--bloom-{next(iter(bloom))}: is for --dedup bloom, and that is {arguments.dedup}")
    if arguments.bloom_error is not None and not 0 < arguments.bloom_error < 1:
        raise ValueError(f"--bloom-error: got {arguments.bloom_error:g}, expected a number above 0 and below 1")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out}: is a file, expected the folder to write")
    recipe = load_recipe(arguments.recipe)
    try:
        report = crawl(
            arguments.files,
            recipe,
            arguments.out,
            dedup=arguments.dedup,
            on_error=arguments.on_error,
            engine=engine,
            workers=arguments.workers,
            show_progress=True,
            **bloom,
        )
    except IncompleteCrawl as error:
        say(f"hubgen: error: {error}")
        raise SystemExit(EXIT_SHARDS_FAILED) from error
    dropped = ", ".join(f"{name} {number}" for name, number in report["dropped"].items() if number)
    print(f"{arguments.out}: {report['kept']} pairs of {report['links']} pictures in {report['files']} files")
    print(f"dropped: {dropped or 'none'}")
    for problem in report["cut_files"].values():
        say(f"hubgen: warning: {problem}; what stands before is taken")
