"""Where a file of adapters is: a path, a folder, a repository on the Hub."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubgen.adaptation.header_keys import METADATA, PEFT_CONFIG
from hubgen.adaptation.lora_files import AdapterError
from hubgen.formats.headers import PICKLED, read_header
from hubgen.formats.loading import fetch
from hubgen.formats.single_file import find_file

PEFT_FILE = "adapter_model.safetensors"
USUAL = ("pytorch_lora_weights.safetensors", PEFT_FILE)
"""Names of diffusers' and of PEFT's files"""


def find_adapter(
    source: str | os.PathLike[str], weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]
) -> Path:
    """The safetensors file of an adapter.

    Args:
        source: The file, its address on the Hub, a folder, or a repository `owner/name`.
        weight_name: Of the file in a folder or repository; else a usual name, or the only safetensors file there is.
        subfolder: Of the folder or repository.
        hub: `revision`, `token` and the like.

    Raises:
        AdapterError: There is none, there are several and none has a usual name, or it is a pickle.
        OSError: There is no such file, folder or repository.
    """
    path = Path(source)
    if path.is_file() or str(source).startswith(("http://", "https://")):
        return find_file(source, hub)
    if path.is_dir():
        folder = path / (subfolder or "")
    else:
        prefix = f"{subfolder}/" if subfolder else ""
        wanted = [f"{prefix}{weight_name or '*.safetensors'}", f"{prefix}{PEFT_CONFIG}"]
        folder = fetch(str(source), wanted, hub) / (subfolder or "")
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise AdapterError(f"{source}: has no {weight_name}; it has {listed(folder)}.")
        return folder / weight_name
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    usual = [name for name in USUAL if name in found]
    if usual or len(found) == 1:
        return folder / (usual or found)[0]
    expected = "expected one safetensors file" if not found else "expected `weight_name` to say which"
    raise AdapterError(f"{source}: got {listed(folder)}, {expected}.")


def listed(folder: Path) -> str:
    """The files of a folder that may hold weights, for messages."""
    names = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", *PICKLED)]
    return ", ".join(names) or "no weights"


def load_adapter(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and header of a file; beside a file of PEFT's lies its config, which then stands in the header.

    Raises:
        ValueError: It is a pickle, or no whole safetensors file.
    """
    from safetensors import safe_open

    read_header(path)
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    config = path.with_name(PEFT_CONFIG)
    if METADATA not in header and path.name == PEFT_FILE and config.is_file():
        header[METADATA] = config.read_text(encoding="utf-8", errors="replace")
    return tensors, header
