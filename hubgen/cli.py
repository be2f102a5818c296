"""The `hubgen` command: pictures from a prompt, and data to train on.

`main` parses, does what it was asked and returns the exit status. Heavy libraries are imported by the functions that
use them, so that `--help` and mistakes in the arguments answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import re
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hubgen.hub.provenance import (
    DTYPES,
    FORMATS,
    LARGEST_SEED,
    LARGEST_SIDE,
    Request,
    read_request,
    versions,
    write_picture,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from hubgen.pipelines.text_to_image import TextToImagePipeline

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED = 0, 2, 130

BUNDLED = "bundled"

DESCRIPTION = """\
hubgen makes pictures from words with diffusion and flow-matching models, and builds data to train such models on.

Without --model, `hubgen generate` uses the model that comes with the package: it was trained on emoji, makes pictures
of 64x64 pixels and needs neither a network nor an accelerator.
"""

EPILOG = """\
examples:
  hubgen generate "a smiling cat" --out cat.png
  hubgen generate --from cat.png                     the same picture again, from what cat.png says about itself
  hubgen data emoji --style fluent --size 64 --out data/fluent

environment:
  HF_HOME          where models from the Hub are kept (default: ~/.cache/huggingface)
  HF_HUB_OFFLINE   1: never use the network; set by hubgen itself for the bundled model and for local folders
  HUBGEN_DEBUG     1: show the traceback of every error

exit status:
  0    done
  2    something in the arguments, files or data is wrong; one line on standard error says what
  130  interrupted from the keyboard
  1    a fault in hubgen or in a library below it, with its traceback

Each command has a page of its own: `hubgen generate --help`, `hubgen data emoji --help`.
"""

GENERATE_DESCRIPTION = """\
Make a picture of each prompt and write it to a file. Several prompts, or -n above 1, give one picture with a grid:
with both, a row for each prompt.

A PNG carries the prompts, the seed and all settings in its text chunk `hubgen` (JSON); --from reads them back.
"""

GENERATE_EPILOG = """\
examples:
  hubgen generate "a smiling cat" --out cat.png
  hubgen generate "a red apple" "a green apple" "a blue apple" -n 4 --seed 7 --out apples.png
  hubgen generate "a house by the sea" --model runs/my-model --num-inference-steps 50 --guidance-scale 5 --out house.png
  hubgen generate --from cat.png                           the same picture, written beside it under a new name
  hubgen generate --from cat.png --seed 8 --out other.png  the same settings, another seed

Picture j of a prompt (from 0) is drawn from seed + j, so each cell of a grid can be made again alone.
The same command gives the same picture on the same machine; other hardware or library versions round differently.

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""

EMOJI_DESCRIPTION = """\
Build an image-text folder from emoji: DIR/train and DIR/test, each with pictures and a metadata.jsonl of captions,
and the licence of the art beside them. The folder loads with `datasets` (imagefolder) and with hubgen's trainers.

Running it again after an interruption finishes what is missing.
"""

EMOJI_EPILOG = """\
examples:
  hubgen data emoji --style fluent --size 64 --out data/fluent
  hubgen data emoji --style noto --size 128 --out data/noto --font NotoColorEmoji.ttf
  hubgen data emoji --style fluent --out data/fluent --archive fluent-emoji-3d.tgz --names-archive emojibase-data.tgz

The art and the names come from the npm registry; without a network, give the files by path. --style noto above 64
pixels needs the font NotoColorEmoji.ttf, or the Debian package that holds it, given as --font.

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 2 for an expected error, 130 for Ctrl-C.

    `argv` are the arguments after the command's name; None reads them from the process. Faults that nobody expected
    leave as exceptions, with their traceback.
    """
    try:
        arguments = build_parser().parse_args(argv)
        run: Callable[[argparse.Namespace], None] = arguments.run
        run(arguments)
    except KeyboardInterrupt:
        print("\nhubgen: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as exit_request:  # argparse leaves this way, after --help too
        return exit_request.code if isinstance(exit_request.code, int) else EXIT_ERROR
    except Exception as error:
        if not is_expected(error) or os.environ.get("HUBGEN_DEBUG") == "1":
            raise
        print(f"hubgen: error: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_OK


def is_expected(error: Exception) -> bool:
    """Whether an error tells of bad input or a full machine, rather than of a fault in the program."""
    if isinstance(error, (ValueError, OSError)):
        return True
    # Named, not imported: the modules that define them are heavy, and may not have been loaded when the error came.
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    expected = {"torch.OutOfMemoryError", "safetensors_rust.SafetensorError", "safetensors.SafetensorError"}
    expected |= {"huggingface_hub.EntryNotFoundError", "huggingface_hub.RevisionResolutionError"}
    if names & expected:
        return True
    # On a CPU, torch reports exhausted memory as a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def one_line(error: Exception) -> str:
    """An error's message on one line; an OSError of the system names its file first."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    if "allocate memory" in text or "OutOfMemory" in type(error).__name__:
        text = f"out of memory; try a smaller --batch-size or --size ({text})"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


class Parser(argparse.ArgumentParser):
    """argparse with its errors in hubgen's one line."""

    def error(self, message: str) -> NoReturn:
        print(f"hubgen: error: {' '.join(message.split())} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(EXIT_ERROR)


class ShowVersion(argparse.Action):
    """Print the version when asked; reading the package's metadata at every start would cost time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"hubgen {installed_version('hubgen')}")
        raise SystemExit(EXIT_OK)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each command's function is in `run`."""
    parser = Parser(
        prog="hubgen",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_generate(commands)
    add_data(commands)
    return parser


def add_command(commands: Any, name: str, *, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_generate(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        summary="make pictures from prompts",
        description=GENERATE_DESCRIPTION,
        epilog=GENERATE_EPILOG,
    )
    # No defaults here: None says "not given", so that --from can tell what to override.
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the picture shows; several give a grid")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the picture to write: .png, .jpg or .webp (default: a new PNG named after the prompt)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="repeat a PNG that hubgen wrote; options given beside it override what the file says",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="a pipeline folder, or owner/name on the Hub (default: the bundled model)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the picture should not show (default: nothing)")
    parser.add_argument(
        "-n",
        "--num-images-per-prompt",
        dest="n",
        type=positive,
        metavar="N",
        help="pictures of each prompt (default: 1)",
    )
    parser.add_argument(
        "--num-inference-steps", type=positive, metavar="N", help="steps from noise to picture (default: the model's)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=finite,
        metavar="X",
        help="how strongly the prompt steers; 1 is no guidance (default: the model's)",
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="start of the random numbers (default: drawn, and told)")
    parser.add_argument(
        "--size", type=size, metavar="N or WxH", help="pixels of each picture (default: what the model was trained for)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision (default: float32; bfloat16 on cuda)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="pictures made at a time (default: 8)")
    parser.set_defaults(run=generate)


def add_data(commands: Any) -> None:
    parser = add_command(
        commands,
        "data",
        summary="build data to train on",
        description="Build image-text folders to train on.",
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
    emoji.add_argument("--seed", type=seed, metavar="N", help="seed of the split (default: the builder's, fixed)")
    emoji.add_argument(
        "--held-out", type=positive, metavar="N", help="how many captions to hold out (default: the builder's)"
    )
    emoji.set_defaults(run=data_emoji)


def positive(text: str) -> int:
    number = whole(text)
    if not 1 <= number <= 10_000:  # more would be a slip of the keyboard, and days of work
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 10000, found {text!r}")
    return number


def seed(text: str) -> int:
    number = whole(text)
    if not 0 <= number <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, found {text!r}")
    return number


def whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
    return int(text)


def finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text!r}")
    return number


def size(text: str) -> tuple[int, int]:
    """`64` or `96x64` to (width, height) in pixels."""
    match = re.fullmatch(r"([0-9]{1,9})(?:[xX×]([0-9]{1,9}))?", text)
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise argparse.ArgumentTypeError(
            f"expected N or WIDTHxHEIGHT in pixels, from 1 to {LARGEST_SIDE}, such as 64 or 96x64, found {text!r}"
        )
    return sides


# ---------------------------------------------------------------------------------------------------------------------
# hubgen generate


def generate(arguments: argparse.Namespace) -> None:
    """`hubgen generate`: prompts to a picture file."""
    started = time.perf_counter()
    source = None
    if arguments.source is not None:
        source, made_with = read_request(arguments.source)
        tell_other_versions(arguments.source, made_with)

    def chosen(name: str, default: Any = None) -> Any:
        """What the command line says, else what the picture to repeat says, else the default."""
        return first_given(getattr(arguments, name), getattr(source, name, None), default)

    prompts = check_prompts(arguments.prompts or (source.prompts if source else []))
    out = check_out(arguments.out or default_out(prompts[0], arguments.source))
    model = chosen("model", BUNDLED)
    if source is not None and source.model != model:
        source = dataclasses.replace(source, width=None, height=None, revision=None)  # those belong to its model
    folder = find_model(model)
    if folder is not None:
        if arguments.revision is not None:
            raise ValueError(f"--revision {arguments.revision}: for models on the Hub; {model} is a folder here")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import of huggingface_hub, which reads it once
    n, seed = chosen("n", 1), chosen("seed", secrets.randbelow(2**32))
    if seed + n - 1 > LARGEST_SEED:
        raise ValueError(f"--seed {seed} with -n {n}: the last picture's seed would be above 2^63 - 1")

    say(f"loading {'the bundled model' if model == BUNDLED else model} ...")
    device, dtype = choose_device(chosen("device"), chosen("dtype"))
    width, height = arguments.size or ((source.width, source.height) if source else (None, None))
    request = Request(
        prompts=prompts,
        negative_prompt=chosen("negative_prompt"),
        n=n,
        num_inference_steps=chosen("num_inference_steps"),
        guidance_scale=chosen("guidance_scale"),
        seed=seed,
        width=width,
        height=height,
        model=model,
        revision=chosen("revision"),
        device=device,
        dtype=dtype,
        batch_size=chosen("batch_size", 8),
    )
    with quiet_libraries():
        pipe = load_pipeline(request, folder)
        request = complete(request, pipe)
        if folder is None:
            request = dataclasses.replace(request, revision=loaded_commit(model, request.revision))
        loaded = time.perf_counter()
        say(f"loaded in {loaded - started:.1f} s; {describe(request)}")
        pictures = sample(pipe, request)
    sampled = time.perf_counter()
    write_picture(out, grid(pictures, len(prompts), n), request)
    if out.suffix.lower() != ".png":
        say(f"{out.suffix} files carry no settings: only a .png can be repeated with --from")
    pictures_made = f"{len(pictures)} {'picture' if len(pictures) == 1 else 'pictures'}"
    print(
        f"wrote {out} ({pictures_made} of {request.width}x{request.height}, seed {seed}, "
        f"sampled in {sampled - loaded:.1f} s, {time.perf_counter() - started:.1f} s in all)"
    )


def check_prompts(prompts: list[str]) -> list[str]:
    if not prompts:
        raise ValueError('no prompt: say what to draw, such as hubgen generate "a smiling cat" --out cat.png')
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} of {len(prompts)} is empty; expected words")
        if not prompt.isascii() and prompt.encode("utf-8", "replace").decode() != prompt:
            raise ValueError(f"prompt {number} of {len(prompts)} is not valid UTF-8 text")
    return prompts


def default_out(prompt: str, source: Path | None) -> Path:
    """A name that is free: after the file that is repeated, beside it, or after the prompt, here."""
    folder, stem = (source.parent, source.stem) if source is not None else (Path(), slug(prompt))
    candidates = (folder / f"{stem}{f'-{number}' if number > 1 else ''}.png" for number in range(1, 10_000))
    free = next((path for path in candidates if not path.exists()), None)
    if free is None:
        raise ValueError(f"--out not given, and {folder / stem}.png to {stem}-9999.png all exist; name a file")
    return free


def slug(prompt: str) -> str:
    return re.sub(r"[\W_]+", "-", prompt.lower())[:60].strip("-") or "picture"


def check_out(out: Path) -> Path:
    """Fail before the work, not after it: the format, the folder, and whether it takes a file."""
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder, expected a file name such as {out / 'cat.png'}")
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {out}: expected a file name ending in {', '.join(FORMATS)}, found {out.suffix!r}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write in {out.parent}: {error.strerror}") from error
    return out


def find_model(model: str) -> Path | None:
    """The folder of a model, or None if it is on the Hub.

    Raises:
        ValueError: it is neither a pipeline folder nor of the form owner/name.
    """
    if model == BUNDLED:
        from hubgen.hub.bundled import bundled_model

        return bundled_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"--model {model}: not a pipeline folder, it holds no model_index.json")
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--model {model}: its model_index.json is not JSON ({error})") from error
        if not isinstance(index, dict) or "_class_name" not in index:
            raise ValueError(f"--model {model}: its model_index.json names no pipeline (`_class_name`)")
        return folder
    if folder.exists():
        raise ValueError(f"--model {model}: is a file, expected a pipeline folder or owner/name on the Hub")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        raise ValueError(f"--model {model}: no such folder; expected a pipeline folder or owner/name on the Hub")
    return None


def choose_device(device: str | None, dtype: str | None) -> tuple[str, str]:
    """The device and precision to use: those asked for, or the fastest device and what suits it."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device)
        torch.empty(1, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: not to be had on this machine ({reason}); cpu always is") from error
    if kind.type == "meta":
        raise ValueError("--device meta: holds no numbers; expected cpu, cuda or mps")
    return device, dtype or ("bfloat16" if kind.type == "cuda" else "float32")


def load_pipeline(request: Request, folder: Path | None) -> TextToImagePipeline:
    import torch

    from hubgen.pipelines.text_to_image import TextToImagePipeline

    options: dict[str, Any] = {"torch_dtype": getattr(torch, request.dtype)}
    if folder is None:
        options["revision"] = request.revision
    try:
        pipe = TextToImagePipeline.from_pretrained(str(folder or request.model), **options)
    except (OSError, ValueError) as error:
        origin = f"no folder of that name here, and from the Hub: {error}" if folder is None else str(error)
        raise ValueError(f"--model {request.model}: does not load: {origin}") from error
    return pipe.to(request.device)


def complete(request: Request, pipe: TextToImagePipeline) -> Request:
    """The request with the model's own settings in place of None, so that the picture's file says them too."""
    height, width = pipe.default_size
    return dataclasses.replace(
        request,
        num_inference_steps=first_given(request.num_inference_steps, pipe.config.default_num_inference_steps),
        guidance_scale=first_given(request.guidance_scale, pipe.config.default_guidance_scale),
        width=request.width or width,
        height=request.height or height,
    )


def loaded_commit(model: str, revision: str | None) -> str | None:
    """The commit of the Hub's files that were just loaded, so that a picture can be repeated after the branch moved."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(index).parent.name if isinstance(index, str) else revision


def sample(pipe: TextToImagePipeline, request: Request) -> list[Image.Image]:
    """The pictures, all those of the first prompt first, each from a generator of its own."""
    prompts = [prompt for prompt in request.prompts for _ in range(request.n)]
    seeds = [request.seed + j for _ in request.prompts for j in range(request.n)]
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), request.batch_size):
        batch = slice(start, start + request.batch_size)
        count = f" {start + 1}-{min(start + request.batch_size, len(prompts))} of {len(prompts)}"
        pipe.set_progress_bar_config(desc="sampling" + (count if len(prompts) > 1 else ""), file=sys.stderr)
        pictures += pipe(
            prompts[batch],
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            negative_prompt=request.negative_prompt,
            generator=[seeded(number) for number in seeds[batch]],
        ).images
    return pictures


def seeded(number: int) -> torch.Generator:
    """A generator on the CPU on every device, so that the noise is the same everywhere."""
    import torch

    return torch.Generator("cpu").manual_seed(number)


def grid(pictures: list[Image.Image], prompts: int, n: int) -> Image.Image:
    """One picture of all: a row for each prompt, or as square as it goes when there is one row or one column."""
    from PIL import Image

    columns = n if prompts > 1 and n > 1 else math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    return sheet


def describe(request: Request) -> str:
    """One line that says what is about to be made."""
    return (
        f"{request.width}x{request.height} pixels, {request.num_inference_steps} steps, "
        f"guidance {request.guidance_scale:g}, seed {request.seed}, {request.dtype} on {request.device}"
    )


def tell_other_versions(path: Path, made_with: dict[str, str]) -> None:
    """Say it where a picture was made with other libraries than those here."""
    here = versions()
    other = [name for name, number in made_with.items() if here.get(name) != number]
    if other:
        then, now = (", ".join(f"{name} {table.get(name)}" for name in other) for table in (made_with, here))
        say(f"{path} was made with {then}; here: {now}. The picture may differ slightly.")


# ---------------------------------------------------------------------------------------------------------------------
# hubgen data


def data_emoji(arguments: argparse.Namespace) -> None:
    """`hubgen data emoji`: an image-text folder from emoji."""
    from hubgen.data.emoji import build_emoji_dataset

    options = {
        "archive": arguments.archive,
        "names_archive": arguments.names_archive,
        "font": arguments.font,
        "seed": arguments.seed,
        "held_out": arguments.held_out,
    }
    for name in ("archive", "names_archive", "font"):
        path = options[name]
        if path is not None and not path.is_file():
            raise ValueError(f"--{name.replace('_', '-')} {path}: no such file")
    given = {name: value for name, value in options.items() if value is not None}
    print(build_emoji_dataset(arguments.style, arguments.size, arguments.out, **given))


# ---------------------------------------------------------------------------------------------------------------------
# Words to the user


def say(text: str) -> None:
    """Progress goes to standard error; standard output holds only what was made."""
    print(text, file=sys.stderr, flush=True)


def first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


class SayOnce(logging.Handler):
    """Shows hubgen's own warnings, each once: a prompt of n pictures is encoded in several batches."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text not in self.said:
            self.said.add(text)
            say(f"hubgen: warning: {text}")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the other libraries' remarks and loading bars out of the command's few lines; errors still come through."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    ours, handler = logging.getLogger("hubgen"), SayOnce()
    ours.addHandler(handler)
    saved = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    for module, _ in saved:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.removeHandler(handler)
        for module, verbosity in saved:
            module.set_verbosity(verbosity)
            module.enable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
