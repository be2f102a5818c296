"""MM-DiT: Stable Diffusion 3's transformer (2403.03206), and hubgen's own with any text encoder."""

from typing import Any

from torch import nn

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families.family import BackboneFamily
from hubgen.conditioning.prompts import PromptCondition, TwoClipsAndT5


class MMDiTFamily(BackboneFamily):
    """Takes token states and pooled text."""

    attention_argument = "joint_attention_kwargs"
    max_shift = 1.16

    def fields(self) -> frozenset[str]:
        return frozenset({"tokens", "pooled"})

    @property
    def text_features(self) -> int | None:
        return self.config.joint_attention_dim

    def joined_encoders(
        self, encoders: tuple[nn.Module | None, ...], tokenizers: tuple[Any, ...], zero_without_prompt: bool
    ) -> PromptCondition:
        return TwoClipsAndT5(encoders, tokenizers, width=self.config.joint_attention_dim)

    def keywords(self, condition: Condition) -> dict[str, Any]:
        return {
            "encoder_hidden_states": self.require(condition, "tokens"),
            "pooled_projections": self.require(condition, "pooled"),
        }
