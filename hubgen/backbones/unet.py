"""The U-Nets of pixels without a text: DDPM's, and NCSN++.

Ho et al. 2020 (DDPM, https://arxiv.org/abs/2006.11239, appendix B) and Song et al. 2021 (NCSN++,
https://arxiv.org/abs/2011.13456, section 4.4); Dhariwal and Nichol 2021 (https://arxiv.org/abs/2105.05233) is the
former with `resnet_time_scale_shift="scale_shift"` and resampling residual blocks.

    timestep or sigma, class ─> temb ──┬────────────┬──────────────┐
                                       │            │              │
    sample ─> conv_in ─> down_blocks ─> mid_block ─> up_blocks ─> conv_norm_out ─> conv_out ─> + ─> (/ sigma)
        └─────────────── picture │ └──────── skips ────────┘ └ picture ────────────────────────┘

The pictures are NCSN++'s alone: its `Skip` levels add the noisy picture, halved with every level, to the features on
the way down, and on the way up add to a picture of their own, which the last convolution's output completes.

Shapes: B batch, H and W height and width in pixels, C_i channels of level i (`block_out_channels`), T features of the
time embedding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from hubgen.backbones.base import Backbone
from hubgen.backbones.unet_config import DOWN_BLOCKS, UP_BLOCKS, block_names, check_config
from hubgen.layers.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from hubgen.layers.unet_blocks import PixelAttention, UNetMidBlock2D, start_at_zero
from hubgen.layers.unet_skip_blocks import (
    ATTENTION_GROUPS,
    OUTPUT_SCALE,
    SkipDownBlock2D,
    SkipUpBlock2D,
    skip_groups,
)

FOURIER_SCALE = 16


class UNet2DModel(Backbone):
    """The U-Net of DDPM and NCSN++; arguments and weights are those of diffusers' class.

    Published configs are functions in `unet_config.py`, where also the names of levels are listed.

    Args:
        sample_size: Height and width of the pictures that the model is made for.
        in_channels: Channels of `sample`.
        out_channels: Channels of the prediction.
        center_input_sample: Whether `sample` is in [0, 1] and is to be mapped to [-1, 1] first.
        time_embedding_type: What `timestep` is: `"positional"` a timestep, `"fourier"` the noise level sigma (NCSN++),
            by which the output is divided; `"learned"` a whole number below `num_train_timesteps`.
        time_embedding_dim: Features of the time embedding (T); four times the channels of the first level by default.
        freq_shift: Shift of the timestep's frequencies, see `timestep_embedding`.
        flip_sin_to_cos: Order of its sines and cosines, see `timestep_embedding`.
        down_block_types: A name a level, of `DOWN_BLOCKS`; either all or none of them are `Skip` levels.
        mid_block_type: `"UNetMidBlock2D"` or `None`.
        up_block_types: A name a level, of `UP_BLOCKS`, lowest resolution first; either all or none are `Skip` levels.
        block_out_channels: Channels of each level, highest resolution first.
        layers_per_block: Residual blocks of a level down, of which the level up has one more.
        mid_block_scale_factor: What the middle divides its sums of skip and residual by.
        downsample_padding: See `Downsample2D`.
        downsample_type: How `AttnDownBlock2D` halves: `"conv"` (also `None`), or `"resnet"` by a residual block.
        upsample_type: How `AttnUpBlock2D` doubles: `"conv"` (also `None`), or `"resnet"`.
        dropout: Probability of dropping a feature in a residual block.
        act_fn: `"silu"` or its other name, `"swish"`.
        attention_head_dim: Features of a head; `None` for a single head.
        norm_num_groups: Groups of all GroupNorms but those of `Skip` levels, which choose theirs by their channels;
            `None` does so in the middle and at the end, too.
        attn_norm_num_groups: Groups of the norm of the middle's attention; by default `norm_num_groups`, or no norm
            with `"scale_shift"`.
        norm_eps: Epsilon of all GroupNorms.
        resnet_time_scale_shift: `"default"`, or `"scale_shift"`: see `ResnetBlock2D`.
        add_attention: Whether the middle has attention.
        class_embed_type: What `class_labels` is: `None` for no such input, or with `num_class_embeds` whole numbers
            (B,); `"timestep"` numbers (B,) that are embedded as the timestep is; `"identity"` vectors (B, T).
        num_class_embeds: Number of classes.
        num_train_timesteps: Number of timesteps of `time_embedding_type="learned"`.

    Raises:
        ValueError: An argument has a value that cannot be built, or does not fit another; the message names both.
    """

    _no_split_modules = ["ResnetBlock2D", "SpatialAttention", "SkipDownBlock2D", "SkipUpBlock2D", "UpBlock2D"]
    _repeated_blocks = ["ResnetBlock2D", "SpatialAttention"]
    _skip_layerwise_casting_patterns = ["norm", "time_proj"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str | None = "conv",
        upsample_type: str | None = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int | None = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ):
        super().__init__()
        self.sample_size = sample_size
        check_config(self.config)
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)

        temb_dim = time_embedding_dim or 4 * block_out_channels[0]
        waves = block_out_channels[0]
        self.time_proj: nn.Module
        if time_embedding_type == "fourier":
            self.time_proj, waves = GaussianFourierProjection(waves, FOURIER_SCALE), 2 * waves
        elif time_embedding_type == "learned":
            self.time_proj = nn.Embedding(int(num_train_timesteps or 0), waves)
        else:
            self.time_proj = Timesteps(waves, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(waves, temb_dim)

        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(waves, temb_dim)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, temb_dim)

        # The order of these three decides the order of `attn_processors`.
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        levels = len(block_out_channels)
        for i, block_type in enumerate(block_names(down_block_types)):
            options = self.level_options(block_type, downsample_type)
            if "Skip" not in block_type:
                options["downsample_padding"] = downsample_padding
            self.down_blocks.append(
                DOWN_BLOCKS[block_type](
                    block_out_channels[max(i - 1, 0)],
                    block_out_channels[i],
                    temb_dim,
                    layers_per_block,
                    add_downsample=i < levels - 1,
                    **options,
                )
            )
        self.mid_block = None
        if mid_block_type is not None:
            self.mid_block = self.build_middle(block_out_channels[-1], temb_dim)
        for i, block_type in enumerate(block_names(up_block_types)):
            level = levels - 1 - i
            self.up_blocks.append(
                UP_BLOCKS[block_type](
                    block_out_channels[max(level - 1, 0)],
                    block_out_channels[level],
                    block_out_channels[min(level + 1, levels - 1)],
                    temb_dim,
                    layers_per_block + 1,  # one residual block a map from the way down
                    add_upsample=level > 0,
                    **self.level_options(block_type, upsample_type),
                )
            )

        self.conv_norm_out = nn.GroupNorm(self.groups(block_out_channels[0]), block_out_channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)
        self.initialize_weights()

    def groups(self, channels: int) -> int:
        """Groups of a GroupNorm outside of the `Skip` levels."""
        return skip_groups(channels) if self.config.norm_num_groups is None else self.config.norm_num_groups

    def level_options(self, block_type: str, resample_type: str | None) -> dict[str, Any]:
        """Keywords that both ways have in common, by the level's type."""
        config, skip = self.config, "Skip" in block_type
        options: dict[str, Any] = {
            "eps": config.norm_eps,
            "dropout": config.dropout,
            "scale_shift": config.resnet_time_scale_shift == "scale_shift",
        }
        if block_type.startswith("Attn"):
            options["attention"] = PixelAttention(
                config.attention_head_dim,
                ATTENTION_GROUPS if skip else config.norm_num_groups,
                config.norm_eps,
                OUTPUT_SCALE if skip else 1.0,
            )
        if not skip:
            options["groups"] = config.norm_num_groups
            options["resnet_resample"] = block_type.startswith("Resnet") or (
                block_type.startswith("Attn") and resample_type == "resnet"
            )
        return options

    def build_middle(self, channels: int, temb_dim: int) -> UNetMidBlock2D:
        """The middle: two residual blocks, with attention between them if `add_attention`."""
        config, groups = self.config, self.groups(channels)
        scale_shift = config.resnet_time_scale_shift == "scale_shift"
        attention_groups = config.attn_norm_num_groups
        if attention_groups is None and not scale_shift:
            attention_groups = groups
        attention = PixelAttention(
            config.attention_head_dim, attention_groups, config.norm_eps, config.mid_block_scale_factor
        )
        return UNetMidBlock2D(
            channels,
            temb_dim,
            attention if config.add_attention else None,
            groups,
            config.norm_eps,
            config.dropout,
            config.mid_block_scale_factor,
            scale_shift,
            num_layers=2,
        )

    def initialize_weights(self) -> None:
        """Every residual branch and the prediction start at zero, as in the code of both papers."""
        start_at_zero(self)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predicts noise, v, data or the score, whatever the weights were trained for.

        Args:
            sample: Noisy pictures, (B, `in_channels`, H, W); H and W multiples of 2 to the number of halvings.
            timestep: One number, or (B,): a timestep, whole or fractional, or sigma > 0 (see `time_embedding_type`).
            class_labels: (B,) whole numbers, (B,) numbers or (B, T) vectors: see `class_embed_type`.
            return_dict: Whether to return `UNet2DOutput` or a tuple.

        Returns:
            The prediction, (B, `out_channels`, H, W), as `sample` of the output.

        Raises:
            ValueError: An argument is missing, is not for this model, or has the wrong shape; before any computation.
        """
        self.check_inputs(sample, timestep, class_labels)
        if not torch.is_tensor(timestep):
            timestep = torch.as_tensor(timestep, device=sample.device)
        timestep = timestep.to(sample.device).reshape(-1).expand(len(sample))  # (B,)
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        temb = self.embed(timestep, class_labels)  # (B, T)

        x, picture = self.conv_in(sample), sample  # (B, C_0, H, W), (B, 3, H, W)
        skips = [x]
        for block in self.down_blocks:  # x: (B, C_i, H / 2^(i + 1), W / 2^(i + 1))
            if isinstance(block, SkipDownBlock2D):
                x, maps, picture = block(x, temb, picture)
            else:
                x, maps = block(x, temb)
            skips.extend(maps)
        if self.mid_block is not None:
            x = self.mid_block(x, temb)  # (B, C_last, H', W')

        prediction: torch.Tensor | None = None
        count = self.config.layers_per_block + 1
        for block in self.up_blocks:  # x: (B, C_i, H / 2^(i - 1), W / 2^(i - 1))
            maps, skips = tuple(skips[-count:]), skips[:-count]
            if isinstance(block, SkipUpBlock2D):
                x, prediction = block(x, maps, temb, prediction)
            else:
                x = block(x, maps, temb)

        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, out_channels, H, W)
        if prediction is not None:
            x = x + prediction
        if self.config.time_embedding_type == "fourier":
            x = x / timestep[:, None, None, None].to(x.dtype)  # 2011.13456, appendix H.2: the score grows as 1 / sigma
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def embed(self, timestep: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """The sum of everything about the picture that is one vector, (B, T): timestep or sigma, and class."""
        dtype = self.dtype
        temb = self.time_embedding(self.time_proj(timestep).to(dtype))  # (B, T)
        if self.class_embedding is not None and class_labels is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(dtype)  # (B, C_0 or 2 C_0)
            temb = temb + self.class_embedding(class_labels).to(dtype)
        return temb

    def check_inputs(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, class_labels: torch.Tensor | None
    ) -> None:
        """Raises ValueError where the pictures, the timestep or the classes do not fit the model or each other."""
        config = self.config
        if sample.ndim != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(
                f"`sample`: got {tuple(sample.shape)}, expected (batch, {config.in_channels}, height, width)."
            )
        multiple = 2 ** (len(config.block_out_channels) - 1)
        if any(side % multiple or side == 0 for side in sample.shape[-2:]):
            height, width = sample.shape[-2:]
            raise ValueError(f"`sample`: got {height} x {width}, expected a height and width that {multiple} divides.")
        batch = len(sample)
        if torch.is_tensor(timestep) and (timestep.ndim > 1 or timestep.numel() not in (1, batch)):
            raise ValueError(
                f"`timestep`: got {tuple(timestep.shape)}, expected one number or ({batch},) as the batch of `sample`."
            )
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                f"`class_labels`: got {'None' if class_labels is None else 'a tensor'}, expected "
                f"{'None' if self.class_embedding is None else 'a tensor'} with `class_embed_type` = "
                f"{config.class_embed_type!r} and `num_class_embeds` = {config.num_class_embeds!r}."
            )
        if class_labels is not None:
            features = self.time_embedding.linear_2.out_features
            shape = (batch, features) if config.class_embed_type == "identity" else (batch,)
            if tuple(class_labels.shape) != shape:
                raise ValueError(f"`class_labels`: got {tuple(class_labels.shape)}, expected {shape}.")
