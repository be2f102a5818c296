"""`hubgen convert`: files for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubgen.adaptation.header_keys import BASE, PREFIX, PROMPT
from hubgen.cli.added import stay_offline
from hubgen.cli.arguments import add_command
from hubgen.cli.messages import few_lines, say
from hubgen.hub.added import find_added
from hubgen.hub.finding import BUNDLED, find_model, read_index
from hubgen.hub.provenance import DTYPES

LORA_DESCRIPTION = """\
Write an adapter anew in the layout that another program reads. Files of diffusers, PEFT, kohya, ComfyUI, XLabs,
OneTrainer and SimpleTuner are read: LoRA, DoRA, LoHa, LoKr or full differences. All are written as LoRA, to the same
product in each layer.

  diffusers    hubgen, diffusers and ComfyUI; alpha goes into the factors
  kohya        A1111, Forge, ComfyUI and kohya's tools; alphas have tensors of their own
  comfyui      ComfyUI's own names

Which layer is which, the base's configs tell: its weights are not read, and neither is a base on the Hub downloaded
but for its configs. Only magnitudes of the inputs (kohya's DoRA) depend on its weights, and then they are loaded.
"""

LORA_EPILOG = """\
examples:
  hubgen convert lora runs/cats-lora/lora --to kohya --out cats.safetensors
  hubgen convert lora style.safetensors --to diffusers --model my/sdxl-folder --out new.safetensors
  hubgen convert lora owner/name --to comfyui --model my/flux-folder --dtype bfloat16 --out style.safetensors

exit status:
  0 done, 2 bad arguments or files (one line says what), 130 interrupted, 1 a fault in hubgen
"""

KEPT = (PREFIX, PROMPT, "modelspec.", "ss_")
"""Beginnings of what stays of a header"""
DROPPED = ("ss_network_", "modelspec.hash_sha256", "modelspec.implementation")
"""... but for what is another in the new file"""
NAMED = ("base_model_name_or_path", BASE, "base_model", "ss_sd_model_name", "modelspec.base_model")
"""Where headers may name a folder of the base"""


def add_convert(commands: Any) -> None:
    """Adds `hubgen convert` to the command line."""
    parser = add_command(
        commands,
        "convert",
        summary="write files for other programs",
        description="Write files anew in the layouts that other programs read.",
        epilog="Each has a page of its own: `hubgen convert lora --help`.",
    )
    kinds = parser.add_subparsers(title="kinds of files", metavar="KIND", required=True)
    lora = add_command(
        kinds, "lora", summary="an adapter (LoRA and its kin)", description=LORA_DESCRIPTION, epilog=LORA_EPILOG
    )
    lora.add_argument("file", metavar="FILE", help="a .safetensors file, a folder with one, or owner/name on the Hub")
    lora.add_argument("--to", choices=("diffusers", "kohya", "comfyui"), required=True, help="the layout to write")
    lora.add_argument("--out", type=Path, metavar="FILE", required=True, help="the .safetensors file to write")
    lora.add_argument(
        "--model",
        metavar="MODEL",
        help="the base: a pipeline folder, or owner/name on the Hub (default: the folder that the file names, or the "
        "bundled model if the file is for it)",
    )
    lora.add_argument("--dtype", choices=DTYPES, help="precision of the numbers (default: they stay as they are)")
    lora.set_defaults(run=convert_lora)


def convert_lora(arguments: argparse.Namespace) -> None:
    """`hubgen convert lora`: an adapter in another layout."""
    out: Path = check_out(arguments.out)
    folder = None if arguments.model is None else find_model(arguments.model, "--model", single_files=False)
    if arguments.model is None or folder is not None:
        stay_offline([arguments.file])
    path = find_added("lora", arguments.file)
    if out.exists() and out.samefile(path):
        raise ValueError(f"--out {out}: is the file that is read, expected another")
    with few_lines():
        from hubgen.adaptation.locate import load_adapter
        from hubgen.hub.bare import bare_parts
        from hubgen.pipelines.loading import is_text_to_image, load_pipeline

        tensors, header = load_adapter(path)
        model = arguments.model or named_base(header) or BUNDLED
        given = arguments.model is not None
        if not given:
            folder = find_model(model, "--model", single_files=False)
        index = read_index(model, None, folder, "--model")
        if not is_text_to_image(index):
            raise ValueError(f"--model {model}: is a {index['_class_name']}, expected a pipeline that draws prompts")
        parts = bare_parts(index, model, None, folder, argument="--model")
        try:
            found, written = converted(tensors, header, parts, arguments.to)
        except NotImplementedError:  # a tensor without storage was asked for its numbers
            say(f"loading {model}: what the magnitudes of {path.name} come to depends on its weights ...")
            whole = load_pipeline(index, model, None, folder, argument="--model").adaptable_models()
            found, written = converted(tensors, header, whole, arguments.to)
        except ValueError as error:
            raise problem(path, error, model if given else None) from error
        save(out, *written, arguments.dtype)
    say(f"{path}, on {'the bundled model' if model == BUNDLED else model}: {found}")
    print(f"wrote {out} ({arguments.to}, {len(written[0])} tensors)")


def check_out(out: Path) -> Path:
    """Fails before the work, not after it."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: got {out.suffix!r}, expected a file name ending in .safetensors")
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder, expected a file name")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    return out


def named_base(header: Mapping[str, Any]) -> str | None:
    """The folder of a pipeline that a file's header names, if it is here."""
    found = [header.get(key) for key in NAMED]
    return next((one for one in found if isinstance(one, str) and (Path(one) / "model_index.json").is_file()), None)


def converted(
    tensors: Mapping[str, Any], header: Mapping[str, str], parts: Mapping[str, Any], layout: str
) -> tuple[Any, tuple[dict[str, Any], dict[str, str]]]:
    """What was read, and tensors and header of the new file.

    Raises:
        ValueError: The file is for other models, or damaged.
        NotImplementedError: The weights of the models are needed, and they have none.
    """
    from hubgen.adaptation.lora_files import as_comfyui, as_diffusers, as_kohya, read_adapter

    found = read_adapter(tensors, header, parts)
    kept = {key: value for key, value in header.items() if key.startswith(KEPT) and not key.startswith(DROPPED)}
    if layout == "diffusers":
        return found, as_diffusers(found.layers, kept)
    return found, (as_kohya if layout == "kohya" else as_comfyui)(found.layers, parts, kept)


def problem(path: Path, error: ValueError, model: str | None) -> ValueError:
    """The error of a file that does not fit a base: one that was named, or that there is by default."""
    from hubgen.adaptation.describe import EMOJI, base_of

    base = base_of(path)
    foreign = str(error).startswith("is for other models") or (model is None and base != EMOJI)
    looks = f"looks like an adapter for {base}, and " if base and foreign else ""
    if model is not None or not foreign:
        return ValueError(f"{path}: {looks}{error}")
    return ValueError(f"{path}: {looks}is not for the bundled model; name its base by --model")


def save(out: Path, tensors: Mapping[str, Any], header: Mapping[str, str], dtype: str | None) -> None:
    """Writes the file, beside and renamed; alphas keep their precision."""
    import torch
    from safetensors.torch import save_file

    from hubgen.formats.atomic import written

    if dtype is not None:
        target = getattr(torch, dtype)
        tensors = {key: one if key.endswith(".alpha") else one.to(target) for key, one in tensors.items()}
    with written(out) as temporary:
        save_file(dict(tensors), temporary, dict(header))
