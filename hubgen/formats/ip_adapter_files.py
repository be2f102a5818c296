"""Files of IP-Adapters: which layout one is in, told by its keys, and its tensors by names that all layouts share.

    image_proj.*        what makes tokens of a picture
    ip_adapter.N.*      keys and values of attention layer N

    layout      told by                          N counts
    base        proj.weight                      every attention of a U-Net, in the order down, up, middle, of which
    full        proj.3.weight                    those to the text have weights: 1, 3, 5, ...; other backbones have
    plus        latents                          weights for all: 0, 1, 2, ...
    faceid      norm.weight, proj.0.weight       the same; LoRA layers beside, which have all N
    sd3         time_embedding                   every attention: 0, 1, 2, ... (InstantX for SD3.5)
    xlabs       double_blocks.N, or biases       FLUX's double blocks
    instantx    as faceid, but from 0 on         all of FLUX's blocks

A safetensors file may say in its header which of hubgen's own image encoders it sees with (`SEEN_BY`); files of others
say nothing of theirs. Pickled files, of which published adapters are still many, are read as weights alone and cannot
run code.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from hubgen.formats.headers import PICKLED, listing, read_header, read_metadata

Layout = Literal["base", "full", "plus", "faceid", "sd3", "xlabs", "instantx"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PARTS = ("image_proj", "ip_adapter")
SEEN_BY = "hubgen.image_encoder"
"""Key of a safetensors file's metadata"""

LORA = re.compile(r"ip_adapter\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
XLABS = [
    (re.compile(r"ip_adapter_proj_model\."), "image_proj."),
    (
        re.compile(r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\."),
        r"ip_adapter.\1.to_\2_ip.",
    ),
]
LISTED = 5
"""How many wrong keys an error names"""


@dataclass
class IPAdapterFile:
    """What was read."""

    layout: Layout
    tensors: dict[str, torch.Tensor]
    """By the names that all layouts share"""
    lora: dict[str, torch.Tensor] = field(default_factory=dict)
    """FaceID's LoRA layers, `N.to_q_lora.down.weight` and so on, N every attention of the U-Net"""
    seen_by: str | None = None
    """What the file says of the image encoder, as `hubgen.controls.image_encoders.described` puts it"""

    @property
    def image_proj(self) -> dict[str, torch.Tensor]:
        """Weights of the projection."""
        return without_prefix(self.tensors, "image_proj.")

    def layers(self) -> dict[int, dict[str, torch.Tensor]]:
        """Weights of each attention layer by its number.

        Raises:
            ValueError: Some keys have no number.
        """
        found: dict[int, dict[str, torch.Tensor]] = {}
        wrong = []
        for key, tensor in without_prefix(self.tensors, "ip_adapter.").items():
            number, _, name = key.partition(".")
            if number.isdecimal() and str(int(number)) == number:
                found.setdefault(int(number), {})[name] = tensor
            else:
                wrong.append(f"ip_adapter.{key}: without a number")
        refuse(wrong)
        return dict(sorted(found.items()))


def read_ip_adapter(source: str | Path | Mapping[str, Any]) -> IPAdapterFile:
    """An adapter of a file, or of tensors as a file has them, flat or in two dicts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of weights, or no IP-Adapter, or one of a kind that is not known.
    """
    if isinstance(source, Mapping):
        return told_apart(flat(source))
    path = Path(source)
    try:
        found = told_apart(flat(weights_of(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    if path.suffix not in PICKLED:
        found.seen_by = read_metadata(path).get(SEEN_BY)
    return found


def weights_of(path: Path) -> Mapping[str, Any]:
    """What a file holds, tensors or dicts of them."""
    if path.suffix not in PICKLED:
        read_header(path)  # a truncated download is found out here
        from safetensors.torch import load_file

        return load_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's and zip's errors are of many classes
        raise ValueError(f"not a pickle of weights alone ({str(error).splitlines()[0]:.200}).") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"got {type(found).__name__}, expected tensors by name.")
    return found


def flat(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of two dicts in one, with the names of XLabs' layout as the other layouts have them."""
    found: dict[str, torch.Tensor] = {}
    wrong = []
    for name, value in content.items():
        inside = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, tensor in inside:
            whole = str(name) if key is None else f"{name}.{key}"
            for pattern, shared in XLABS:
                whole = pattern.sub(shared, whole, count=1)
            if not torch.is_tensor(tensor):
                wrong.append(f"{whole}: no tensor, {type(tensor).__name__}")
            elif whole.split(".")[0] not in PARTS:
                wrong.append(f"{whole}: unknown")
            else:
                found[whole] = tensor
    missing = [f"{part}.*: missing" for part in PARTS if not any(key.startswith(f"{part}.") for key in found)]
    refuse(wrong + missing)
    return found


def told_apart(tensors: Mapping[str, torch.Tensor]) -> IPAdapterFile:
    """Tensors by the shared names, with their layout."""
    layout = layout_of(tensors)
    lora = {key: tensor for key, tensor in tensors.items() if LORA.fullmatch(key)} if layout == "faceid" else {}
    rest = {key: tensor for key, tensor in tensors.items() if key not in lora}
    return IPAdapterFile(layout, rest, without_prefix(lora, "ip_adapter."))


def layout_of(keys: Iterable[str]) -> Layout:
    """Which layout an adapter's keys, by the shared names, are in.

    Raises:
        ValueError: None that is known; names FaceID-Plus.
    """
    keys = set(keys)

    def has(name: str) -> bool:
        return f"image_proj.{name}" in keys

    if any(key.startswith("image_proj.perceiver_resampler.") for key in keys):
        raise ValueError(
            "`image_proj`: got the perceiver_resampler of IP-Adapter FaceID-Plus, expected another layout: it sees a "
            "face's embedding and CLIP's picture at once, which is not supported."
        )
    if any(key.startswith("image_proj.time_embedding.") for key in keys):
        return "sd3"
    if has("latents"):
        return "plus"
    if has("proj.3.weight"):
        return "full"
    if has("proj.weight"):
        return "xlabs" if any(key.endswith(".to_k_ip.bias") for key in keys) else "base"
    if has("norm.weight") and has("proj.0.weight"):
        return "instantx" if "ip_adapter.0.to_k_ip.weight" in keys else "faceid"
    found = sorted(key for key in keys if key.startswith("image_proj."))
    raise ValueError(
        f"`image_proj`: got {len(found)} keys of no known layout, expected one of {', '.join(LAYOUTS)}:"
        f"{listing(found, LISTED)}"
    )


def as_file(adapter: IPAdapterFile) -> dict[str, torch.Tensor]:
    """Tensors by the names of the adapter's own layout, each with storage of its own: the inverse of reading."""
    named = {**adapter.tensors, **{f"ip_adapter.{key}": tensor for key, tensor in adapter.lora.items()}}
    if adapter.layout == "xlabs":
        names = [
            (r"image_proj\.", "ip_adapter_proj_model."),
            (r"ip_adapter\.(\d+)\.to_([kv])_ip\.", r"double_blocks.\1.processor.ip_adapter_double_stream_\2_proj."),
        ]
        for pattern, own in names:
            named = {re.sub(f"^{pattern}", own, key): tensor for key, tensor in named.items()}
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in named.items()}


def write_ip_adapter(adapter: IPAdapterFile, path: str | Path) -> None:
    """Saves an adapter as safetensors in its layout, with what is known of its image encoder."""
    from safetensors.torch import save_file

    seen_by = {} if adapter.seen_by is None else {SEEN_BY: adapter.seen_by}
    save_file(as_file(adapter), path, metadata={"format": "pt", **seen_by})


def check_shapes(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where an adapter's tensors are not those of the network; names the first and counts all."""
    wrong = [f"{key}: missing" for key in expected if key not in given]
    for key, tensor in given.items():
        if key not in expected:
            wrong.append(f"{key}: unknown")
        elif tensor.shape != expected[key].shape:
            wrong.append(f"{key}: of shape {list(tensor.shape)}, expected {list(expected[key].shape)}")
    refuse(wrong)


def refuse(lines: list[str]) -> None:
    """Raises ValueError with the first wrong keys and how many there are, if any."""
    if lines:
        raise ValueError(f"{len(lines)} keys are not those of an IP-Adapter:{listing(lines, LISTED)}")


def without_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin so, by the rest of their names."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
