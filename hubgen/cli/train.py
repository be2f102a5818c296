"""`hubgen train`: front doors of the scripts that teach a model something, with settings for a first success."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubgen.cli.added import stay_offline
from hubgen.cli.arguments import add_command, positive
from hubgen.cli.captioner import add_captioner
from hubgen.cli.data import check_out
from hubgen.cli.messages import few_lines, say
from hubgen.cli.plan import column, plan
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
from hubgen.hub.finding import BUNDLED, find_model, read_index
from hubgen.training.kit.usual import Material, completed

LORA_DESCRIPTION = """\
Teach a model a style, a theme or a subject from a folder of pictures with captions, by an adapter (LoRA): a small file
beside the model, which hubgen, diffusers, ComfyUI and other programs load. The model itself stays as it is.

Captions stand in a metadata.jsonl of file_name and text, in a text file beside each picture, or in the name of the
folder (10_NAME: its pictures ten times an epoch). --trigger puts words before all of them, by which prompts call what
was learned; pictures without captions all get these words as their caption.
"""

DREAMBOOTH_DESCRIPTION = """\
Teach a model one subject from 3 to 5 pictures of it (DreamBooth): --instance-prompt are the words of all of them, with
a rare one that will mean the subject. With --class-prompt the model first draws pictures of the class itself, and is
shown them too, so that it does not take the whole class for the subject.
"""

CONTROLNET_DESCRIPTION = """\
Teach a model to follow hints: edges, colours, poses, or whatever a picture can say of another (ControlNet). The hints
stand in the column conditioning_image of the data's table, as `hubgen data hints` writes it, or are made of each
picture (--hint). The network begins as a copy of the model's first half; the model itself stays as it is.
"""

IP_ADAPTER_DESCRIPTION = """\
Teach a model to take a picture beside the prompt (IP-Adapter): from pictures with captions, each of which the model is
shown while it learns to draw it. What sees the pictures is the model's own image encoder, if it has one, or
--image-encoder: the folder of a vision model, efficientnet, or latents (the model's autoencoder). The model itself
stays as it is.
"""

EDITOR_DESCRIPTION = """\
Teach a model to edit pictures by instructions (InstructPix2Pix): from pictures before and after an edit with the edit
in words, the columns original_image, edit_prompt, edited_image, as `hubgen data edits` writes them. All of the model
learns.
"""

CONTROL_EXAMPLES = {
    "controlnet": """\
examples:
  hubgen train controlnet data/fluent --hint canny
  hubgen train controlnet data/fluent-canny --base stabilityai/stable-diffusion-xl-base-1.0 --push owner/sdxl-canny
  hubgen train controlnet data/fluent --hint color --set data.hint_options="{cells: 4}" --steps 2000

""",
    "ip-adapter": """\
examples:
  hubgen train ip-adapter data/fluent
  hubgen train ip-adapter pictures --base runwayml/stable-diffusion-v1-5 --image-encoder openai/clip-vit-large-patch14

""",
    "instruct-pix2pix": """\
examples:
  hubgen data edits data/fluent --out data/edits && hubgen train instruct-pix2pix data/edits
  hubgen train instruct-pix2pix timbrooks/instructpix2pix-clip-filtered --base runwayml/stable-diffusion-v1-5

""",
}

CONTROL_EPILOG = """\
What is not given is chosen by the number of pictures and the kind of base, and printed in a plan before anything
learns. Grids of what is shown, and of what the model draws with it and without, lie in DIR/validation, the result in
DIR/{result}, and DIR/recipe.yaml has all settings.

The same command goes on where it was stopped, or, with more --steps, where it had ended. --set reaches every setting
of the script (`python -m hubgen.training.{script} --help` lists them). On several accelerators:
  accelerate launch -m hubgen.training.{script} --config DIR/recipe.yaml

exit status:
  0 done, 2 bad arguments, files or data (one line says what), 3 the loss is no longer finite, 4 trained and saved, but
  drawing or sending failed, 128 + signal stopped by it after a save (130: Ctrl-C), 1 a fault in hubgen
"""

TRAIN_EPILOG = """\
What is not given is chosen by the number of pictures and the kind of base, and printed in a plan before anything
learns. The progress bar says how many minutes are left, measured on the steps that are done. Pictures of the prompts,
drawn before, meanwhile and after, lie in DIR/validation, the adapter in DIR/lora, and DIR/recipe.yaml has all settings.

The same command goes on where it was stopped, or, with more --steps, where it had ended. --set reaches every setting
of the script (`python -m hubgen.training.{script} --help` lists them). On several accelerators:
  accelerate launch -m hubgen.training.{script} --config DIR/recipe.yaml

exit status:
  0 done, 2 bad arguments, files or data (one line says what), 3 the loss is no longer finite, 4 trained and saved, but
  drawing or sending failed, 128 + signal stopped by it after a save (130: Ctrl-C), 1 a fault in hubgen
"""

LORA_EXAMPLES = """\
examples:
  hubgen train lora pictures
  hubgen train lora pictures --trigger "my style" --prompt "my style, a cat" --prompt "my style, a house"
  hubgen train lora pictures --base stabilityai/stable-diffusion-xl-base-1.0 --push owner/my-style
  hubgen train lora pictures --steps 2000 --rank 32 --set data.mirror=true --set adapter.targets=all

"""

DREAMBOOTH_EXAMPLES = """\
examples:
  hubgen train dreambooth frog --instance-prompt "a sks frog" --class-prompt "a frog"
  hubgen train dreambooth dog --instance-prompt "a photo of sks dog" --class-prompt "a photo of a dog" \\
      --base stabilityai/stable-diffusion-xl-base-1.0 --prompt "sks dog on the moon"

"""


def add_train(commands: Any) -> None:
    """Adds `hubgen train` to the command line."""
    parser = add_command(
        commands,
        "train",
        summary="teach a model a style, a subject, or to follow pictures",
        description="Teach a model a style or a subject by an adapter, a small file beside it; or to follow hints, "
        "pictures and instructions.",
        epilog="Each has a page of its own: `hubgen train lora --help`, `hubgen train controlnet --help`, ...\n\n"
        "All other training (a whole model, an autoencoder, classes) starts from a recipe:\n"
        "  accelerate launch -m hubgen.training.train_text_to_image --config RECIPE.yaml",
    )
    kinds = parser.add_subparsers(title="what is taught", metavar="KIND", required=True)
    lora = add_command(
        kinds,
        "lora",
        summary="a style, a theme or a subject, from pictures with captions",
        description=LORA_DESCRIPTION,
        epilog=LORA_EXAMPLES + TRAIN_EPILOG.format(script="train_lora"),
    )
    add_options(lora)
    lora.add_argument("--trigger", metavar="WORDS", help="words before every caption, and for pictures without any")
    lora.set_defaults(run=train_lora)
    dreambooth = add_command(
        kinds,
        "dreambooth",
        summary="one subject, from 3 to 5 pictures",
        description=DREAMBOOTH_DESCRIPTION,
        epilog=DREAMBOOTH_EXAMPLES + TRAIN_EPILOG.format(script="train_dreambooth"),
    )
    add_options(dreambooth)
    dreambooth.add_argument(
        "--instance-prompt", metavar="TEXT", required=True, help="words of the subject's pictures, with a rare one"
    )
    dreambooth.add_argument(
        "--class-prompt", metavar="TEXT", help="words of its class, of which the base draws pictures (default: none)"
    )
    dreambooth.set_defaults(run=train_dreambooth)
    add_controls(kinds)
    add_captioner(kinds)


def add_controls(kinds: Any) -> None:
    """Adds what teaches a model to follow pictures."""

    def add(name: str, summary: str, description: str, result: str) -> argparse.ArgumentParser:
        script = f"train_{name.replace('-', '_')}"
        epilog = CONTROL_EXAMPLES[name] + CONTROL_EPILOG.format(script=script, result=result)
        parser = add_command(kinds, name, summary=summary, description=description, epilog=epilog)
        add_options(parser, adapter=False)
        parser.add_argument("--held-out", metavar="SPLIT", help="a split to measure and draw (default: none)")
        parser.set_defaults(run=train_control, kind=name)
        return parser

    net = add("controlnet", "to follow hints, such as edges", CONTROLNET_DESCRIPTION, "controlnet")
    net.add_argument(
        "--hint", choices=("canny", "color", "grey", "blur"), help="make hints of this kind of each picture"
    )
    net.add_argument("--hint-column", metavar="NAME", help="column of the hints (default: conditioning_image)")
    net.add_argument("--layers", type=positive, metavar="N", help="blocks that it copies (default: by the base)")
    net.add_argument(
        "--controlnet", metavar="NET", help="a network to go on from: its folder, or owner/name on the Hub"
    )
    picture = add("ip-adapter", "to take a picture beside the prompt", IP_ADAPTER_DESCRIPTION, "ip_adapter")
    picture.add_argument("--image-encoder", metavar="MODEL", help="what sees the pictures (default: by the base)")
    picture.add_argument("--tokens", type=positive, metavar="N", help="of a picture (default: 4)")
    picture.add_argument("--ip-adapter", metavar="FILE", help="an adapter to go on from")
    add("instruct-pix2pix", "to edit pictures by instructions", EDITOR_DESCRIPTION, "pipeline")


def add_options(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    """Adds what all of these take, or all that train an adapter of weights."""
    parser.add_argument("data", metavar="DIR", help="the folder of pictures")
    parser.add_argument(
        "--base", metavar="MODEL", help="a pipeline folder, or owner/name on the Hub (default: the bundled model)"
    )
    if adapter:
        parser.add_argument("--rank", type=positive, metavar="N", help="how much the adapter can hold (default: 16)")
    parser.add_argument(
        "--size", type=positive, metavar="N", help="pixels of a side (default: what the base was trained for)"
    )
    if adapter:
        parser.add_argument(
            "--prompt",
            action="append",
            metavar="TEXT",
            help="what to draw before, meanwhile and after; may be given several times (default: the first captions)",
        )
    add_run_options(parser)


# ---- the commands ----


def train_lora(arguments: argparse.Namespace) -> None:
    """`hubgen train lora`."""
    trigger = check_words("--trigger", arguments.trigger)
    captioned = prepare(arguments)
    if not captioned and trigger is None:
        raise ValueError(NO_CAPTIONS.format(folder=arguments.data))
    with few_lines():
        if captioned:
            from hubgen.training import train_lora as script

            train(arguments, "lora", script, {} if trigger is None else {"data.caption_prefix": f"{trigger}, "}, True)
        else:  # one caption for all: a subject without pictures of its class
            from hubgen.training import train_dreambooth

            train(arguments, "lora", train_dreambooth, {"instance.prompt": trigger, "prior.weight": 0}, False)


def train_dreambooth(arguments: argparse.Namespace) -> None:
    """`hubgen train dreambooth`."""
    given: dict[str, Any] = {"instance.prompt": check_words("--instance-prompt", arguments.instance_prompt)}
    words = check_words("--class-prompt", arguments.class_prompt)
    given |= {"prior.weight": 0} if words is None else {"prior.prompt": words}
    prepare(arguments)
    with few_lines():
        from hubgen.training import train_dreambooth as script

        train(arguments, "dreambooth", script, given, False)


def train_control(arguments: argparse.Namespace) -> None:
    """`hubgen train controlnet`, `ip-adapter` and `instruct-pix2pix`."""
    names = {
        "hint": "data.hint",
        "hint_column": "data.hint_column",
        "layers": "network.layers",
        "controlnet": "base.controlnet",
        "image_encoder": "adapter.image_encoder",
        "tokens": "adapter.tokens",
        "ip_adapter": "base.ip_adapter",
        "held_out": "validation.split",
    }
    found = {name: getattr(arguments, option, None) for option, name in names.items()}
    given = {name: value for name, value in found.items() if value is not None}
    if given.keys() >= {"data.hint", "data.hint_column"}:
        raise ValueError("--hint-column: got together with --hint, which makes the hints, expected one of the two")
    if not prepare(arguments):
        raise ValueError(NO_CAPTIONS.format(folder=arguments.data).partition("; or give one")[0])
    with few_lines():
        script = importlib.import_module(f"hubgen.training.train_{arguments.kind.replace('-', '_')}")
        train(arguments, arguments.kind, script, given, True)


def prepare(arguments: argparse.Namespace) -> bool:
    """What is checked before the libraries are imported; whether the pictures have captions.

    Raises:
        ValueError: Packages, base or pictures are missing, or nothing can be sent to the Hub.
    """
    check_packages()
    base = find_model(arguments.base or BUNDLED, "--base", single_files=False)
    check_push(arguments.push)
    if base is not None and arguments.push is None:
        others = (getattr(arguments, name, None) for name in ("controlnet", "image_encoder"))
        stay_offline([arguments.data, *(name for name in others if name is not None)])
    return has_captions(arguments.data)


def check_words(option: str, words: str | None) -> str | None:
    """The words of an option; raises ValueError where there are none in it."""
    if words is not None and not words.strip():
        raise ValueError(f"{option}: got {words!r}, expected words")
    return None if words is None else words.strip()


# ---- from options to a run ----


def train(
    arguments: argparse.Namespace, kind: str, script: Any, stands_for: Mapping[str, Any], captioned: bool
) -> None:
    """Completes the settings, prints the plan and runs the script.

    Args:
        arguments: Of the command line.
        kind: Of the command, for the name of the folder.
        script: Module of hubgen.training.
        stands_for: Settings that the command stands for, by dotted name.
        captioned: Whether pictures have captions of their own; else all are given the same words.
    """
    from hubgen.data.sources import open_examples
    from hubgen.pipelines.loading import bare_pipeline

    out: Path = arguments.out or Path("runs") / f"{Path(arguments.data).resolve().name}-{kind}"
    given = {"data.source": arguments.data, "run.output_dir": str(out), **stands_for, **options_of(arguments)}
    further = further_of(arguments.settings)
    asked = checked_settings(script, given, further)  # what is wrong with it is said at once
    base = asked.base.model or BUNDLED
    folder = find_model(base, "--base", single_files=False)
    pipe = bare_pipeline(read_index(base, None, folder, "--base"), base, None, folder, "--base")
    data = asked.data
    options = {"on_error": data.on_bad_picture, "max_pixels": data.max_pixels, "cache_dir": data.cache_dir}
    options |= {"beside": data.beside, "picture": data.picture}
    column_of_captions = data.caption_column if captioned else None
    examples = open_examples(data.source, data.split, caption_column=column_of_captions, **options)
    material, known = Material(base, pipe, examples, captioned), {*given, *further}
    settings = checked_settings(script, {**completed(asked, known, material), **given}, further)
    check_out(settings.run.output_dir)
    say("\n".join(column(plan(settings, known, material))))
    run(script, settings)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the options stand for."""
    names = {"rank": "adapter.rank", "size": "data.size"}
    values = {name: getattr(arguments, option, None) for option, name in names.items()} | run_options_of(arguments)
    if arguments.base is not None:  # the scripts know the bundled model as none, and no ~
        values["base.model"] = None if arguments.base == BUNDLED else os.path.expanduser(arguments.base)
    if getattr(arguments, "prompt", None):
        values["validation.prompts"] = [check_words("--prompt", prompt) for prompt in arguments.prompt]
    return {name: value for name, value in values.items() if value is not None}
