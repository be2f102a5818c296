"""`hubgen train captioner`: a model that writes captions, with settings for a first success."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubgen.cli.added import stay_offline
from hubgen.cli.arguments import add_command
from hubgen.cli.data import check_out
from hubgen.cli.inspect import size_text
from hubgen.cli.messages import few_lines, say
from hubgen.cli.plan import column
from hubgen.cli.scripts import (
    NO_CAPTIONS,
    add_run_options,
    check_packages,
    check_push,
    checked_settings,
    further_of,
    has_captions,
    run,
    run_options_of,
)

DESCRIPTION = """\
Teach a model to write captions (LLaVA, as ShareGPT4V trains it): from pictures with captions, or from conversations
about pictures in ShareGPT4V's JSON. Without --base it is a small one from scratch, for captions like those that it is
shown; a CPU teaches it a hundred of them in a minute. With --base, a Llava of transformers goes on.

`hubgen data recaption SHARDS --model DIR/captioner` then captions pictures, and transformers loads the folder.
"""

EPILOG = """\
examples:
  hubgen train captioner data/fluent
  hubgen train captioner sharegpt4v.json --image-root pictures --base llava-hf/llava-1.5-7b-hf
  hubgen train captioner mix665k.json --image-root pictures --base runs/sharegpt4v-captioner/captioner --stage instruct

--stage says what learns:
  align     the projector alone
  pretrain  projector, language model and the upper half of the vision tower (default)
  instruct  projector and language model, on questions and answers

What is not given is chosen by the number of pictures and the kind of base, and printed in a plan before anything
learns. The same command goes on where it was stopped. --set reaches every setting of the script
(`python -m hubgen.training.train_captioner --help` lists them). On several accelerators:
  accelerate launch -m hubgen.training.train_captioner --config DIR/recipe.yaml

exit status:
  0 done, 2 bad arguments, files or data (one line says what), 3 the loss is no longer finite, 4 trained and saved, but
  measuring or sending failed, 128 + signal stopped by it after a save (130: Ctrl-C), 1 a fault in hubgen
"""

EPOCHS = 50
"""Of a small captioner from scratch: after as many, 64 emoji are named word for word"""
LEAST, MOST = 200, 5000
"""Its steps"""
LOOKED_AT = 1000
"""Pictures whose size tells which one suits"""


def add_captioner(kinds: Any) -> None:
    """Adds `hubgen train captioner`."""
    parser = add_command(
        kinds, "captioner", summary="to write captions of pictures", description=DESCRIPTION, epilog=EPILOG
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="pictures with captions, as for the others, or a file of conversations (.json)")
    add(
        "--image-root",
        type=Path,
        metavar="DIR",
        help="the folder of the conversations' pictures (default: that of the file)",
    )
    add("--base", metavar="MODEL", help="a captioner to go on from: its folder, or owner/name on the Hub")
    add("--stage", choices=("align", "pretrain", "instruct"), default="pretrain", help="what learns (see below)")
    add("--held-out", metavar="SPLIT", help="a split to measure (default: none)")
    add_run_options(parser)
    parser.set_defaults(run=train_captioner)


def train_captioner(arguments: argparse.Namespace) -> None:
    """`hubgen train captioner`."""
    check_packages()
    check_push(arguments.push)
    if arguments.push is None:
        stay_offline([arguments.data, *([] if arguments.base is None else [arguments.base])])
    out: Path = arguments.out or Path("runs") / f"{Path(arguments.data).resolve().stem}-captioner"
    asked_for = {
        "data.source": arguments.data,
        "data.image_root": None if arguments.image_root is None else str(arguments.image_root),
        "stage": arguments.stage,
        "base.model": None if arguments.base is None else os.path.expanduser(arguments.base),
        "validation.split": arguments.held_out,
        "run.output_dir": str(out),
        **run_options_of(arguments),
    }
    given = {name: value for name, value in asked_for.items() if value is not None}
    further = further_of(arguments.settings)
    if not arguments.data.lower().endswith((".json", ".jsonl")) and not has_captions(arguments.data):
        raise ValueError(NO_CAPTIONS.format(folder=arguments.data).partition("; or give one")[0])
    with few_lines():
        from hubgen.captioning.captioner import open_parts
        from hubgen.training import train_captioner as script

        if arguments.base is not None:
            try:
                open_parts(arguments.base)
            except ValueError as error:
                raise ValueError(f"--base {error}") from error

        asked = checked_settings(script, given, further)  # what is wrong with it is said at once
        found = script.open_told(asked.data, asked.data.split, 0)
        pictures = len(found.row(asked.data, 1))
        batch = asked.run.batch_size if {"run.batch_size"} & {*given, *further} else None
        chosen = usual(asked, pictures, [found.examples.sizes[row] for row in range(min(len(found), LOOKED_AT))], batch)
        settings = checked_settings(script, {**chosen, **given}, further)
        check_out(settings.run.output_dir)
        say("\n".join(column(plan(settings, {*given, *further}, pictures))))
        run(script, settings)


def usual(asked: Any, pictures: int, sizes: Sequence[tuple[int, int]], batch: int | None) -> dict[str, Any]:
    """The settings that are chosen, by dotted name; what is given wins over them.

    A captioner that knows pictures already goes through the data once, at the rate of ShareGPT4V. One from scratch sees
    each picture `EPOCHS` times, at AdamW's 0.001.

    Args:
        asked: The settings with what is given alone.
        pictures: Of an epoch.
        sizes: Height and width of some pictures.
        batch: Pictures of a step, if they were given.
    """
    if asked.base.model is not None or asked.base.vision_tower is not None:
        size = batch or min(pictures, 16)
        steps = math.ceil(pictures / size)
        large = {"run.mixed_precision": "bf16", "run.gradient_checkpointing": True, "publish.dtype": "bfloat16"}
        warmup = math.ceil(0.03 * steps)
        return {"run.batch_size": size, "run.max_train_steps": steps, "optim.lr_warmup_steps": warmup, **large}
    size = batch or min(pictures, 16 if pictures < 1000 else 64)
    steps = min(MOST, max(LEAST, math.ceil(EPOCHS * pictures / size / 50) * 50))
    side = max(32, min(128, min(map(min, sizes)) // 16 * 16))
    return {
        "base.image_size": side,
        "run.batch_size": size,
        "run.max_train_steps": steps,
        "run.checkpoint_steps": min(250, max(steps // 4, 1)),
        "run.log_steps": max(min(steps // 20, 50), 1),
        "optim.learning_rate": 1e-3,
        "optim.lr_warmup_steps": 10,
        "validation.steps": max(steps // 4, 1),
        "validation.max_new_tokens": 64,
    }


def plan(settings: Any, known: set[str], pictures: int) -> dict[str, str]:
    """What will happen, by topic.

    Args:
        settings: All of them.
        known: Names of those that were given.
        pictures: Of an epoch.
    """
    from hubgen.acceleration.device import fastest_device

    def says(name: str, text: str) -> str:
        return f"{text} ({'given' if name in known else 'chosen'})"

    base, s = settings.base, settings.run
    batch = s.batch_size * s.gradient_accumulation_steps
    uses = s.max_train_steps * batch / pictures
    scratch = f"from scratch: {base.layers} blocks of {base.width} features each of vision tower and language model, "
    scratch += f"pictures of {base.image_size}x{base.image_size} pixels"
    parts = {"align": "the projector", "pretrain": "projector, language model, upper half of the vision tower",
             "instruct": "projector and language model"}  # fmt: skip
    lines = {
        "base": f"{base.model or base.vision_tower or scratch}, on {fastest_device()}",
        "learns": f"{parts[settings.stage]} ({settings.stage})",
        "pictures": f"{pictures} an epoch",
        "batch": says("run.batch_size", f"{batch} {'picture' if batch == 1 else 'pictures'} a step"),
        "steps": says("run.max_train_steps", f"{s.max_train_steps}, each picture about {uses:.3g} times"),
        "rate": says("optim.learning_rate", f"{settings.optim.learning_rate:g}"),
        "folder": f"{s.output_dir}, where {size_text(shutil.disk_usage(s.output_dir).free)} are free",
    }
    if settings.publish.push_to_hub is not None:
        lines["push"] = f"to {settings.publish.push_to_hub}, at the end"
    return lines
