"""Captions of the emoji data: several wordings of each label, and the captions held out from training."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hubgen.data.colours import COLOURS
from hubgen.data.errors import DataError

COLOUR_WORDS = frozenset(COLOURS)

# Labels of these kinds name something that the words alone do not describe (a country's flag, a key's sign), so that
# no model could draw them unseen; a family's members are the exception: their labels differ only by counts.
NEVER_HELD_OUT = frozenset(
    ("country-flag", "subdivision-flag", "keycap", "alphanum", "zodiac", "family", "av-symbol", "currency", "religion")
)

# Compounds whose picture does not follow from their words.
_NOT_LITERAL = frozenset(
    ("hot dog", "moon cake", "high voltage", "milky way", "teddy bear", "roller coaster", "lady beetle")
)

_PREPOSITION = re.compile(
    r"\s(?:with|without|of|in|on|for|by|behind|under|over|at|from|to|off|into|through|pointing|curving|and)\s"
)
_MASS_NOUNS = frozenset(
    """bread cheese rice milk honey butter salt ice money mail music laughter water luggage bacon sushi tempura
    spaghetti
    ginger garlic broccoli popcorn chocolate lacrosse rain snow lightning fog fire hockey tennis badminton golf skis
    poo camping teeth deer bison people men women children weather clothing makeup hair foot luggage fondue curry cream
    o'clock dna up skiing smoking entry shellfish seaweed paper soap thread yarn wood dolls wine cinema sound lotion
    baseball softball basketball football volleyball bowling karate cricket pizza watermelon sake mahjong maracas
    nazar multiply divide infinity customs information copyright registered radioactive prohibited warning wireless om
    sleeping rising""".split()
)
_NOT_AFTER_ARTICLE = re.compile(
    r"^(?:no|mount|tokyo|japanese symbol|input|crossed|folded|men|women|people|ok|play|not)\b"
)
_VOWEL_SOUND = re.compile(r"^(?:a|e(?!uro|we)|i|o(?!ne)|u(?!ni|k|s|f)|hour|x-|NG\b|SOS\b)", re.IGNORECASE)
_PLAIN_TAG = re.compile(r"^[a-z]{3,}(?:[ -][a-z]{2,})*$")
_SLANG = frozenset(
    "yolo xoxo ily lol omg rofl haha hahaha lmao xd brb smh fml bae ikr imo nvm tgif ttyl yum omw af".split()
)


def clean_label(label: str) -> str:
    """The label with straight quotes and single spaces."""
    for curly, straight in (("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"')):
        label = label.replace(curly, straight)
    return " ".join(label.split())


def words_of(caption: str) -> frozenset[str]:
    """Words of a caption in lower case, as runs of letters and digits: "man: red hair" → man, red, hair."""
    return frozenset(re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower()))


def _countable_words(caption: str) -> frozenset[str]:
    """Words as letters and digits bound them, and words as blanks do.

    "eight" inside "eight-thirty" is no word to a reader who splits at blanks: a held-out word has to occur in both
    senses.
    """
    return words_of(caption) | frozenset(f" {word}" for word in caption.lower().split())


def noun_phrase(text: str) -> str:
    """The label as it stands in a sentence: "blue heart" → "a blue heart", "grapes" → "grapes".

    English articles by rule of thumb: where the rules are unsure the label stays bare.
    """
    kind, _, rest = text.partition(": ")
    if rest:
        return _labelled_phrase(kind, rest)
    head = _PREPOSITION.split(f" {text} ", maxsplit=1)[0].strip() or text
    last = head.split()[-1].lower()
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is", "lens", "'s", "compass", "cactus"))
    proper = text[0].isupper() and " " not in text
    joined = re.search(r"\S and \S", text) is not None and " with " not in text
    if (
        plural
        or proper
        or last.endswith("-thirty")
        or joined
        or last in _MASS_NOUNS
        or _NOT_AFTER_ARTICLE.match(text.lower())
    ):
        return text
    return f"{_article(text)} {text}"


def _labelled_phrase(kind: str, rest: str) -> str:
    """CLDR labels with a colon: kind and detail."""
    if kind == "flag":
        return f"the flag of {rest}"
    if kind == "keycap":
        return f"a key with {rest} on it"
    if kind in ("family", "kiss", "couple with heart"):
        members = rest.split(", ")
        listed = " and ".join([", ".join(members[:-1]), members[-1]]) if len(members) > 1 else rest
        return f"a {kind} of {listed}" if kind != "couple with heart" else f"a couple, {listed}, with a heart"
    if rest == "bald":
        return f"a bald {kind}"
    return f"a {kind} with a beard" if rest == "beard" else f"a {kind} with {rest}"


def _article(text: str) -> str:
    return "an" if _VOWEL_SOUND.match(text) else "a"


def wordings(text: str, tags: Sequence[str], look: str) -> list[str]:
    """Three to five wordings of one picture, the label first; `look` names the style ("3D icon")."""
    phrase = noun_phrase(text)
    said = words_of(text)
    fresh = [
        tag
        for tag in tags
        if _PLAIN_TAG.match(tag) and tag not in _SLANG and not any(_same_stem(tag, word) for word in said)
    ]
    options = [text, phrase, f"an emoji of {phrase}", f"a {look} of {phrase}"]
    if fresh:
        options.append(", ".join([text, *fresh[:2]]))
    return list(dict.fromkeys(options))


def _same_stem(tag: str, word: str) -> bool:
    stem = min(len(tag), len(word), 5)
    return stem > 2 and tag[:stem] == word[:stem]


@dataclass(frozen=True)
class Candidate:
    """What the split looks at: the caption, its CLDR subgroup, and whether the picture stands apart from all others."""

    text: str
    subgroup: str
    distinct: bool


def choose_held_out(candidates: Sequence[Candidate], count: int, seed: int) -> list[int]:
    """Indices of `count` captions to hold out, in ascending order; the same for the same candidates and seed.

    A held-out caption has at least two words, each of which stays in at least two training captions; of no word are
    more than a third of the captions held out (never two of three), and no subgroup gives more than its share. About a
    quarter of the captions bear a colour word where there are as many. Raises `DataError` where the data do not allow
    so many.
    """
    words = [_countable_words(candidate.text) for candidate in candidates]
    total = Counter(word for caption in words for word in caption)
    held: Counter[str] = Counter()
    from_subgroup: Counter[str] = Counter()
    chosen: list[int] = []
    order = list(range(len(candidates)))
    random.Random(seed).shuffle(order)

    def fits(index: int, share: int) -> bool:
        candidate = candidates[index]
        return (
            candidate.distinct
            and candidate.subgroup not in NEVER_HELD_OUT
            and candidate.text not in _NOT_LITERAL
            and len(candidate.text.split()) >= 2
            and not any(character.isdigit() for character in candidate.text)
            and from_subgroup[candidate.subgroup] < share
            and all(
                total[word] - held[word] > 2 and held[word] + 1 <= max(1, total[word] // 3) for word in words[index]
            )
        )

    def take(indices: list[int], quota: int, share: int) -> None:
        for index in indices:
            if len(chosen) >= quota:
                return
            if index not in chosen and fits(index, share):
                chosen.append(index)
                held.update(words[index])
                from_subgroup[candidates[index].subgroup] += 1

    take([index for index in order if words[index] & COLOUR_WORDS], quota=count // 4, share=max(1, count // 8))
    take(order, quota=count, share=max(1, count // 16))
    take(order, quota=count, share=count)
    if len(chosen) < count:
        raise DataError(
            f"held_out: {count} captions asked for, but only {len(chosen)} of {len(candidates)} can be held out so "
            "that each of their words stays in two training captions"
        )
    return sorted(chosen)
