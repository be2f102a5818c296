"""What attention sees of an IP-Adapter's pictures: their tokens, keys and values, and how these meet a layer's queries.

Shapes: n pictures, F features of the image encoder, P patches, S tokens of a picture with D features, L image tokens;
b sets of pictures, a divisor of the number of results; rows are those of all branches.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor

from hubgen.conditioning.guidance import POSITIVE
from hubgen.conditioning.predict import BackboneCall
from hubgen.controls.attention_maps import token_grid
from hubgen.controls.control import Prepared, Span, Target
from hubgen.controls.image_attention import Adapter
from hubgen.layers.attention import AttentionCall, Part, attend
from hubgen.layers.decoupled_attention import KeyValue

Places = Mapping[str, tuple[int, float]]


class Seen(Prepared):
    """What attention sees of an adapter's pictures; subclasses differ in where keys and values come from.

    Args:
        adapter: The weights.
        places: Numbers of layers and how much they count, by names of processors.
        masks: (n, 1, H, W).
        own_tokens: Those of x_t, where others may come after; `None`: all are x_t's.
    """

    def __init__(
        self, adapter: Adapter, places: Places, masks: torch.Tensor | None = None, own_tokens: int | None = None
    ):
        self.network, self.after_mlp = adapter.network, adapter.kind.after_mlp
        self.places, self.pixel_masks, self.own_tokens = places, masks, own_tokens
        self.token_masks: dict[int, list[torch.Tensor]] = {}
        self.live = True

    def parts(self) -> Mapping[str, Any]:
        part = LookAfterMLP if self.after_mlp else Look
        return {name: part(self, number, scale) for name, (number, scale) in self.places.items()}

    @abstractmethod
    def keys_values(self, number: int, heads: int) -> list[KeyValue]:
        """Of all pictures together, or with masks of each: (rows, S, heads, features of a head) twice."""

    def look(self, number: int, scale: float, call: AttentionCall) -> torch.Tensor | None:
        """What one layer adds: (rows, L, D), or with text tokens in front where these look too."""
        if not self.live:
            return None
        layer, total = self.network.layer(number), None
        query = layer.query(call)
        for i, pair in enumerate(self.keys_values(number, call.attn.heads)):
            key, value = layer.among(call, *(one.to(query.dtype) for one in pair))
            seen = scale * attend(call.attn.processor, query, key, value).flatten(2)
            if self.pixel_masks is not None:
                seen = seen * self.mask(i, call.query.shape[1], seen.shape[1]).to(seen)
            total = seen if total is None else total + seen
        return total

    def mask(self, picture: int, tokens: int, rows: int) -> torch.Tensor:
        """A picture's mask for so many tokens, (1, rows, 1), as diffusers has it.

        What comes in front are text tokens, and after x_t's may come those of other pictures. Both lie nowhere in the
        result: they see as much of the picture as the result does on average.

        Args:
            picture: Its number.
            tokens: Of x_t and of what comes after.
            rows: Of these and of the text in front.
        """
        if rows not in self.token_masks:
            assert self.pixel_masks is not None
            own = tokens if self.own_tokens is None else self.own_tokens
            self.token_masks[rows] = []
            for one in self.pixel_masks:
                inside = IPAdapterMaskProcessor.downsample(one, 1, own, 1)  # (1, own, 1)
                mean = inside.mean(1, keepdim=True)
                around = [mean.expand(1, count, 1) for count in (rows - tokens, tokens - own)]
                self.token_masks[rows].append(torch.cat([around[0], inside, around[1]], dim=1))
        return self.token_masks[rows][picture]


class InCall(Seen):
    """In a call of a pipeline. Tokens are made once, keys and values too, unless they follow the time.

    Args:
        adapter: The weights.
        places: See `Seen`.
        target: Of the call.
        span: The steps in which it is live.
        embeds: Of the positive and of any other branch, (b, n, F) or (b, n, P, F) each.
        masks: See `Seen`.
    """

    def __init__(
        self,
        adapter: Adapter,
        places: Places,
        target: Target,
        span: Span,
        embeds: tuple[torch.Tensor, torch.Tensor],
        masks: torch.Tensor | None = None,
    ):
        super().__init__(adapter, places, masks, math.prod(token_grid(target)) if target.family.takes_tokens else None)
        self.span, self.target = span, target
        self.embeds = [one.to(target.device, self.network.dtype) for one in embeds]
        self.picture_tokens: dict[bool, torch.Tensor] = {}
        """By whether it is the positive branch: (b, n, S, D)"""
        self.kept: dict[tuple[int, tuple[str, ...]], list[KeyValue]] = {}
        self.temb: torch.Tensor | None = None
        self.branches = tuple[str, ...]()
        if not self.timed:
            self.project()

    @property
    def timed(self) -> bool:
        """Whether tokens follow the time."""
        return self.network.image_proj.timed

    def before_call(self, call: BackboneCall) -> None:
        self.live, self.branches = self.span.covers(call.step, len(self.target.timesteps)), call.branches
        if self.live and self.timed:
            self.project(self.target.family.timestep(call.timestep[:1]))

    def project(self, timestep: torch.Tensor | None = None) -> None:
        """Makes the tokens."""
        needed = {branch == POSITIVE for branch in self.target.branches}
        for positive, embeds in zip((True, False), self.embeds, strict=True):
            if positive in needed:
                pictures = embeds.flatten(0, 1)  # (b * n, ...)
                if timestep is None:
                    tokens = self.network.image_proj(pictures)
                else:
                    tokens, temb = self.network.image_proj(pictures, timestep.expand(len(pictures)))
                    self.temb = temb[:1]
                self.picture_tokens[positive] = tokens.unflatten(0, embeds.shape[:2])

    def keys_values(self, number: int, heads: int) -> list[KeyValue]:
        key = (number, self.branches)
        if key in self.kept:
            return self.kept[key]
        found = [self.of_rows(tokens, number, heads) for tokens in self.sets()]
        if not self.timed:
            self.kept[key] = found
        return found

    def sets(self) -> list[torch.Tensor]:
        """Tokens of all pictures, or with masks of each, (branches * b, S, D)."""
        rows = torch.cat(
            [self.picture_tokens[branch == POSITIVE] for branch in self.branches]
        )  # (branches * b, n, S, D)
        return [rows.flatten(1, 2)] if self.pixel_masks is None else list(rows.unbind(1))

    def of_rows(self, tokens: torch.Tensor, number: int, heads: int) -> KeyValue:
        """Keys and values for all rows of the backbone."""
        temb = None if self.temb is None else self.temb.expand(len(tokens), -1)
        key, value = (
            torch.cat([self.target.for_all(rows) for rows in one.chunk(len(self.branches))])
            for one in self.network.layer(number)(tokens, heads, temb)
        )
        return key, value


class InTraining(Seen):
    """In training: one picture for each row, anew in every layer, so that gradients flow.

    Args:
        adapter: The weights.
        places: See `Seen`.
    """

    def __init__(self, adapter: Adapter, places: Places):
        super().__init__(adapter, places)
        self.picture_tokens, self.temb = torch.empty(0), None

    def show(self, embeds: torch.Tensor, timestep: torch.Tensor | None = None) -> None:
        """What is seen from now on.

        Args:
            embeds: (B, F) or (B, P, F).
            timestep: (B,), as the backbone takes it, for adapters that are told the time.
        """
        if self.network.image_proj.timed:
            if timestep is None:
                raise ValueError("`timestep`: got None, expected it: this adapter is told the time.")
            self.picture_tokens, self.temb = self.network.image_proj(embeds, timestep)
        else:
            self.picture_tokens = self.network.image_proj(embeds)  # (B, S, D)

    def keys_values(self, number: int, heads: int) -> list[KeyValue]:
        return [self.network.layer(number)(self.picture_tokens, heads, self.temb)]


class Look(Part):
    """One layer's look at the pictures, added to its own attention."""

    def __init__(self, seen: Seen, number: int, scale: float):
        self.seen, self.number, self.scale = seen, number, scale

    def added(self, call: AttentionCall) -> torch.Tensor | None:
        return self.seen.look(self.number, self.scale, call)


class LookAfterMLP(Look):
    """The same, added past the block's MLP."""

    where = "after_mlp"
