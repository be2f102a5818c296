"""`hubgen data score` and `hubgen data filter`: what a pair is worth, and which pairs stay."""

import argparse
from pathlib import Path
from typing import Any

from hubgen.cli.added import stay_offline
from hubgen.cli.arguments import add_command, finite
from hubgen.cli.web import ENGINE_HELP, add_engine, engine_of, run_stage

SCORE_DESCRIPTION = """\
Add columns to the tables of a folder of shards that say what each pair is worth; `hubgen data filter` chooses by them.
Every row stays, with nulls where there is no value. A column that is there already is never written over.

Running it again after an interruption does the shards that are missing, and gives the same files. Other columns are
added by a run of their own.
"""

SCORE_EPILOG = f"""\
examples:
  hubgen data score shards --scorer clip:openai/clip-vit-base-patch32
  hubgen data score shards --scorer clip:openai/clip-vit-base-patch32 --engine ray --workers 8 --gpus-per-worker 1
  hubgen data score shards --scorer embeddings:vectors --no-similarity --no-nsfw --head aesthetic=sac+logos.pth
  hubgen data score shards --scorer conse
  hubgen data score shards --language --hash
  hubgen data score shards --join punsafe.parquet --on hash

--scorer
  clip:MODEL           any CLIP or SigLIP of transformers, a folder or owner/name: similarity, the cosine of picture and
                       caption, and LAION's tags: nsfw, under_age_prompts, animal_prompts
  conse                conse_similarity, without the Hub: ImageNet's classes beside the words of the caption. For
                       photographs alone, and on a scale of its own: no threshold of CLIP's fits it
  embeddings:DIR       as what made the vectors of `hubgen data embed --out DIR`, whose pictures are not looked at again

--head NAME=FILE       a column from a network on the vectors (.safetensors, or .pth with weights alone): LAION's
                       aesthetic predictors and detectors of unsafe pictures, and others of their layouts

On a CPU, each worker computes on one thread: --workers is how many are used.

{ENGINE_HELP}
"""

FILTER_DESCRIPTION = """\
Copy the rows of a folder of shards that a recipe's rules, a condition on columns and lists of hashes leave. Keys and
pictures stay as they are. Rows without a picture go too. DIR/report.json counts what went, by the first reason.

Running it again after an interruption does what is missing, and gives the same files.
"""

FILTER_EPILOG = f"""\
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

{ENGINE_HELP}
"""


def add_score(kinds: Any) -> None:
    """Adds `hubgen data score`."""
    parser = add_command(
        kinds, "score", summary="what pairs are worth", description=SCORE_DESCRIPTION, epilog=SCORE_EPILOG
    )
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add("shards", type=Path, metavar="SHARDS", help="the folder of shards")
    add("--scorer", metavar="NAME", help="clip:MODEL, conse or embeddings:DIR, see below")
    add("--similarity", action=switch, help="of a scorer: the cosine of picture and caption (default: yes)")
    add("--nsfw", action=switch, help="of a CLIP: LAION's tags (default: yes)")
    add("--head", nargs="+", type=name_and_file, default=[], metavar="NAME=FILE", help="of a scorer: see below")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of a CLIP's weights (default: float32)")
    add(
        "--language",
        nargs="?",
        choices=("cld3", "fasttext"),
        const="cld3",
        help="language and language_score of each caption, by this detector (default: cld3)",
    )
    add("--least-language-score", type=finite, metavar="X", help='less probable languages are "" (default: 0)')
    add("--hash", action="store_true", help="LAION's hash of URL and caption")
    add("--join", type=Path, metavar="FILE", help="columns of another table (parquet)")
    add("--on", choices=("hash", "url", "key"), help="what it is joined by (default: the first that it has)")
    add("--columns", nargs="+", metavar="NAME", help="of --join: which to add (default: all)")
    add_engine(parser, gpus=True)
    parser.set_defaults(run=data_score)


def name_and_file(text: str) -> tuple[str, Path]:
    """`aesthetic=head.pth` to the name of a column and a file."""
    name, equals, file = text.partition("=")
    if not (equals and file and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=FILE, the name as letters, digits and _")
    return name, Path(file)


def data_score(arguments: argparse.Namespace) -> None:
    """`hubgen data score`: a folder of shards, with more columns."""
    engine_of(arguments)
    check_score(arguments)
    if arguments.scorer is not None and arguments.scorer.startswith("clip:"):
        stay_offline([arguments.scorer.removeprefix("clip:")])
    from hubgen.cli.messages import few_lines

    with few_lines():
        from hubgen.data.web.scoring.scores import SCORED, Score
        from hubgen.data.web.stages import open_to_add

        shards = open_to_add(arguments.shards)
        stage = Score(tuple(parts_of(arguments)))
        stats = run_stage(stage, stage.works(shards), arguments.shards, arguments)
    rows, pictures = (sum(entry[name] for entry in stats) for name in ("count", "successes"))
    counts = {name: sum(entry[SCORED][name] for entry in stats) for name in stage.columns}
    print(f"{arguments.shards}: {rows} rows, {pictures} pictures; with a value:")
    for name, number in counts.items():
        print(f"  {name} {number}")


def check_score(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit together."""
    wanted = {
        "--scorer": ("similarity", "nsfw", "head", "dtype"),
        "--language": ("least_language_score",),
        "--join": ("on", "columns"),
    }
    for option, others in wanted.items():
        for other in others:
            if getattr(arguments, option.strip("-")) is None and getattr(arguments, other) not in (None, []):
                raise ValueError(f"--{other.replace('_', '-')}: is for {option}, which is not given")
    if not (arguments.scorer or arguments.language or arguments.hash or arguments.join):
        raise ValueError("expected --scorer, --language, --hash or --join; got none of them")
    if not 0 <= (arguments.least_language_score or 0) <= 1:
        raise ValueError(f"--least-language-score: got {arguments.least_language_score:g}, expected 0 to 1")
    names = [name for name, _ in arguments.head]
    if len({*names}) < len(names):
        raise ValueError(f"--head: got the names {', '.join(names)}, expected each once")


def parts_of(arguments: argparse.Namespace) -> Any:
    """What makes the columns that the arguments ask for.

    Raises:
        DataError: A model, a file or a package is not there, or does not fit.
    """
    from hubgen.data.web.scoring.scores import Joined, LaionHash, Language

    if arguments.scorer is not None:
        yield embedding_scores(arguments)
    if arguments.language is not None:
        yield Language(arguments.language, arguments.least_language_score or 0.0)
    if arguments.hash:
        yield LaionHash()
    if arguments.join is not None:
        yield Joined.of(arguments.join, arguments.on, arguments.columns or ())


def embedding_scores(arguments: argparse.Namespace) -> Any:
    """What makes the columns of a scorer."""
    from hubgen.data.web.embedding.embedders import embedder
    from hubgen.data.web.scoring.embedding_scores import EmbeddingScores, Live, Stored, Vectors

    kind, _, folder = arguments.scorer.partition(":")
    similarity = arguments.similarity is not False
    vectors: Vectors
    if kind == "embeddings" and folder:
        if arguments.dtype is not None:
            raise ValueError("--dtype: is that of the vectors' own model; expected none with embeddings:DIR")
        vectors = Stored(Path(folder))
    else:
        vectors = Live(embedder(arguments.scorer, dtype=arguments.dtype or "float32"))
    tags = vectors.name.startswith("clip:") if arguments.nsfw is None else arguments.nsfw
    if not (similarity or tags or arguments.head):
        raise ValueError("--scorer: got --no-similarity, no tags and no --head, expected something to compute")
    return EmbeddingScores(vectors, similarity, tags, tuple(arguments.head))


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
    from hubgen.data.web.filtering.filters import REPORT, Filter, write_report
    from hubgen.data.web.filtering.where import WhereError, parse_where
    from hubgen.data.web.rules import load_recipe
    from hubgen.data.web.shards import open_shards

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
