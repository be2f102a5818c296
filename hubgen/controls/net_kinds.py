"""How the networks behind `ControlNet` are shown a hint, and asked: one class a kind, told by the network's config.

    UNetNet      ControlNets of Stable Diffusion 1, 2 and XL (2302.05543)
    UnionNet     SDXL's union of several types of hints
    SD3Net       ControlNets of SD3 and 3.5
    FluxNet      ControlNets of FLUX.1, unions of modes, and XLabs'
    DiTNet       ControlNets of DiT, by PixArt's construction (2401.05252)
    AdapterNet   T2I-adapters (2302.08453): features of the hint alone, the same at every step

Networks may be hubgen's or diffusers'. Where they have fewer residuals than the base has blocks, each is put at its
block by the network's own rule here, so that networks of different depth add up.

Shapes: B pictures of H x W pixels, latents (B, C, h, w), T image tokens; rows are those of all branches that are asked.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hubgen.autoencoders.latents import encode
from hubgen.checks import is_whole
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import SHUT, BackboneFamily
from hubgen.conditioning.families.dit import DiTFamily
from hubgen.conditioning.families.flux import FluxFamily, pack
from hubgen.conditioning.families.mmdit import MMDiTFamily
from hubgen.conditioning.families.unet import UNetFamily
from hubgen.controls.control import Target
from hubgen.layers.residuals import in_turns, shared_by_neighbours, spread_evenly

logger = logging.getLogger(__name__)

UNKNOWN_HINTS = (
    "This %s does not say which hints it was made for, so they are shown to it as pictures are. Pass `mode=1` if it "
    "was made for edges (canny), which it has seen in another range; `mode=0` for blurred pictures, `mode=2` for "
    "depths."
)
FLUX_GUIDANCE = 3.5
"""What a FLUX ControlNet is told whose base takes no guidance scale: dev's usual one"""


@dataclass(frozen=True, eq=False)
class Hint:
    """What a network is to be shown, as the user gave it, checked."""

    images: Sequence[torch.Tensor]
    """One for each mode of a union, else one: (n, channels, H, W) in [0, 1] at the size of the result"""
    mask: torch.Tensor | None = None
    """(n, 1, H, W), 1 where the picture is made anew"""
    modes: tuple[int, ...] = ()
    guess: bool = False
    latents: torch.Tensor | None = None
    """(B, C, h, w) of the image, drawn from the posterior, where they are known already, as in training; of a network
    for which `sees_latents`, without a mask"""


@dataclass(frozen=True, eq=False)
class Rows:
    """What a network is asked about, of some rows of a call of the base."""

    x_t: torch.Tensor
    """(rows, C, h, w)"""
    timestep: torch.Tensor
    """(rows,), as schedulers have it"""
    keywords: Mapping[str, Any]
    """See `NetKind.keywords`"""


class NetKind(ABC):
    """Base of the kinds; one object a network.

    Args:
        net: The network.
    """

    family_class: ClassVar[type[BackboneFamily]]
    """Family of the backbones that it steers"""
    early: ClassVar[bool] = False
    """Whether the hint takes its random numbers before the start's noise, as in diffusers' pipeline"""
    guesses: ClassVar[bool] = False
    """Whether there is a guess mode"""
    masked: bool = False
    """Whether it is shown a mask beside the image"""
    pools: bool = False
    """Whether residuals are averaged over the picture, which always is a guess"""
    modes: int = 0
    """How many kinds of hints are told apart, by a union or by networks that were made for one each; 0: none are"""
    made_for: int | None = None
    """Which of these kinds it was made for, if it is no union and says so"""
    is_union: bool = True
    """Whether it was made for all of these kinds, and has to be told which of them it is shown"""
    several: ClassVar[bool] = False
    """Whether it is shown several hints at once, one a mode"""
    sees_latents: bool = False
    """Whether it is shown latents of the hint, not pixels"""
    sees_x_t: ClassVar[bool] = True
    """Whether it is shown x_t too, beside the hint"""

    def __init__(self, net: nn.Module):
        self.net: Any = net
        self.config: Any = net.config
        self.family = self.family_class(self.config)

    @property
    def image_channels(self) -> int:
        """Channels of the hint's pictures."""
        return 3

    @abstractmethod
    def sizes(self, config: Mapping[str, Any], is_net: bool) -> dict[str, Any]:
        """What the config of a network and that of its base must have in common."""

    def check(self, target: Target) -> None:
        """Raises ValueError where the network does not fit the backbone."""
        name = type(self.net).__name__
        if not isinstance(target.family, self.family_class):
            raise ValueError(
                f"`net`: got a {name}, expected a network for a {type(target.backbone).__name__}, the model's backbone."
            )
        own, base = self.sizes(self.config, True), self.sizes(target.family.config, False)
        found = {key: value for key, value in own.items() if value != base[key]}
        if found:
            expected = {key: base[key] for key in found}
            raise ValueError(f"`net`: got a {name} with {found}, expected {expected} as the model's backbone has them.")
        if self.sees_x_t and self.family.channels != target.latents.channels:
            raise ValueError(
                f"`net`: got a {name} of {self.family.channels} input channels, expected {target.latents.channels}: it "
                "is shown x_t alone, without what else the model may be shown."
            )

    @abstractmethod
    def shown(self, hint: Hint, target: Target) -> Any:
        """What the network is shown in each call, for B pictures; random numbers are drawn here."""

    @abstractmethod
    def repeated(self, shown: Any, count: int) -> Any:
        """The same for the rows of `count` branches."""

    def keywords(self, condition: Condition) -> dict[str, Any]:
        """Of the network's forward, for a condition of the base."""
        return self.family.keywords(condition)

    @abstractmethod
    def residuals(self, target: Target, rows: Rows, shown: Any, scale: float) -> Mapping[str, Any]:
        """What it adds to the base, by the keywords of the base's forward.

        Args:
            target: Of the call.
            rows: That it is asked about.
            shown: For these rows.
            scale: Of what it adds.
        """

    def to_net(self, values: torch.Tensor) -> torch.Tensor:
        """On the network's device and in its type."""
        return values.to(next(self.net.parameters()).device, self.net.dtype)

    def rescaled(self, hint: Hint, target: Target) -> torch.Tensor:
        """The one image for B pictures, in [-1, 1]."""
        return target.for_all(2 * hint.images[0] - 1)


def rows_repeated(values: torch.Tensor, count: int) -> torch.Tensor:
    """(B, ...) -> (count * B, ...)."""
    return values if count == 1 else values.repeat(count, *[1] * (values.ndim - 1))


def plain(value: Any) -> Any:
    """A value of a config, lists as tuples."""
    return tuple(plain(one) for one in value) if isinstance(value, list | tuple) else value


# ---- U-Nets ----


class UNetNet(NetKind):
    """Shown pixels in [0, 1]; adds to every feature map on the way down, and to the middle."""

    family_class = UNetFamily
    guesses = True

    def __init__(self, net: nn.Module):
        super().__init__(net)
        self.pools = bool(self.config.get("global_pool_conditions"))

    @property
    def image_channels(self) -> int:
        return self.config.conditioning_channels

    def sizes(self, config: Mapping[str, Any], is_net: bool) -> dict[str, Any]:
        return {name: plain(config[name]) for name in ("block_out_channels", "layers_per_block", "cross_attention_dim")}

    def shown(self, hint: Hint, target: Target) -> tuple[torch.Tensor, bool]:
        return self.to_net(target.for_all(hint.images[0])), hint.guess or self.pools

    def repeated(self, shown: tuple[torch.Tensor, bool], count: int) -> tuple[torch.Tensor, bool]:
        return rows_repeated(shown[0], count), shown[1]

    def residuals(self, target: Target, rows: Rows, shown: Any, scale: float) -> Mapping[str, Any]:
        image, guess = shown
        options = {"controlnet_cond": image, "guess_mode": guess}
        return self.asked(rows, options, scale)

    def asked(self, rows: Rows, options: Mapping[str, Any], scale: float) -> dict[str, Any]:
        """Runs the network."""
        down, mid = self.net(
            self.to_net(rows.x_t),
            timestep=rows.timestep,
            conditioning_scale=scale,
            return_dict=False,
            **rows.keywords,
            **options,
        )
        return {"down_block_additional_residuals": list(down), "mid_block_additional_residual": mid}


class UnionNet(UNetNet):
    """Shown several hints at once, and which type each of them is."""

    several = True

    def __init__(self, net: nn.Module):
        super().__init__(net)
        self.modes = self.config.num_control_type

    def shown(self, hint: Hint, target: Target) -> Any:
        types = torch.zeros(target.batch, self.modes)
        types[:, list(hint.modes)] = 1
        images = [self.to_net(target.for_all(image)) for image in hint.images]
        return images, self.to_net(types), list(hint.modes), hint.guess or self.pools

    def repeated(self, shown: Any, count: int) -> Any:
        images, types, modes, guess = shown
        return [rows_repeated(image, count) for image in images], rows_repeated(types, count), modes, guess

    def residuals(self, target: Target, rows: Rows, shown: Any, scale: float) -> Mapping[str, Any]:
        images, types, modes, guess = shown
        options = {"controlnet_cond": list(images), "control_type": types, "control_type_idx": modes}
        return self.asked(rows, {**options, "guess_mode": guess}, scale)


class AdapterNet(NetKind):
    """Runs once a call, on the hint alone; its features are added inside the down levels."""

    family_class = UNetFamily
    sees_x_t = False

    @property
    def image_channels(self) -> int:
        return self.config.in_channels

    def sizes(self, config: Mapping[str, Any], is_net: bool) -> dict[str, Any]:
        widths = plain(config["channels" if is_net else "block_out_channels"])
        # Some adapters have features for the middle too, which is as wide as the last level.
        while len(widths) > 1 and widths[-1] == widths[-2]:
            widths = widths[:-1]
        return {"channels": widths}

    def shown(self, hint: Hint, target: Target) -> list[torch.Tensor]:
        return list(self.net(self.to_net(target.for_all(hint.images[0]))))

    def repeated(self, shown: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        return [rows_repeated(one, count) for one in shown]

    def keywords(self, condition: Condition) -> dict[str, Any]:
        return {}

    def residuals(self, target: Target, rows: Rows, shown: Any, scale: float) -> Mapping[str, Any]:
        return {"down_intrablock_additional_residuals": [one * scale for one in shown]}


# ---- transformers ----


def width_of(config: Mapping[str, Any]) -> int:
    """Features of a token."""
    return config["num_attention_heads"] * config["attention_head_dim"]


class TransformerNet(NetKind):
    """Shown latents of the hint; adds to the image tokens behind blocks."""

    base_blocks: ClassVar[Mapping[str, tuple[str, Callable[..., Any]]]]
    """By the keyword of the base's forward: the key of its config that counts the blocks, and the network's rule"""

    sees_latents = True

    def encoded(self, hint: Hint, target: Target, pixels: torch.Tensor | None = None) -> torch.Tensor:
        """Latents of the hint, or of these pixels in its place, (B, C, h, w) as the base has them."""
        if hint.latents is not None:
            return hint.latents
        pixels = self.rescaled(hint, target) if pixels is None else pixels
        return encode(target.vae, pixels, target.generator)

    def repeated(self, shown: torch.Tensor, count: int) -> torch.Tensor:
        return rows_repeated(shown, count)

    def placed(self, target: Target, keyword: str, residuals: Sequence[torch.Tensor] | None) -> Mapping[str, Any]:
        """One residual for each block of the base, `None` where there is none."""
        if not residuals:
            return {}
        return {keyword: self.rule(keyword)(residuals, target.family.config[self.base_blocks[keyword][0]])}

    def rule(self, keyword: str) -> Callable[..., Any]:
        """Which block gets which residual."""
        return self.base_blocks[keyword][1]


STABILITY_HINTS = ("a blurred picture", "edges", "depths")
"""Of Stability's networks for SD3.5, in the order of their `control_type`"""
EDGES = 1


class SD3Net(TransformerNet):
    """Shown latents of the hint, drawn from the posterior; those for inpainting the mask beside them.

    InstantX' (`force_zeros_for_pooled_projection`) see latents without the autoencoder's shift, and no pooled text;
    Stability's for SD3.5 no text tokens, and x_t as the base embeds it (`use_pos_embed`). These were made for one kind
    of hint each, of `STABILITY_HINTS`; the one for edges has seen them in a range of its own, 127.5 x + 0.5 for x in
    [0, 1] (`vae_encode` in sd3_infer.py of Stability-AI/sd3.5). diffusers draws from the posterior without a generator.
    """

    family_class = MMDiTFamily
    base_blocks: ClassVar = {"block_controlnet_hidden_states": ("num_layers", spread_evenly)}

    def __init__(self, net: nn.Module):
        super().__init__(net)
        self.masked = bool(self.config.get("extra_conditioning_channels"))
        self.without_pooled = bool(self.config.get("force_zeros_for_pooled_projection", True))
        self.without_text = self.config.get("joint_attention_dim") is None
        if self.without_text:
            self.modes, self.is_union = len(STABILITY_HINTS), False
            self.made_for = self.config.get("_control_type")

    def sizes(self, config: Mapping[str, Any], is_net: bool) -> dict[str, Any]:
        return {"width": width_of(config), "patch_size": config["patch_size"]}

    def rescaled(self, hint: Hint, target: Target) -> torch.Tensor:
        """The image as it was seen in training: in [-1, 1], or edges in [0.5, 128]."""
        if self.without_text and hint.modes == (EDGES,):
            return target.for_all(127.5 * hint.images[0] + 0.5)
        return super().rescaled(hint, target)

    def shown(self, hint: Hint, target: Target) -> torch.Tensor:
        pixels = None
        if hint.mask is not None:
            mask = target.for_all(hint.mask)
            pixels = torch.where(mask > 0.5, -1.0, self.rescaled(hint, target))
        latents = self.encoded(hint, target, pixels)
        vae = target.vae.config
        if self.without_pooled and hint.mask is None:
            latents = latents + (vae.get("shift_factor") or 0.0) * vae.scaling_factor
        if hint.mask is not None:
            latents = torch.cat([latents, 1 - F.interpolate(mask, size=latents.shape[2:])], dim=1)
        return self.to_net(latents)

    def keywords(self, condition: Condition) -> dict[str, Any]:
        keywords = super().keywords(condition)
        if self.without_pooled:
            keywords["pooled_projections"] = torch.zeros_like(keywords["pooled_projections"])
        if self.without_text:
            keywords["encoder_hidden_states"] = None
        return keywords

    def residuals(self, target: Target, rows: Rows, shown: Any, scale: float) -> Mapping[str, Any]:
        x = self.to_net(rows.x_t)
        if getattr(self.net, "pos_embed", None) is None:  # a pipeline of diffusers may have put the base's into it
            base: Any = target.backbone
            # Zeros for what else a widened base is shown, of which the embedding is a sum.
            x_t = F.pad(rows.x_t, (0, 0, 0, 0, 0, target.family.channels - rows.x_t.shape[1]))
            x = self.to_net(base.pos_embed(x_t.to(base.dtype)))  # (rows, T, D)
        (blocks,) = self.net(
            x,
            controlnet_cond=shown,
            conditioning_scale=scale,
            timestep=rows.timestep,
            return_dict=False,
            **rows.keywords,
        )
        return self.placed(target, "block_controlnet_hidden_states", blocks)


class FluxNet(TransformerNet):
    """Shown packed latents of the hint and a mode, or, XLabs' with a hint block of their own, pixels in [-1, 1]."""

    family_class = FluxFamily
    early = True
    base_blocks: ClassVar = {
        "controlnet_block_samples": ("num_layers", shared_by_neighbours),
        "controlnet_single_block_samples": ("num_single_layers", shared_by_neighbours),
    }

    def __init__(self, net: nn.Module):
        super().__init__(net)
        self.modes = self.config.get("num_mode") or 0
        self.reads_pixels = self.config.get("conditioning_embedding_channels") is not None
        self.sees_latents = not self.reads_pixels

    def sizes(self, config: Mapping[str, Any], is_net: bool) -> dict[str, Any]:
        return {"width": width_of(config)}

    def rule(self, keyword: str) -> Callable[..., Any]:
        return in_turns if self.reads_pixels and keyword == "controlnet_block_samples" else super().rule(keyword)

    def shown(self, hint: Hint, target: Target) -> tuple[torch.Tensor, torch.Tensor | None]:
        image = self.rescaled(hint, target) if self.reads_pixels else pack(self.encoded(hint, target))
        mode = None
        if hint.modes:
            mode = torch.full((target.batch, 1), hint.modes[0], dtype=torch.long, device=image.device)
        return self.to_net(image), mode

    def repeated(self, shown: Any, count: int) -> Any:
        image, mode = shown
        return rows_repeated(image, count), None if mode is None else rows_repeated(mode, count)

    def keywords(self, condition: Condition) -> dict[str, Any]:
        if "guidance_scale" in self.family.takes and condition.guidance_scale is None:
            condition = replace(condition, guidance_scale=FLUX_GUIDANCE)
        return super().keywords(condition)

    def residuals(self, target: Target, rows: Rows, shown: Any, scale: float) -> Mapping[str, Any]:
        image, mode = shown
        x, positions = self.family.enter(self.to_net(rows.x_t), SHUT)
        double, single = self.net(
            x,
            controlnet_cond=image,
            controlnet_mode=mode,
            conditioning_scale=scale,
            timestep=self.family.timestep(rows.timestep),
            return_dict=False,
            **rows.keywords,
            **positions,
        )
        return {
            **self.placed(target, "controlnet_block_samples", double),
            **self.placed(target, "controlnet_single_block_samples", single),
        }


class DiTNet(TransformerNet):
    """Shown latents of the hint, drawn from the posterior."""

    family_class = DiTFamily
    base_blocks: ClassVar = {"block_controlnet_hidden_states": ("num_layers", shared_by_neighbours)}

    def sizes(self, config: Mapping[str, Any], is_net: bool) -> dict[str, Any]:
        same = ("patch_size", "num_embeds_ada_norm")
        return {"width": width_of(config), **{name: config[name] for name in same}}

    def shown(self, hint: Hint, target: Target) -> torch.Tensor:
        return self.to_net(self.encoded(hint, target))

    def residuals(self, target: Target, rows: Rows, shown: Any, scale: float) -> Mapping[str, Any]:
        (blocks,) = self.net(
            self.to_net(rows.x_t),
            controlnet_cond=shown,
            conditioning_scale=scale,
            timestep=rows.timestep,
            return_dict=False,
            **rows.keywords,
        )
        return self.placed(target, "block_controlnet_hidden_states", blocks)


# By a key of the config and a layer that networks have and backbones do not; the first that fits.
KINDS: Sequence[tuple[str, str, type[NetKind]]] = (
    ("adapter_type", "adapter", AdapterNet),
    ("num_control_type", "controlnet_down_blocks", UnionNet),
    ("conditioning_channels", "controlnet_down_blocks", UNetNet),
    ("axes_dims_rope", "controlnet_blocks", FluxNet),
    ("num_embeds_ada_norm", "controlnet_blocks", DiTNet),
    ("pooled_projection_dim", "controlnet_blocks", SD3Net),
)


def kind_of(net: Any) -> NetKind:
    """The kind of a network; ValueError for anything else."""
    config = getattr(net, "config", None)
    for key, layer, kind in KINDS:
        if isinstance(net, nn.Module) and isinstance(config, Mapping) and key in config and hasattr(net, layer):
            return kind(net)
    raise ValueError(f"`net`: got a {type(net).__name__}, expected a ControlNet or a T2I-adapter.")


def check_modes(kind: NetKind, modes: Sequence[Any], images: int) -> tuple[int, ...]:
    """The modes of the hints, one for each image.

    A network that is no union has the mode that it was made for. Where it does not say which that is, and none is
    given, a warning says so, and the mode is unknown: an empty tuple.

    Raises:
        ValueError: A union has none, or one out of range; or another network has some, or others than its own.
    """
    name = type(kind.net).__name__
    if not kind.modes:
        if modes:
            raise ValueError(f"`mode`: got {list(modes)}, expected none: this {name} is no union.")
        return ()
    if not modes and kind.is_union:
        raise ValueError(f"`mode`: got None, expected a number from 0 to {kind.modes - 1} for this union.")
    if not modes:
        if kind.made_for is None:
            logger.warning(UNKNOWN_HINTS, name)
        modes = () if kind.made_for is None else (kind.made_for,)
    if not all(is_whole(mode, 0, kind.modes - 1) for mode in modes) or len(set(modes)) < len(modes):
        raise ValueError(f"`mode`: got {list(modes)}, expected different numbers from 0 to {kind.modes - 1}.")
    if kind.made_for is not None and tuple(modes) != (kind.made_for,):
        raise ValueError(f"`mode`: got {list(modes)}, expected {kind.made_for}, which this {name} was made for.")
    if not modes:
        return ()
    if len(modes) != images or (len(modes) > 1 and not kind.several):
        expected = f"one for each of the {images} images" if kind.several else "one"
        raise ValueError(f"`mode`: got {list(modes)}, expected {expected}.")
    return tuple(int(mode) for mode in modes)
