"""What a safetensors file says about itself, read and checked without its weights.

    8 bytes    n, little-endian
    n bytes    JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    the rest   the tensors' bytes, back to back

Format: https://huggingface.co/docs/safetensors. A file that fails any of the checks is refused by name, so that a
truncated download is not found out halfway through a load.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library itself
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip (torch >= 1.6) and protocols
HOW_TO_CONVERT = """Pickled files can run code when they are opened, so only safetensors files are read. To convert one:
    import torch; from safetensors.torch import save_file
    state = torch.load({source!r}, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    tensors = {{key: value.clone().contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}}
    save_file(tensors, {target!r})"""

# the format's names of number types; those that torch lacks before some version are looked up
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
    }.items()
    if hasattr(torch, dtype)
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    def meta(self) -> torch.Tensor:
        """A tensor like it without storage."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Shapes:
    """What a file's tensors tell about the network that they are of: `shape("conv.weight")`, `shape.count("block.{}")`.

    Raises:
        ValueError: When called with the name of a tensor that the file does not have.
    """

    network: str
    """What it is, for errors."""
    tensors: Mapping[str, TensorHeader]

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"no such {self.network}: the file has no {name!r}")
        return tuple(self.tensors[name].shape)

    def count(self, name: str) -> int:
        """How many tensors have this name with 0, 1, 2, ... in the place of its braces."""
        number = 0
        while name.format(number) in self.tensors:
            number += 1
        return number


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file by name; reads the header only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is a pickle, or no whole safetensors file; says what it looks like.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        refuse_other_formats(path, start, size)
        length = int.from_bytes(start[:8], "little")
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError(
                f"{path}: not a whole safetensors file: its header is to be {length:,} bytes long, "
                f"the file has {size:,}. Get it again."
            )
        file.seek(8)
        raw = file.read(length)
    try:
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError(f"got {type(content).__name__}, expected an object")
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are among them
        raise ValueError(f"{path}: the safetensors header is corrupt ({error}). Get the file again.") from error
    content.pop("__metadata__", None)
    tensors = {name: tensor_header(path, name, entry) for name, entry in content.items()}
    check_offsets(path, content, tensors, size - 8 - length)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file's writer left in its header, of a file that `read_header` has read."""
    with path.open("rb") as file:
        content = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = content.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    """Raises ValueError for what is often found under a wrong name."""
    # The length of a whole header may happen to begin with a pickle's first bytes; its JSON tells the two apart.
    if path.suffix in PICKLED or (start.startswith(PICKLE_MAGIC) and start[8:9] != b"{"):
        target = str(path.with_suffix(".safetensors"))
        raise ValueError(f"{path}: a pickled file. " + HOW_TO_CONVERT.format(source=str(path), target=target))
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder.")
    if start.startswith(b"GGUF"):
        raise ValueError(f"{path}: a GGUF file, quantised; got that, expected a safetensors file of whole weights.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path}: a web page, not weights. Get the file again.")
    if size < 10:
        raise ValueError(f"{path}: not a safetensors file: it is {size} bytes long.")


def tensor_header(path: Path, name: str, entry: Any) -> TensorHeader:
    """One entry of the header, its types checked."""
    try:
        dtype, shape, offsets = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        begin, end = offsets
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: the header's entry {name!r} is not a tensor: {str(entry)[:200]}.") from error
    numbers = (*shape, begin, end)
    if any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers):
        raise ValueError(f"{path}: the header's entry {name!r} has a wrong shape or offset: {str(entry)[:200]}.")
    if dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} is of type {dtype!r}; known are {', '.join(DTYPES)}.")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{path}: tensor {name!r} of shape {list(shape)} and type {dtype} has {end - begin:,} bytes.")
    return TensorHeader(shape, DTYPES[dtype], path)


def check_offsets(path: Path, content: Mapping[str, Any], tensors: Mapping[str, TensorHeader], size: int) -> None:
    """Raises ValueError unless the tensors fill the file's `size` bytes after the header, without hole or overlap."""
    end = 0
    for name in sorted(tensors, key=lambda name: content[name]["data_offsets"]):
        begin, next_end = content[name]["data_offsets"]
        if begin != end:
            raise ValueError(f"{path}: tensor {name!r} begins at byte {begin:,} of the data, expected {end:,}.")
        end = next_end
    if end != size:
        what = "truncated" if end > size else "longer than its header says"
        raise ValueError(
            f"{path}: the file is {what}: its tensors have {end:,} bytes, the file has {size:,} for them. Get it again."
        )


def listing(names: list[str], limit: int = 12) -> str:
    """The first names, one a line, and how many more there are."""
    more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
    return "".join(f"\n    {name}" for name in [*names[:limit], *more])


def check_finite(tensors: Mapping[str, TensorHeader]) -> None:
    """Reads all weights once, tensor by tensor.

    Raises:
        ValueError: Some hold NaN or infinity; lists them.
    """
    from safetensors import safe_open

    bad = []
    for file in sorted({header.file for header in tensors.values()}):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                value = weights.get_tensor(name)
                if value.is_floating_point() and value.dtype.itemsize == 1:
                    value = value.float()  # float8 has no isfinite
                if not value.isfinite().all():
                    bad.append(f"{name} (in {file})")
    if bad:
        raise ValueError(f"{len(bad)} tensors hold NaN or infinite weights:{listing(bad)}")
