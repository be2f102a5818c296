"""Attention on a CPU, where torch's own kernel is not always the fastest or the most exact.

Shapes: B batch, L queries, S keys, H heads, D features of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Scores that fit into a CPU's cache, 4 MB of bfloat16; below so many tokens, a softmax over odd ones is slow.
BLOCK, SHORT = 2**21, 128


def attend_on_cpu(
    kernel: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by `kernel`, or in half precision by what is faster: (B, L, H, D), (B, S, H, D) twice -> (B, L, H, D).

    Args:
        kernel: Computes the same for `(query, key, value, attn_mask=attention_mask)`, in any precision.
        query: (B, L, H, D).
        key: (B, S, H, D).
        value: (B, S, H, D).
        attention_mask: Added to the scores, or where it is false they are not seen; (B or 1, H or 1, L or 1, S).
    """
    if value.dtype in (torch.bfloat16, torch.float16) and value.requires_grad:
        # In half precision the kernel's backward takes up to four times as long as in float32 (88 tokens, torch
        # 2.13), and is the less exact.
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.float()
        with torch.autocast("cpu", enabled=False):
            return kernel(query.float(), key.float(), value.float(), attn_mask=attention_mask).to(value.dtype)
    if prefers_blocks(query, key, value, attention_mask):
        return attend_in_blocks(query, key, value)
    return kernel(query, key, value, attn_mask=attention_mask)


def prefers_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Whether `attend_in_blocks` is the faster one: for bfloat16, without a mask and without gradients."""
    return (
        value.dtype == torch.bfloat16
        and attention_mask is None
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
        and not torch.compiler.is_compiling()
    )


def attend_in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention by plain matrix products, block by block: (B, L, H, D), (B, S, H, D) twice -> (B, L, H, D).

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
