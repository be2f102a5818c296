"""`hubgen data embed`, `index`, `search`, `duplicates`: vectors of the pictures of shards, and what they are for."""

import argparse
from pathlib import Path
from typing import Any

from hubgen.cli.arguments import add_command, count, finite, positive
from hubgen.cli.web import ENGINE_HELP, add_engine, engine_of, run_stage

MODELS = """\
--model:
  clip:NAME   a CLIP or SigLIP of transformers: a folder, or OWNER/NAME on the Hub
  conse       for photographs only, of what ImageNet's 1,000 classes name; needs no Hub: pip install "hubgen[conse]".
              Its cosines are no CLIP's, and CLIP's thresholds do not fit them
  thumbnail   the coarse look of a picture, without a model, for `hubgen data duplicates`; knows no texts
"""

EMBED_DESCRIPTION = """\
Make vectors of the pictures in a folder of shards, so that what is alike points the same way: 00000.npy with a row for
each picture, and 00000.parquet with key, caption and url of these rows, as LAION published its embeddings.

Running it again after an interruption does what is missing.
"""

EMBED_EPILOG = f"""\
examples:
  hubgen data embed shards --model clip:openai/clip-vit-base-patch32 --out embeddings
  hubgen data embed shards --model clip:openai/clip-vit-base-patch32 --texts --out embeddings --engine ray --workers 4
  hubgen data embed shards --model thumbnail --out thumbnails

{MODELS}
{ENGINE_HELP}
"""

INDEX_DESCRIPTION = """\
Make an index of vectors, for `hubgen data search`. Up to 10,000 vectors are all compared at a search; of more, those of
the nearest cells are, and how many cells a search needs is measured: of the ten nearest, at least 95 in 100 are found.
"""

INDEX_EPILOG = """\
examples:
  hubgen data index embeddings --out index

EMBEDDINGS is a folder of `hubgen data embed` or of clip-retrieval (img_emb, metadata). All vectors are in memory, 4
bytes a number. Needs faiss: pip install "hubgen[index]".

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""

SEARCH_DESCRIPTION = """\
Print the pictures of an index that are nearest to a text or to a picture: key, cosine, caption and URL, with tabs
between them.
"""

SEARCH_EPILOG = """\
examples:
  hubgen data search index --text "a red car"
  hubgen data search index --image photo.jpg --k 20
  hubgen data search index --image photo.jpg --model clip:my/folder

The model is the one that made the index's vectors; --model names it where it is not known, or lies elsewhere.

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""

DUPLICATES_DESCRIPTION = """\
Mark pictures that are nearly the same as an earlier one: the column duplicate_of of the shards becomes the key of that
one, of all others null. Rows are gone through in order, so the least key stays, and each that is marked is as near to
one that stays.
"""

DUPLICATES_EPILOG = f"""\
examples:
  hubgen data embed shards --model thumbnail --out thumbnails
  hubgen data duplicates shards --embeddings thumbnails --threshold 0.95
  hubgen data filter shards --where "duplicate_of is null" --out kept

Vectors of `thumbnail` find copies of other sizes and compressions; those of a CLIP find the same thing too, with a
threshold of its own. Needs faiss: pip install "hubgen[index]".

{ENGINE_HELP}
"""


def add_search(kinds: Any) -> None:
    """Adds `hubgen data embed`, `index`, `search` and `duplicates`."""
    embed = add_command(
        kinds, "embed", summary="vectors of pictures", description=EMBED_DESCRIPTION, epilog=EMBED_EPILOG
    )
    add = embed.add_argument
    add("shards", type=Path, metavar="SHARDS", help="the folder of shards")
    add("--model", required=True, metavar="MODEL", help="what makes them, see below")
    add("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    add("--texts", action="store_true", help="of the captions too: 00000.text.npy")
    add("--stored", choices=("float16", "float32"), default="float16", help="numbers of the files (default: float16)")
    add_device(embed)
    add_engine(embed, gpus=True)
    embed.set_defaults(run=data_embed)

    index = add_command(
        kinds, "index", summary="an index of vectors", description=INDEX_DESCRIPTION, epilog=INDEX_EPILOG
    )
    add = index.add_argument
    add("embeddings", type=Path, metavar="EMBEDDINGS", help="the folder of vectors")
    add("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    add("--threads", type=positive, default=1, metavar="N", help="more may change last bits (default: 1)")
    index.set_defaults(run=data_index)

    search = add_command(
        kinds, "search", summary="pictures like a text or picture", description=SEARCH_DESCRIPTION, epilog=SEARCH_EPILOG
    )
    add = search.add_argument
    add("index", type=Path, metavar="INDEX", help="the folder of `hubgen data index`")
    asked = search.add_mutually_exclusive_group(required=True)
    asked.add_argument("--text", metavar="TEXT", help="what to look for")
    asked.add_argument("--image", type=Path, metavar="FILE", help="a picture that others are like")
    add("--k", type=count, default=10, metavar="N", help="how many (default: 10)")
    add("--probes", type=positive, metavar="N", help="cells to look into (default: as the index was measured to need)")
    add("--model", metavar="MODEL", help="what makes the vector (default: what made the index's)")
    add_device(search)
    search.set_defaults(run=data_search)

    duplicates = add_command(
        kinds,
        "duplicates",
        summary="near-duplicates, marked",
        description=DUPLICATES_DESCRIPTION,
        epilog=DUPLICATES_EPILOG,
    )
    add = duplicates.add_argument
    add("shards", type=Path, metavar="SHARDS", help="the folder of shards, whose tables get the column")
    add("--embeddings", type=Path, metavar="DIR", required=True, help="their vectors, of `hubgen data embed`")
    add("--threshold", type=finite, default=0.95, metavar="X", help="cosine of near-duplicates (default: 0.95)")
    add_engine(duplicates)
    duplicates.set_defaults(run=data_duplicates)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds what a model runs on."""
    add = parser.add_argument
    add("--device", metavar="NAME", help="cpu, cuda, mps (default: the fastest of the machine)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of a CLIP (default: float32)")


def data_embed(arguments: argparse.Namespace) -> None:
    """`hubgen data embed`: shards to vectors."""
    engine_of(arguments)
    out: Path = arguments.out
    if out.resolve() == arguments.shards.resolve():
        raise ValueError(f"--out {out}: is the folder of the shards, expected another one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected the folder to write")
    from hubgen.data.web.embedding.embedders import embedder
    from hubgen.data.web.embedding.embeddings import Embed
    from hubgen.data.web.shards import open_shards

    shards = open_shards(arguments.shards)
    stage = Embed(embedder(arguments.model, arguments.device, arguments.dtype), arguments.texts, arguments.stored)
    if arguments.texts and arguments.model == "thumbnail":
        raise ValueError("--texts: is for models that know texts, and thumbnail knows none")
    stats = run_stage(stage, stage.works(shards), out, arguments)
    total = sum(entry["count"] for entry in stats)
    print(f"{out}: vectors of {stage.embedder.dimension} numbers of {total} pictures in {len(stats)} shards")


def data_index(arguments: argparse.Namespace) -> None:
    """`hubgen data index`: vectors to an index."""
    from hubgen.data.web.embedding.embeddings import StoredEmbeddings
    from hubgen.data.web.embedding.index import build_index

    if arguments.out.resolve() == arguments.embeddings.resolve():
        raise ValueError(f"--out {arguments.out}: is the folder of the vectors, expected another one")
    index = build_index(StoredEmbeddings.open(arguments.embeddings), arguments.out, threads=arguments.threads)
    cells, probes = index.info["cells"], index.info["probes"]
    searched = "all are compared" if cells == 1 else f"{probes} of {cells} cells are looked into"
    measured = f", recall of 10: {index.info['recall']:.3f}" if cells > 1 else ""
    print(f"{arguments.out}: {len(index)} vectors of {index.info['dimension']} numbers; {searched}{measured}")


def data_search(arguments: argparse.Namespace) -> None:
    """`hubgen data search`: the nearest pictures."""
    from hubgen.data.web.embedding.embedders import embedder
    from hubgen.data.web.embedding.index import SearchIndex

    index = SearchIndex.open(arguments.index)
    name = arguments.model or index.info["embedder"]
    if name is None:
        raise ValueError(f"--model: got none, and {arguments.index} does not say what made its vectors; expected it")
    one = embedder(name, arguments.device, arguments.dtype)
    if one.dimension != index.info["dimension"]:
        raise ValueError(
            f"--model {name}: makes vectors of {one.dimension} numbers, expected {index.info['dimension']} as "
            f"{arguments.index} has"
        )
    if arguments.image is not None:
        from hubgen.data.pictures import read_picture

        picture = read_picture(arguments.image)
        one.setup()
        question = one.pictures([picture])
    else:
        one.setup()
        question = one.texts([arguments.text])
    similarities, rows = index.search(question, arguments.k, arguments.probes)
    for similarity, row in zip(similarities[0], index.shown(rows[0]), strict=False):
        values = [row["key"], f"{similarity:.4f}", row["caption"], row["url"]]
        print("\t".join(" ".join((value or "").split()) for value in values))


def data_duplicates(arguments: argparse.Namespace) -> None:
    """`hubgen data duplicates`: the column `duplicate_of` of shards."""
    engine_of(arguments)
    if not 0 < arguments.threshold <= 1:
        raise ValueError(f"--threshold: got {arguments.threshold:g}, expected a cosine above 0, at most 1")
    from hubgen.data.web.embedding.duplicates import MarkDuplicates
    from hubgen.data.web.embedding.embeddings import StoredEmbeddings
    from hubgen.data.web.stages import open_to_add

    shards = open_to_add(arguments.shards)
    stage = MarkDuplicates.of(shards, StoredEmbeddings.open(arguments.embeddings), arguments.threshold)
    stats = run_stage(stage, stage.works(shards), arguments.shards, arguments)
    marked, total = (sum(entry[name] for entry in stats) for name in ("near_duplicates", "count"))
    print(f"{arguments.shards}: {marked} of {total} rows are near-duplicates of an earlier one")
