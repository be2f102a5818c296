"""FLUX.1: latents as a sequence of tokens with positions, times in [0, 1], guidance as an input.

Shapes: B pictures, (B, C, h, w) latents, T = h / 2 * w / 2 tokens of 2x2 latents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families.family import BackboneFamily, Doors, ShownRules, StartRules, even_sigmas
from hubgen.conditioning.prompts import ClipAndT5, PromptCondition
from hubgen.conditioning.text import SHOWS_PADDING

# Side of the square of latents that is one token.
PACKED = 2


class FluxFamily(BackboneFamily):
    """Takes token states, pooled text and, unless it is schnell, a guidance scale."""

    attention_argument = "joint_attention_kwargs"
    starts = StartRules(draws_per_image=True)
    shown = ShownRules(control=True, whole_mask=True)
    takes_tokens = True
    patch = PACKED
    distilled = True

    def __init__(self, config: Any):
        super().__init__(config)
        self._positions: dict[tuple[Any, ...], torch.Tensor] = {}

    def fields(self) -> frozenset[str]:
        return frozenset({"tokens", "pooled", *(["guidance_scale"] if self.config.get("guidance_embeds") else [])})

    @property
    def channels(self) -> int:
        return self.config.in_channels // PACKED**2

    @property
    def text_features(self) -> int | None:
        return self.config.joint_attention_dim

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
        maps = [x, *(further.latents.to(x) for further in doors.tokens)]
        indices = (0, *(further.index for further in doors.tokens))
        sizes = tuple((*latents.shape[-2:], index) for latents, index in zip(maps, indices, strict=True))
        tokens = [pack(latents) for latents in maps]
        keywords = {**keywords, "img_ids": self.positions(sizes, x.device)}
        return torch.cat(tokens, dim=1) if doors.tokens else tokens[0], keywords

    def leave(self, prediction: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        height, width = x_t.shape[-2:]
        return unpack(prediction[:, : height // PACKED * (width // PACKED)], height, width)

    def positions(self, sizes: tuple[tuple[int, int, int], ...], device: torch.device) -> torch.Tensor:
        """Of the tokens of several pictures, each (h, w, index): (T, 3), one after the other.

        The same tensor at every step, by which the backbone knows it again.
        """
        key = (*sizes, device)
        if key not in self._positions:
            found = [token_positions(height, width, device, index) for height, width, index in sizes]
            self._positions[key] = torch.cat(found) if len(found) > 1 else found[0]
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


def token_positions(height: int, width: int, device: torch.device, index: int = 0) -> torch.Tensor:
    """(T, 3): the picture's index, row and column of each token of `pack`, for h x w latents."""
    rows, columns = height // PACKED, width // PACKED
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    positions = torch.stack([torch.full_like(grid[0], index), *grid], dim=-1)
    return positions.flatten(0, 1).to(device, torch.float32)
