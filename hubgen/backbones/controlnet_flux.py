"""ControlNets of FLUX.1: a copy of the first double and single blocks that sees the hint beside x_t.

The figure is drawn in `controlnet_tokens.py`. Of the hint it sees packed latents, or, XLabs' networks, pixels through
a small convolutional network. A union of several kinds of hints is told by a token in front of the text which one it
sees.

    net = FluxControlNetModel.from_transformer(transformer, num_layers=4, num_single_layers=10)
    double, single = net(x_t, hint, None, 1.0, text, pooled, t, img_ids, txt_ids, guidance, return_dict=False)
    transformer(..., controlnet_block_samples=double, controlnet_single_block_samples=single)

XLabs' go to the base's double blocks in turns (`controlnet_blocks_repeat`).

Shapes: B batch, H and W height and width of a picture, T image tokens, L text tokens, D features of a token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet_flux import FluxControlNetOutput as DiffusersFluxControlNetOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from hubgen.backbones.controlnet_encoder import ControlNetConditioningEmbedding, check_scale, zeroed
from hubgen.backbones.controlnet_tokens import TokenControlNet, require_hint
from hubgen.backbones.flux import FluxStem, without_batch
from hubgen.formats import flux_controlnet_layout
from hubgen.formats.headers import TensorHeader
from hubgen.layers.mmdit_blocks import FluxSingleTransformerBlock, FluxTransformerBlock, initialize_joint_

HINT_WIDTHS = (16, 16, 16, 16)
"""Of the network that embeds a hint's pixels, at full size, half, quarter and eighth."""
NO_MODE = -1
"""What diffusers' pipelines give a network that is no union for its mode, where it is one of several."""


@dataclass
class FluxControlNetOutput(DiffusersFluxControlNetOutput):
    """diffusers' output, which can be made of a dictionary, as accelerate does for a model spread over devices."""

    controlnet_block_samples: list[torch.Tensor] | None = None  # type: ignore[assignment]
    """One for each double block, (B, T, D); `None` where there are none"""
    controlnet_single_block_samples: list[torch.Tensor] | None = None  # type: ignore[assignment]
    """The same of the single blocks"""


class FluxControlNetModel(TokenControlNet, FluxStem):
    """The ControlNet of a `FluxTransformer2DModel`; arguments and weights are those of diffusers' class.

    Args:
        patch_size: Side of the square of embedded pixels that becomes a token, 2 for XLabs' networks; not read by
            others.
        num_mode: Kinds of hints of a union; `None` for what is no union.
        conditioning_embedding_channels: Features that a hint's pixels are embedded to, `in_channels` / `patch_size`²;
            `None` for a network that sees latents.

    The others are those of `FluxTransformer2DModel`, of which the base has the same.

    Raises:
        ValueError: `axes_dims_rope` do not share out a head, or embedded pixels do not make up a token.
    """

    _no_split_modules = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    base_class = "FluxTransformer2DModel"
    copied = ("time_text_embed", "context_embedder", "x_embedder")
    block_counts = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: list[int] = [16, 56, 56],  # noqa: B006, it stands in the config as in diffusers' class
        num_mode: int | None = None,
        conditioning_embedding_channels: int | None = None,
    ):
        super().__init__()
        self.check_axes()
        self.inner_dim = num_attention_heads * attention_head_dim
        embedded = conditioning_embedding_channels
        if embedded is not None and embedded * patch_size**2 != in_channels:
            raise ValueError(
                f"`conditioning_embedding_channels` * `patch_size`²: got {embedded} * {patch_size}², expected "
                f"`in_channels` = {in_channels}."
            )
        self.build_stem()
        block = {
            "dim": self.inner_dim,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
        }
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(**block) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(**block) for _ in range(num_single_layers)
        )
        width = self.inner_dim
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.controlnet_single_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(num_single_layers))
        self.union = num_mode is not None
        if num_mode is not None:
            self.controlnet_mode_embedder = nn.Embedding(num_mode, width)
        self.input_hint_block = None
        if embedded is not None:
            self.input_hint_block = ControlNetConditioningEmbedding(embedded, block_out_channels=HINT_WIDTHS)
        self.controlnet_x_embedder = nn.Linear(in_channels, width)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Blocks that are the identity (adaLN-Zero), no hint, and no residuals."""
        initialize_joint_(self)
        zeroed(self.controlnet_blocks)
        zeroed(self.controlnet_single_blocks)
        # one layer on the hint's way starts at zero, not two in a row, which would never learn
        zeroed(self.controlnet_x_embedder if self.input_hint_block is None else self.input_hint_block.conv_out)

    @classmethod
    def from_transformer(
        cls,
        transformer: Any,
        num_layers: int = 4,
        num_single_layers: int = 10,
        attention_head_dim: int | None = None,
        num_attention_heads: int | None = None,
        load_weights_from_transformer: bool = True,
        num_mode: int | None = None,
        conditioning_embedding_channels: int | None = None,
    ) -> Self:
        """A network to be trained for a base, which stays as it is; until then its residuals are zero.

        Args:
            transformer: A `FluxTransformer2DModel` of hubgen or diffusers.
            num_layers: Double blocks, at most those of the base.
            num_single_layers: Single blocks, at most those of the base.
            attention_head_dim: That of the base, as by default: residuals are as wide as its tokens.
            num_attention_heads: The same.
            load_weights_from_transformer: Whether it starts as a copy of the base's embedders and first blocks; else
                from fresh weights.
            num_mode: See the class.
            conditioning_embedding_channels: See the class; `patch_size` follows from it.

        Raises:
            ValueError: The base is another network, or has fewer blocks or other heads.
        """
        own: dict[str, Any] = {"num_mode": num_mode}
        config = getattr(transformer, "config", None) or {}
        asked = {"attention_head_dim": attention_head_dim, "num_attention_heads": num_attention_heads}
        for name, value in asked.items():
            if value is not None and name in config and value != config[name]:
                raise ValueError(f"`{name}`: got {value}, expected {config[name]}, as the base has.")
        if conditioning_embedding_channels is not None:
            side = math.isqrt(config.get("in_channels", 0) // max(conditioning_embedding_channels, 1))
            own |= {"conditioning_embedding_channels": conditioning_embedding_channels, "patch_size": side}
        layers = {"num_layers": num_layers, "num_single_layers": num_single_layers}
        return cls.made_for(transformer, layers, load_weights_from_transformer, **own)

    @classmethod
    def config_of_tensors(cls, tensors: Mapping[str, TensorHeader]) -> dict[str, Any] | None:
        """The config of a file in diffusers' layout, which its keys and shapes tell."""
        return flux_controlnet_layout.infer_own_config(tensors)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        controlnet_mode: torch.Tensor | None = None,
        conditioning_scale: float = 1.0,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> FluxControlNetOutput | tuple[list[torch.Tensor] | None, list[torch.Tensor] | None]:
        """What is to be added to the base's image tokens.

        Args:
            hidden_states: Packed x_t, (B, T, in_channels).
            controlnet_cond: The hint, (B, ...) or (1, ...) for all: packed latents, (B, T, in_channels), or for a
                network with `conditioning_embedding_channels` pixels in [-1, 1], (B, 3, H, W).
            controlnet_mode: Which kind of hint it is, whole numbers, (B, 1), 0 to `num_mode` - 1; of a union alone.
            conditioning_scale: Factor on all residuals.
            encoder_hidden_states: As of the base, like all that follow.
            pooled_projections: Pooled text, (B, pooled_projection_dim).
            timestep: (B,), or (1,) for all; 0 (data) to 1 (noise).
            img_ids: Positions of the image tokens, (T, axes).
            txt_ids: Positions of the text tokens, (L, axes); the first is the mode's, too.
            guidance: Guidance scale, (B,), or (1,) for all; `None` for a network without `guidance_embeds`.
            joint_attention_kwargs: Keywords for the attention processors, and `scale`, the strength of LoRA layers.
            return_dict: Whether to return an output object rather than a tuple.

        Returns:
            `controlnet_block_samples` and `controlnet_single_block_samples`: one for each double and single block,
            (B, T, D); `None` where there are no such blocks.

        Raises:
            ValueError: An input is missing, is not for this network, or has the wrong shape; before any computation.
        """
        img_ids, txt_ids = without_batch("img_ids", img_ids), without_batch("txt_ids", txt_ids)
        self.check_inputs(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance
        )
        assert encoder_hidden_states is not None and pooled_projections is not None and timestep is not None
        assert img_ids is not None and txt_ids is not None
        self.check_hint(controlnet_cond, *hidden_states.shape[:2])
        self.check_mode(controlnet_mode, len(hidden_states))
        check_scale("conditioning_scale", conditioning_scale)

        x, context, temb = self.embed(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance
        )  # (B, T, D), (B, L, D), (B, D)
        x = x + self.embed_hint(controlnet_cond)
        cos, sin = self.rotary_tables(txt_ids, img_ids)  # (L + T, features of a head)
        if self.union:
            context = torch.cat([self.controlnet_mode_embedder(controlnet_mode), context], dim=1)  # (B, 1 + L, D)
            cos, sin = (torch.cat([table[:1], table]) for table in (cos, sin))

        double, single = [], []
        for block, zero in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            context, x = self.run(block, x, context, temb, (cos, sin), joint_attention_kwargs)
            double.append(zero(x) * conditioning_scale)  # (B, T, D)
        for block, zero in zip(self.single_transformer_blocks, self.controlnet_single_blocks, strict=True):
            context, x = self.run(block, x, context, temb, (cos, sin), joint_attention_kwargs)
            single.append(zero(x) * conditioning_scale)
        return FluxControlNetOutput(double or None, single or None) if return_dict else (double or None, single or None)

    def embed_hint(self, hint: torch.Tensor) -> torch.Tensor:
        """Packed latents (B, T, in_channels), or pixels (B, 3, H, W) -> (B, T, D)."""
        if self.input_hint_block is not None:
            side = self.config.patch_size
            maps = self.input_hint_block(hint)  # (B, C, side * h, side * w)
            maps = maps.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, h, side, w, side)
            hint = maps.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, h * w, C * side * side)
        return self.controlnet_x_embedder(hint)

    def check_hint(self, hint: Any, rows: int, tokens: int) -> None:
        """Raises ValueError unless a hint has the right channels and as many tokens as x_t."""
        channels = self.config.in_channels
        if self.input_hint_block is None:
            require_hint(hint, rows, (tokens, channels), f"as x_t, of `in_channels` = {channels}")
            return
        factor = self.config.patch_size * 2 ** (len(HINT_WIDTHS) - 1)
        sizes = hint.shape[2:] if torch.is_tensor(hint) and hint.ndim == 4 else ("height", "width")
        require_hint(hint, rows, (3, *sizes), "pixels, for a network with `conditioning_embedding_channels`")
        height, width = hint.shape[2:]
        if height % factor or width % factor or height * width != tokens * factor**2:
            raise ValueError(
                f"`controlnet_cond`: got {height} x {width}, expected multiples of {factor} that make up the {tokens} "
                f"tokens of x_t, each of {factor} x {factor} pixels."
            )

    def check_mode(self, mode: torch.Tensor | None, rows: int) -> None:
        """Raises ValueError where a union has no mode or one out of range, or another network has one."""
        count = self.config.num_mode
        looked_at = mode is not None and mode.device.type == "cpu" and not torch.compiler.is_compiling()
        if count is None:
            if mode is not None and not (looked_at and bool((mode == NO_MODE).all())):
                raise ValueError("`controlnet_mode`: got a tensor, expected None: the network is no union.")
            return
        if mode is None or tuple(mode.shape) != (rows, 1) or mode.is_floating_point():
            got = None if mode is None else f"{tuple(mode.shape)} of {mode.dtype}"
            raise ValueError(f"`controlnet_mode`: got {got}, expected whole numbers, ({rows}, 1), for a union.")
        # On an accelerator a look at the values would make the host wait.
        if looked_at and bool(((mode < 0) | (mode >= count)).any()):
            raise ValueError(f"`controlnet_mode`: got {mode.flatten().tolist()}, expected 0 to {count - 1}.")
