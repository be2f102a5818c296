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
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import UNet2DConditionLoadersMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from hubgen.backbones.unet_condition_config import UP_BLOCKS, check_config
from hubgen.backbones.unet_condition_encoder import UNetConditionEncoder
from hubgen.layers.unet_blocks import start_at_zero


class UNet2DConditionModel(UNet2DConditionLoadersMixin, UNetConditionEncoder):
    """The U-Net of Stable Diffusion 1.x and 2.x and of SDXL; arguments and weights are those of diffusers' class.

    Arguments that are missing below belong to variants that are not built here; they stay in the signature so that any
    config can be read, and a value that cannot be built raises an error (`unet_condition_config.py`, which also has the
    configs of published models).

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
            diffusers, and in every checkpoint's config since. A head has `channels // attention_head_dim` features.
        use_linear_projection: See `Transformer2DModel`.
        class_embed_type: What `class_labels` is: `None` for no such input, or with `num_class_embeds` whole numbers
            (B,); `"timestep"` numbers (B,) that are embedded as the timestep is; `"projection"` vectors, which go
            through two layers, and `"simple_projection"` through one; `"identity"` vectors (B, T).
        addition_embed_type: `None`, or `"text_time"` for SDXL's pooled text and sizes.
        addition_time_embed_dim: Features of each embedded number of `time_ids`.
        num_class_embeds: Number of classes.
        upcast_attention: See `Attention`.
        time_embedding_dim: Features of the time embedding (T); four times the channels of the first level by default.
        time_cond_proj_dim: Features of `timestep_cond`, the embedded guidance scale of latent consistency models.
        conv_in_kernel: Size of the first convolution, odd.
        conv_out_kernel: Size of the last convolution, odd.
        projection_class_embeddings_input_dim: Features of the vector of `class_embed_type="projection"` (or
            `"simple_projection"`), or of the pooled text and all embedded `time_ids` together for
            `addition_embed_type="text_time"`.
        class_embeddings_concat: Whether the class's embedding stands beside that of the time, and is not added to it.

    Raises:
        ValueError: An argument has a value that cannot be built, or does not fit another; the message names both.
    """

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
        check_config(self.config)
        levels = len(block_out_channels)
        self.build_way_down()
        self.up_blocks = nn.ModuleList()
        self.build_middle()

        self.num_upsamplers = levels - 1
        self.up_layers = tuple(count + 1 for count in reversed(self.per_level("layers_per_block")))  # one a map
        up_depths = self.down_depths[::-1]
        if reverse_transformer_layers_per_block is not None:
            up_depths = self.per_level("reverse_transformer_layers_per_block")
        for i, block_type in enumerate(up_block_types):
            level = levels - 1 - i
            self.up_blocks.append(
                UP_BLOCKS[block_type](
                    block_out_channels[max(level - 1, 0)],
                    block_out_channels[level],
                    block_out_channels[min(level + 1, levels - 1)],
                    self.vector_dim,
                    self.up_layers[i],
                    self.level_attention(level, up_depths[i], block_type),
                    add_upsample=level > 0,
                    **self.norm_options,
                )
            )

        self.conv_norm_out = nn.GroupNorm(self.config.norm_num_groups, block_out_channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, conv_out_kernel, padding=conv_out_kernel // 2)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Every residual branch and the prediction start at zero: the network starts as its skip connections."""
        start_at_zero(self)

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
            added_cond_kwargs: For `addition_embed_type="text_time"`: `text_embeds` (B, P) and `time_ids` (B, N); and
                `image_embeds`, the pictures of IP-Adapters that diffusers' loader has put in.
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
        added_cond_kwargs, images = self.images_apart(added_cond_kwargs)
        self.check_inputs(sample, timestep, encoder_hidden_states, attention_mask, encoder_attention_mask)
        self.check_embeddings(sample, class_labels, timestep_cond, added_cond_kwargs)
        self.check_residuals(
            down_block_additional_residuals, mid_block_additional_residual, down_intrablock_additional_residuals
        )
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        temb = self.embed_conditions(sample, timestep, class_labels, timestep_cond, added_cond_kwargs)  # (B, T)
        attended = self.attended(
            encoder_hidden_states, attention_mask, encoder_attention_mask, cross_attention_kwargs, sample.dtype
        )
        if images is not None:
            attended["encoder_hidden_states"] = (attended["encoder_hidden_states"], self.encoder_hid_proj(images))
        intra = list(down_intrablock_additional_residuals or ())

        x, skips = self.way_down(self.conv_in(sample), temb, attended, intra)  # (B, C_last, H', W')
        if down_block_additional_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, down_block_additional_residuals, strict=True)]
        if self.mid_block is not None:
            x = self.mid_block(x, temb, **attended)  # (B, C_last, H', W')
        for residual in (*intra[len(self.down_blocks) :], mid_block_additional_residual):
            x = x if residual is None else x + residual

        for block, count in zip(self.up_blocks, self.up_layers, strict=True):
            maps, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[-2:] if skips else None
            x = block(x, tuple(maps), temb, upsample_size=size, **attended)  # (B, C_i, H / 2^(i - 1), W / 2^(i - 1))

        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, out_channels, H, W)
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)

    def images_apart(self, added_cond_kwargs: dict[str, Any] | None) -> tuple[dict[str, Any] | None, Any]:
        """`added_cond_kwargs` without `image_embeds`, and these; as it is where no IP-Adapter is in the model."""
        if not self.has_image_projection:
            return added_cond_kwargs, None
        rest = dict(added_cond_kwargs or {})
        images = rest.pop("image_embeds", None)
        if images is None:
            raise ValueError("`added_cond_kwargs`: got no `image_embeds`, expected those of the loaded IP-Adapters.")
        return rest, images

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
                    "`mid_block_additional_residual`: got None, expected a tensor with "
                    "`down_block_additional_residuals` of a ControlNet; those of a T2I-adapter are "
                    "`down_intrablock_additional_residuals`."
                )
            count = sum(self.up_layers)
            if len(down) != count:
                raise ValueError(f"`down_block_additional_residuals`: got {len(down)} tensors, expected {count}.")
        if intra is not None and len(intra) > len(self.down_blocks) + 1:
            raise ValueError(
                f"`down_intrablock_additional_residuals`: got {len(intra)} tensors, expected at most "
                f"{len(self.down_blocks) + 1}, one a down level and one for the middle."
            )
