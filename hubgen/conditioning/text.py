"""Prompts to embeddings: token states for attention and one pooled vector, from any transformers text encoder.

Shapes: B prompts, L tokens (always the maximum, so that a prompt's embedding does not depend on its neighbours),
D features of a token, P features of the pooled vector.
"""

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hubgen.checks import whole

logger = logging.getLogger(__name__)

# Encoders trained by contrast with images: their pooled output is the sentence. Elsewhere (BERT's is trained on "is
# this the next sentence?", T5 has none) the mean over the tokens says more (sentence-transformers, 1908.10084).
POOLS_ITSELF = ("clip", "siglip", "align", "altclip")
# The encoders of Stable Diffusion and FLUX, whose backbones were trained on the states of all tokens, padding included,
# and, unless an encoder's config says otherwise, with padding attended to.
SHOWS_PADDING = ("clip_text_model", "clip", "t5", "umt5")
WORD = re.compile(r"<[^<>\s]+>(?:_\d+)?|\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class TextEmbeddings:
    """What a text encoder makes of B prompts."""

    tokens: torch.Tensor
    """(B, L, D)"""
    pooled: torch.Tensor
    """(B, P)"""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | torch.Tensor) -> "TextEmbeddings":
        """The embeddings of some of the prompts, chosen as rows of a tensor are."""
        return TextEmbeddings(self.tokens[index], self.pooled[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TextEmbeddings":
        """The same on another device or in another floating-point type."""
        return TextEmbeddings(self.tokens.to(device=device, dtype=dtype), self.pooled.to(device=device, dtype=dtype))

    def repeat_interleave(self, count: int) -> "TextEmbeddings":
        """Every prompt `count` times in a row: (B * count, ...)."""
        return TextEmbeddings(self.tokens.repeat_interleave(count, 0), self.pooled.repeat_interleave(count, 0))

    @staticmethod
    def cat(parts: list["TextEmbeddings"]) -> "TextEmbeddings":
        """The prompts of all parts in one batch."""
        return TextEmbeddings(torch.cat([part.tokens for part in parts]), torch.cat([part.pooled for part in parts]))


class TextCondition:
    """Turns prompts into embeddings by a frozen text encoder and its tokenizer.

    Embeddings come as the encoder gives them, not normalised (MiniLM: standard deviation about 0.5 for tokens and 0.35
    pooled). The pooled vector is the model's own where it was trained to be one (CLIP, projected where the model has a
    projection), else the mean over the prompt's tokens; for sentence-transformers models its direction is the sentence
    embedding. The empty prompt is the unconditional one, embedded as any other. Tokens of padding are zeros, so that a
    backbone without masks is not shown what the encoder makes of them; but CLIP's and T5's are left as they come, as
    Stable Diffusion and FLUX have them. Learned words of several vectors are read as all of their tokens
    (`spelled_out`).

    Args:
        text_encoder: A transformers encoder: BERT and its kin, CLIP's text models, `T5EncoderModel`, ...
        tokenizer: Its tokenizer.
        max_length: Tokens L of a prompt, the encoder's special ones counted. `None` takes `model_max_length` of the
            tokenizer, which is saved with it: a model trained on short prompts keeps its length there.

    Raises:
        ValueError: `max_length` is not a whole number that leaves room for a word, is more than the encoder has
            positions for, or is `None` where nothing tells it.
    """

    def __init__(self, text_encoder: nn.Module, tokenizer: Any, max_length: int | None = None):
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.special_tokens = tokenizer.num_special_tokens_to_add()
        self.max_length = self._check_max_length(max_length)

    def _check_max_length(self, max_length: int | None) -> int:
        # T5 attends by relative position and names no limit; an unset length of a tokenizer is astronomical.
        positions = getattr(self.text_encoder.config, "max_position_embeddings", None)
        if max_length is None:
            max_length = min(self.tokenizer.model_max_length, positions or self.tokenizer.model_max_length)
            if max_length > 100_000:
                raise ValueError(
                    "`max_length`: got None, expected a number: neither tokenizer nor text encoder has a limit."
                )
        max_length = whole("max_length", max_length, self.special_tokens + 1)
        if positions is not None and max_length > positions:
            raise ValueError(
                f"`max_length`: got {max_length}, expected at most the text encoder's {positions} positions."
            )
        return max_length

    @property
    def device(self) -> torch.device:
        """Where the encoder's weights lie."""
        return next(self.text_encoder.parameters()).device

    def encode(
        self,
        prompts: list[str],
        device: torch.device | str | None = None,
        skip: int = 0,
        normed: bool = True,
    ) -> TextEmbeddings:
        """Embeds prompts, in the encoder's dtype; gradients as the caller's context has them.

        A prompt of more than `max_length` tokens is cut at the end, and a warning tells what was cut.

        Args:
            prompts: B prompts.
            device: Where the encoder runs; `None` for where its weights lie (offloaded weights move by hooks).
            skip: The token states are those before the last `skip` layers (CLIP only).
            normed: Whether such states go through the norm that follows the last layer.

        Raises:
            ValueError: `prompts` is not a non-empty list of strings.
        """
        if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"`prompts`: got {prompts!r}, expected a non-empty list of strings.")
        prompts = spelled_out(prompts, self.tokenizer)
        for prompt in prompts:
            self._warn_of_truncation(prompt)
        config, options = self.text_encoder.config, {}
        shows_padding = config.model_type in SHOWS_PADDING
        # Padding that nothing sees is not computed either.
        short = not shows_padding and self.tokenizer.padding_side == "right"
        batch = self.tokenizer(
            prompts,
            padding="longest" if short else "max_length",
            max_length=self.max_length,
            truncation=True,
            return_tensors="pt",
        )
        batch = batch.to(self.device if device is None else device)
        mask = batch["attention_mask"].bool()[:, :, None]  # (B, L, 1)
        if not shows_padding or getattr(config, "use_attention_mask", False):
            options["attention_mask"] = batch["attention_mask"]
        if skip:
            options["output_hidden_states"] = True
        output = self.text_encoder(input_ids=batch["input_ids"], **options)

        tokens = output.hidden_states[-1 - skip] if skip else output.last_hidden_state  # (B, L, D)
        if skip and normed:
            # transformers before 5 has the layers one level deeper
            tokens = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm(tokens)
        if not shows_padding:
            tokens = tokens.masked_fill(~mask, 0.0)
        pooled = self._own_pooled(output)
        if pooled is None:
            pooled = tokens.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)  # (B, D)
        return TextEmbeddings(nn.functional.pad(tokens, (0, 0, 0, self.max_length - tokens.shape[1])), pooled)

    def _own_pooled(self, output: Any) -> torch.Tensor | None:
        projected = getattr(output, "text_embeds", None)
        if projected is not None:
            return projected
        if any(name in self.text_encoder.config.model_type for name in POOLS_ITSELF):
            return output.pooler_output
        return None

    def word_places(self, prompt: str) -> dict[str, tuple[int, ...]]:
        """Where the tokens of each word of a prompt lie among its L; words beyond them have none.

        A word is letters and digits, also with an apostrophe or a hyphen within, or a learned `<word>`. One that comes
        twice has all of its places.

        Raises:
            ValueError: The tokenizer does not tell which letters a token stands for.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(f"`tokenizer`: got a {type(self.tokenizer).__name__} that knows no offsets.")
        (prompt,) = spelled_out([prompt], self.tokenizer)
        read = self.tokenizer(
            prompt, max_length=self.max_length, truncation=True, return_offsets_mapping=True, verbose=False
        )
        places: dict[str, tuple[int, ...]] = {}
        for word in WORD.finditer(prompt):
            own = (
                place
                for place, (begin, end) in enumerate(read["offset_mapping"])
                if begin < word.end() and end > word.start()
            )
            places[word[0]] = (*places.get(word[0], ()), *own)
        return places

    def not_read(self, prompt: str) -> str | None:
        """What of a prompt is beyond the tokens that are read, in words; `None` where all of it is read."""
        (prompt,) = spelled_out([prompt], self.tokenizer)
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.max_length - self.special_tokens
        if len(ids) <= room:
            return None
        # At most so many tokens are spelled out: a prompt may be a book.
        cut = self.tokenizer.decode(ids[room : room + 50]) + (" ..." if len(ids) > room + 50 else "")
        return f"The prompt has {len(ids)} tokens, but the model reads {room}. Not read: {cut!r}"

    def _warn_of_truncation(self, prompt: str) -> None:
        warning = self.not_read(prompt)
        if warning is not None:
            logger.warning("%s", warning)


def spelled_out(prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """Prompts with all tokens of each learned word that has several (`hubgen.adaptation.textual_inversion`).

    `a <cat>` becomes `a <cat> <cat>_1 <cat>_2` where the tokenizer was given these three; what is spelled out already
    stays as it is.
    """
    added = tokenizer.get_added_vocab()
    words = {token: " ".join(tokens) for token in added if len(tokens := tokens_of(token, added)) > 1}
    if not words:
        return list(prompts)
    longest_first = sorted({*added, *words.values()}, key=len, reverse=True)
    known = re.compile("|".join(re.escape(text) for text in longest_first))
    return [known.sub(lambda match: words.get(match[0], match[0]), prompt) for prompt in prompts]


def tokens_of(token: str, added: Collection[str]) -> list[str]:
    """The tokens of a learned word, of those that were added: `<cat>`, `<cat>_1`, ..."""
    tokens = [token]
    while f"{token}_{len(tokens)}" in added:
        tokens.append(f"{token}_{len(tokens)}")
    return tokens
