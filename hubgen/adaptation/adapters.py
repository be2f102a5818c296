"""Adapters to train: which layers of a model, how many terms, what kind; PEFT makes them.

    layers = targets(unet, "attention")                    by a preset, or a pattern of names
    add_adapter(unet, "default", AdapterShape(kind="lora", rank=16), layers)

A fresh adapter adds nothing, bit for bit, except for the inits that take part of the weight (PiSSA, OLoRA).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from torch import nn

from hubgen.adaptation.attach import adaptable, detach, is_quantised, pattern

ATTENTION = (
    r"(to_[qkv]|to_out\.0|to_(added_)?qkv|add_[qkv]_proj|to_add_out|[qkv]_proj|out_proj"
    r"|SelfAttention\.[qkvo]|self\.(query|key|value)|attention\.output\.dense)$"
)
FEED_FORWARD = (
    r"(ff(_context)?\.net\.(0\.proj|2)|proj_mlp|single_transformer_blocks\.\d+\.proj_out|mlp\.fc[12]"
    r"|DenseReluDense\.w\w+|intermediate\.dense|layer\.\d+\.output\.dense)$"
)
BLOCKS = r"(^|\.)(down_blocks|mid_block|up_blocks|(single_)?transformer_blocks|layers?|block)\."
PRESETS = {"attention": ATTENTION, "attention_and_feed_forward": f"{ATTENTION}|{FEED_FORWARD}", "all": BLOCKS}
"""Names of layers by what they do; `all` are those of the blocks, and not those around them"""

Kind = Literal["lora", "loha", "lokr", "oft"]
Init = Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]
PREFIXES = {"lora": "lora_", "loha": "hada_", "lokr": "lokr_", "oft": "oft_"}
"""Of the names of PEFT's parameters"""
RESIDUAL = ("pissa", "pissa_niter_4", "olora")
"""Inits that move a part of the weight into the adapter"""


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter is made of.

    Raises:
        ValueError: Options that do not go together.
    """

    kind: Kind = "lora"
    """LoRA (2106.09685), LoHa (2108.06098), LoKr (2309.14859) or OFT (2306.07280)"""
    rank: int = 16
    """Terms of the product; of OFT the size of its blocks"""
    alpha: float | None = None
    """The product counts alpha / rank; the rank if not given"""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Pattern of names -> rank, for layers that are to have another"""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Pattern of names -> alpha; where only the rank is another, alpha keeps its ratio"""
    dropout: float = 0.0
    """Of what enters the product, while it is trained"""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) (2312.03732)"""
    decomposed: bool = False
    """Magnitudes of their own, DoRA (2402.09353)"""
    init: Init = "default"
    """Of LoRA's factors: zeros and Kaiming's; PiSSA (2404.02948) and OLoRA (2406.01775) start from the weight"""

    def __post_init__(self) -> None:
        special = {"rank_stabilised": self.rank_stabilised, "decomposed": self.decomposed}
        special["init"] = self.init != "default"
        for name, given in special.items():
            if given and self.kind != "lora":
                raise ValueError(
                    f"`{name}`: got {getattr(self, name)!r} with {self.kind}, expected it with lora alone."
                )
        if self.decomposed and self.init in RESIDUAL:
            raise ValueError(f"`init`: got {self.init!r} with `decomposed`, expected one of the two.")


def targets(model: nn.Module, wanted: str) -> list[str]:
    """Names of the layers that a preset or pattern means.

    Args:
        model: Whose.
        wanted: A key of `PRESETS`, or a regular expression that is found in the names.

    Raises:
        ValueError: It is no regular expression, or means no layer of the model.
    """
    names = list(adaptable(model))
    try:
        found = [name for name in names if re.search(PRESETS.get(wanted, wanted), name)]
    except re.error as error:
        raise ValueError(f"`targets`: got {wanted!r}, expected a regular expression ({error}).") from error
    if not found:
        kinds = sorted({re.sub(r"\d+", "N", name) for name in names})
        raise ValueError(
            f"`targets`: got {wanted!r}, which no layer of {type(model).__name__} matches; expected "
            f"{', '.join(PRESETS)}, or a pattern of {', '.join(kinds)}."
        )
    return found


def add_adapter(model: Any, adapter: str, shape: AdapterShape, layers: Sequence[str]) -> None:
    """Puts a fresh adapter on layers of a model; all else of the model is frozen.

    The adapter is float32 on a model of any precision: a step of training is smaller than what bfloat16 can tell apart.

    Args:
        model: Of hubgen, diffusers or transformers, without an adapter of that name.
        adapter: Its name.
        shape: What it is made of.
        layers: By name, as `targets` gives them.

    Raises:
        ValueError: A rank is larger than its layer, a pattern means none of the layers, or the adapter is of a kind
            that some layer does not take; OFT, PiSSA or OLoRA on a quantised model, whose weights stay as they are.
    """
    if is_quantised(model):
        if shape.kind == "oft":
            raise ValueError("`kind`: got oft for a quantised model, expected lora, loha or lokr.")
        if shape.init in RESIDUAL:
            raise ValueError(f"`init`: got {shape.init} for a quantised model, whose weights it cannot change.")
    ranks, alphas = by_layer(shape, layers)
    known = adaptable(model)
    for name in layers:
        weight: torch.Tensor = known[name].weight  # type: ignore[assignment]
        width = min(weight.shape[0], weight.shape[1:].numel())
        if shape.kind == "oft" and isinstance(known[name], nn.Conv2d):
            raise ValueError(f"`kind`: got oft for {name}, a convolution, expected it for linear layers alone.")
        if shape.kind != "oft" and ranks[name] > width:
            raise ValueError(f"`rank`: got {ranks[name]} for {name}, expected at most its width, {width}.")
    model.requires_grad_(False)
    keys = {f"{name}.{PREFIXES[shape.kind]}": torch.empty(0) for name in layers}
    try:
        inject_adapter_in_model(config_of(shape, layers, ranks, alphas), model, adapter, state_dict=keys)
    except (ValueError, TypeError) as error:
        detach(model, adapter)
        raise ValueError(f"`kind`: no {shape.kind} can be made of these layers: {error}") from error
    cast_adapter_dtype(model, adapter)
    model._hf_peft_config_loaded = True


def by_layer(shape: AdapterShape, layers: Sequence[str]) -> tuple[dict[str, int], dict[str, float]]:
    """The rank and alpha of each layer.

    Raises:
        ValueError: A pattern is none, or means none of the layers.
    """
    ratio = 1.0 if shape.alpha is None else shape.alpha / shape.rank
    ranks = dict.fromkeys(layers, shape.rank)
    ranks |= matched("ranks", shape.ranks, layers)
    alphas = {name: ratio * rank for name, rank in ranks.items()}
    return ranks, alphas | matched("alphas", shape.alphas, layers)


def matched(what: str, patterns: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """The value of each layer that a pattern means; of several, the last holds."""
    found: dict[str, Any] = {}
    for one, value in patterns.items():
        try:
            meant = [name for name in layers if re.search(one, name)]
        except re.error as error:
            raise ValueError(f"`{what}`: got {one!r}, expected a regular expression ({error}).") from error
        if not meant:
            raise ValueError(f"`{what}`: got {one!r}, which none of the layers matches: {', '.join(layers[:8])}, ...")
        found |= dict.fromkeys(meant, value)
    return found


def config_of(shape: AdapterShape, layers: Sequence[str], ranks: Mapping[str, int], alphas: Mapping[str, float]) -> Any:
    """PEFT's config."""
    alpha = shape.rank * (1.0 if shape.alpha is None else shape.alpha / shape.rank)
    common: dict[str, Any] = {
        "target_modules": list(layers),
        "rank_pattern": pattern(ranks, shape.rank),
        "alpha_pattern": pattern(alphas, alpha),
    }
    if shape.kind == "lora":
        init: Any = True if shape.init == "default" else shape.init
        return LoraConfig(
            r=shape.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=shape.dropout,
            use_rslora=shape.rank_stabilised,
            use_dora=shape.decomposed,
            init_lora_weights=init,
            **common,
        )
    if shape.kind == "oft":
        return OFTConfig(r=0, oft_block_size=shape.rank, module_dropout=shape.dropout, target_modules=list(layers))
    cls = LoHaConfig if shape.kind == "loha" else LoKrConfig
    return cls(r=shape.rank, alpha=alpha, rank_dropout=shape.dropout, **common)  # type: ignore[arg-type]
