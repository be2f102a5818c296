"""How many text encoders become one condition: an object for each way of joining them.

    OneEncoder        states and pooled vector of one: Stable Diffusion 1 and 2 (CLIP), hubgen's own (any)
    TwoClips          SDXL (2307.01952): both CLIPs' last states but one, side by side; the second one's pooled vector
    TwoClipsAndT5     SD3 (2403.03206): that, padded to T5's width, and T5's states behind it; both pooled vectors
    ClipAndT5         FLUX: T5's states and CLIP's pooled vector

Shapes: B prompts, L text tokens of D features, P features of pooled text.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hubgen.conditioning.text import TextCondition, TextEmbeddings

LONGEST_T5 = 512
T5 = ("t5", "umt5")


@dataclass(frozen=True)
class PromptCondition(ABC):
    """Base: the text encoders of a pipeline with their tokenizers, in its order; `None` for one that is missing."""

    encoders: tuple[nn.Module | None, ...]
    tokenizers: tuple[Any, ...]

    t5_tokens: ClassVar[int | None] = None
    """Default of `max_sequence_length`, where there is a T5"""
    skips_clip: ClassVar[bool] = True
    """Whether `clip_skip` means something"""
    zero_without_prompt: bool = False
    """Whether the unconditional embeddings are zeros where there is no negative prompt (SDXL)"""

    @property
    def prompts(self) -> int:
        """How many prompts it reads: `prompt`, `prompt_2`, `prompt_3`."""
        return 1

    @property
    def missing(self) -> list[str]:
        """Names of the text encoders without which no prompt can be read."""
        return ["text_encoder"] if self.encoders[0] is None else []

    def text(self, number: int, max_length: int | None = None) -> TextCondition:
        """One encoder with its tokenizer."""
        encoder = self.encoders[number]
        assert encoder is not None
        return TextCondition(encoder, self.tokenizers[number], max_length)

    def longest(self) -> TextCondition:
        """The encoder that reads most of a prompt."""
        texts = []
        for number, encoder in enumerate(self.encoders):
            if encoder is not None:
                config: Any = encoder.config
                texts.append(self.text(number, self.t5_tokens if config.model_type in T5 else None))
        return max(texts, key=lambda text: text.max_length)

    def in_order(self, t5_tokens: int | None) -> list[TextCondition]:
        """The encoders whose states lie one behind another in the condition."""
        return [self.text(0)]

    def word_places(self, prompt: str, max_sequence_length: int | None = None) -> dict[str, tuple[int, ...]]:
        """Where the tokens of each word of a prompt lie among the L text tokens; words beyond them have none.

        Args:
            prompt: One prompt.
            max_sequence_length: Tokens of T5, as in `encode`.
        """
        places: dict[str, tuple[int, ...]] = {}
        first = 0
        for text in self.in_order(max_sequence_length or self.t5_tokens):
            for word, own in text.word_places(prompt).items():
                places[word] = (*places.get(word, ()), *(first + place for place in own))
            first += text.max_length
        return places

    def encode(
        self,
        prompts: Sequence[str],
        device: torch.device | str | None = None,
        *,
        prompts_2: Sequence[str] | None = None,
        prompts_3: Sequence[str] | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
    ) -> TextEmbeddings:
        """Embeds B prompts.

        Args:
            prompts: For the first encoder, and for those that have none of their own.
            device: Where the encoders run; `None` for where their weights lie.
            prompts_2: For the second encoder.
            prompts_3: For the third.
            clip_skip: Layers of CLIP left out at the end, beyond what the family leaves out anyway.
            max_sequence_length: Tokens of T5.
        """
        texts = [list(prompts), list(prompts_2 or prompts), list(prompts_3 or prompts)]
        return self._join(texts, device, clip_skip or 0, max_sequence_length or self.t5_tokens)

    @abstractmethod
    def _join(self, texts: list[list[str]], device: Any, skip: int, t5_tokens: int | None) -> TextEmbeddings:
        """Embeddings of one list of B prompts for each of the three encoders."""

    def check_options(self, clip_skip: int | None, max_sequence_length: int | None) -> None:
        """Raises ValueError for options that these encoders have no use for, or out of their range."""
        if clip_skip is not None:
            config: Any = self.encoders[0].config if self.encoders[0] is not None else None
            clip = config is None or config.model_type in ("clip_text_model", "clip")
            if not self.skips_clip or not clip:
                raise ValueError("`clip_skip`: no state of a CLIP text encoder's layers is used by this model.")
            layers = 12 if config is None else config.num_hidden_layers
            if not isinstance(clip_skip, int) or not 0 <= clip_skip < layers:
                raise ValueError(f"`clip_skip`: got {clip_skip!r}, expected a whole number from 0 to {layers - 1}.")
        if max_sequence_length is not None:
            if self.t5_tokens is None:
                raise ValueError("`max_sequence_length`: this model has no T5, the length of whose prompts it sets.")
            if not isinstance(max_sequence_length, int) or not 1 < max_sequence_length <= LONGEST_T5:
                raise ValueError(
                    f"`max_sequence_length`: got {max_sequence_length!r}, expected a whole number from 2 to "
                    f"{LONGEST_T5}."
                )


class OneEncoder(PromptCondition):
    """States of the last layer, normed; `clip_skip` takes those of an earlier one."""

    def _join(self, texts: list[list[str]], device: Any, skip: int, t5_tokens: int | None) -> TextEmbeddings:
        return self.text(0).encode(texts[0], device, skip)


class TwoClips(PromptCondition):
    """SDXL; its refiner has the second encoder alone."""

    @property
    def prompts(self) -> int:
        """The refiner's one encoder reads the first prompt."""
        return 1 if self.encoders[0] is None else 2

    @property
    def missing(self) -> list[str]:
        return ["text_encoder_2"] if self.encoders[1] is None else []

    def in_order(self, t5_tokens: int | None) -> list[TextCondition]:
        """Both read the same tokens; their states lie side by side."""
        return [self.text(1)]

    def _join(self, texts: list[list[str]], device: Any, skip: int, t5_tokens: int | None) -> TextEmbeddings:
        if self.encoders[0] is None:
            return self.text(1).encode(texts[0], device, 1 + skip, normed=False)
        first, second = (self.text(i).encode(texts[i], device, 1 + skip, normed=False) for i in (0, 1))
        return TextEmbeddings(torch.cat([first.tokens, second.tokens], -1), second.pooled)


@dataclass(frozen=True)
class TwoClipsAndT5(PromptCondition):
    """SD3; without its T5, zeros stand in its place."""

    width: int = 4096
    """D of T5 and the backbone"""

    t5_tokens = 256

    @property
    def prompts(self) -> int:
        return 3

    @property
    def missing(self) -> list[str]:
        return _missing_of_two(self.encoders)

    def _join(self, texts: list[list[str]], device: Any, skip: int, t5_tokens: int | None) -> TextEmbeddings:
        first, second = (self.text(i).encode(texts[i], device, 1 + skip, normed=False) for i in (0, 1))
        clips = torch.cat([first.tokens, second.tokens], -1)  # (B, 77, D of both)
        if self.encoders[2] is None:
            t5 = clips.new_zeros(len(clips), t5_tokens or 0, self.width)
        else:
            t5 = self.text(2, t5_tokens).encode(texts[2], device).tokens  # (B, 256, D)
        clips = nn.functional.pad(clips, (0, t5.shape[-1] - clips.shape[-1]))
        return TextEmbeddings(torch.cat([clips, t5], 1), torch.cat([first.pooled, second.pooled], -1))

    def in_order(self, t5_tokens: int | None) -> list[TextCondition]:
        return [self.text(0), *([] if self.encoders[2] is None else [self.text(2, t5_tokens)])]


class ClipAndT5(PromptCondition):
    """FLUX."""

    t5_tokens = 512
    skips_clip = False

    @property
    def prompts(self) -> int:
        return 2

    @property
    def missing(self) -> list[str]:
        return _missing_of_two(self.encoders)

    def _join(self, texts: list[list[str]], device: Any, skip: int, t5_tokens: int | None) -> TextEmbeddings:
        pooled = self.text(0).encode(texts[0], device).pooled
        return TextEmbeddings(self.text(1, t5_tokens).encode(texts[1], device).tokens, pooled)

    def in_order(self, t5_tokens: int | None) -> list[TextCondition]:
        return [self.text(1, t5_tokens)]


def _missing_of_two(encoders: Sequence[nn.Module | None]) -> list[str]:
    return [f"text_encoder{suffix}" for suffix, one in zip(("", "_2"), encoders, strict=False) if one is None]
