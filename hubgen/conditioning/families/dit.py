"""DiT (2212.09748): classes, on latents."""

from typing import Any

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families.family import BackboneFamily


class DiTFamily(BackboneFamily):
    """Takes class labels."""

    attention_argument = "cross_attention_kwargs"

    def fields(self) -> frozenset[str]:
        return frozenset({"labels"})

    def keywords(self, condition: Condition) -> dict[str, Any]:
        return {"class_labels": self.require(condition, "labels")}
