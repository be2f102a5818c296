"""The `hubgen` command: pictures from a prompt, adapters trained, inspected and converted, and data to train on.

`main` parses, does what it was asked and returns the exit status. Heavy libraries are imported by the functions that
use them, so that `--help` and mistakes in the arguments answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version as installed_version
from typing import Any, NoReturn

from hubgen.cli.arguments import EXIT_ERROR, Parser
from hubgen.cli.convert import add_convert
from hubgen.cli.data import add_data
from hubgen.cli.demo import add_demo
from hubgen.cli.generate import add_generate
from hubgen.cli.inspect import add_inspect
from hubgen.cli.publish import add_publish
from hubgen.cli.train import add_train
from hubgen.errors import is_expected, one_line

EXIT_OK, EXIT_INTERRUPTED = 0, 130

DESCRIPTION = """\
hubgen makes pictures from words with diffusion and flow-matching models, teaches such models a style or a subject by
small adapters (LoRA), says what files of weights are and writes them for other programs, and builds data to train on.

Without --model, `hubgen generate` uses the model that comes with the package: it was trained on emoji, makes pictures
of 64x64 pixels and needs neither a network nor an accelerator.
"""

EPILOG = """\
examples:
  hubgen generate "a smiling cat" --out cat.png
  hubgen generate --from cat.png                     the same picture again, from what cat.png says about itself
  hubgen train lora pictures --trigger "my style"    an adapter from a folder of pictures
  hubgen train dreambooth frog --instance-prompt "a sks frog" --class-prompt "a frog"
  hubgen generate "a cat, my style" --lora runs/pictures-lora/lora --out cat.png
  hubgen inspect style.safetensors                   what the file is, and for which model
  hubgen convert lora style.safetensors --to kohya --out kohya.safetensors
  hubgen publish runs/emoji/pipeline owner/emoji --dry-run
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

Each command has a page of its own: `hubgen generate --help`, `hubgen train lora --help`, `hubgen data emoji --help`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 2 for an expected error, 130 for Ctrl-C.

    `argv` are the arguments after the command's name; None reads them from the process. Faults that nobody expected
    leave as exceptions, with their traceback.
    """
    try:
        arguments, unknown = build_parser().parse_known_args(argv)
        if unknown:
            arguments.parser.refuse_unknown(unknown)
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
        print(f"hubgen: error: {one_line(error, 'try a smaller --batch-size or --size')}", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_OK


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
    add_train(commands)
    add_inspect(commands)
    add_convert(commands)
    add_data(commands)
    add_publish(commands)
    add_demo(commands)
    return parser
