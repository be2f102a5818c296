"""`hubgen data score` and `hubgen data filter`: what a pair is worth, and which pairs stay."""

import argparse
from pathlib import Path
from typing import Any

from hubgen.cli.arguments import add_command
from hubgen.cli.web import add_engine, engine_of, run_stage

FILTER_DESCRIPTION = """\
Copy the rows of a folder of shards that a recipe's rules, a condition on columns and lists of hashes leave. Keys and
pictures stay as they are. Rows without a picture go too. DIR/report.json counts what went, by the first reason.

Running it again after an interruption does what is missing, and gives the same files.
"""

FILTER_EPILOG = """\
examples:
  hubgen data filter shards --recipe laion-5b --out kept
  hubgen data filter shards --where "similarity >= 0.28 and width >= 200" --out kept
  hubgen data filter shards --recipe datacomp-basic --where "top(similarity, 0.3)" --out kept
  hubgen data filter shards --hash-list blocked.txt --out kept

--where: comparisons (>= > <= < == !=) of a column with a number, a text in quotes, true or false; `column is null`,
`is not null`; top(column, 0.3) for the rows of the largest 30 % of all values; and, or, not, brackets. What is equal to
a number stays for >= and <=. A comparison with a missing value does not hold, nor does its opposite: such a row goes,
and is counted by itself. A column whose name is no plain word stands in `backquotes`.

--recipe: the recipe's rules of "filter" (scores), and those of "download" that shards can answer. datacomp-basic,
laion-400m, laion-5b, or a YAML file of your own. The columns come from `hubgen data score`.

--hash-list: an MD5, SHA-256, SHA-512 (of the downloaded file) or URL on each line, or parquet with columns md5, sha256,
sha512, url. Pictures are not looked at.

exit status:
  0 done, 2 bad arguments or files (one line says what), 3 some shards failed and the others are done, 130 interrupted,
  1 a fault in hubgen
"""


def add_filter(kinds: Any) -> None:
    """Adds `hubgen data filter`."""
    parser = add_command(
        kinds, "filter", summary="shards with the rows to keep", description=FILTER_DESCRIPTION, epilog=FILTER_EPILOG
    )
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="the folder of shards")
    add("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    add("--recipe", metavar="NAME", help="which rules to apply, or a .yaml file of them")
    add("--where", metavar="CONDITION", help="what has to hold of a row's columns, see below")
    add("--hash-list", nargs="+", type=Path, default=[], metavar="FILE", help="pictures and URLs that go unseen")
    add_engine(parser)
    parser.set_defaults(run=data_filter)


def data_filter(arguments: argparse.Namespace) -> None:
    """`hubgen data filter`: shards to shards."""
    from hubgen.cli.messages import say

    out: Path = arguments.out
    engine_of(arguments)
    if arguments.recipe is None and arguments.where is None and not arguments.hash_list:
        raise ValueError("expected --recipe, --where or --hash-list; got none of them")
    if out.resolve() == arguments.shards.resolve():
        raise ValueError(f"--out {out}: is the folder of the shards, expected another one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected the folder to write")
    from hubgen.data.web.filters import REPORT, Filter, write_report
    from hubgen.data.web.rules import load_recipe
    from hubgen.data.web.shards import open_shards
    from hubgen.data.web.where import WhereError, parse_where

    recipe = None if arguments.recipe is None else load_recipe(arguments.recipe)
    try:
        where = None if arguments.where is None else parse_where(arguments.where)
        shards = open_shards(arguments.shards)
        stage = Filter.of(shards, recipe=recipe, where=where, hash_lists=arguments.hash_list)
    except WhereError as error:
        raise WhereError(f"--where: {error}") from error
    run_stage(stage, stage.works(shards), out, arguments)
    report = write_report(stage, out)
    if stage.not_applied:
        say(
            f"hubgen: warning: {', '.join(stage.not_applied)}: not applied, since shards do not tell what the "
            "downloaded files were; `hubgen data download --min-bytes --formats` does"
        )
    dropped = ", ".join(f"{name} {number}" for name, number in report["dropped"].items() if number)
    print(f"{out}: {report['kept']} of {report['rows']} rows in {report['shards']} shards ({REPORT})")
    print(f"dropped: {dropped or 'none'}")
