"""Attention and its processors.

`Attention` holds the projections; a processor computes with them. Every backbone asks its processors by name
(`model.attn_processors`), which makes them the third door to controls, and dispatches to the backend that the user
chose (`model.set_attention_backend`). Parameter names are those of diffusers' `Attention`.

Shapes: B batch, L image tokens, S context tokens, H heads, D features of a head, C features of a token.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from hubgen.layers.normalization import RMSNorm

# Scores that fit into a CPU's cache, 4 MB of bfloat16; below so many tokens, a softmax over odd ones is slow.
BLOCK, SHORT = 2**21, 128


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
    if prefers_blocks(query, key, value, attention_mask) and processor._attention_backend is None:
        return attend_in_blocks(query, key, value)
    return dispatch(query, key, value, attn_mask=attention_mask)


def prefers_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Whether `attend_in_blocks` is the faster kernel: for bfloat16 on a CPU, without gradients."""
    return (
        value.dtype == torch.bfloat16
        and value.device.type == "cpu"
        and attention_mask is None
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
        and not torch.compiler.is_compiling()
    )


def attend_in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`attend` by plain matrix products, part by part: (B, L, H, D), (B, S, H, D) twice -> (B, L, H, D).

    torch's fused kernel runs at a third of a CPU's peak in bfloat16 (torch 2.13); this one takes 0.5 to 0.85 of its
    time. The scores of some queries of some heads stay in the cache, and all shapes are whole vectors: features are
    filled up to 16 and few tokens to 32.
    """
    batch, length, heads, features = query.shape
    tokens, width = key.shape[1], value.shape[-1]
    q = (query * features**-0.5).transpose(1, 2).reshape(batch * heads, length, features)
    k = key.permute(0, 2, 3, 1).reshape(batch * heads, features, tokens)
    v = value.transpose(1, 2).reshape(batch * heads, tokens, width)
    spare = -tokens % 32 if tokens < SHORT else 0
    if spare or width % 16:
        k, v = F.pad(k, (0, spare)), F.pad(v, (0, -width % 16, 0, spare))

    at_once = max(2 * torch.get_num_threads(), BLOCK // (256 * max(tokens, 1)))
    rows = max(64, min(256, BLOCK // (at_once * max(tokens, 1))))
    out = q.new_empty(batch * heads, length, v.shape[-1])
    for first in range(0, batch * heads, at_once):
        some = slice(first, first + at_once)
        for top in range(0, length, rows):
            scores = torch.bmm(q[some, top : top + rows], k[some])
            scores[..., tokens:] = -torch.inf
            out[some, top : top + rows] = torch.bmm(scores.softmax(-1), v[some])
    return out[..., :width].view(batch, heads, length, -1).transpose(1, 2)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns each pair of neighbouring features by its angle (RoPE, 2104.09864, eq. 34): (B, L, H, D) -> the same.

    `rotary` are cosines and sines, each (L, D) with every angle twice, as diffusers hands them to processors. The
    turning is done in float32.
    """
    cos, sin = (table[:, None, ::2] for table in rotary)  # (L, 1, D / 2)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, H, D / 2)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)


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
        query, key, value = attn.project(hidden_states, encoder_hidden_states)  # (B, L, H, D), (B, S, H, D) twice
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        out = attend(self, query, key, value, attention_mask)  # (B, L, H, D)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))  # (B, L, C)


class JointAttnProcessor:
    """One attention over image and text tokens, each with projections of its own (SD3, 2403.03206, figure 2b).

    Returns the image tokens, and with them the text tokens where the call was given any. A mask and rotary tables are
    for the tokens in the order of attention, which is the same attention in any order: SD3 has the text last.
    """

    _attention_backend = None
    _parallel_config = None
    text_first = False

    def __call__(
        self,
        attn: "Attention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        query, key, value = attn.project(hidden_states)  # (B, L, H, D) each
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)

        if encoder_hidden_states is not None:
            text_query, text_key, text_value = attn.project_added(encoder_hidden_states)  # (B, S, H, D) each
            if attn.norm_added_q is not None and attn.norm_added_k is not None:
                text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
            query = self.join(query, text_query)  # (B, L + S, H, D)
            key = self.join(key, text_key)
            value = self.join(value, text_value)
        if image_rotary_emb is not None:
            query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)

        out = attend(self, query, key, value, attention_mask).flatten(2)  # (B, L + S, H * D)
        if encoder_hidden_states is None:
            return out if attn.pre_only else attn.to_out[1](attn.to_out[0](out))
        image, text = self.part(out, hidden_states.shape[1], encoder_hidden_states.shape[1])
        image = attn.to_out[1](attn.to_out[0](image))  # (B, L, C)
        return image, text if attn.to_add_out is None else attn.to_add_out(text)  # (B, L, C), (B, S, C)

    def join(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(B, L, H, D), (B, S, H, D) -> (B, L + S, H, D)."""
        return torch.cat([text, image] if self.text_first else [image, text], dim=1)

    def part(self, out: torch.Tensor, image_tokens: int, text_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L + S, C) -> (B, L, C), (B, S, C)."""
        if self.text_first:
            text, image = out.split([text_tokens, image_tokens], dim=1)
        else:
            image, text = out.split([image_tokens, text_tokens], dim=1)
        return image, text


class FluxAttnProcessor(JointAttnProcessor):
    """`JointAttnProcessor` with the text first, as FLUX has it; of one stream of tokens in FLUX's single blocks."""

    text_first = True


class Projections(AttentionModuleMixin):
    """Features of tokens to queries, keys and values, by a layer each or by one for all (`fuse_projections`)."""

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, H * D) -> (B, L, H, D)."""
        return x.unflatten(-1, (-1, self.dim_head))

    def project(self, x: torch.Tensor, context: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Queries of `x`, keys and values of `context`, or of `x`: (B, L, C), (B, S, C) -> each (B, L or S, H, D)."""
        source = x if context is None else context
        if context is None and self.has_fused("to_qkv", "to_q", "to_k", "to_v"):
            parts = self.to_qkv(x).chunk(3, dim=-1)
        elif self.has_fused("to_kv", "to_k", "to_v"):
            parts = (self.to_q(x), *self.to_kv(source).chunk(2, dim=-1))
        else:
            parts = (self.to_q(x), self.to_k(source), self.to_v(source))
        return [self.split_heads(part) for part in parts]

    def project_added(self, text: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values of the text tokens of joint attention: (B, S, C) -> each (B, S, H, D)."""
        if self.has_fused("to_added_qkv", "add_q_proj", "add_k_proj", "add_v_proj"):
            parts = self.to_added_qkv(text).chunk(3, dim=-1)
        else:
            parts = (self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text))
        return [self.split_heads(part) for part in parts]

    def has_fused(self, name: str, *parts: str) -> bool:
        """Whether there is the fused layer `name`, and no adapter has come to the layers it stands for since then."""
        return self.fused_projections and hasattr(self, name) and not self.adapted(*parts)

    def adapted(self, *names: str) -> list[str]:
        """Those of the layers that an adapter has wrapped, whose weights alone are not what they compute."""
        layers = {name: getattr(self, name, None) for name in names}
        return [name for name, layer in layers.items() if layer is not None and not isinstance(layer, nn.Linear)]

    def context_layers(self) -> list[nn.Module]:
        """The layers that see the context of a cross-attention, and nothing else."""
        if not self.is_cross_attention:
            return []
        return [self.to_kv] if self.has_fused("to_kv", "to_k", "to_v") else [self.to_k, self.to_v]

    def fuse_projections(self) -> None:
        """Puts queries, keys and values into one layer; of cross-attention keys and values.

        Raises:
            ValueError: One of them carries an adapter, which the fused layer would lack.
        """
        found = self.adapted("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        if found:
            raise ValueError(f"{found} carry an adapter, expected plain layers: fuse or unload the adapter first.")
        super().fuse_projections()


class Attention(nn.Module, Projections):
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
        pre_only: Whether there is no output projection at all: the caller has one of its own (FLUX's single blocks).
        upcast_attention: Whether a processor that multiplies queries and keys by itself must do so in float32. Ours
            does not: torch's attention kernels sum the scores in float32 in any case.
        processor: What computes; `AttnProcessor`, or `JointAttnProcessor` where `added_kv_proj_dim` is given.
    """

    _default_processor_cls = AttnProcessor
    _available_processors = [AttnProcessor, JointAttnProcessor, FluxAttnProcessor]

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
        pre_only: bool = False,
        upcast_attention: bool = False,
        processor: Any = None,
    ):
        super().__init__()
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"`qk_norm` must be 'rms_norm' or None, got {qk_norm!r}.")
        inner_dim = heads * dim_head
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.heads = heads
        self.dim_head = self.head_dim = dim_head
        self.scale = dim_head**-0.5
        self.upcast_attention = upcast_attention
        # More that processors written for diffusers' `Attention` and `FluxAttention` look at, and its QKV fusion.
        self.inner_dim, self.query_dim, self.out_dim = inner_dim, query_dim, query_dim
        self.cross_attention_dim = context_dim
        self.is_cross_attention = cross_attention_dim is not None
        self.use_bias = bias
        self.added_kv_proj_dim = added_kv_proj_dim
        self.added_proj_bias = True
        self.context_pre_only = context_pre_only
        self.pre_only = pre_only

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

        if not pre_only:
            self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim), nn.Dropout(dropout)])
        default = AttnProcessor if added_kv_proj_dim is None else JointAttnProcessor
        self.set_processor(default() if processor is None else processor)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Hands over to the processor; further keywords go to it as they are."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask=attention_mask, **kwargs)


class SpatialAttention(nn.Module, Projections):
    """Self-attention over the pixels of a feature map, normalised before and added to its input.

    With a single head the middle of the latent-diffusion autoencoder (2112.10752) and of DDPM's U-Net (2006.11239).

    Args:
        channels: Channels of input and output.
        groups: Groups of the GroupNorm; `None` for no norm.
        eps: Epsilon of the GroupNorm.
        dim_head: Features of a head, a divisor of `channels`; `None` for a single head.
        output_scale_factor: The sum of input and attention is divided by it.
    """

    _default_processor_cls = AttnProcessor
    _available_processors = [AttnProcessor]
    is_cross_attention = False
    use_bias = True

    def __init__(
        self,
        channels: int,
        groups: int | None = 32,
        eps: float = 1e-6,
        dim_head: int | None = None,
        output_scale_factor: float = 1.0,
    ):
        super().__init__()
        self.dim_head = channels if dim_head is None else dim_head
        self.heads = channels // self.dim_head
        self.output_scale_factor = output_scale_factor
        self.norm_q = self.norm_k = None
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        self.set_processor(AttnProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        normed = hidden_states if self.group_norm is None else self.group_norm(hidden_states)
        tokens = normed.flatten(2).transpose(1, 2)  # (B, H * W, C)
        tokens = self.processor(self, tokens)
        out = hidden_states + tokens.transpose(1, 2).reshape(hidden_states.shape)
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor
