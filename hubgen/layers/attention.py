"""Attention and its processors.

`Attention` holds the projections; a processor computes with them. Every backbone asks its processors by name
(`model.attn_processors`), which makes them the third door to controls, and dispatches to the backend that the user
chose (`model.set_attention_backend`). Parameter names are those of diffusers' `Attention`.

Shapes: B batch, L image tokens, S context tokens, H heads, D features of a head.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from hubgen.layers.normalization import RMSNorm


def attend(
    processor: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(query key^T / sqrt(D)) value, on the backend that was set on the processor (1706.03762, eq. 1).

    (B, L, H, D), (B, S, H, D), (B, S, H, D) -> (B, L, H, D)
    """
    dispatch = partial(
        dispatch_attention_fn, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    half = value.dtype in (torch.bfloat16, torch.float16)
    if half and value.device.type == "cpu" and value.requires_grad and processor._attention_backend is None:
        # In half precision the CPU kernel's backward takes up to four times as long as in float32 (88 tokens, torch
        # 2.13), and is the less exact.
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.float()
        with torch.autocast("cpu", enabled=False):
            return dispatch(query.float(), key.float(), value.float(), attn_mask=attention_mask).to(value.dtype)
    return dispatch(query, key, value, attn_mask=attention_mask)


class AttnProcessor:
    """Scaled dot-product attention of `hidden_states` to itself or to `encoder_hidden_states` (1706.03762, eq. 1)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "Attention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None and attention_mask.ndim == 3:
            attention_mask = attention_mask[:, None]  # (B, 1, 1 or L, S): the same for every head
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states  # (B, S, C)
        query = attn.split_heads(attn.to_q(hidden_states))  # (B, L, H, D)
        key = attn.split_heads(attn.to_k(context))  # (B, S, H, D)
        value = attn.split_heads(attn.to_v(context))  # (B, S, H, D)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        out = attend(self, query, key, value, attention_mask)  # (B, L, H, D)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))  # (B, L, C)


class JointAttnProcessor:
    """One attention over image and text tokens, each with projections of its own (SD3, 2403.03206, figure 2b).

    Returns the image tokens, and with them the text tokens where the call was given any.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "Attention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        query = attn.split_heads(attn.to_q(hidden_states))  # (B, L, H, D)
        key = attn.split_heads(attn.to_k(hidden_states))
        value = attn.split_heads(attn.to_v(hidden_states))
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)

        if encoder_hidden_states is not None:
            text_query = attn.split_heads(attn.add_q_proj(encoder_hidden_states))  # (B, S, H, D)
            text_key = attn.split_heads(attn.add_k_proj(encoder_hidden_states))
            text_value = attn.split_heads(attn.add_v_proj(encoder_hidden_states))
            if attn.norm_added_q is not None and attn.norm_added_k is not None:
                text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
            query = torch.cat([query, text_query], dim=1)  # (B, L + S, H, D)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, text_value], dim=1)

        out = attend(self, query, key, value, attention_mask).flatten(2)  # (B, L + S, H * D)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        image, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))  # (B, L, C)
        return image, text if attn.to_add_out is None else attn.to_add_out(text)  # (B, L, C), (B, S, C)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head attention: projections here, the computation in `processor`.

    Args:
        query_dim: Features of `hidden_states` and of the output.
        cross_attention_dim: Features of `encoder_hidden_states`; `None` for self-attention.
        heads: Number of heads.
        dim_head: Features of a head.
        bias: Whether queries, keys and values have a bias; the output projection always has.
        dropout: Probability of dropping a feature of the output.
        qk_norm: `"rms_norm"` normalises queries and keys a head (SD3.5), `None` does not.
        eps: Epsilon of the query and key norms.
        added_kv_proj_dim: Features of the text tokens of joint attention, which then get projections of their own.
        context_pre_only: In joint attention, whether the text tokens end here and need no output projection.
        upcast_attention: Whether a processor that multiplies queries and keys by itself must do so in float32. Ours
            does not: torch's attention kernels sum the scores in float32 in any case.
        processor: What computes; `AttnProcessor`, or `JointAttnProcessor` where `added_kv_proj_dim` is given.
    """

    _default_processor_cls = AttnProcessor
    _available_processors = [AttnProcessor, JointAttnProcessor]
    _supports_qkv_fusion = False

    # What processors written for diffusers' `Attention` look at: here norm, residual and rescaling are the block's.
    spatial_norm = group_norm = norm_cross = None
    residual_connection = False
    rescale_output_factor = 1.0
    upcast_softmax = False

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        bias: bool = False,
        dropout: float = 0.0,
        qk_norm: str | None = None,
        eps: float = 1e-6,
        added_kv_proj_dim: int | None = None,
        context_pre_only: bool = False,
        upcast_attention: bool = False,
        processor: Any = None,
    ):
        super().__init__()
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"`qk_norm` must be 'rms_norm' or None, got {qk_norm!r}.")
        inner_dim = heads * dim_head
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.heads = heads
        self.dim_head = dim_head
        self.scale = dim_head**-0.5
        self.upcast_attention = upcast_attention

        self.to_q = nn.Linear(query_dim, inner_dim, bias=bias)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=bias)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=bias)
        self.norm_q = RMSNorm(dim_head, eps=eps) if qk_norm else None
        self.norm_k = RMSNorm(dim_head, eps=eps) if qk_norm else None

        self.norm_added_q = self.norm_added_k = self.to_add_out = None
        if added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(added_kv_proj_dim, inner_dim)
            self.add_v_proj = nn.Linear(added_kv_proj_dim, inner_dim)
            self.add_q_proj = nn.Linear(added_kv_proj_dim, inner_dim)
            if qk_norm:
                self.norm_added_q = RMSNorm(dim_head, eps=eps)
                self.norm_added_k = RMSNorm(dim_head, eps=eps)
            if not context_pre_only:
                self.to_add_out = nn.Linear(inner_dim, query_dim)

        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim), nn.Dropout(dropout)])
        default = AttnProcessor if added_kv_proj_dim is None else JointAttnProcessor
        self.set_processor(default() if processor is None else processor)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, H * D) -> (B, L, H, D)."""
        return x.unflatten(-1, (-1, self.dim_head))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Hands over to the processor; further keywords go to it as they are."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask=attention_mask, **kwargs)


class SpatialAttention(nn.Module, AttentionModuleMixin):
    """Single-head self-attention over the pixels of a feature map, normalised before and added to its input.

    The middle of the latent-diffusion autoencoder (2112.10752).
    """

    _default_processor_cls = AttnProcessor
    _available_processors = [AttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6):
        super().__init__()
        self.heads = 1
        self.dim_head = channels
        self.norm_q = self.norm_k = None
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        self.set_processor(AttnProcessor())

    split_heads = Attention.split_heads

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = self.group_norm(hidden_states).flatten(2).transpose(1, 2)  # (B, H * W, C)
        tokens = self.processor(self, tokens)
        return hidden_states + tokens.transpose(1, 2).reshape(hidden_states.shape)
