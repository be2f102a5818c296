"""Words that are learned beside an adapter: new rows of the text encoders' tables (textual inversion, 2208.01618)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubgen.adaptation.textual_inversion import USUAL, EmbeddingError, LearnedWord, Reader, save_embeddings
from hubgen.conditioning.text import tokens_of
from hubgen.training.kit.parse import SettingsError

KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "t5": "t5xxl"}
"""What files for several encoders call each"""


class NewRows(nn.Module):
    """A table whose last rows learn, and no others.

    Args:
        table: The whole table, frozen.
        count: Of the rows that learn.
    """

    def __init__(self, table: nn.Embedding, count: int) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.first = table.num_embeddings - count
        self.rows = nn.Parameter(table.weight[self.first :].detach().float().clone())

    @property
    def weight(self) -> torch.Tensor:
        """All rows."""
        return torch.cat([self.table.weight[: self.first], self.rows.to(self.table.weight)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of tokens, (..., D)."""
        old = self.table(ids.clamp(max=self.first - 1))
        new = self.rows[(ids - self.first).clamp(min=0)]
        return torch.where((ids >= self.first)[..., None], new.to(old), old)


class NewWords:
    """Words that all text encoders of a pipeline are to learn.

    Args:
        pipe: Whose tokenizers and tables get them.
        words: Such as <zog>.
        vectors: Rows of each.
        start: A known word whose meaning they begin with; the mean of all rows if it is empty.

    Raises:
        SettingsError: A word is known already, or the start is none.
    """

    def __init__(self, pipe: Any, words: Sequence[str], vectors: int, start: str) -> None:
        self.words = list(words)
        encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        self.readers = [
            Reader(name, encoder, getattr(pipe, name.replace("text_encoder", "tokenizer")))
            for name, encoder in encoders.items()
            if encoder is not None
        ]
        for reader in self.readers:
            beginning = self._beginning(reader, start)
            for word in self.words:
                made = LearnedWord(word, beginning.repeat(vectors, 1), None, "setting 'adapter.new_words'")
                try:
                    reader.check(made)
                except EmbeddingError as error:
                    raise SettingsError(str(error)) from error
                reader.add(made)
            count = len(self.words) * vectors
            if reader.table.num_embeddings != len(reader.tokenizer):
                raise SettingsError(
                    f"setting 'adapter.new_words': the table of {reader.name} has {reader.table.num_embeddings} rows "
                    f"for {len(reader.tokenizer)} tokens; expected as many, so that the last rows are the new words'."
                )
            reader.encoder.set_input_embeddings(NewRows(reader.table, count))

    @staticmethod
    @torch.no_grad()
    def _beginning(reader: Reader, start: str) -> torch.Tensor:
        """(1, D), what new rows begin as."""
        weight = reader.table.weight
        if not start:
            return weight.float().mean(0, keepdim=True)
        ids = reader.tokenizer(start, add_special_tokens=False)["input_ids"]
        if not ids or (reader.tokenizer.unk_token_id in ids and reader.tokenizer.unk_token != start):
            raise SettingsError(
                f"setting 'adapter.word_start': got {start!r}, expected words that {reader.name} knows."
            )
        return weight[ids].float().mean(0, keepdim=True)

    @property
    def parts(self) -> list[str]:
        """The components that learn them."""
        return [reader.name for reader in self.readers]

    def learned(self) -> dict[str, dict[str, torch.Tensor]]:
        """The vectors (n, D) of each word, by component."""
        found: dict[str, dict[str, torch.Tensor]] = {word: {} for word in self.words}
        for reader in self.readers:
            added = reader.learned()
            weight = reader.table.weight.detach()
            for word in self.words:
                ids = [added[token] for token in tokens_of(word, added)]
                found[word]["t5" if reader.part == "t5" else reader.name] = weight[ids]
        return found

    def save(self, folder: Path) -> list[str]:
        """Writes a file for each word in diffusers' layout; their names."""
        names = []
        for word, vectors in self.learned().items():
            name = (
                USUAL if len(self.words) == 1 else f"{re.sub(r'[^A-Za-z0-9_-]', '', word) or 'word'}.embeds.safetensors"
            )
            own: Any = next(iter(vectors.values()))
            if len(vectors) > 1:
                own = {KEYS[part]: value for part, value in vectors.items()}
            save_embeddings(folder / name, {word: own})
            names.append(name)
        return names
