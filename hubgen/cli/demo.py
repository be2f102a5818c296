"""`hubgen demo`: a page to draw with, or to train with, in the browser."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import socket
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hubgen.cli.added import stay_offline
from hubgen.cli.arguments import add_command
from hubgen.cli.messages import few_lines, say
from hubgen.hub.added import find_added, is_local
from hubgen.hub.finding import BUNDLED, find_model
from hubgen.hub.provenance import DTYPES

DESCRIPTION = """\
Serve a page to draw with: pictures that form step by step, from words or from a picture, in styles, and a look inside
the model. It is the Space of spaces/text_to_image, run here; the address is printed once it can draw.

--model takes the folder or repository of any pipeline that draws prompts. --adapters names LoRA files, folders with
some, or owner/name on the Hub; --controls networks that steer by a picture. Visitors choose among these, and name no
files themselves.

--train serves the other Space, spaces/train_lora: pictures are dropped in, and the model is taught their style or their
subject by a LoRA, with the loss and pictures to watch, and files to take.

Without --host, only this machine reaches the page. Visitors are held to limits, which the environment sets.
"""

EPILOG = """\
examples:
  hubgen demo
  hubgen demo --model runs/emoji/pipeline --adapters runs/noto/lora --open
  hubgen demo --model owner/model --controls owner/canny     steered by edges, in Control
  hubgen demo --second-model owner/model                     two models side by side, in Look inside
  hubgen demo --train                                        teach the model your pictures
  HUBGEN_LIMIT_STEPS=30 hubgen demo --host 0.0.0.0 --port 80

environment:
  HUBGEN_LIMIT_STEPS, HUBGEN_LIMIT_PIXELS, HUBGEN_LIMIT_PICTURES, HUBGEN_LIMIT_QUEUE, HUBGEN_LIMIT_SECONDS, ...
  (hubgen.spaces.kit.limits lists all)

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""

NEEDED = ("gradio",)
NEEDED_TO_TRAIN = ("gradio", "datasets")
EXTRA = 'pip install "hubgen[demo]"'
EXTRA_TO_TRAIN = 'pip install "hubgen[demo,train]"'


def add_demo(commands: Any) -> None:
    """Adds `hubgen demo` to the command line."""
    parser = add_command(
        commands, "demo", summary="a page to draw with, in the browser", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "--model",
        default=BUNDLED,
        metavar="MODEL",
        help="a pipeline folder, or owner/name on the Hub (default: the bundled model)",
    )
    parser.add_argument("--second-model", metavar="MODEL", help="another, to compare with in Look inside")
    parser.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="DIR",
        help="adapters for Style: .safetensors files, folders with some, or owner/name on the Hub",
    )
    parser.add_argument(
        "--controls",
        nargs="+",
        default=[],
        metavar="NET",
        help="networks for Control: folders or files of ControlNets, T2I-adapters and IP-Adapters, or owner/name",
    )
    parser.add_argument("--train", action="store_true", help="the page that trains: teach --model your pictures")
    parser.add_argument("--host", metavar="NAME", help="where to listen (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=port, metavar="N", help="default: 7860, or the next one that is free")
    parser.add_argument("--share", action="store_true", help="ask Gradio for an address that others can reach")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision (default: float32; bfloat16 on cuda)")
    parser.set_defaults(run=demo)


def port(text: str) -> int:
    """Of this machine."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 to 65535")
    return int(text)


def demo(arguments: argparse.Namespace) -> None:
    """`hubgen demo`: checks the arguments, hands them to the page by the environment as a Space gets them, and runs it.

    Raises:
        ValueError: Gradio is missing, or a model, an adapter or the port cannot be had.
    """
    check_packages(arguments.train)
    if arguments.train and (arguments.second_model is not None or arguments.adapters or arguments.controls):
        raise ValueError("--second-model, --adapters and --controls are for the page that draws, without --train")
    folders = [find_model(arguments.model, "--model", single_files=False)]
    if arguments.second_model is not None:
        folders.append(find_model(arguments.second_model, "--second-model", single_files=False))
    if None not in folders and not arguments.train:  # that page may send what it trained
        stay_offline([*arguments.adapters, *arguments.controls])
    for name in arguments.adapters:
        check_adapters(name)
    check_port(arguments.host or "127.0.0.1", arguments.port)
    values = {
        "MODEL": arguments.model,
        "SECOND_MODEL": arguments.second_model,
        "ADAPTERS": "\n".join(arguments.adapters),
        "CONTROLS": "\n".join(arguments.controls),
        "HOST": arguments.host,
        "PORT": arguments.port,
        "SHARE": int(arguments.share),
        "OPEN": int(arguments.open),
        "DEVICE": arguments.device,
        "DTYPE": arguments.dtype,
    }
    for name, value in values.items():
        os.environ.pop(f"HUBGEN_{name}", None)
        if value:
            os.environ[f"HUBGEN_{name}"] = str(value)
    say(f"loading {'the bundled model' if arguments.model == BUNDLED else arguments.model} ...")
    with few_lines():
        app = page("train_lora" if arguments.train else "text_to_image")
    try:
        app.main()
    except ValueError as error:
        raise ValueError(in_options(str(error), values)) from error


def in_options(text: str, names: Collection[str]) -> str:
    """What is wrong with a variable of the environment, told of the option that it was set by."""
    variable, space, rest = text.partition(" ")
    name = variable.removeprefix("HUBGEN_")
    return f"--{name.lower().replace('_', '-')}{space}{rest}" if variable != name and name in names else text


def check_packages(train: bool) -> None:
    """Raises ValueError where packages of the page are missing."""
    missing = [name for name in (NEEDED_TO_TRAIN if train else NEEDED) if importlib.util.find_spec(name) is None]
    if "gradio" in missing:
        raise ValueError(f"the page needs Gradio, which is not installed: {EXTRA_TO_TRAIN if train else EXTRA}")
    if missing:
        raise ValueError(f"training needs {' and '.join(missing)}, which is not installed: {EXTRA_TO_TRAIN}")


def check_adapters(name: str) -> None:
    """Raises ValueError for a name that is no adapter and no folder, before anything heavy is imported."""
    if is_local(name) and not Path(name).expanduser().is_dir():
        find_added("lora", name, shown=f"--adapters {name}")
    elif not is_local(name) and "/" not in name:
        raise ValueError(f"--adapters {name}: no such file or folder, and no owner/name on the Hub")


def check_port(host: str, number: int | None) -> None:
    """Raises ValueError where something else listens already."""
    if number is None:
        return
    try:
        with socket.create_server((host, number)):
            pass
    except OSError as error:
        raise ValueError(f"--port {number}: not to be had at {host} ({error.strerror or error})") from error


def page(space: str) -> Any:
    """The module of a page, from the installed folder of its Space, whose files import each other by their names."""
    found = importlib.util.find_spec("hubgen.spaces")
    if found is None or found.origin is None:
        raise FileNotFoundError("the Spaces are not in this installation; install hubgen from a full clone or wheel")
    sys.path.insert(0, str(Path(found.origin).parent / space))
    return importlib.import_module("app")
