"""An IP-Adapter's weights, and where in a backbone they belong: numbers of layers to names of processors, and scales.

A backbone is known by its attention layers alone: their names, widths, and whether they look at text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch

from hubgen.checks import is_number
from hubgen.formats.headers import PICKLED, listing
from hubgen.formats.ip_adapter_files import (
    LISTED,
    IPAdapterFile,
    Layout,
    check_shapes,
    read_ip_adapter,
    refuse,
    write_ip_adapter,
)
from hubgen.hub.finding import HUB_ID
from hubgen.layers.decoupled_attention import ImageAttention, ImageKeysValues, NormedKeysValues, TimedKeysValues
from hubgen.layers.image_projection import (
    LinearProjection,
    MLPProjection,
    Projection,
    Resampler,
    TimeResampler,
    TokenProjection,
)

Scale = float | list[float] | dict[str, Any]

FILE = "ip-adapter.safetensors"
"""Of an adapter in a folder or repository of its own"""

WAYS = ("down", "up", "mid")
"""Of a U-Net, in the order in which files count them"""


@dataclass(frozen=True)
class Kind:
    """What a layout's weights are for."""

    projection: type[Projection]
    keys_values: type[ImageKeysValues] = ImageKeysValues
    after_mlp: bool = False
    """Whether what is seen goes behind the block's MLP, ungated"""
    layers: Literal["text", "all", "joint"] = "text"
    """Which attentions have weights: those to the text where there are such, all, or the joint ones with text"""
    without: Literal["zeros", "zero pixels", "black"] = "zeros"
    """What is shown where no picture is: an embedding of zeros, or what the encoder says of pixels of 0 after it has
    normalised them, or of black pictures"""
    reads_pictures: bool = True
    """Whether an image encoder comes before it"""


KINDS: Mapping[Layout, Kind] = {
    "base": Kind(LinearProjection),
    "full": Kind(TokenProjection, without="zero pixels"),
    "plus": Kind(Resampler, without="zero pixels"),
    "faceid": Kind(MLPProjection, reads_pictures=False),
    "sd3": Kind(TimeResampler, TimedKeysValues, layers="all"),
    "xlabs": Kind(LinearProjection, after_mlp=True, layers="joint", without="black"),
    "instantx": Kind(MLPProjection, NormedKeysValues, layers="all"),
}


@dataclass(eq=False)
class Adapter:
    """An IP-Adapter, apart from what it is shown and how much it counts."""

    layout: Layout
    network: ImageAttention
    lora: dict[str, torch.Tensor] = field(default_factory=dict)
    """See `IPAdapterFile`"""
    seen_by: str | None = None
    """One of hubgen's own image encoders, if it is known to see with one; see `IPAdapterFile`"""

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], revision: str | None = None) -> Self:
        """Of a file, or of tensors as a file has them; see `read_ip_adapter`.

        Args:
            source: A file; a folder or owner/name on the Hub that holds `FILE`; or tensors by name.
            revision: Of a repository.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The Hub cannot be reached, or has no such repository or no such file in it.
            ValueError: Its tensors are not those of an adapter; names the first and counts them.
        """
        found = read_ip_adapter(source if isinstance(source, Mapping) else file_of(source, revision))
        return cls(found.layout, network_of(found), found.lora, found.seen_by)

    @classmethod
    def fresh(cls, backbone: Any, image_features: int, tokens: int = 4) -> Self:
        """A base adapter for a backbone, whose values are 0, so that it changes nothing until it is trained.

        Args:
            backbone: Of any family.
            image_features: Of the vectors that it will be shown.
            tokens: Of a picture.
        """
        layers = {number: attention(backbone, name) for number, name in places(backbone, "base").items()}
        features = next(iter(layers.values())).to_k.in_features
        network = ImageAttention(
            LinearProjection(image_features, features, tokens),
            {number: ImageKeysValues(features, attn.to_q.out_features) for number, attn in layers.items()},
        )
        network.start_at_zero()
        return cls("base", network)

    @property
    def kind(self) -> Kind:
        """What the layout says."""
        return KINDS[self.layout]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file of the adapter's layout."""
        write_ip_adapter(IPAdapterFile(self.layout, self.network.state_dict(), self.lora, self.seen_by), path)

    def lora_of(self, backbone: Any) -> dict[str, torch.Tensor]:
        """FaceID's LoRA layers by the names of a U-Net's processors, as diffusers once wrote LoRA files.

        Raises:
            ValueError: There is one for a layer that the backbone does not have.
        """
        names, found = counted(backbone), {}
        for key, tensor in self.lora.items():
            number, _, rest = key.partition(".")
            if int(number) >= len(names):
                raise ValueError(f"`weights`: got ip_adapter.{key}, expected numbers below {len(names)}.")
            found[f"unet.{names[int(number)]}.{rest}"] = tensor
        return found

    def wears_lora(self, backbone: Any) -> bool:
        """Whether FaceID's LoRA layers are on a backbone, whatever the adapter that holds them is called there."""
        names = counted(backbone)
        for key, tensor in self.lora.items():
            number, _, rest = key.partition(".")
            name, _, end = rest.partition("_lora.")
            if end == "down.weight" and name != "to_out" and int(number) < len(names):
                layer = getattr(attention(backbone, names[int(number)]), name)
                held = [one.weight.detach() for one in getattr(layer, "lora_A", {}).values()]
                return any(same_or_away(one, tensor) for one in held)
        return not self.lora

    def names(self, backbone: Any) -> dict[int, str]:
        """The backbone's processors by the numbers of the adapter's layers.

        Raises:
            ValueError: The adapter is for another backbone.
        """
        expected, network = places(backbone, self.layout), self.network
        wrong = [f"ip_adapter.{number}: unknown" for number in network.numbers if number not in expected]
        for number, name in expected.items():
            if number not in network.numbers:
                wrong.append(f"ip_adapter.{number}: missing, for {name}")
                continue
            width, own = network.layer(number).to_k_ip.out_features, attention(backbone, name).to_q.out_features
            if own != width:
                wrong.append(f"ip_adapter.{number}: {width} features, expected {own} as {name} has them")
        if wrong:
            raise ValueError(
                f"`weights`: got an IP-Adapter ({self.layout}) for another backbone, expected one for this "
                f"{type(backbone).__name__}; {len(wrong)} layers differ:{listing(sorted(wrong, key=in_order), LISTED)}"
            )
        return expected


def file_of(name: str | Path, revision: str | None = None) -> Path:
    """The file of an adapter: itself, or `FILE` in a folder or in a repository on the Hub, owner/name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path / FILE
    if path.exists() or path.suffix in (".safetensors", *PICKLED) or not HUB_ID.fullmatch(str(name)):
        return path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(name), FILE, revision=revision))


def network_of(adapter: IPAdapterFile) -> ImageAttention:
    """The network of a file's sizes, with its weights.

    Raises:
        ValueError: Some tensors are unknown, missing or of a wrong shape; names the first and counts them.
    """
    kind, wrong = KINDS[adapter.layout], list[str]()

    def like(cls: Any, weights: Mapping[str, torch.Tensor], prefix: str) -> Any:
        try:
            return cls.like(weights)
        except KeyError as error:
            wrong.append(f"{prefix}.{error.args[0]}: missing")
        except ValueError:  # of another number of dimensions
            wrong.append(f"{prefix}: of shapes {[list(weight.shape) for weight in weights.values()]}")
        return None

    with torch.device("meta"):
        projection = like(kind.projection, adapter.image_proj, "image_proj")
        layers = {
            number: like(kind.keys_values, weights, f"ip_adapter.{number}")
            for number, weights in adapter.layers().items()
        }
    if projection is not None:
        wrong += [
            f"ip_adapter.{number}.to_k_ip.weight: for {layer.to_k_ip.in_features} features, expected "
            f"{projection.features}, those of `image_proj`"
            for number, layer in layers.items()
            if layer is not None and layer.to_k_ip.in_features != projection.features
        ]
    refuse(wrong)
    network = ImageAttention(projection, layers)
    check_shapes(adapter.tensors, network.state_dict())
    network.load_state_dict(adapter.tensors, assign=True)
    return network.eval()


def same_or_away(weight: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether a weight is a tensor in the weight's type, as far as it can be seen: offloaded ones have no storage."""
    if weight.shape != tensor.shape:
        return False
    return weight.is_meta or torch.equal(weight.cpu(), tensor.to("cpu", weight.dtype))


def attention(backbone: Any, processor: str) -> Any:
    """The attention layer of a processor's name."""
    return backbone.get_submodule(processor.removesuffix(".processor"))


def counted(backbone: Any) -> list[str]:
    """Names of all attention processors, in the order in which files count them."""
    rank = {way: i for i, way in enumerate(WAYS)}
    return sorted(backbone.attn_processors, key=lambda name: rank.get(name.partition("_")[0], 0))


def places(backbone: Any, layout: Layout) -> dict[int, str]:
    """The processors that an adapter of a layout has weights for, by their numbers in its file."""
    names = counted(backbone)
    which = KINDS[layout].layers
    if which == "joint":
        return dict(enumerate(name for name in names if getattr(attention(backbone, name), "added_kv_proj_dim", None)))
    to_text = {n: name for n, name in enumerate(names) if attention(backbone, name).is_cross_attention}
    return to_text if which == "text" and to_text else dict(enumerate(names))


def check_takes_parts(backbone: Any, names: Mapping[int, str]) -> None:
    """Raises ValueError where a layer's processor has no place for what a control adds."""
    processors = backbone.attn_processors
    without = [name for name in names.values() if not hasattr(processors[name], "parts")]
    if without:
        raise ValueError(
            f"`controls`: got an IP-Adapter for {type(processors[without[0]]).__name__} of {type(backbone).__name__}, "
            "expected processors that take parts, which hubgen's backbones have."
        )


def in_order(line: str) -> list[int | str]:
    """Sorts lines by the numbers in them."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", line)]


def check_scale(scale: Any) -> None:
    """Raises ValueError unless it is a number, a list of numbers, or a dict of such for a U-Net's blocks."""
    values = scale if isinstance(scale, list | tuple) else [scale]
    if isinstance(scale, Mapping):
        wrong = [way for way in scale if way not in WAYS]
        if wrong:
            raise ValueError(f"`scale`: got the key {wrong[0]!r}, expected some of {list(WAYS)}.")
    elif not values or not all(is_number(value) for value in values):
        raise ValueError(
            f"`scale`: got {scale!r:.100}, expected a finite number, a list with one for each layer, or for a U-Net a "
            'dict such as {"up": {"block_0": [0, 1, 0]}}.'
        )


def layer_scales(scale: Scale, names: Mapping[int, str]) -> dict[int, float]:
    """How much each layer of an adapter counts, by its number.

    Args:
        scale: One for all; a list with one for each layer; or InstantStyle's dict (2404.02733), which names a U-Net's
            blocks and attentions. What it does not name does not count.
        names: Of the layers' processors by their numbers.

    Raises:
        ValueError: It does not fit these layers.
    """
    if isinstance(scale, Mapping):
        return by_blocks(scale, names)
    values = list(scale) if isinstance(scale, list | tuple) else [scale] * len(names)
    if len(values) != len(names):
        raise ValueError(f"`scale`: got a list of {len(values)}, expected {len(names)}, one for each layer.")
    return dict(zip(sorted(names), map(float, values), strict=True))


def by_blocks(scale: Mapping[str, Any], names: Mapping[int, str]) -> dict[int, float]:
    """The same of a dict: `{"down": 1, "mid": 1, "up": {"block_0": [0, 1, 0], "block_1": 0.5}}`."""
    found = dict.fromkeys(names, 0.0)
    blocks: dict[str, dict[int, list[int]]] = {}
    """Way and block, such as `up.block_0` -> attentions -> numbers of layers"""
    for number, name in names.items():
        match = re.match(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.|(mid)_block\.attentions\.(\d+)\.", name)
        if match is None:
            raise ValueError(f"`scale`: got a dict, expected a number or a list: {name} is in no block of a U-Net.")
        way, block, place, mid, mid_place = match.groups()
        key, index = ("mid", mid_place) if mid else (f"{way}.block_{block}", place)
        blocks.setdefault(key, {}).setdefault(int(index), []).append(number)
    for key, value in named_blocks(scale, blocks):
        attentions = blocks[key]
        values = list(value) if isinstance(value, list | tuple) else [value]
        values = values * len(attentions) if len(values) == 1 else values
        if len(values) != len(attentions) or not all(is_number(one) for one in values):
            raise ValueError(f"`scale`: got {value!r} for {key!r}, expected a number, or a list of {len(attentions)}.")
        for one, numbers in zip(values, (attentions[index] for index in sorted(attentions)), strict=True):
            found |= dict.fromkeys(numbers, float(one))
    return found


def named_blocks(scale: Mapping[str, Any], known: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Blocks that a dict names, as `up.block_0` or `mid`, with what it says of them; ValueError for unknown ones."""
    found = []
    for way, value in scale.items():
        if way != "mid" and isinstance(value, Mapping):
            found += [(f"{way}.{block}", one) for block, one in value.items()]
        else:
            found += [(block, value) for block in known if block.partition(".")[0] == way]
    unknown = [block for block, _ in found if block not in known]
    if unknown:
        raise ValueError(f"`scale`: got the block {unknown[0]!r}, expected some of {sorted(known)}.")
    return found
