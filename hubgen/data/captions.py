"""Which texts a picture may be shown with, and which it is shown with at a place of the endless row.

A picture has a finite number of texts (wordings, orders of its tags, none), so that what encoders make of them can be
kept. Which of them a training step takes is drawn at each use.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from hubgen.data.order import generator_of

TAG = ", "

SYNTHETIC = "synthetic_caption"
"""Column of the captions that a model wrote (`hubgen data recaption`)"""


@dataclass(frozen=True)
class Captions:
    """The texts of all pictures of a data set."""

    wordings: Sequence[Sequence[str]]
    """Of each picture; the first is its caption"""
    variants: float = 0.0
    """How often another wording than the first is taken, where there is one"""
    dropout: float = 0.0
    """How often the text is the empty one, which classifier-free guidance needs"""
    prefix: str = ""
    """Before every text but the empty one, such as a trigger word"""
    shuffles: int = 0
    """Orders in which the tags of a text (parts between commas) are shown; 0 leaves them as they stand"""
    kept_tags: int = 0
    """Tags at the beginning that stay there"""
    seed: int = 0
    """Of the orders"""
    written: Sequence[str | None] = ()
    """Of each picture, the caption that a model wrote, if there is one; of none where `synthetic` is 0"""
    synthetic: float = 0.0
    """How often that one is taken, in the place of the wordings"""

    def all(self, rows: Iterable[int] | None = None) -> list[str]:
        """Every text that can be drawn, once, the empty one among them.

        Args:
            rows: For which pictures; all if not given.
        """
        texts = {
            self._text(wording, order)
            for row in (range(len(self.wordings)) if rows is None else rows)
            for wording in self._wordings(row)
            for order in range(max(self.shuffles, 1))
        }
        return sorted({"", *texts})

    def _wordings(self, row: int) -> list[str]:
        """What may be drawn for a picture."""
        wordings, written = self.wordings[row], self.written[row] if self.synthetic > 0 else None
        found = (
            [] if written is not None and self.synthetic >= 1 else list(wordings[: None if self.variants > 0 else 1])
        )
        return found if written is None else [*found, written]

    def drawn(self, seed: int, place: int, row: int) -> str:
        """The text that the picture in a row is shown with at a place."""
        generator = generator_of(seed, place, "caption")
        other, which, dropped, order = torch.rand(4, generator=generator).tolist()
        if dropped < self.dropout:
            return ""
        if self.synthetic > 0:
            chosen, written = torch.rand((), generator=generator_of(seed, place, "synthetic")), self.written[row]
            if written is not None and chosen < self.synthetic:
                return self._text(written, int(order * max(self.shuffles, 1)))
        wordings = self.wordings[row]
        wording = wordings[0]
        if len(wordings) > 1 and other < self.variants:
            wording = wordings[1 + int(which * (len(wordings) - 1))]
        return self._text(wording, int(order * max(self.shuffles, 1)))

    def first(self, row: int) -> str:
        """The text of a picture that is only looked at: its caption, in its own order."""
        return self.prefix + self.wordings[row][0]

    def _text(self, wording: str, order: int) -> str:
        if not self.shuffles:
            return self.prefix + wording
        tags = [tag.strip() for tag in wording.split(TAG.strip())]
        kept, others = tags[: self.kept_tags], tags[self.kept_tags :]
        # Of the words, so that neither the order of rows nor other pictures move a tag.
        number = int.from_bytes(hashlib.blake2b(wording.encode(), digest_size=6).digest(), "little")
        generator = generator_of(self.seed, number, f"tags {order}")
        shuffled = [others[index] for index in torch.randperm(len(others), generator=generator).tolist()]
        return self.prefix + TAG.join([*kept, *shuffled])
