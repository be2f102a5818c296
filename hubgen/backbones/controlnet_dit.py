"""ControlNet of DiT: a copy of the first blocks that sees the latents of a hint beside x_t.

PixArt's ControlNet-Transformer (2401.05252) on DiT's blocks; diffusers has none. The figure is drawn in
`controlnet_tokens.py`. PixArt's 13 copies of 28 blocks run in turns with the base's; here they are a network of their
own, as for SD3 and FLUX, so that several add up.

    net = DiTControlNetModel.from_transformer(transformer, num_layers=14)             # fresh: the base draws as it did
    (residuals,) = net(x_t, hint, 1.0, t, label, return_dict=False)
    transformer(x_t, t, label, block_controlnet_hidden_states=residuals)

Shapes: B batch, C channels, H and W height and width of the latents, T image tokens (patches), D features of a token.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn

from hubgen.backbones.controlnet_encoder import check_scale, zeroed
from hubgen.backbones.controlnet_tokens import TokenControlNet, require_hint
from hubgen.backbones.dit import DiTStem
from hubgen.layers.dit_blocks import initialize_dit_


@dataclass
class DiTControlNetOutput(BaseOutput):
    """What the ControlNet of a DiT returns."""

    controlnet_block_samples: list[torch.Tensor]
    """One for each block, (B, T, D)"""


class DiTControlNetModel(TokenControlNet, DiTStem):
    """The ControlNet of a `DiTTransformer2DModel`; its hint lies in the same latents as x_t.

    Args:
        num_layers: Blocks, at most those of the base.

    The others are those of `DiTTransformer2DModel`, of which the base has the same. In training no label is dropped
    here: whoever trains drops it for network and base alike.

    Raises:
        ValueError: As of the base.
    """

    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    base_class = "DiTTransformer2DModel"
    copied = ("pos_embed",)

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        num_layers: int = 14,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.build_stem()
        self.controlnet_blocks = nn.ModuleList(nn.Linear(self.inner_dim, self.inner_dim) for _ in range(num_layers))
        self.pos_embed_input = self.patches(pos_embed_type=None)
        initialize_dit_(self)
        zeroed(self.controlnet_blocks)
        zeroed(self.pos_embed_input)

    @classmethod
    def from_transformer(
        cls, transformer: Any, num_layers: int | None = None, load_weights_from_transformer: bool = True
    ) -> Self:
        """A network to be trained for a base, which stays as it is; until then its residuals are zero.

        Args:
            transformer: A `DiTTransformer2DModel` of hubgen or diffusers.
            num_layers: Blocks, at most those of the base; half of them by default.
            load_weights_from_transformer: Whether it starts as a copy of the base's embedder and first blocks; else
                from fresh weights.

        Raises:
            ValueError: The base is another network, or has fewer blocks.
        """
        if num_layers is None:
            num_layers = -(-getattr(getattr(transformer, "config", None), "num_layers", 0) // 2)
        return cls.made_for(transformer, {"num_layers": num_layers}, load_weights_from_transformer)

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> DiTControlNetOutput | tuple[list[torch.Tensor]]:
        """What is to be added to the base's tokens.

        Args:
            hidden_states: x_t, (B, in_channels, H, W); H and W multiples of `patch_size`.
            controlnet_cond: Latents of the hint, of the same shape, or (1, ...) for all.
            conditioning_scale: Factor on all residuals.
            timestep: (B,), or (1,) for all; as of the base.
            class_labels: (B,), or (1,) for all; as of the base.
            cross_attention_kwargs: Keywords for the attention processors, and `scale`, the strength of LoRA layers.
            return_dict: Whether to return an output object rather than a tuple of one.

        Returns:
            `controlnet_block_samples`: one for each block, (B, T, D).

        Raises:
            ValueError: An input is missing, has the wrong shape, or a label is no class; before any computation.
        """
        timestep, class_labels = self.check_inputs(hidden_states, timestep, class_labels)
        why = f"as x_t, of `in_channels` = {self.config.in_channels}"
        require_hint(controlnet_cond, len(hidden_states), hidden_states.shape[1:], why)
        check_scale("conditioning_scale", conditioning_scale)
        x = self.pos_embed(hidden_states)  # (B, T, D)
        x = x + self.pos_embed_input(controlnet_cond)

        residuals = []
        for block, zero in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            x = self.run(block, x, timestep, class_labels, cross_attention_kwargs)
            residuals.append(zero(x) * conditioning_scale)  # (B, T, D)
        return DiTControlNetOutput(controlnet_block_samples=residuals) if return_dict else (residuals,)
