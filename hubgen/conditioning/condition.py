"""What a backbone is given beside x_t and the time.

Shapes: B pictures, L text tokens of D features, P features of pooled text, N numbers about a picture.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hubgen.conditioning.text import TextEmbeddings


@dataclass(frozen=True, eq=False)
class Condition:
    """Of B pictures, whatever the backbone takes; a backbone's family says in `takes` which fields it reads."""

    tokens: torch.Tensor | None = None
    """(B, L, D) states of the text"""
    pooled: torch.Tensor | None = None
    """(B, P) pooled text"""
    labels: torch.Tensor | None = None
    """(B,) classes, whole numbers"""
    micro: torch.Tensor | None = None
    """(B, N) sizes, crop and score of the picture, see `MicroConditioning`"""
    guidance_scale: float | None = None
    """the guidance that was distilled into the weights, as an input of theirs"""

    @staticmethod
    def of_text(text: TextEmbeddings) -> "Condition":
        """What a text encoder made of B prompts."""
        return Condition(tokens=text.tokens, pooled=text.pooled)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if torch.is_tensor(value)}

    def __len__(self) -> int:
        """B; raises ValueError for a condition without any tensor."""
        for value in self.tensors.values():
            return len(value)
        raise ValueError("`condition`: got one without a tensor, expected `tokens`, `pooled`, `labels` or `micro`.")

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Condition":
        """The condition with every tensor changed."""
        changed: dict[str, Any] = {name: change(value) for name, value in self.tensors.items()}
        return dataclasses.replace(self, **changed)

    def repeat(self, count: int) -> "Condition":
        """All B, `count` times over: (count * B, ...)."""
        return self.map(lambda value: value.repeat(count, *[1] * (value.ndim - 1)))

    @staticmethod
    def cat(parts: Sequence["Condition"]) -> "Condition":
        """The pictures of all parts in one batch.

        Raises:
            ValueError: Parts have different fields, or different guidance scales.
        """
        first, *others = parts
        for other in others:
            if other.tensors.keys() != first.tensors.keys() or other.guidance_scale != first.guidance_scale:
                raise ValueError(
                    f"`conditions`: got {sorted(other.tensors)} with guidance {other.guidance_scale} beside "
                    f"{sorted(first.tensors)} with {first.guidance_scale}, expected the same fields in all."
                )
        if not others:
            return first
        joined: dict[str, Any] = {name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors}
        return dataclasses.replace(first, **joined)
