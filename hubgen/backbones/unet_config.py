"""Configs of the U-Nets of pixels: those of published models, and what can be built."""

from typing import Any

from torch import nn

from hubgen.checks import whole
from hubgen.layers.checks import require_supported
from hubgen.layers.unet_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    ResnetDownsampleBlock2D,
    ResnetUpsampleBlock2D,
    UpBlock2D,
)
from hubgen.layers.unet_skip_blocks import (
    ATTENTION_GROUPS,
    OUTPUT_SCALE,
    PICTURE_CHANNELS,
    AttnSkipDownBlock2D,
    AttnSkipUpBlock2D,
    SkipDownBlock2D,
    SkipUpBlock2D,
    joined_groups,
    skip_groups,
)

DOWN_BLOCKS: dict[str, type[nn.Module]] = {
    "DownBlock2D": DownBlock2D,
    "AttnDownBlock2D": AttnDownBlock2D,
    "ResnetDownsampleBlock2D": ResnetDownsampleBlock2D,
    "SkipDownBlock2D": SkipDownBlock2D,
    "AttnSkipDownBlock2D": AttnSkipDownBlock2D,
}
UP_BLOCKS: dict[str, type[nn.Module]] = {
    "UpBlock2D": UpBlock2D,
    "AttnUpBlock2D": AttnUpBlock2D,
    "ResnetUpsampleBlock2D": ResnetUpsampleBlock2D,
    "SkipUpBlock2D": SkipUpBlock2D,
    "AttnSkipUpBlock2D": AttnSkipUpBlock2D,
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}
"""Values that can be built, of the arguments that choose a variant."""


def ddpm_cifar10() -> dict[str, Any]:
    """Arguments of google/ddpm-cifar10-32: 35,746,307 parameters, attention at 16 pixels."""
    return {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        **DDPM,
    }


def ddpm_celebahq_256() -> dict[str, Any]:
    """Arguments of google/ddpm-celebahq-256, and of the bedrooms, cats and churches: 113,673,219 parameters."""
    return {
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
        **DDPM,
    }


DDPM: dict[str, Any] = {
    "attention_head_dim": None,  # a single head
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
"""What TensorFlow's DDPM does otherwise than the defaults: padding right and below only, frequencies to 1/10000."""


def ncsnpp_256() -> dict[str, Any]:
    """Arguments of google/ncsnpp-ffhq-256, -celebahq-256, -church-256 and -bedroom-256: 65,574,549 parameters."""
    return {
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 256, 256, 256),
        "down_block_types": (*("SkipDownBlock2D",) * 4, "AttnSkipDownBlock2D", *("SkipDownBlock2D",) * 2),
        "up_block_types": (*("SkipUpBlock2D",) * 2, "AttnSkipUpBlock2D", *("SkipUpBlock2D",) * 4),
        **NCSNPP,
    }


def ncsnpp_ffhq_1024() -> dict[str, Any]:
    """Arguments of google/ncsnpp-ffhq-1024: one residual block a level, attention at 16 pixels."""
    return {
        "sample_size": 1024,
        "block_out_channels": (16, 32, 64, 128, 256, 512, 512, 512),
        "layers_per_block": 1,
        "down_block_types": (*("SkipDownBlock2D",) * 6, "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", *("SkipUpBlock2D",) * 6),
        **NCSNPP,
    }


NCSNPP: dict[str, Any] = {
    "attention_head_dim": None,
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": OUTPUT_SCALE,
    "norm_num_groups": None,  # as many as `skip_groups` says
    "norm_eps": 1e-6,
}


def check_config(config: Any) -> None:
    """Raises ValueError naming the argument whose value cannot be built or does not fit another."""
    require_supported(config, SUPPORTED)
    for name in ("in_channels", "out_channels", "layers_per_block"):
        whole(name, config[name])
    for name in ("norm_num_groups", "attn_norm_num_groups", "attention_head_dim", "time_embedding_dim"):
        if config[name] is not None:
            whole(name, config[name])
    for name in ("num_class_embeds", "num_train_timesteps"):
        if config[name] is not None:
            whole(name, config[name])
    if not config.block_out_channels:
        raise ValueError("`block_out_channels`: got none, expected one entry a level.")
    for channels in config.block_out_channels:
        whole("block_out_channels", channels)
    if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
        raise ValueError(
            "`num_train_timesteps`: got None, expected a whole number with `time_embedding_type` = 'learned'."
        )
    if config.class_embed_type is not None and config.num_class_embeds is not None:
        raise ValueError(
            f"`num_class_embeds`: got {config.num_class_embeds}, expected None with `class_embed_type` = "
            f"{config.class_embed_type!r}."
        )
    check_levels(config)
    check_groups(config)


def check_levels(config: Any) -> None:
    """Raises ValueError where the types of levels are unknown or cannot follow each other."""
    levels = len(config.block_out_channels)
    for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        types = block_names(config[name])
        if len(types) != levels:
            raise ValueError(
                f"`{name}`: got {config[name]!r}, expected one entry a level, {levels} as `block_out_channels`."
            )
        for block_type in types:
            if block_type not in known:
                raise ValueError(f"`{name}`: got {block_type!r}, expected one of {list(known)} for each level.")
        skips = ["Skip" in block_type for block_type in types]
        if any(skips) != all(skips):
            raise ValueError(f"`{name}`: got {config[name]!r}, expected `Skip` levels only or none of them.")
        channels = "in_channels" if name == "down_block_types" else "out_channels"
        if any(skips) and config[channels] != PICTURE_CHANNELS:
            raise ValueError(
                f"`{channels}`: got {config[channels]}, expected {PICTURE_CHANNELS} for `Skip` levels in `{name}`."
            )
        if not all(skips) and config.norm_num_groups is None:
            raise ValueError(
                f"`norm_num_groups`: got None, expected a number for the levels other than `Skip` in `{name}` = "
                f"{config[name]!r}."
            )
    padded = not all("Skip" in block_type for block_type in config.down_block_types)
    if padded and config.downsample_padding not in (0, 1):
        raise ValueError(f"`downsample_padding`: got {config.downsample_padding!r}, expected 0 or 1.")


def check_groups(config: Any) -> None:
    """Raises ValueError where groups of a norm or heads of an attention do not divide a level's channels."""
    levels = len(config.block_out_channels)
    widths = tuple(config.block_out_channels)
    if config.norm_num_groups is not None and any(width % config.norm_num_groups for width in widths):
        raise ValueError(
            f"`norm_num_groups`: got {config.norm_num_groups}, expected a divisor of all `block_out_channels` = "
            f"{widths}."
        )
    down, up = block_names(config.down_block_types), block_names(config.up_block_types)[::-1]
    attended = {i for i in range(levels) if down[i].startswith("Attn") or up[i].startswith("Attn")}
    if config.mid_block_type is not None and config.add_attention:
        attended.add(levels - 1)
        groups = config.attn_norm_num_groups
        if groups is not None and widths[-1] % groups:
            raise ValueError(
                f"`attn_norm_num_groups`: got {groups}, expected a divisor of the middle's {widths[-1]} channels."
            )
    for i in attended:
        if config.attention_head_dim is not None and config.attention_head_dim > widths[i]:
            raise ValueError(
                f"`attention_head_dim`: got {config.attention_head_dim}, expected at most the {widths[i]} channels of "
                "a level with attention."
            )
    for i, width in enumerate(widths):
        norms = []
        if "Skip" in down[i] or "Skip" in up[i] or config.norm_num_groups is None:
            norms.append((width, skip_groups(width)))
        if "Skip" in up[i]:
            below, above = widths[min(i + 1, levels - 1)], widths[max(i - 1, 0)]
            last = [width] * config.layers_per_block
            for features, skip in zip([below, *last], [*last, above], strict=True):
                norms.append((features + skip, joined_groups(features, skip, up[i].startswith("Attn"))))
        if any(name[i].startswith("AttnSkip") for name in (down, up)):
            norms.append((width, ATTENTION_GROUPS))
        for channels, groups in norms:
            if groups == 0 or channels % groups:
                raise ValueError(
                    f"`block_out_channels`: got {widths}, with which `Skip` levels normalise {channels} channels "
                    f"in {groups} groups, expected a number that divides them."
                )


def block_names(types: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Types of levels without the prefix that they had in the first configs on the Hub."""
    return tuple(block_type.removeprefix("UNetRes") for block_type in types)
