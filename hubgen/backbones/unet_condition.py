"""The text-conditioned U-Net of latent diffusion, Stable Diffusion 1.x and 2.x, and SDXL with its refiner.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, figure 3) and Podell et al. 2023 (SDXL,
https://arxiv.org/abs/2307.01952, table 1):

    timestep, class, pooled text, sizes ─> temb ──┬────────────┬──────────────┐
                                                  │            │              │
    sample ─> conv_in ─> down_blocks ─> mid_block ─> up_blocks ─> conv_norm_out ─> conv_out
                              └───────────── skips ─────────────┘
    encoder_hidden_states ────┴─ cross-attention ─┴────────────┘

Every down level is a stack of residual blocks, each of which may be followed by a spatial transformer that looks at
the text, and half the size; the way up mirrors it and is handed each feature map of the way down.

Shapes: B batch, H and W height and width in latent pixels, C_i channels of level i (`block_out_channels`), T features
of the time embedding, S text tokens, E features of a text token (`cross_attention_dim`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from hubgen.formats.loading import StrictModelMixin
from hubgen.formats.single_file import SingleFileMixin
from hubgen.layers.checks import per_level, require_all_positive, require_supported
from hubgen.layers.embeddings import TimestepEmbedding, Timesteps
from hubgen.layers.unet_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    LevelAttention,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
    start_at_zero,
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
    "class_embed_type": (None, "timestep", "projection"),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}
"""Values that can be built, of the arguments that have more of them in diffusers (Kandinsky, DeepFloyd IF, GLIGEN)."""


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


class UNet2DConditionModel(
    StrictModelMixin, SingleFileMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin
):
    """The U-Net of Stable Diffusion 1.x and 2.x and of SDXL; arguments and weights are those of diffusers' class.

    Arguments that are missing below belong to variants that are not built here (`SUPPORTED` lists the values that
    are); they stay in the signature so that any config can be read, and another value raises an error.

    Text comes in two forms. Token states always enter by cross-attention. A pooled embedding is optional, and enters
    by one of two arguments:

    - `class_embed_type="projection"`, `projection_class_embeddings_input_dim=P`: pass the pooled embedding (B, P) as
      `class_labels`. This is the one for training with a small text encoder and one image size, for example MiniLM:
      `cross_attention_dim=384, class_embed_type="projection", projection_class_embeddings_input_dim=384`.
    - `addition_embed_type="text_time"`: SDXL's, with sizes and crops beside it: pass
      `added_cond_kwargs={"text_embeds": (B, P), "time_ids": (B, N)}`. For training with aspect buckets and crops.

    Args:
        sample_size: Height and width of the latents that the model is made for; any other size works, too.
        in_channels: Channels of `sample`.
        out_channels: Channels of the prediction.
        center_input_sample: Whether `sample` is in [0, 1] and is to be mapped to [-1, 1] first.
        flip_sin_to_cos: Order of the timestep's sines and cosines, see `timestep_embedding`.
        freq_shift: Shift of its frequencies, see `timestep_embedding`.
        down_block_types: A name a level: `"CrossAttnDownBlock2D"`, or `"DownBlock2D"` for a level without attention.
        mid_block_type: `"UNetMidBlock2DCrossAttn"`, `"UNetMidBlock2D"` (one residual block) or `None`.
        up_block_types: A name a level, lowest resolution first: `"CrossAttnUpBlock2D"` or `"UpBlock2D"`.
        only_cross_attention: `False`; the self-attention stays.
        block_out_channels: Channels of each level, highest resolution first.
        layers_per_block: Residual blocks of a level down, of which the level up has one more; or one number a level.
        downsample_padding: See `Downsample2D`.
        mid_block_scale_factor: What the residual blocks of the middle divide their output by.
        dropout: Probability of dropping a feature in a residual block.
        norm_num_groups: Groups of all GroupNorms; must divide all channels.
        norm_eps: Epsilon of the GroupNorms, but for that of the spatial transformers.
        cross_attention_dim: Features of a text token (E); or one number a level.
        transformer_layers_per_block: Transformer blocks of each spatial transformer; or one number a level; or a
            list a level with one number a residual block.
        reverse_transformer_layers_per_block: The same for the way up, lowest resolution first; required where
            `transformer_layers_per_block` has a list a level.
        encoder_hid_dim: Features of the text encoder's tokens where they are to be projected to
            `cross_attention_dim` first; `encoder_hid_dim_type` is then `"text_proj"`.
        attention_head_dim: The **number** of heads, in spite of its name, or one number a level: the name is wrong in
            diffusers, and in every checkpoint's config since. A head has `channels / attention_head_dim` features.
        use_linear_projection: See `Transformer2DModel`.
        class_embed_type: What `class_labels` is: `None` for no such input, or with `num_class_embeds` whole numbers
            (B,); `"timestep"` numbers (B,) that are embedded as the timestep is; `"projection"` vectors.
        addition_embed_type: `None`, or `"text_time"` for SDXL's pooled text and sizes.
        addition_time_embed_dim: Features of each embedded number of `time_ids`.
        num_class_embeds: Number of classes.
        upcast_attention: See `Attention`.
        time_embedding_dim: Features of the time embedding (T); four times the channels of the first level by default.
        time_cond_proj_dim: Features of `timestep_cond`, the embedded guidance scale of latent consistency models.
        conv_in_kernel: Size of the first convolution, odd.
        conv_out_kernel: Size of the last convolution, odd.
        projection_class_embeddings_input_dim: Features of the vector of `class_embed_type="projection"`, or of the
            pooled text and all embedded `time_ids` together for `addition_embed_type="text_time"`.

    Raises:
        ValueError: An argument has a value that cannot be built, or does not fit another; the message names both.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    _repeated_blocks = ["BasicTransformerBlock", "ResnetBlock2D"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple[int, ...] | tuple[tuple[int, ...], ...] = 1,
        reverse_transformer_layers_per_block: tuple[tuple[int, ...], ...] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None,
        addition_embed_type_num_heads: int = 64,
    ):
        super().__init__()
        self.sample_size = sample_size
        if encoder_hid_dim is not None and encoder_hid_dim_type is None:
            self.register_to_config(encoder_hid_dim_type="text_proj")
        self.check_config()
        config, levels = self.config, len(block_out_channels)
        heads = per_level("attention_head_dim", attention_head_dim, levels)
        context_dims = per_level("cross_attention_dim", cross_attention_dim, levels)
        layers = per_level("layers_per_block", layers_per_block, levels)
        down_depths = per_level("transformer_layers_per_block", transformer_layers_per_block, levels)
        up_depths = down_depths[::-1]
        if reverse_transformer_layers_per_block is not None:
            up_depths = per_level("reverse_transformer_layers_per_block", reverse_transformer_layers_per_block, levels)

        def attention(level: int, depth: int | tuple[int, ...], block_type: str) -> LevelAttention | None:
            if not block_type.startswith(("CrossAttn", "UNetMidBlock2DCrossAttn")):
                return None
            return LevelAttention(
                heads[level],
                context_dims[level],
                depth,
                use_linear_projection,
                upcast_attention,
                config.norm_num_groups,
            )

        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], conv_in_kernel, padding=conv_in_kernel // 2)

        temb_dim = 4 * block_out_channels[0] if time_embedding_dim is None else time_embedding_dim
        self.time_proj = Timesteps(block_out_channels[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], temb_dim, cond_proj_dim=time_cond_proj_dim)

        self.encoder_hid_proj = (
            None if encoder_hid_dim is None else nn.Linear(encoder_hid_dim, config.cross_attention_dim)
        )
        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(block_out_channels[0], temb_dim)
        elif class_embed_type == "projection":
            self.class_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, temb_dim)
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, temb_dim)
        if addition_embed_type == "text_time":
            self.add_time_proj = Timesteps(config.addition_time_embed_dim, flip_sin_to_cos, freq_shift)
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, temb_dim)

        self.num_upsamplers = levels - 1
        self.up_layers = tuple(count + 1 for count in reversed(layers))  # one residual block a map from the way down
        norms: dict[str, Any] = {"groups": norm_num_groups, "eps": norm_eps, "dropout": dropout}
        # The order of these three decides the order of `attn_processors`, by which IP-Adapter files are numbered.
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for i, block_type in enumerate(down_block_types):
            self.down_blocks.append(
                DOWN_BLOCKS[block_type](
                    block_out_channels[max(i - 1, 0)],
                    block_out_channels[i],
                    temb_dim,
                    layers[i],
                    attention(i, down_depths[i], block_type),
                    add_downsample=i < levels - 1,
                    downsample_padding=downsample_padding,
                    **norms,
                )
            )
        self.mid_block = None
        if mid_block_type is not None:
            self.mid_block = MID_BLOCKS[mid_block_type](
                block_out_channels[-1],
                temb_dim,
                attention(-1, down_depths[-1], mid_block_type),
                output_scale_factor=mid_block_scale_factor,
                **norms,
            )
        for i, block_type in enumerate(up_block_types):
            level = levels - 1 - i
            self.up_blocks.append(
                UP_BLOCKS[block_type](
                    block_out_channels[max(level - 1, 0)],
                    block_out_channels[level],
                    block_out_channels[min(level + 1, levels - 1)],
                    temb_dim,
                    self.up_layers[i],
                    attention(level, up_depths[i], block_type),
                    add_upsample=level > 0,
                    **norms,
                )
            )

        self.conv_norm_out = nn.GroupNorm(norms["groups"], block_out_channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, conv_out_kernel, padding=conv_out_kernel // 2)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Every residual branch and the prediction start at zero: the network starts as its skip connections."""
        start_at_zero(self)

    def check_config(self) -> None:
        """Raises ValueError naming the argument whose value cannot be built or does not fit another."""
        config = self.config
        require_supported(config, SUPPORTED)
        levels = len(config.block_out_channels)
        if any(per_level("only_cross_attention", config.only_cross_attention, levels)):
            raise ValueError(f"`only_cross_attention` must be False, got {config.only_cross_attention!r}.")
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            if len(config[name]) != levels:
                raise ValueError(
                    f"`{name}` must have one entry a level, {levels} as `block_out_channels`, got {config[name]!r}."
                )
            for block_type in config[name]:
                if block_type not in known:
                    raise ValueError(f"`{name}` must be made of {list(known)}, got {block_type!r}.")
        for name in (
            "in_channels",
            "out_channels",
            "block_out_channels",
            "layers_per_block",
            "norm_num_groups",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "attention_head_dim",
            "conv_in_kernel",
            "conv_out_kernel",
        ):
            require_all_positive(name, config[name])
        for name in ("conv_in_kernel", "conv_out_kernel"):
            if config[name] % 2 == 0:
                raise ValueError(f"`{name}` must be odd, got {config[name]}.")
        if config.downsample_padding not in (0, 1):
            raise ValueError(f"`downsample_padding` must be 0 or 1, got {config.downsample_padding!r}.")

        heads = per_level("attention_head_dim", config.attention_head_dim, levels)
        for channels, count in zip(config.block_out_channels, heads, strict=True):
            if channels % config.norm_num_groups:
                raise ValueError(
                    f"`norm_num_groups` = {config.norm_num_groups} must divide all `block_out_channels`, "
                    f"got {tuple(config.block_out_channels)}."
                )
            if channels % count:
                raise ValueError(
                    f"`attention_head_dim` is a number of heads (a name kept for old configs) and must divide the "
                    f"level's channels, got {count} heads for {channels} channels."
                )
        self.check_transformer_layers()
        self.check_embedding_config()

    def check_transformer_layers(self) -> None:
        """Raises ValueError where a list of transformer layers does not fit the residual blocks of its level."""
        config, levels = self.config, len(self.config.block_out_channels)
        layers = per_level("layers_per_block", config.layers_per_block, levels)
        down = per_level("transformer_layers_per_block", config.transformer_layers_per_block, levels)
        reverse = config.reverse_transformer_layers_per_block
        if reverse is None and any(isinstance(entry, Sequence) for entry in down):
            raise ValueError(
                "`transformer_layers_per_block` has a list a level, which needs `reverse_transformer_layers_per_block` "
                "for the way up, where every level has one residual block more."
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
                        f"`{name}` must have a number for each of the level's {count} residual blocks, got {depth!r}."
                    )

    def check_embedding_config(self) -> None:
        """Raises ValueError where an embedding is asked for without the sizes that it needs."""
        config = self.config
        needs = {
            ("class_embed_type", "projection"): ("projection_class_embeddings_input_dim",),
            ("addition_embed_type", "text_time"): (
                "projection_class_embeddings_input_dim",
                "addition_time_embed_dim",
            ),
            ("encoder_hid_dim_type", "text_proj"): ("encoder_hid_dim", "cross_attention_dim"),
        }
        for (name, value), sizes in needs.items():
            for size in sizes if config[name] == value else ():
                if not isinstance(config[size], int) or config[size] < 1:
                    raise ValueError(f"`{name}`={value!r} needs a whole number as `{size}`, got {config[size]!r}.")
        if config.class_embed_type is not None and config.num_class_embeds is not None:
            raise ValueError(
                f"`num_class_embeds` = {config.num_class_embeds} needs `class_embed_type`=None, "
                f"got {config.class_embed_type!r}."
            )

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Predicts noise, v or velocity, whatever the weights were trained for.

        Args:
            sample: Noisy latents, (B, `in_channels`, H, W); any H and W.
            timestep: One number, or (B,); whole or fractional, in the model's discrete timesteps (0 to 999).
            encoder_hidden_states: Text tokens, (B, S, E); `None` only for a model without cross-attention.
            class_labels: (B,) whole numbers, (B,) numbers or (B, P) vectors: see `class_embed_type`.
            timestep_cond: Embedded guidance scale, (B, `time_cond_proj_dim`).
            attention_mask: (B, H' * W') with 1 for the pixels that self-attention may see and 0 for the others; only
                for a model with attention at a single resolution H' x W'.
            cross_attention_kwargs: Keywords for the attention processors; `scale` is the strength of LoRA adapters.
            added_cond_kwargs: For `addition_embed_type="text_time"`: `text_embeds` (B, P) and `time_ids` (B, N).
            down_block_additional_residuals: From a ControlNet: added to the feature maps from the way down, one each.
            mid_block_additional_residual: From a ControlNet: added to the output of the middle.
            down_intrablock_additional_residuals: From a T2I-adapter: added inside the down levels, one each, and a
                last one after the middle.
            encoder_attention_mask: (B, S) with 1 for text tokens that count and 0 for the others.
            return_dict: Whether to return `UNet2DConditionOutput` or a tuple.

        Returns:
            The prediction, (B, `out_channels`, H, W), as `sample` of the output.

        Raises:
            ValueError: An argument is missing, is not for this model, or has the wrong shape; before any computation.
        """
        self.check_inputs(sample, timestep, encoder_hidden_states, attention_mask, encoder_attention_mask)
        self.check_embeddings(sample, class_labels, timestep_cond, added_cond_kwargs)
        self.check_residuals(
            down_block_additional_residuals, mid_block_additional_residual, down_intrablock_additional_residuals
        )
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        temb = self.embed_conditions(sample, timestep, class_labels, timestep_cond, added_cond_kwargs)  # (B, T)
        if self.encoder_hid_proj is not None:
            encoder_hidden_states = self.encoder_hid_proj(encoder_hidden_states)  # (B, S, E)
        attended: dict[str, Any] = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": self.score_bias(attention_mask, sample.dtype),
            "encoder_attention_mask": self.score_bias(encoder_attention_mask, sample.dtype),
            "cross_attention_kwargs": cross_attention_kwargs,
        }
        intra = list(down_intrablock_additional_residuals or ())

        x = self.conv_in(sample)  # (B, C_0, H, W)
        skips = [x]
        for block in self.down_blocks:
            x, maps = block(x, temb, additional_residuals=intra.pop(0) if intra else None, **attended)
            skips.extend(maps)  # x: (B, C_i, H / 2^(i + 1), W / 2^(i + 1)), rounded up

        if down_block_additional_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, down_block_additional_residuals, strict=True)]
        if self.mid_block is not None:
            x = self.mid_block(x, temb, **attended)  # (B, C_last, H', W')
        if intra:
            x = x + intra.pop(0)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual

        for block, count in zip(self.up_blocks, self.up_layers, strict=True):
            maps, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[-2:] if skips else None
            x = block(x, tuple(maps), temb, upsample_size=size, **attended)  # (B, C_i, H / 2^(i - 1), W / 2^(i - 1))

        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, out_channels, H, W)
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)

    def embed_conditions(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None,
        timestep_cond: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The sum of everything about the image that is one vector, (B, T): timestep, class, pooled text and sizes."""
        batch, dtype = sample.shape[0], sample.dtype
        if not torch.is_tensor(timestep):
            timestep = torch.full((batch,), timestep, dtype=torch.float32, device=sample.device)
        timestep = timestep.to(sample.device).reshape(-1).expand(batch)  # (B,)
        temb = self.time_embedding(self.time_proj(timestep).to(dtype), timestep_cond)  # (B, T)

        if self.class_embedding is not None and class_labels is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels)  # (B, C_0)
            if self.config.class_embed_type is not None:
                class_labels = class_labels.to(dtype)
            temb = temb + self.class_embedding(class_labels).to(dtype)

        if added_cond_kwargs:
            numbers = added_cond_kwargs["time_ids"]  # (B, N)
            waves = self.add_time_proj(numbers.flatten()).reshape(batch, -1)  # (B, N * addition_time_embed_dim)
            vector = torch.cat([added_cond_kwargs["text_embeds"].to(dtype), waves.to(dtype)], dim=-1)
            temb = temb + self.add_embedding(vector)
        return temb

    @staticmethod
    def score_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """(B, S) of 1 and 0 -> (B, 1, S) of 0 and -10000, which fits in half precision, to be added to the scores."""
        return None if mask is None else ((1 - mask.to(dtype)) * -10000.0)[:, None]

    def check_inputs(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
    ) -> None:
        """Raises ValueError where the latents, the timestep, the text or a mask do not fit the model or each other."""
        config = self.config
        if sample.ndim != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(
                f"`sample` must have the shape (batch, {config.in_channels}, height, width), got {tuple(sample.shape)}."
            )
        batch = sample.shape[0]
        if torch.is_tensor(timestep) and (timestep.ndim > 1 or timestep.numel() not in (1, batch)):
            raise ValueError(
                f"`timestep` must be one number or have the shape ({batch},) as the batch of `sample`, "
                f"got {tuple(timestep.shape)}."
            )
        blocks = [*self.down_blocks, *self.up_blocks, *([] if self.mid_block is None else [self.mid_block])]
        if any(block.has_cross_attention for block in blocks):
            width = config.cross_attention_dim if config.encoder_hid_dim is None else config.encoder_hid_dim
            width = width[0] if isinstance(width, Sequence) else width
            shape = None if encoder_hidden_states is None else tuple(encoder_hidden_states.shape)
            if shape is None or len(shape) != 3 or shape[0] != batch or shape[2] != width:
                raise ValueError(
                    f"`encoder_hidden_states` must have the shape ({batch}, tokens, {width}), got {shape}."
                )
        if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[0] != batch):
            raise ValueError(
                f"`attention_mask` must have the shape ({batch}, pixels), got {tuple(attention_mask.shape)}."
            )
        if encoder_attention_mask is not None:
            expected = None if encoder_hidden_states is None else tuple(encoder_hidden_states.shape[:2])
            if tuple(encoder_attention_mask.shape) != expected:
                raise ValueError(
                    f"`encoder_attention_mask` must have the shape {expected} as `encoder_hidden_states`, "
                    f"got {tuple(encoder_attention_mask.shape)}."
                )

    def check_embeddings(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None,
        timestep_cond: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
    ) -> None:
        """Raises ValueError where a vector is missing that the model needs, or given that it does not take."""
        config, batch = self.config, sample.shape[0]
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                f"`class_labels` is {'missing' if class_labels is None else 'given'}, but the model was made with "
                f"`class_embed_type`={config.class_embed_type!r} and `num_class_embeds`={config.num_class_embeds!r}."
            )
        if class_labels is not None:
            vector = (config.projection_class_embeddings_input_dim,) if config.class_embed_type == "projection" else ()
            if tuple(class_labels.shape) != (batch, *vector):
                raise ValueError(
                    f"`class_labels` must have the shape {(batch, *vector)}, got {tuple(class_labels.shape)}."
                )
        if timestep_cond is not None and timestep_cond.shape[-1] != config.time_cond_proj_dim:
            raise ValueError(
                f"`timestep_cond` must have `time_cond_proj_dim` = {config.time_cond_proj_dim} features, "
                f"got {tuple(timestep_cond.shape)}."
            )

        keys = {"text_embeds", "time_ids"} if config.addition_embed_type == "text_time" else set()
        given = set(added_cond_kwargs or ())
        if given != keys:
            raise ValueError(
                f"`added_cond_kwargs` must have the keys {sorted(keys)} for `addition_embed_type`="
                f"{config.addition_embed_type!r}, got {sorted(given)}."
            )
        if added_cond_kwargs:
            text, numbers = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            for name, value in (("text_embeds", text), ("time_ids", numbers)):
                if value.ndim != 2 or value.shape[0] != batch:
                    raise ValueError(
                        f"`added_cond_kwargs['{name}']` must have the shape ({batch}, features), "
                        f"got {tuple(value.shape)}."
                    )
            features = text.shape[1] + numbers.shape[1] * config.addition_time_embed_dim
            if features != config.projection_class_embeddings_input_dim:
                raise ValueError(
                    f"`text_embeds` with {text.shape[1]} features and `time_ids` with {numbers.shape[1]} numbers of "
                    f"{config.addition_time_embed_dim} features make {features}, but "
                    f"`projection_class_embeddings_input_dim` is {config.projection_class_embeddings_input_dim}."
                )

    def check_residuals(
        self,
        down: Sequence[torch.Tensor] | None,
        mid: torch.Tensor | None,
        intra: Sequence[torch.Tensor] | None,
    ) -> None:
        """Raises ValueError where the number of residuals does not fit the model's levels."""
        if down is not None:
            if mid is None:
                raise ValueError(
                    "`down_block_additional_residuals` of a ControlNet come with `mid_block_additional_residual`, "
                    "which is missing; those of a T2I-adapter are `down_intrablock_additional_residuals`."
                )
            count = sum(self.up_layers)
            if len(down) != count:
                raise ValueError(f"`down_block_additional_residuals` must be {count} tensors, got {len(down)}.")
        if intra is not None and len(intra) > len(self.down_blocks) + 1:
            raise ValueError(
                f"`down_intrablock_additional_residuals` must be at most {len(self.down_blocks) + 1} tensors, one a "
                f"down level and one for the middle, got {len(intra)}."
            )
