"""How a command runs a script of hubgen.training: its settings from options, and the run in this process."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubgen.cli.arguments import count, positive, positive_number, repository, seed
from hubgen.cli.messages import say
from hubgen.hub.finding import HUB_ID

NEEDED = ("datasets", "tensorboard")
"""Packages of the extra `train`"""
NO_CAPTIONS = (
    "{folder}: its pictures have no captions; expected a metadata.jsonl with rows of file_name and text, a text file "
    "beside each picture (cat.txt for cat.png), or folders named 10_CAPTION; or give one caption for all: "
    '--trigger "WORDS"'
)


def check_packages() -> None:
    """Raises ValueError where a package is missing that training needs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ValueError(f"training needs {' and '.join(missing)}, which {are} missing: pip install 'hubgen[train]'")


def has_captions(source: str) -> bool:
    """Whether the pictures of a folder have captions; shards and data sets of the Hub have.

    Raises:
        ValueError: There is no such folder.
    """
    from hubgen.data import metadata
    from hubgen.data.sources import is_counted
    from hubgen.data.webdataset import is_shards

    folder = Path(source).expanduser()
    if is_counted(source) or is_shards(source) or (not folder.exists() and HUB_ID.fullmatch(source)):
        return True
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise ValueError(f"{source}: {what}, expected a folder of pictures")
    inner = folder / "train"
    return is_shards(str(inner)) or metadata.has_captions(inner if inner.is_dir() else folder)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every command takes that runs a script."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write (default: runs/DIR-KIND)")
    parser.add_argument("--steps", type=count, metavar="N", help="how long (default: by the number of pictures)")
    parser.add_argument("--learning-rate", type=positive_number, metavar="X", help="(default: by the base)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="pictures a step (default: by the base)")
    parser.add_argument("--seed", type=seed, metavar="N", help="start of the random numbers (default: 0)")
    parser.add_argument("--push", type=repository, metavar="NAME", help="owner/name on the Hub to send the result to")
    parser.add_argument("--licence", metavar="NAME", help="of the result, as the Hub names it, such as apache-2.0")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="GROUP.NAME=VALUE",
        help="any other setting of the script; may be given several times",
    )


def run_options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that those stand for, `None` where one is not given."""
    names = {
        "steps": "run.max_train_steps",
        "learning_rate": "optim.learning_rate",
        "batch_size": "run.batch_size",
        "seed": "run.seed",
        "push": "publish.push_to_hub",
        "licence": "publish.license",
    }
    return {name: getattr(arguments, option) for option, name in names.items()}


def further_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """The settings of --set, each with the words of its value; several of a list, `[a, b]`."""
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {text}: expected GROUP.NAME=VALUE, such as optim.learning_rate=1e-4")
        words: Any = [value]
        if value.startswith("["):
            try:
                words = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(
                    f"--set {text}: expected a list such as [a, b] ({' '.join(str(error).split())})"
                ) from error
        found[name.strip().replace("-", "_")] = [str(word) for word in words]
    return found


def checked_settings(script: Any, values: Mapping[str, Any], further: Mapping[str, Sequence[str]]) -> Any:
    """See `settings_of`; what wins stands in --set."""
    from hubgen.training.kit.parse import SettingsError, settings_of

    try:
        return settings_of(script, values, further)
    except SettingsError as error:
        raise SettingsError(str(error).replace("on the command line", "of --set")) from None


def check_push(repo: str | None) -> None:
    """Raises ValueError where nothing can be sent to the Hub, before the training and not after it."""
    if repo is None:
        return
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push {repo}: the network is off (HF_HUB_OFFLINE=1), expected it on")
    if get_token() is None:
        raise ValueError(f"--push {repo}: needs a login: `hf auth login`, or a token in HF_TOKEN")


def run(script: Any, settings: Any) -> None:
    """Runs a script in this process, and leaves its settings as a recipe; exit statuses are the script's own."""
    import yaml

    from hubgen.errors import one_line
    from hubgen.formats.atomic import written
    from hubgen.training.kit.finite import NonFiniteError
    from hubgen.training.kit.parse import settings_to_dict
    from hubgen.training.kit.script import NON_FINITE_ERROR, UNFINISHED_ERROR, UnfinishedError
    from hubgen.training.kit.signals import Interrupted

    def leave_recipe() -> None:
        with written(settings.run.output_dir / "recipe.yaml") as temporary:
            text = yaml.safe_dump(settings_to_dict(settings), sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")

    if not (settings.run.output_dir / "recipe.yaml").exists():
        leave_recipe()  # while it runs, and if it is killed
    try:
        script.main(settings)
    except Interrupted as stop:
        leave_recipe()
        say(f"\nhubgen: stopped: {stop}")
        raise SystemExit(stop.exit_code) from stop
    except (NonFiniteError, UnfinishedError) as error:
        say(f"hubgen: error: {one_line(error)}")
        code = NON_FINITE_ERROR if isinstance(error, NonFiniteError) else UNFINISHED_ERROR
        raise SystemExit(code) from error
    leave_recipe()
