"""`hubgen data`: image-text folders to train on."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from hubgen.cli.arguments import add_command, finite, positive, seed
from hubgen.cli.crawl import add_crawl
from hubgen.cli.recaption import add_recaption
from hubgen.cli.score import add_filter, add_score
from hubgen.cli.search import add_search
from hubgen.cli.web import add_download

EMOJI_DESCRIPTION = """\
Build an image-text folder from emoji: DIR/train and DIR/test, each with pictures and a metadata.jsonl of captions,
and the licence of the art beside them. The folder loads with `datasets` (imagefolder) and with hubgen's trainers.

Running it again after an interruption finishes what is missing.
"""

EMOJI_EPILOG = """\
examples:
  hubgen data emoji --style fluent --size 64 --out data/fluent
  hubgen data emoji --style noto --size 128 --out data/noto --font NotoColorEmoji.ttf
  hubgen data emoji --size 128 --variants mirrored recoloured frame flat --validation 60 --out data/rich
  hubgen data emoji --style fluent --out data/fluent --archive fluent-emoji-3d.tgz --names-archive emojibase-data.tgz

The art and the names come from the npm registry; without a network, give the files by path. --style noto above 64
pixels needs the font NotoColorEmoji.ttf, or the Debian package that holds it, given as --font.

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""


def add_data(commands: Any) -> None:
    """Adds `hubgen data` to the command line."""
    parser = add_command(
        commands,
        "data",
        summary="build data to train on",
        description="Make data to train on: folders of pictures with captions, and shards of pictures from the web.",
        epilog="Each has a page of its own: `hubgen data emoji --help`.",
    )
    kinds = parser.add_subparsers(title="kinds of data", metavar="KIND", required=True)
    emoji = add_command(
        kinds, "emoji", summary="emoji with their names", description=EMOJI_DESCRIPTION, epilog=EMOJI_EPILOG
    )
    emoji.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    emoji.add_argument("--style", choices=("fluent", "noto"), default="fluent", help="whose art (default: fluent)")
    emoji.add_argument("--size", type=positive, default=64, metavar="N", help="pixels of a side (default: 64)")
    emoji.add_argument("--archive", type=Path, metavar="FILE", help="the art's package (.tgz) if it is already here")
    emoji.add_argument("--names-archive", type=Path, metavar="FILE", help="the names' package (.tgz), likewise")
    emoji.add_argument("--font", type=Path, metavar="FILE", help="the colour font for --style noto, likewise")
    emoji.add_argument(
        "--variants",
        nargs="+",
        default=[],
        choices=("mirrored", "recoloured", "frame", "flat"),
        help="further pictures to train on: mirrored, turned to seven named colours, frames of the animated emoji (a "
        "download of 730 MB), the flat ones (needs hubgen[emoji])",
    )
    emoji.add_argument(
        "--more-archives", nargs="+", type=Path, default=[], metavar="FILE", help="the variants' packages, likewise"
    )
    emoji.add_argument("--seed", type=seed, metavar="N", help="seed of the split (default: the builder's, fixed)")
    emoji.add_argument(
        "--held-out", type=positive, metavar="N", help="how many captions to hold out (default: the builder's)"
    )
    emoji.add_argument(
        "--validation", type=positive, metavar="N", help="captions of a further split to choose by (default: none)"
    )
    emoji.set_defaults(run=data_emoji)
    add_hints(kinds)
    add_edits(kinds)
    add_crawl(kinds)
    add_download(kinds)
    add_score(kinds)
    add_filter(kinds)
    add_recaption(kinds)
    add_search(kinds)


HINTS_DESCRIPTION = """\
Copy an image-text folder and put a hint beside each picture, which a ControlNet is shown: edges (canny), a coarse grid
of colours (color), brightness (grey), or the picture without its details (blur). The hints are the column
conditioning_image, which `datasets` finds too. Of a single picture, the hint is written to a file.

Running it again after an interruption finishes what is missing.
"""

HINTS_EPILOG = """\
examples:
  hubgen data hints data/fluent --kind canny --out data/fluent-canny
  hubgen data hints photo.jpg --kind canny --low 50 --high 150 --out edges.png
  hubgen data hints data/fluent --kind color --cells 8 --out data/fluent-colors

Edges need OpenCV: pip install "hubgen[controls]".

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""


def add_hints(kinds: Any) -> None:
    """Adds `hubgen data hints`."""
    hints = add_command(
        kinds, "hints", summary="hints for ControlNets", description=HINTS_DESCRIPTION, epilog=HINTS_EPILOG
    )
    hints.add_argument("source", type=Path, metavar="SOURCE", help="an image-text folder, or a picture")
    hints.add_argument("--kind", choices=("canny", "color", "grey", "blur"), required=True, help="of the hints")
    hints.add_argument("--out", type=Path, metavar="PATH", required=True, help="the folder to write, or the picture")
    hints.add_argument("--low", type=finite, metavar="X", help="canny: strength of an edge to follow (default: 100)")
    hints.add_argument("--high", type=finite, metavar="X", help="canny: strength of one to begin with (default: 200)")
    hints.add_argument("--cells", type=positive, metavar="N", help="color: cells along a side (default: 8)")
    hints.add_argument("--radius", type=finite, metavar="X", help="blur: pixels (default: 4)")
    hints.set_defaults(run=data_hints)


def data_hints(arguments: argparse.Namespace) -> None:
    """`hubgen data hints`: an image-text folder with hints, or the hint of one picture."""
    from hubgen.data.errors import DataError
    from hubgen.data.hints import check_options, hint_of, write_hints
    from hubgen.data.pictures import on_white, read_picture

    source, out = arguments.source, arguments.out
    names = ("low", "high", "cells", "radius")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    try:
        check_options(arguments.kind, options)
        if not source.exists():
            raise ValueError(f"{source}: no such file or folder, expected an image-text folder or a picture")
        if source.is_dir():
            check_out(out)
            count = write_hints(source, arguments.kind, out, **options)
            print(f"{out}: {count} pictures with hints ({arguments.kind})")
        else:
            check_picture(out)
            hint_of(on_white(read_picture(source)), arguments.kind, **options).save(out)
            print(out)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise as_option(error) from error


def as_option(error: ValueError) -> ValueError:
    """An error about an argument of Python, as one about the option of its name."""
    text = str(error)
    return ValueError(text.replace("`", "--", 1).replace("`", "", 1) if text.startswith("`") else text)


EDITS_DESCRIPTION = """\
Write pictures before and after edits, with the edits in words, to train a model that follows instructions
(`hubgen train instruct-pix2pix`). SOURCE is an image-text folder, whose pictures are edited by rule; or a .jsonl file
with an object of input, edit and output in each line: then a model draws pictures of input and of output, alike but for
the edit (Prompt-to-Prompt), from several seeds. The rows are original_image, edit_prompt, edited_image.

Running it again after an interruption finishes what is missing.
"""

EDITS_EPILOG = """\
examples:
  hubgen data edits data/fluent --out data/edits
  hubgen data edits data/fluent --edits mirror grey red blue --out data/edits
  hubgen data edits prompts.jsonl --model runwayml/stable-diffusion-v1-5 --seeds 8 --out data/pairs \\
      --scorer openai/clip-vit-large-patch14

A line of prompts.jsonl:
  {"input": "a photo of a cat", "edit": "make it a dog", "output": "a photo of a dog"}

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""
RULES = ("mirror", "upside_down", "grey", "swap_red_and_blue")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")


def add_edits(kinds: Any) -> None:
    """Adds `hubgen data edits`."""
    edits = add_command(
        kinds, "edits", summary="edits with instructions", description=EDITS_DESCRIPTION, epilog=EDITS_EPILOG
    )
    edits.add_argument("source", type=Path, metavar="SOURCE", help="an image-text folder, or a .jsonl file of prompts")
    edits.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    edits.add_argument(
        "--edits",
        nargs="+",
        choices=(*RULES, *COLOURS),
        metavar="NAME",
        help=f"of a folder: {', '.join(RULES)} (these if not given), or a colour that the picture is turned to, where "
        f"one prevails: {', '.join(COLOURS)}",
    )
    edits.add_argument("--model", metavar="MODEL", help="of prompts: what draws (default: the bundled model)")
    edits.add_argument("--seeds", type=positive, metavar="N", help="of prompts: pairs of each (default: 4)")
    edits.add_argument("--keep", type=positive, metavar="N", help="of prompts: the best of them (default: 1)")
    edits.add_argument("--steps", type=positive, metavar="N", help="of prompts: denoising steps (default: the model's)")
    edits.add_argument("--seed", type=seed, metavar="N", help="of prompts: start of the random numbers (default: 0)")
    edits.add_argument(
        "--scorer",
        metavar="CLIP",
        help="of prompts: folder or Hub id of a CLIP that chooses the best pairs, and leaves out bad ones",
    )
    edits.set_defaults(run=data_edits)


def data_edits(arguments: argparse.Namespace) -> None:
    """`hubgen data edits`: pictures before and after edits, by rule or drawn by a model."""
    source, out = arguments.source, arguments.out
    of_prompts = source.is_file() and source.suffix == ".jsonl"
    if not of_prompts and not source.is_dir():
        raise ValueError(f"{source}: no such folder or .jsonl file, expected an image-text folder, or prompts")
    others = ("edits",) if of_prompts else ("model", "seeds", "keep", "steps", "seed", "scorer")
    for name in others:
        if getattr(arguments, name) is not None:
            kind = "a folder" if of_prompts else "a .jsonl file of prompts"
            raise ValueError(f"--{name}: is for {kind}, and {source} is none")
    if of_prompts:
        count = drawn_pairs(arguments)
    else:
        from hubgen.data.edits import USUAL, write_edits

        check_out(out)
        count = write_edits(source, out, arguments.edits or USUAL)
    print(f"{out}: {count} edits")


def drawn_pairs(arguments: argparse.Namespace) -> int:
    """Has a model draw the pairs of a file of prompts; how many."""
    from hubgen.data.edits import DirectionalSimilarity, Drawing, read_triples, write_pairs
    from hubgen.hub.finding import BUNDLED, find_model, read_index

    triples = read_triples(arguments.source)
    given = {"seeds": arguments.seeds, "kept": arguments.keep, "steps": arguments.steps, "seed": arguments.seed}
    drawing = Drawing(**{name: value for name, value in given.items() if value is not None})
    model = arguments.model or BUNDLED
    folder = find_model(model, "--model")
    check_out(arguments.out)
    from hubgen.acceleration.device import choose_device
    from hubgen.pipelines.loading import is_text_to_image, load_pipeline

    index = read_index(model, None, folder, "--model")
    if not is_text_to_image(index):
        raise ValueError(f"--model {model}: is a {index['_class_name']}, expected one that draws prompts")
    device, dtype = choose_device(None, None, "--device")
    pipe = load_pipeline(index, model, None, folder, dtype=dtype, argument="--model").to(device)
    pipe.set_progress_bar_config(disable=True)
    score = None
    if arguments.scorer is not None:
        try:
            score = DirectionalSimilarity.from_pretrained(arguments.scorer)
        except Exception as error:  # folders of weights fail in every way there is
            from hubgen.errors import one_line

            raise ValueError(f"--scorer {arguments.scorer}: {one_line(error)}") from error
        score.model.to(device)
    return write_pairs(pipe, triples, arguments.out, drawing, score, model)


def check_picture(out: Path) -> None:
    """Raises ValueError unless a picture can be written to a file of this name."""
    from PIL import Image

    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {out}: expected a name with the ending of a picture, such as .png")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out}: cannot be written, expected a file in a folder that there is")


def check_out(out: Path) -> None:
    """Raises ValueError before anything is downloaded, where the folder cannot be made or takes no file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected the folder to write")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from error


def data_emoji(arguments: argparse.Namespace) -> None:
    """`hubgen data emoji`: an image-text folder from emoji."""
    from hubgen.data.emoji import build_emoji_dataset
    from hubgen.data.errors import DataError

    options = {
        "archive": arguments.archive,
        "names_archive": arguments.names_archive,
        "font": arguments.font,
        "seed": arguments.seed,
        "held_out": arguments.held_out,
        "variants": arguments.variants,
        "more_archives": arguments.more_archives,
        "validation": arguments.validation,
    }
    for name in ("archive", "names_archive", "font"):
        path = options[name]
        if path is not None and not path.is_file():
            raise ValueError(f"--{name.replace('_', '-')} {path}: no such file")
    check_out(arguments.out)
    given = {name: value for name, value in options.items() if value is not None}
    try:
        print(build_emoji_dataset(arguments.style, arguments.size, arguments.out, **given))
    except DataError as error:  # which names the arguments of Python
        text = str(error).replace("output_dir: ", "--out ", 1).replace("more_archives: ", "--more-archives ", 1)
        raise DataError(text) from error


# ---------------------------------------------------------------------------------------------------------------------
