"""The blocks of multimodal diffusion transformers, SD3's and FLUX's, whose text and image tokens meet in attention.

    double block    text and image have weights of their own and one attention in common (SD3, 2403.03206, figure 2b);
                    FLUX's differs in that queries and keys are normalised and turned by their positions
    single block    text and image are one sequence; attention and MLP stand side by side (2302.05442), FLUX only
    image block     no text, an attention and an MLP (Stability's ControlNets for SD3.5)

All are modulated by the timestep (adaLN-Zero; DiT, 2212.09748). Class names and parameter names are diffusers', where
`device_map`, step caches and adapters look for them.

Shapes: B batch, T image tokens, L text tokens, D features of a token.
"""

from typing import Any

import torch
from torch import nn

from hubgen.layers.attention import Attention, FluxAttnProcessor, JointAttnProcessor
from hubgen.layers.embeddings import TextProjection, TimestepEmbedding
from hubgen.layers.feed_forward import FeedForward
from hubgen.layers.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
    modulate,
)
from hubgen.layers.residuals import added_to_first

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the tokens' angles, text first, each (L + T, features of a head)."""


def add_gated(x: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """x + gate * update, the same gate for all tokens: (B, T, D), (B, D), (B, T, D) -> (B, T, D)."""
    return torch.addcmul(x, gate[:, None], update)


def within_float16(x: torch.Tensor) -> torch.Tensor:
    """float16 clipped to its finite numbers, which a few text tokens leave; every other precision as it is."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class JointTransformerBlock(nn.Module):
    """A double block: both streams are modulated, attend jointly, and pass MLPs of their own.

    Args:
        dim: Features of a token, image and text alike.
        num_attention_heads: Heads of the joint attention.
        attention_head_dim: Features of a head.
        context_pre_only: Whether the text only informs this attention and is not computed further (SD3's last block).
        qk_norm: `"rms_norm"` or `None`, see `Attention`.
        use_dual_attention: Whether the image tokens have a second attention among themselves (SD3.5 medium).
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        context_pre_only: bool = False,
        qk_norm: str | None = None,
        use_dual_attention: bool = False,
    ):
        super().__init__()
        self.context_pre_only = context_pre_only
        self.use_dual_attention = use_dual_attention
        attention: dict[str, Any] = {
            "query_dim": dim,
            "heads": num_attention_heads,
            "dim_head": attention_head_dim,
            "bias": True,
            "qk_norm": qk_norm,
        }

        self.norm1 = SD35AdaLayerNormZeroX(dim) if use_dual_attention else AdaLayerNormZero(dim)
        self.norm1_context = (
            AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
            if context_pre_only
            else AdaLayerNormZero(dim)
        )
        self.attn = Attention(**attention, added_kv_proj_dim=dim, context_pre_only=context_pre_only)
        if use_dual_attention:
            self.attn2 = Attention(**attention, processor=JointAttnProcessor())
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")
        if not context_pre_only:
            self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.ff_context = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D), (B, L, D), (B, D) -> text (B, L, D), image (B, T, D); a pre-only block hands the text on as is.

        Args:
            hidden_states: Image tokens, (B, T, D).
            encoder_hidden_states: Text tokens, (B, L, D).
            temb: The embedded condition, (B, D).
            joint_attention_kwargs: Further keywords of the joint attention's processor; the second attention, which
                sees the image alone, has of them what IP-Adapters of diffusers look at. The processor may return a
                third part, image tokens that are added behind the MLP and ungated (an IP-Adapter's).
            residual: A ControlNet's, added to the image tokens at the end, of which it may be that only the first ones
                are its own. Here, and not between blocks, so that it belongs to what a step cache keeps of a block.
        """
        x, context, kwargs = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}

        if self.use_dual_attention:
            x_in, gate, shift_mlp, scale_mlp, gate_mlp, x_in2, gate2 = self.norm1(x, temb)
        else:
            x_in, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, temb)
        if self.context_pre_only:
            context_in = self.norm1_context(context, temb)
        else:
            context_in, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(context, temb)

        x_out, context_out, *added = self.attn(x_in, context_in, **kwargs)  # (B, T, D), (B, L, D)
        x = add_gated(x, gate, x_out)
        if self.use_dual_attention:
            pictures = {name: kwargs[name] for name in ("ip_hidden_states", "temb") if name in kwargs}
            x = add_gated(x, gate2, self.attn2(x_in2, **pictures))
        x = add_gated(x, gate_mlp, self.ff(modulate(self.norm2(x), scale_mlp, shift_mlp)))
        for update in added:
            x = x + update
        x = added_to_first(x, residual)

        if not self.context_pre_only:
            context = add_gated(context, c_gate, context_out)
            c_in = modulate(self.norm2_context(context), c_scale_mlp, c_shift_mlp)
            context = within_float16(add_gated(context, c_gate_mlp, self.ff_context(c_in)))
        return context, x


class SD3SingleTransformerBlock(nn.Module):
    """An image block: a double block's half, whose tokens attend to each other alone.

    Args:
        dim: Features of a token.
        num_attention_heads: Heads.
        attention_head_dim: Features of a head.
    """

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = Attention(
            dim, heads=num_attention_heads, dim_head=attention_head_dim, bias=True, processor=JointAttnProcessor()
        )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, joint_attention_kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """(B, T, D), (B, D) -> (B, T, D); see `JointTransformerBlock.forward`."""
        x_in, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, temb)
        x = add_gated(hidden_states, gate, self.attn(x_in, **(joint_attention_kwargs or {})))
        return add_gated(x, gate_mlp, self.ff(modulate(self.norm2(x), scale_mlp, shift_mlp)))


class FluxTransformerBlock(JointTransformerBlock):
    """A double block whose queries and keys are normalised and turned by the tokens' positions."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int):
        super().__init__(dim, num_attention_heads, attention_head_dim, qk_norm="rms_norm")
        self.attn.set_processor(FluxAttnProcessor())

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D), (B, L, D), (B, D) -> text (B, L, D), image (B, T, D); see `JointTransformerBlock.forward`."""
        kwargs = {**(joint_attention_kwargs or {}), "image_rotary_emb": image_rotary_emb}
        return super().forward(hidden_states, encoder_hidden_states, temb, kwargs, residual)


class FluxSingleTransformerBlock(nn.Module):
    """A single block: all tokens alike pass attention and an MLP side by side, which one projection adds up.

    Args:
        dim: Features of a token (D).
        num_attention_heads: Heads.
        attention_head_dim: Features of a head.
        mlp_ratio: Features inside the MLP, as a multiple of D.
    """

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.mlp_hidden_dim = int(dim * mlp_ratio)
        self.norm = AdaLayerNormZeroSingle(dim)
        self.proj_mlp = nn.Linear(dim, self.mlp_hidden_dim)
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(dim + self.mlp_hidden_dim, dim)
        self.attn = Attention(
            dim,
            heads=num_attention_heads,
            dim_head=attention_head_dim,
            bias=True,
            qk_norm="rms_norm",
            pre_only=True,
            processor=FluxAttnProcessor(),
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D), (B, L, D), (B, D) -> text (B, L, D), image (B, T, D); see `JointTransformerBlock.forward`."""
        tokens = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        kwargs = {**(joint_attention_kwargs or {}), "image_rotary_emb": image_rotary_emb}
        if getattr(self.attn.processor, "parts", ()):
            kwargs["text_tokens"] = tokens[0]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, L + T, D)
        x_in, gate = self.norm(x, temb)
        attended = self.attn(x_in, **kwargs)  # (B, L + T, D)
        inner = self.act_mlp(self.proj_mlp(x_in))  # (B, L + T, mlp_hidden_dim)
        x = within_float16(add_gated(x, gate, self.proj_out(torch.cat([attended, inner], dim=2))))
        context, x = x.split(tokens, dim=1)
        return context, added_to_first(x, residual)


def initialize_joint_(model: Any) -> None:
    """adaLN-Zero (2212.09748) for a transformer of these blocks, whose last layer, if it has one, is `proj_out`.

    Every block starts as the identity, and the prediction as exactly 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # the convolution is a linear layer on patches
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    zeroed = (AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX, AdaLayerNormContinuous)
    for module in model.modules():
        if isinstance(module, TimestepEmbedding | TextProjection):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
        elif isinstance(module, zeroed):
            nn.init.zeros_(module.linear.weight)
    if hasattr(model, "proj_out"):
        nn.init.zeros_(model.proj_out.weight)
