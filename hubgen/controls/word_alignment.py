"""Which tokens of an edited prompt take over the attention of which of the source's (Prompt-to-Prompt, 2208.01626).

    replaced(source, target, length)    word for word, for prompts of as many words (the paper's word swap)
    refined(source, target, length)     prompts aligned by Needleman and Wunsch; what is new in the target stays its own

Both give what the paper's code gives, entry by entry, its rule for the tokens behind the last replaced word included.

Shapes: S text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from hubgen.conditioning.text import TextCondition, spelled_out


@dataclass(frozen=True)
class Reading:
    """A prompt as a text encoder reads it."""

    prompt: str
    ids: Sequence[int]
    """Its tokens, those of begin and end included, cut where the encoder reads no further"""
    words: Sequence[str]
    """What stands between its spaces"""
    places: Sequence[Sequence[int]]
    """Of each word, where its tokens lie; none for a word that is cut off"""

    @classmethod
    def of(cls, text: TextCondition, prompt: str) -> Self:
        """Reads a prompt; a learned word is one word, however many tokens it has.

        Raises:
            ValueError: The tokenizer does not tell which letters a token stands for.
        """
        if not text.tokenizer.is_fast:
            raise ValueError(f"`tokenizer`: got a {type(text.tokenizer).__name__} that knows no offsets.")
        words = prompt.split()
        (spelled,) = spelled_out([prompt], text.tokenizer)
        read = text.tokenizer(
            spelled, max_length=text.max_length, truncation=True, return_offsets_mapping=True, verbose=False
        )
        places, begin = [], 0
        for word in spelled_out(words, text.tokenizer) if words else []:
            begin = spelled.index(word, begin)
            end = begin + len(word)
            places.append([i for i, (low, high) in enumerate(read["offset_mapping"]) if low < end and high > begin])
            begin = end
        return cls(prompt, list(read["input_ids"]), words, places)


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the attention to a source's tokens becomes that to a target's: maps (..., S) @ `mapper`, where `known`."""

    mapper: torch.Tensor
    """(S, S): how much of the attention to a token of the source, by rows, goes to one of the target, by columns"""
    known: torch.Tensor
    """(S,) of truth values: which of the target's tokens have a counterpart"""


def unchanged(length: int) -> Alignment:
    """Every token is its own counterpart."""
    return Alignment(torch.eye(length), torch.ones(length, dtype=torch.bool))


def replaced(source: Reading, target: Reading, length: int) -> Alignment:
    """Words of the target take the place of those of the source with the same number (2208.01626, "word swap").

    A word of as many tokens takes over their attention one by one, another one an equal share of all of it. Behind the
    last replaced word the paper's code goes by the number of the token, also where the new word is longer or shorter.

    Args:
        source: The source prompt.
        target: The edited one.
        length: S.

    Raises:
        ValueError: They differ in their numbers of words.
    """
    if len(source.words) != len(target.words):
        raise ValueError(
            f"`prompt`: got {len(target.words)} words in {target.prompt!r}, expected {len(source.words)} as in "
            f"{source.prompt!r}: the edit 'replace' swaps word for word; 'refine' takes prompts of any length."
        )
    mapper = torch.zeros(length, length)
    here = there = 0  # tokens of source and target that are done
    for number, (old, new) in enumerate(zip(source.places, target.places, strict=True)):
        if source.words[number] == target.words[number] or not old or not new:
            continue
        while here < old[0] and there < length:
            mapper[here, there] = 1
            here, there = here + 1, there + 1
        if len(old) == len(new):
            mapper[old, new] = 1
        else:
            mapper[old[0] : old[-1] + 1, new] = 1 / len(new)
        here, there = here + len(old), there + len(new)
    rest = torch.arange(there, there + max(length - max(here, there), 0))
    mapper[rest, rest] = 1
    return Alignment(mapper, torch.ones(length, dtype=torch.bool))


def refined(source: Reading, target: Reading, length: int) -> Alignment:
    """The prompts' tokens are aligned, and those that are in both keep their attention (2208.01626, "adding a phrase").

    The alignment is Needleman's and Wunsch's with 0 for a gap, 1 for equal tokens and -1 for others; of several best
    ones, from the end on, a new token of the target comes first, then one that the source alone has.

    Args:
        source: The source prompt.
        target: The edited one.
        length: S.
    """
    score = [[0] * (len(target.ids) + 1) for _ in range(len(source.ids) + 1)]
    for i, old in enumerate(source.ids, 1):
        for j, new in enumerate(target.ids, 1):
            match = score[i - 1][j - 1] + (1 if old == new else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], match)
    mapper, known = torch.eye(length), torch.ones(length, dtype=torch.bool)
    mapper[:, : len(target.ids)] = 0
    i, j = len(source.ids), len(target.ids)
    while j:
        if i == 0 or score[i][j] == score[i][j - 1]:
            j -= 1
            known[j] = False
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            mapper[i, j] = 1
    return Alignment(mapper, known)
