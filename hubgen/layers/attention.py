"""Attention: projections, scores, softmax, output; and the parts by which controls take a hand in it.

`Attention` holds the projections; a processor computes with them:

    tokens -> project -> norms, rotation -> Part.edit -> softmax(Q K^T / sqrt(D)) V -> + Part.added -> output
                                                              Part.maps

Every backbone names its processors (`model.attn_processors`) and dispatches to the backend that the user chose
(`model.set_attention_backend`). Parameter names are those of diffusers' `Attention`, and the two work together: our
processors compute for diffusers' modules (of tokens), and diffusers' processors for ours.

Shapes: B batch, L image tokens, S context tokens, H heads, D features of a head, C features of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from hubgen.diffusers_contract import dispatch_attention_fn
from hubgen.layers.attention_cpu import attend_on_cpu
from hubgen.layers.normalization import RMSNorm

QueryKeyValue = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(B, L, H, D), (B, S, H, D), (B, S, H, D)."""


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
    backend = processor._attention_backend
    kernel = partial(dispatch_attention_fn, backend=backend, parallel_config=processor._parallel_config)
    if value.device.type == "cpu" and backend is None:
        return attend_on_cpu(kernel, query, key, value, attention_mask)
    return kernel(query, key, value, attn_mask=attention_mask)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns each pair of neighbouring features by its angle (RoPE, 2104.09864, eq. 34): (B, L, H, D) -> the same.

    `rotary` are cosines and sines, each (L, D) with every angle twice, as diffusers hands them to processors. The
    turning is done in float32.
    """
    cos, sin = (table[:, None, ::2] for table in rotary)  # (L, 1, D / 2)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, H, D / 2)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)


def project(attn: Any, x: torch.Tensor, context: torch.Tensor | None = None) -> QueryKeyValue:
    """Queries of `x`, keys and values of `context`, or of `x`: (B, L, C), (B, S, C) -> each (B, L or S, H, D).

    `attn` is an `Attention`, a `SpatialAttention`, or diffusers' `Attention` or `FluxAttention`.
    """
    source = x if context is None else context
    if context is None and has_fused(attn, "to_qkv", "to_q", "to_k", "to_v"):
        features = attn.to_qkv(x).chunk(3, dim=-1)
    elif has_fused(attn, "to_kv", "to_k", "to_v"):
        features = (attn.to_q(x), *attn.to_kv(source).chunk(2, dim=-1))
    else:
        features = (attn.to_q(x), attn.to_k(source), attn.to_v(source))
    query, key, value = (split_heads(attn, one) for one in features)
    return query, key, value


def project_text(attn: Any, text: torch.Tensor) -> QueryKeyValue:
    """Queries, keys and values of the text tokens of joint attention: (B, S, C) -> each (B, S, H, D)."""
    if has_fused(attn, "to_added_qkv", "add_q_proj", "add_k_proj", "add_v_proj"):
        features = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        features = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    query, key, value = (split_heads(attn, one) for one in features)
    return query, key, value


def split_heads(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """(B, L, H * D) -> (B, L, H, D)."""
    return x.unflatten(-1, (attn.heads, -1))


def normalise(
    query: torch.Tensor, key: torch.Tensor, query_norm: nn.Module | None, key_norm: nn.Module | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys after the norms of their heads, if there are any: (B, L, H, D), (B, S, H, D) -> the same."""
    if query_norm is None or key_norm is None:
        return query, key
    return query_norm(query), key_norm(key)


def output(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """The output projection and its dropout, where the layer has them: (B, L, H * D) -> (B, L, C)."""
    layers = output_layers(attn)
    return x if layers is None else layers[1](layers[0](x))


def output_layers(attn: Any) -> Any:
    """The output projection and its dropout; `None` in FLUX's single blocks, where the block has them."""
    return getattr(attn, "to_out", None)


def output_text(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """The same of the text tokens: (B, S, H * D) -> (B, S, C)."""
    return x if attn.to_add_out is None else attn.to_add_out(x)


def has_fused(attn: Any, name: str, *parts: str) -> bool:
    """Whether there is the fused layer `name`, and no adapter has come to the layers it stands for since then."""
    return getattr(attn, "fused_projections", False) and hasattr(attn, name) and not adapted(attn, *parts)


def adapted(attn: Any, *names: str) -> list[str]:
    """Those of the layers that an adapter has wrapped, whose weights alone are not what they compute."""
    layers = {name: getattr(attn, name, None) for name in names}
    return [name for name, layer in layers.items() if layer is not None and not isinstance(layer, nn.Linear)]


@dataclass
class AttentionCall:
    """One call of an attention layer, as its parts see it.

    In joint attention image and text are one sequence, of which `image` and `text` are the places; elsewhere all
    queries are the image's, and `text` is empty.
    """

    attn: Any
    """The layer, with its projections and number of heads."""
    image: slice
    """Where the image tokens lie among the queries."""
    text: slice
    """Where the text tokens lie among the queries."""
    projected: QueryKeyValue
    """Queries of the image tokens, keys and values of the same, or of the context in cross-attention, before norms."""
    query: torch.Tensor
    """Queries of the image tokens after their norm, before rotation, (B, L, H, D)."""
    stream: torch.Tensor
    """The same of all tokens that come in with the image's, which in FLUX's single blocks are the text's, in front."""


class Part:
    """One control's share of an attention layer: override what it takes a hand in, and leave the rest.

    A processor asks its `parts` in their order. What changes from call to call, such as the step or which rows of the
    batch belong to which prompt, a part knows by itself.
    """

    where: ClassVar[Literal["before_out", "after_out", "after_mlp"]] = "before_out"
    """Where `added` goes: before the layer's output projection; after it, and so before the block's gate; or after the
    block's MLP, past all gates, which double blocks alone have."""

    @property
    def wants_maps(self) -> bool:
        """Whether `maps` is asked now; attention is then computed by its maps, (B, H, queries, keys) in memory."""
        return False

    def edit(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> QueryKeyValue:
        """Queries, keys and values to attend with, after norms and rotation; of keys and values any number."""
        return query, key, value

    def maps(self, call: AttentionCall, probabilities: torch.Tensor) -> torch.Tensor:
        """The attention maps, (B, H, queries, keys) in float32 with rows that add up to 1 -> the same."""
        return probabilities

    def added(self, call: AttentionCall) -> torch.Tensor | None:
        """What is added to the image tokens: (B, L, H * D) before the output projection, (B, L, C) after it."""
        return None


def attention_maps(query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(query key^T / sqrt(D)) in float32: (B, L, H, D), (B, S, H, D) -> (B, H, L, S); the mask is `attend`'s."""
    query, key = query.transpose(1, 2), key.transpose(1, 2)  # (B, H, L, D), (B, H, S, D)
    scores = query.float() @ key.float().mT * query.shape[-1] ** -0.5  # (B, H, L, S)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return scores.softmax(dim=-1)


def attend_by_maps(
    call: AttentionCall,
    parts: Sequence[Part],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend` with its maps in between, for the parts that want them; arguments and result are those of `attend`."""
    probabilities = attention_maps(query, key, attention_mask)
    for part in parts:
        if part.wants_maps:
            probabilities = part.maps(call, probabilities)
    return (probabilities.to(value.dtype) @ value.transpose(1, 2)).transpose(1, 2)


class AttnProcessor:
    """Attention of `hidden_states` to itself or to `encoder_hidden_states` (1706.03762, eq. 1), and of its parts.

    The subclasses differ in how tokens come in and go out. Without parts nothing but the attention is computed.
    """

    _attention_backend = None
    _parallel_config = None
    parts: tuple[Part, ...] = ()
    """What controls do to this layer, in order. Layers may share a processor, and share its parts then."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        text_tokens: int = 0,
    ) -> Any:
        """The image tokens, (B, L, C), in joint attention in a tuple with the text tokens.

        Args:
            attn: The layer, ours or diffusers'.
            hidden_states: Image tokens, (B, L, C).
            encoder_hidden_states: Context tokens, (B, S, features of a context token).
            attention_mask: Added to the scores, or where it is false they are not seen: (B, 1 or L, S), or with heads,
                (B or 1, H or 1, L or 1, S). In joint attention for all tokens, as the rotation.
            image_rotary_emb: Cosines and sines of the tokens' angles, see `rotate`.
            text_tokens: How many of `hidden_states`, the first ones, are text; only parts need to know.

        Raises:
            ValueError: A part adds to a place that this layer does not have.
        """
        context = encoder_hidden_states
        if attention_mask is not None and attention_mask.ndim == 3:
            attention_mask = attention_mask[:, None]  # (B, 1, 1 or L, S): the same for every head
        for part in self.parts:
            if part.where not in self.places(attn, context):
                raise ValueError(f"`where`: got {part.where!r}, expected one of {self.places(attn, context)} here.")
        query, key, value, call = self.tokens_in(attn, hidden_states, context, text_tokens)
        if image_rotary_emb is not None:
            query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)
        for part in self.parts:
            query, key, value = part.edit(call, query, key, value)
        if self.parts and any(part.wants_maps for part in self.parts):
            out = attend_by_maps(call, self.parts, query, key, value, attention_mask)
        else:
            out = attend(self, query, key, value, attention_mask)
        out = self.add("before_out", call, out.flatten(2))  # (B, L, H * D)
        return self.tokens_out(attn, out, hidden_states, context, call)

    def tokens_in(
        self, attn: Any, x: torch.Tensor, context: torch.Tensor | None, text_tokens: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """Queries (B, L, H, D), keys and values (B, S, H, D), normalised; with parts also the `AttentionCall`."""
        query, key, value = project(attn, x, context)
        if not self.parts:
            return *normalise(query, key, attn.norm_q, attn.norm_k), value, None
        projected = query[:, text_tokens:], key[:, text_tokens:], value[:, text_tokens:]
        query, key = normalise(query, key, attn.norm_q, attn.norm_k)
        image, text = slice(text_tokens, x.shape[1]), slice(0, text_tokens)
        return query, key, value, AttentionCall(attn, image, text, projected, query[:, text_tokens:], query)

    def tokens_out(
        self, attn: Any, out: torch.Tensor, x: torch.Tensor, context: torch.Tensor | None, call: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(B, L, H * D) -> (B, L, C)."""
        return self.add("after_out", call, output(attn, out))

    def places(self, attn: Any, context: torch.Tensor | None) -> tuple[str, ...]:
        """Where parts may add something in a call with this context."""
        return ("before_out",) if output_layers(attn) is None else ("before_out", "after_out")

    def add(self, where: str, call: Any, x: torch.Tensor) -> torch.Tensor:
        """`x`, (B, L, features) or with text tokens beside, plus what the parts add there to the image tokens."""
        update = self.added(where, call) if self.parts else None
        if update is None:
            return x
        if x.shape[1] == update.shape[1]:
            return x + update
        x = x.clone()
        x[:, call.image] += update
        return x

    def added(self, where: str, call: Any) -> torch.Tensor | None:
        """The sum of what the parts add there; `None` for nothing."""
        total = None
        for part in self.parts:
            update = part.added(call) if part.where == where else None
            if update is not None:
                total = update if total is None else total + update
        return total


class JointAttnProcessor(AttnProcessor):
    """One attention over image and text tokens, each with projections of its own (SD3, 2403.03206, figure 2b).

    Returns the image tokens; where text tokens are given a tuple of the image, the text and, if a part adds something
    after the MLP, that. A mask and rotary tables are for the tokens in the order of attention, which is the same
    attention in any order: SD3 has the text last.
    """

    text_first = False

    def tokens_in(
        self, attn: Any, x: torch.Tensor, context: torch.Tensor | None, text_tokens: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """Queries, keys and values of image and text, each (B, L + S, H, D), and the `AttentionCall`."""
        query, key, value, call = super().tokens_in(attn, x, None, text_tokens)
        if context is None:
            return query, key, value, call
        text_query, text_key, text_value = project_text(attn, context)  # (B, S, H, D) each
        text_query, text_key = normalise(text_query, text_key, attn.norm_added_q, attn.norm_added_k)
        if call is not None:
            first = context.shape[1] if self.text_first else 0
            call.image = slice(first, first + x.shape[1])
            call.text = slice(0, first) if self.text_first else slice(x.shape[1], x.shape[1] + context.shape[1])
        return self.join(query, text_query), self.join(key, text_key), self.join(value, text_value), call

    def tokens_out(
        self, attn: Any, out: torch.Tensor, x: torch.Tensor, context: torch.Tensor | None, call: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(B, L + S, H * D) -> image (B, L, C), text (B, S, C)."""
        if context is None:
            return super().tokens_out(attn, out, x, context, call)
        image, text = self.split(out, x.shape[1], context.shape[1])
        outputs = self.add("after_out", call, output(attn, image)), output_text(attn, text)
        late = self.added("after_mlp", call)
        return outputs if late is None else (*outputs, late)

    def places(self, attn: Any, context: torch.Tensor | None) -> tuple[str, ...]:
        """As in `AttnProcessor`, and with text, which double blocks have, after the MLP."""
        return (*super().places(attn, context), *(() if context is None else ("after_mlp",)))

    def join(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(B, L, H, D), (B, S, H, D) -> (B, L + S, H, D)."""
        return torch.cat([text, image] if self.text_first else [image, text], dim=1)

    def split(self, out: torch.Tensor, image_tokens: int, text_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L + S, H * D) -> (B, L, H * D), (B, S, H * D)."""
        if self.text_first:
            text, image = out.split([text_tokens, image_tokens], dim=1)
        else:
            image, text = out.split([image_tokens, text_tokens], dim=1)
        return image, text


class FluxAttnProcessor(JointAttnProcessor):
    """`JointAttnProcessor` with the text first, as FLUX has it; of one stream of tokens in FLUX's single blocks."""

    text_first = True


class Projections(AttentionModuleMixin):
    """Attention layers whose projections can be fused into one (`fuse_projections`)."""

    def context_layers(self) -> list[nn.Module]:
        """The layers that see the context of a cross-attention, and nothing else."""
        if not self.is_cross_attention:
            return []
        return [self.to_kv] if has_fused(self, "to_kv", "to_k", "to_v") else [self.to_k, self.to_v]

    def fuse_projections(self) -> None:
        """Puts queries, keys and values into one layer; of cross-attention keys and values.

        Raises:
            ValueError: One of them carries an adapter, which the fused layer would lack.
        """
        found = adapted(self, "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        if found:
            raise ValueError(
                f"`fuse_projections`: got adapters on {found}, expected plain layers: fuse or unload the adapters "
                "first."
            )
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
            raise ValueError(f"`qk_norm`: got {qk_norm!r}, expected 'rms_norm' or None.")
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
        dim_head: Features of a head, at most `channels`; there are as many heads as fit. `None` for a single head.
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
        self.heads = 1 if dim_head is None else channels // dim_head
        self.output_scale_factor = output_scale_factor
        self.norm_q = self.norm_k = None
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps=eps)
        width = channels if dim_head is None else self.heads * dim_head
        self.to_q = nn.Linear(channels, width)
        self.to_k = nn.Linear(channels, width)
        self.to_v = nn.Linear(channels, width)
        self.to_out = nn.ModuleList([nn.Linear(width, channels), nn.Dropout(0.0)])
        self.set_processor(AttnProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        normed = hidden_states if self.group_norm is None else self.group_norm(hidden_states)
        tokens = normed.flatten(2).transpose(1, 2)  # (B, H * W, C)
        tokens = self.processor(self, tokens)
        out = hidden_states + tokens.transpose(1, 2).reshape(hidden_states.shape)
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor
