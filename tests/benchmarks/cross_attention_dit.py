"""A DiT that reads text by cross-attention, to compare an MM-DiT with (PixArt-alpha, 2310.00426, figure 4).

           x_t                    t, pooled text            text tokens
            |                            |                       |
        pos_embed                 time_text_embed         context_embedder
            |                            |                       |
            x ------> block: adaLN, self-attention, <------------+
            |         cross-attention, adaLN, MLP; n times
      norm_out, proj_out
            |
      the prediction

Image tokens look at the text, and the text stays as it is. Everything around the blocks is the MM-DiT's own, its pooled
text included, so that the two differ in their blocks alone. PixArt shares one layer of modulations between its blocks;
here each block has its own, as in DiT.

Shapes: B batch, C channels, H and W height and width of the latents, T image tokens, L text tokens, D features.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from hubgen.backbones.sd3 import SD3Stem, SD3Transformer2DModel
from hubgen.layers.attention import Attention
from hubgen.layers.feed_forward import FeedForward
from hubgen.layers.mmdit_blocks import add_gated, initialize_joint_
from hubgen.layers.normalization import AdaLayerNormContinuous, AdaLayerNormZero, modulate


class CrossAttentionBlock(nn.Module):
    """Self-attention, cross-attention to the text, MLP; the first and the last are modulated and gated.

    Args:
        dim: Features of a token.
        num_attention_heads: Heads of both attentions.
        attention_head_dim: Features of a head.
    """

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn1 = Attention(
            dim, heads=num_attention_heads, dim_head=attention_head_dim, bias=True, qk_norm="rms_norm"
        )
        self.attn2 = Attention(
            dim,
            cross_attention_dim=dim,
            heads=num_attention_heads,
            dim_head=attention_head_dim,
            bias=True,
            qk_norm="rms_norm",
        )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(self, x: torch.Tensor, context: torch.Tensor, temb: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Image (B, T, D), text (B, L, D), condition (B, D), which of the text counts (B, 1, L) -> (B, T, D)."""
        x_in, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, temb)
        x = add_gated(x, gate, self.attn1(x_in))
        x = x + self.attn2(x, context, attention_mask=seen)
        return add_gated(x, gate_mlp, self.ff(modulate(self.norm2(x), scale_mlp, shift_mlp)))


class CrossAttentionDiT(SD3Stem):
    """A diffusion transformer with cross-attention to the text tokens; arguments are those of the MM-DiT.

    Args:
        sample_size: Height and width of the latents that the model is made for.
        patch_size: Latents along each side of a token.
        in_channels: Channels of the latents, and of the prediction.
        num_layers: Blocks.
        attention_head_dim: Features of a head.
        num_attention_heads: Heads; the width D is heads times features.
        joint_attention_dim: Features of the text tokens.
        caption_projection_dim: Features that the text tokens are projected to; must be D.
        pooled_projection_dim: Features of the pooled text.
        pos_embed_max_size: Largest height and width in tokens.

    Raises:
        ValueError: `caption_projection_dim` is not D.
    """

    unpatchify = SD3Transformer2DModel.unpatchify

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 5,
        attention_head_dim: int = 64,
        num_attention_heads: int = 2,
        joint_attention_dim: int = 384,
        caption_projection_dim: int = 128,
        pooled_projection_dim: int = 384,
        pos_embed_max_size: int = 4,
    ):
        super().__init__()
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels
        if caption_projection_dim != self.inner_dim:
            raise ValueError(f"`caption_projection_dim`: got {caption_projection_dim}, expected {self.inner_dim}.")
        self.build_stem()
        self.transformer_blocks = nn.ModuleList(
            CrossAttentionBlock(self.inner_dim, num_attention_heads, attention_head_dim) for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(self.inner_dim, patch_size * patch_size * in_channels)
        initialize_joint_(self)
        for block in self.transformer_blocks:  # every block begins as the identity
            nn.init.zeros_(block.attn2.to_out[0].weight)  # type: ignore[index]

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts from noisy latents.

        Args:
            hidden_states: x_t, (B, in_channels, H, W); H and W multiples of `patch_size`.
            encoder_hidden_states: Text tokens, (B, L, joint_attention_dim); padding is zeros, and not looked at.
            pooled_projections: Pooled text, (B, pooled_projection_dim).
            timestep: (B,), or (1,) for all.
            return_dict: Whether to return an output object rather than a tuple of one.

        Returns:
            `sample`: (B, in_channels, H, W).
        """
        self.check_inputs(hidden_states, encoder_hidden_states, pooled_projections, timestep)
        assert encoder_hidden_states is not None and pooled_projections is not None and timestep is not None
        height, width = hidden_states.shape[-2:]
        seen = encoder_hidden_states.ne(0).any(dim=-1)  # (B, L)
        seen[:, 0] = True  # a softmax over nothing has no value

        x, context, temb = self.embed(hidden_states, encoder_hidden_states, pooled_projections, timestep)
        for block in self.transformer_blocks:
            x = self.run(block, x, context, temb, seen[:, None])  # (B, T, D)
        x = self.proj_out(self.norm_out(x, temb))  # (B, T, patch * patch * C)
        sample = self.unpatchify(x, height, width)  # (B, C, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
