"""Configs of the text-conditioned U-Net: those of published models, and what can be built.

Written for `UNet2DConditionModel`; a ControlNet, which shares its encoder half, has the same keys but for the way up
and those of `LEFT_OUT`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hubgen.checks import whole
from hubgen.layers.checks import per_level, require_all_positive, require_supported
from hubgen.layers.unet_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)

DOWN_BLOCKS = {"DownBlock2D": DownBlock2D, "CrossAttnDownBlock2D": CrossAttnDownBlock2D}
MID_BLOCKS = {"UNetMidBlock2D": UNetMidBlock2D, "UNetMidBlock2DCrossAttn": UNetMidBlock2DCrossAttn}
UP_BLOCKS = {"UpBlock2D": UpBlock2D, "CrossAttnUpBlock2D": CrossAttnUpBlock2D}

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": (*MID_BLOCKS, None),
    "act_fn": ("silu", "swish"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "attention_type": ("default",),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}
"""Values that can be built, of the arguments that have more of them in diffusers (Kandinsky, DeepFloyd IF, GLIGEN)."""

LEFT_OUT: dict[str, Any] = {
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "dropout": 0.0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "time_cond_proj_dim": None,
    "time_embedding_dim": None,
}
"""What the encoder half is built with where the config has no such key, as those of ControlNets have none."""


def stable_diffusion_1() -> dict[str, Any]:
    """Arguments of the U-Net of Stable Diffusion 1.x: 859,520,964 parameters, CLIP ViT-L/14's 768 text features."""
    return {"sample_size": 64, "cross_attention_dim": 768}


def stable_diffusion_2() -> dict[str, Any]:
    """Arguments of the U-Net of Stable Diffusion 2.x: 865,910,724 parameters, OpenCLIP ViT-H/14's 1024 text features.

    The checkpoints at 768 pixels predict v, the base ones at 512 pixels (`sample_size=64`) the noise; the network is
    the same.
    """
    return {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    }


def stable_diffusion_xl() -> dict[str, Any]:
    """Arguments of the U-Net of SDXL base: 2,567,463,684 parameters.

    `text_embeds` has 1280 features and `time_ids` six numbers: height and width of the original, top and left of the
    crop, height and width of the target (2307.01952, section 2.2).
    """
    return {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


def stable_diffusion_xl_refiner() -> dict[str, Any]:
    """Arguments of the U-Net of the SDXL refiner: 2,259,526,660 parameters.

    `time_ids` has five numbers: height and width of the original, top and left of the crop, aesthetic score.
    """
    return {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (384, 768, 1536, 1536),
        "transformer_layers_per_block": 4,
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    }


def check_config(config: Any) -> None:
    """Raises ValueError naming the argument whose value cannot be built or does not fit another."""
    check_encoder(config)
    check_block_types("up_block_types", config, UP_BLOCKS)
    require_all_positive("out_channels", config.out_channels)
    require_odd("conv_out_kernel", config.conv_out_kernel)
    check_transformer_layers(config)


def check_encoder(config: Any) -> None:
    """The same for the half that ControlNets share, of whose keys theirs has not all."""
    require_supported(config, {name: values for name, values in SUPPORTED.items() if name in config})
    levels = len(config.block_out_channels)
    if any(per_level("only_cross_attention", config.only_cross_attention, levels)):
        raise ValueError(f"`only_cross_attention`: got {config.only_cross_attention!r}, expected False.")
    check_block_types("down_block_types", config, DOWN_BLOCKS)
    for name in (
        "in_channels",
        "block_out_channels",
        "layers_per_block",
        "norm_num_groups",
        "cross_attention_dim",
        "transformer_layers_per_block",
        "attention_head_dim",
    ):
        require_all_positive(name, config[name])
    require_odd("conv_in_kernel", config.get("conv_in_kernel", LEFT_OUT["conv_in_kernel"]))
    if config.downsample_padding not in (0, 1):
        raise ValueError(f"`downsample_padding`: got {config.downsample_padding!r}, expected 0 or 1.")

    heads = per_level("attention_head_dim", config.attention_head_dim, levels)
    for channels, count in zip(config.block_out_channels, heads, strict=True):
        if channels % config.norm_num_groups:
            raise ValueError(
                f"`norm_num_groups`: got {config.norm_num_groups}, expected a divisor of all `block_out_channels` = "
                f"{tuple(config.block_out_channels)}."
            )
        if count > channels:
            raise ValueError(
                f"`attention_head_dim`: got {count} heads (the name is kept for old configs), expected at most the "
                f"level's {channels} channels."
            )
    check_embeddings(config)


def check_block_types(name: str, config: Any, known: Mapping[str, Any]) -> None:
    """Raises ValueError unless there is one of the `known` types for each level."""
    levels = len(config.block_out_channels)
    if len(config[name]) != levels:
        raise ValueError(
            f"`{name}`: got {config[name]!r}, expected one entry a level, {levels} as `block_out_channels`."
        )
    for block_type in config[name]:
        if block_type not in known:
            raise ValueError(f"`{name}`: got {block_type!r}, expected one of {list(known)} for each level.")


def require_odd(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a positive odd number."""
    if whole(name, value) % 2 == 0:
        raise ValueError(f"`{name}`: got {value}, expected an odd number.")


def check_transformer_layers(config: Any) -> None:
    """Raises ValueError where a list of transformer layers does not fit the residual blocks of its level."""
    levels = len(config.block_out_channels)
    layers = per_level("layers_per_block", config.layers_per_block, levels)
    down = per_level("transformer_layers_per_block", config.transformer_layers_per_block, levels)
    reverse = config.reverse_transformer_layers_per_block
    if reverse is None and any(isinstance(entry, Sequence) for entry in down):
        raise ValueError(
            "`reverse_transformer_layers_per_block`: got None, expected a list a level as in "
            "`transformer_layers_per_block`, for on the way up every level has one residual block more."
        )
    up = () if reverse is None else per_level("reverse_transformer_layers_per_block", reverse, levels)
    require_all_positive("reverse_transformer_layers_per_block", up)
    for name, depths, counts in (
        ("transformer_layers_per_block", down, layers),
        ("reverse_transformer_layers_per_block", up, [count + 1 for count in layers[::-1]]),
    ):
        for depth, count in zip(depths, counts, strict=False):
            if isinstance(depth, Sequence) and len(depth) != count:
                raise ValueError(
                    f"`{name}`: got {depth!r}, expected a number for each of the level's {count} residual blocks."
                )


def check_embeddings(config: Any) -> None:
    """Raises ValueError where an embedding is asked for without the sizes that it needs."""
    needs = {
        ("class_embed_type", "projection"): ("projection_class_embeddings_input_dim",),
        ("class_embed_type", "simple_projection"): ("projection_class_embeddings_input_dim",),
        ("addition_embed_type", "text_time"): (
            "projection_class_embeddings_input_dim",
            "addition_time_embed_dim",
        ),
        ("encoder_hid_dim_type", "text_proj"): ("encoder_hid_dim", "cross_attention_dim"),
    }
    for (name, value), sizes in needs.items():
        for size in sizes if config[name] == value else ():
            if not isinstance(config[size], int) or config[size] < 1:
                raise ValueError(f"`{size}`: got {config[size]!r}, expected a whole number with `{name}` = {value!r}.")
    beside = config.get("class_embeddings_concat", LEFT_OUT["class_embeddings_concat"])
    if beside and config.addition_embed_type is not None:
        raise ValueError(
            f"`class_embeddings_concat`: got True, expected False with `addition_embed_type` = "
            f"{config.addition_embed_type!r}, whose embedding is added."
        )
    if beside and config.class_embed_type is None and config.num_class_embeds is None:
        raise ValueError("`class_embeddings_concat`: got True, expected False without `class_embed_type`.")
    if config.class_embed_type is not None and config.num_class_embeds is not None:
        raise ValueError(
            f"`num_class_embeds`: got {config.num_class_embeds}, expected None with `class_embed_type` = "
            f"{config.class_embed_type!r}."
        )
