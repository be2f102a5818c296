"""U-Nets: DDPM's and NCSN++'s, Stable Diffusion 1 and 2, SDXL with its refiner, and those distilled by guidance."""

from typing import Any

import torch
from torch import nn

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families.family import BackboneFamily, StartRules
from hubgen.conditioning.prompts import OneEncoder, PromptCondition, TwoClips

# Kinds of `class_embed_type` that take a vector, which is pooled text.
VECTORS = ("projection", "simple_projection", "identity")


class UNetFamily(BackboneFamily):
    """Takes token states where it has cross-attention; beside them pooled text, classes or numbers, as it was built."""

    attention_argument = "cross_attention_kwargs"
    starts = StartRules(keeps_image_size=True, rounds_steps_down=True)

    def fields(self) -> frozenset[str]:
        config = self.config
        found = {"tokens"} if config.get("cross_attention_dim") is not None else set()
        if config.get("addition_embed_type") == "text_time":
            found |= {"pooled", "micro"}
        if config.get("class_embed_type") in VECTORS:
            found |= {"pooled"}
        elif config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
            found |= {"labels"}
        if config.get("time_cond_proj_dim") is not None:
            found |= {"guidance_scale"}
        return frozenset(found)

    @property
    def patch(self) -> int:
        """1 where the way up is given the sizes of the way down; else what all halvings together divide by."""
        return 1 if "tokens" in self.takes else 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def text_features(self) -> int | None:
        if "tokens" not in self.takes:
            return None
        width = self.config.cross_attention_dim
        return width if isinstance(width, int) else width[0]

    @property
    def distilled(self) -> bool:
        return "guidance_scale" in self.takes

    def joined_encoders(
        self, encoders: tuple[nn.Module | None, ...], tokenizers: tuple[Any, ...], zero_without_prompt: bool
    ) -> PromptCondition:
        if "micro" in self.takes:
            return TwoClips(encoders, tokenizers, zero_without_prompt=zero_without_prompt)
        return OneEncoder(encoders, tokenizers)

    def keywords(self, condition: Condition) -> dict[str, Any]:
        config, keywords = self.config, {}
        if config.get("addition_embed_type") not in (None, "text_time"):
            raise ValueError(
                f"`addition_embed_type`: got {config['addition_embed_type']!r}, expected None or 'text_time'."
            )
        if "tokens" in self.takes:
            keywords["encoder_hidden_states"] = self.require(condition, "tokens")
        if "labels" in self.takes:
            keywords["class_labels"] = self.require(condition, "labels")
        elif config.get("class_embed_type") in VECTORS:
            keywords["class_labels"] = self.require(condition, "pooled")
        if "micro" in self.takes:
            pooled, micro = self.require(condition, "pooled"), self.require(condition, "micro")
            check_micro(config, micro.shape[1], pooled.shape[1])
            keywords["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": micro.to(pooled)}
        if "guidance_scale" in self.takes:
            tokens = self.require(condition, "tokens")
            scale = self.require(condition, "guidance_scale")
            scales = torch.full((len(tokens),), scale, dtype=torch.float32, device=tokens.device)
            keywords["timestep_cond"] = guidance_embedding(scales, config.time_cond_proj_dim).to(tokens.dtype)
        return keywords


def check_micro(config: Any, count: int, pooled: int) -> None:
    """Raises ValueError unless a U-Net embeds `count` numbers about a picture beside `pooled` features of text."""
    expected = (config.projection_class_embeddings_input_dim - pooled) / config.addition_time_embed_dim
    if count != expected:
        raise ValueError(
            f"`condition.micro`: got {count} numbers about a picture, expected {expected:g}: so many this backbone "
            f"embeds beside {pooled} features of text. Of the pipeline's config, `requires_aesthetics_score` must be "
            "true for 5, which is SDXL's refiner, and false for 6."
        )


def guidance_embedding(scale: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoids of a guidance scale, (B,) -> (B, dim), for models distilled by it (LCM, 2310.04378, section 4.2)."""
    half = dim // 2
    frequencies = torch.logspace(0, -4, half, device=scale.device)  # 1 ... 1/10000
    angles = 1000 * (scale[:, None] - 1) * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))
