"""FLUX.1: latents as a sequence of tokens with positions, times in [0, 1], guidance as an input.

Shapes: B pictures, (B, C, h, w) latents, T = h / 2 * w / 2 tokens of 2x2 latents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families.family import BackboneFamily, Doors, StartRules, even_sigmas
from hubgen.conditioning.prompts import ClipAndT5, PromptCondition
from hubgen.conditioning.text import SHOWS_PADDING

# Side of the square of latents that is one token.
PACKED = 2


class FluxFamily(BackboneFamily):
    """Takes token states, pooled text and, unless it is schnell, a guidance scale."""

    attention_argument = "joint_attention_kwargs"
    starts = StartRules(draws_per_image=True)
    patch = PACKED
    distilled = True

    def __init__(self, config: Any):
        super().__init__(config)
        self._positions: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    def fields(self) -> frozenset[str]:
        return frozenset({"tokens", "pooled", *(["guidance_scale"] if self.config.get("guidance_embeds") else [])})

    @property
    def channels(self) -> int:
        return self.config.in_channels // PACKED**2

    def prompt_condition(
        self, encoders: Sequence[nn.Module | None], tokenizers: Sequence[Any], zero_without_prompt: bool = True
    ) -> PromptCondition:
        """CLIP and T5, of which one alone can read no prompt; or a single encoder of another kind."""
        first: Any = encoders[0]
        if first is not None and first.config.model_type not in SHOWS_PADDING and not any(encoders[1:]):
            return super().prompt_condition(encoders, tokenizers, zero_without_prompt)
        return ClipAndT5(tuple(encoders), tuple(tokenizers))

    def sigmas(self, steps: int, scheduler: Any) -> list[float] | None:
        return even_sigmas(steps, scheduler)

    def keywords(self, condition: Condition) -> dict[str, Any]:
        tokens = self.require(condition, "tokens")
        keywords = {
            "encoder_hidden_states": tokens,
            "pooled_projections": self.require(condition, "pooled"),
            "txt_ids": tokens.new_zeros(tokens.shape[1], 3, dtype=torch.float32),
        }
        if "guidance_scale" in self.takes:
            scale = self.require(condition, "guidance_scale")
            keywords["guidance"] = torch.full((len(tokens),), scale, dtype=torch.float32, device=tokens.device)
        return keywords

    def timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        """0 ... 1000 to 0 ... 1."""
        return timestep / 1000

    def enter(self, x_t: torch.Tensor, doors: Doors) -> tuple[torch.Tensor, dict[str, Any]]:
        x, keywords = super().enter(x_t, doors)
        height, width = x.shape[-2:]
        return pack(x), {**keywords, "img_ids": self.positions(height, width, x.device)}

    def leave(self, prediction: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        return unpack(prediction, *x_t.shape[-2:])

    def positions(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        """See `token_positions`; the same tensor at every step, by which the backbone knows it again."""
        key = (height, width, device)
        if key not in self._positions:
            self._positions[key] = token_positions(*key)
        return self._positions[key]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, T, 4 C): tokens of 2x2 latents, in each the channels outermost."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // PACKED, PACKED, width // PACKED, PACKED)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, T, 4 C) -> (B, C, h, w), the inverse of `pack`; `height` and `width` are h and w."""
    squares = tokens.unflatten(2, (-1, PACKED, PACKED)).unflatten(1, (height // PACKED, width // PACKED))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def token_positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """(T, 3): 0, row and column of each token of `pack`, for h x w latents."""
    rows, columns = height // PACKED, width // PACKED
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).flatten(0, 1).to(device, torch.float32)
