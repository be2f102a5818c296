"""Further pictures of emoji, so that a model learns what varies and what does not: of a thing, and of a colour.

    mirrored     left and right changed, where no direction, letter or order is in the picture
    recoloured   of one hue, turned to seven named ones; the caption names it
    frame        of the animated emoji, as far apart as they are
    flat         by the same artists without light and shadow; the caption says so

Only the emoji that are trained on have variants.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from hubgen.data.colours import COLOURS, HUES, colour_shares, colour_words, dominant_hue, recoloured
from hubgen.data.emoji_captions import NEVER_HELD_OUT, noun_phrase, words_of
from hubgen.data.emoji_sources import ANIMATED, ASSETS, FLAT, Emoji, assets, drawn_svg, frames_of, key_of
from hubgen.data.packages import NpmPackage
from hubgen.data.pictures import on_white, pad_to_square, scale

COMPARED_SIDE = 64
"""Pixels at which pictures are compared"""
SAME_PICTURE = 8.0
"""Root mean square of the difference, of 255 at `COMPARED_SIDE`, below which two pictures are the same. In the Fluent
set that joins "pilot" and "man pilot" (7.4), of which one is a retouched copy of the other, and keeps apart faces that
differ by the mouth (9 and more), clock faces (15 and more) and flags (14 and more)"""
MOST_FRAMES = 4
"""Of an animation"""
FRAMES_APART = 12.0
"""The same of two frames of an animation, at least"""
FRAME_STEP = 3
"""Each third frame of an animation is looked at"""
LEAST_CONCENTRATION, LEAST_SHARE = 0.8, 0.3
"""Of the hue of a picture that is recoloured"""
LEAST_SHOWN = 0.25
"""Of the named colour among the drawn pixels of a recoloured picture"""
OTHER_HUE = 25.0
"""Degrees at least that a hue is turned by"""
LEAST_COLOURS = 3
"""That an emoji keeps in training where one of its colours is held out"""

# A mirrored picture of these is another thing, or holds a mirrored letter.
_DIRECTED_GROUPS = frozenset(("flags", "symbols"))
_DIRECTED_SUBGROUPS = frozenset(("time", "money", "book-paper", "writing"))
_DIRECTED = re.compile(
    r"\b(?:left|right|clockwise|east|west|o'clock|thirty|sign|button|calendar|clock|watch|compass|input|chart|badge"
    r"|speech|ticket|receipt|newspaper|mahjong|joker|die|keyboard|timer|ATM|car|taxi|moon|scroll|post|stop)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Variant:
    """A further picture of an emoji."""

    emoji: Emoji
    kind: str
    """One of `VARIANTS`"""
    name: str
    """What file names say of it"""
    picture: Image.Image
    """RGB, square, on white"""
    text: str
    captions: tuple[str, ...]
    """Wordings, `text` first; none where they are those of the emoji itself"""
    colour: str | None = None
    """That it was turned to"""

    @property
    def file_stem(self) -> str:
        """What tells it from all others."""
        return f"{self.emoji.hexcode}-{self.name}"


def squared(picture: Image.Image, size: int) -> Image.Image:
    """RGB on white, padded to a square, of `size` pixels."""
    return scale(pad_to_square(on_white(picture)), size)


# ---- mirrored ----


def may_be_mirrored(emoji: Emoji) -> bool:
    """Whether the mirrored picture is one of the same thing."""
    directed = emoji.group in _DIRECTED_GROUPS or emoji.subgroup in _DIRECTED_SUBGROUPS
    return not directed and _DIRECTED.search(emoji.label) is None


def mirrored(emoji: Emoji, picture: Image.Image) -> Iterator[Variant]:
    """The mirrored picture; none where it looks as before."""
    other = ImageOps.mirror(picture)
    if may_be_mirrored(emoji) and difference(picture, other) >= FRAMES_APART:
        yield Variant(emoji, "mirrored", "mirrored", other, emoji.label, ())


# ---- recoloured ----


def recoloured_text(label: str, colour: str) -> str:
    """The label with another colour: "green apple" to "red apple", "crab" to "red crab"."""
    words = [word for word in label.split() if word.lower() not in COLOURS]
    return " ".join([colour, *words])


def may_be_recoloured(emoji: Emoji) -> bool:
    """Whether a colour before its label says what another hue makes of it."""
    plain = re.fullmatch(r"[a-z][a-z' -]*", emoji.label) is not None
    named = colour_words(emoji.label)
    return plain and emoji.group != "flags" and emoji.subgroup not in NEVER_HELD_OUT and len(named) < 2


def in_other_colours(emoji: Emoji, picture: Image.Image, look: str, known: frozenset[frozenset[str]]) -> list[Variant]:
    """The picture in the colours that it can be turned to, and that then show.

    Args:
        emoji: The emoji.
        picture: RGB, on white.
        look: Of the style, in captions.
        known: Words of all labels: what is an emoji of its own is not made of another.
    """
    if not may_be_recoloured(emoji):
        return []
    pixels = np.asarray(picture)
    hue = dominant_hue(pixels)
    if hue.concentration < LEAST_CONCENTRATION or hue.share < LEAST_SHARE:
        return []
    found = []
    for colour, angle in HUES.items():
        turn = abs((angle - np.degrees(hue.angle) + 180) % 360 - 180)
        text = recoloured_text(emoji.label, colour)
        if turn < OTHER_HUE or words_of(text) in known or text == emoji.label:
            continue
        other = recoloured(pixels, hue, colour)
        values = torch.from_numpy(other).permute(2, 0, 1)[None].float() / 127.5 - 1
        if colour_shares(values)[0, COLOURS.index(colour)] < LEAST_SHOWN:
            continue
        phrase = noun_phrase(text)
        captions = (text, phrase, f"an emoji of {phrase}", f"a {look} of {phrase}")
        found.append(Variant(emoji, "recoloured", colour, Image.fromarray(other), text, captions, colour))
    return found


def hold_out_combinations(
    by_emoji: Sequence[Sequence[Variant]], count: int, splits: int, seed: int
) -> list[list[Variant]]:
    """Colours of emoji that training never shows together, of as many emoji for each split, one colour of each.

    Colours take turns, so that each is held out about as often as the others, and of no more than a third of its
    things.

    Args:
        by_emoji: The recoloured pictures of each emoji.
        count: Of each split, at most.
        splits: How many.
        seed: Of the choice.
    """
    rows = [list(variants) for variants in by_emoji if len(variants) > LEAST_COLOURS]
    random.Random(seed).shuffle(rows)
    total = Counter(one.name for variants in by_emoji for one in variants)
    often: Counter[str] = Counter()
    chosen: list[Variant] = []
    for variants in rows:
        possible = [one for one in variants if often[one.name] < total[one.name] // 3]
        if possible and len(chosen) < count * splits:
            chosen.append(min(possible, key=lambda one: often[one.name]))
            often[chosen[-1].name] += 1
    return [chosen[split::splits] for split in range(splits)]


# ---- frames and flat pictures ----


def frames(emoji: Emoji, picture: Image.Image, animation: Iterable[Image.Image]) -> Iterator[Variant]:
    """Frames that are far from the picture and from each other, the farthest first."""
    shown = [squared(frame, picture.width) for frame in animation]
    pixels = [compared(one) for one in shown]
    if not pixels:
        return
    nearest = np.array([rms(compared(picture), one) for one in pixels])
    for number in range(1, MOST_FRAMES + 1):
        best = int(nearest.argmax())
        if nearest[best] < FRAMES_APART:
            return
        yield Variant(emoji, "frame", f"frame-{number}", shown[best], emoji.label, ())
        nearest = np.minimum(nearest, [rms(pixels[best], one) for one in pixels])


def flat(emoji: Emoji, picture: Image.Image) -> Variant:
    """The picture without light and shadow; its captions say so, so that those that do not mean the others."""
    phrase = noun_phrase(emoji.label)
    captions = (f"flat {emoji.label}", f"a flat icon of {phrase}", f"{emoji.label}, flat", f"a flat emoji of {phrase}")
    return Variant(emoji, "flat", "flat", picture, captions[0], captions)


# ---- pictures side by side ----


def compared(picture: Image.Image) -> np.ndarray:
    """Values of a picture at the size at which it is compared."""
    return np.asarray(scale(picture, COMPARED_SIDE), dtype=np.float32).reshape(-1)


def rms(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of a difference."""
    return float(np.sqrt(np.mean((one - other) ** 2)))


def difference(one: Image.Image, other: Image.Image) -> float:
    """Root mean square of the difference of two pictures, of 255."""
    return rms(compared(one), compared(other))


class Pictures:
    """Pictures that others are told from.

    Args:
        pictures: RGB and square.
    """

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self.values = np.stack([compared(one) for one in pictures]) if pictures else None  # (N, P)

    def hold(self, picture: Image.Image, least: float) -> bool:
        """Whether a picture differs from one of them by less than `least`."""
        if self.values is None:
            return False
        squares = ((self.values - compared(picture)) ** 2).mean(1)
        return bool(np.sqrt(squares.min()) < least)


# ---- all of them ----


@dataclass(frozen=True)
class Material:
    """What variants are made of."""

    train: Sequence[tuple[Emoji, Image.Image]]
    """The emoji that are trained on, with their pictures"""
    held: Sequence[Image.Image]
    """Pictures of the others"""
    labels: Sequence[str]
    """Of all emoji of the source"""
    look: str
    """Of the style, in captions"""
    packages: Mapping[NpmPackage, Path]
    """Where the archives are that `packages_of` names"""
    progress: bool

    def by_key(self) -> dict[str, tuple[Emoji, Image.Image]]:
        """Those that are trained on, by their code points as packages name them."""
        return {key_of(emoji.hexcode): (emoji, picture) for emoji, picture in self.train}


def packages_of(kinds: Sequence[str]) -> list[NpmPackage]:
    """The packages that variants are made of, beside the pictures themselves."""
    return [*(ANIMATED if "frame" in kinds else ()), *([FLAT] if "flat" in kinds else [])]


def variants_of(kind: str, material: Material) -> Iterator[Variant]:
    """The variants of a kind; those that look like a picture that is held out are left out."""
    held = Pictures(material.held)
    for one in MAKERS[kind](material):
        if not held.hold(one.picture, SAME_PICTURE):
            yield one


def _mirrored(material: Material) -> Iterator[Variant]:
    for emoji, picture in material.train:
        yield from mirrored(emoji, picture)


def _recoloured(material: Material) -> Iterator[Variant]:
    known = frozenset(words_of(label) for label in material.labels)
    for emoji, picture in tqdm(material.train, desc="recolour", disable=not material.progress):
        yield from in_other_colours(emoji, picture, material.look, known)


def _frames(material: Material) -> Iterator[Variant]:
    wanted = material.by_key()
    for package in ANIMATED:
        members = assets(package, material.packages[package], ASSETS, (".webp",))
        for key, name, content in tqdm(members, desc=f"frames of {package.name}", disable=not material.progress):
            if key in wanted:
                yield from frames(*wanted[key], frames_of(content, name, FRAME_STEP))


def _flat(material: Material) -> Iterator[Variant]:
    wanted = material.by_key()
    for key, name, content in assets(FLAT, material.packages[FLAT], ASSETS, (".svg",)):
        if key in wanted:
            emoji, picture = wanted[key]
            yield flat(emoji, squared(drawn_svg(content, name, picture.width), picture.width))


MAKERS: dict[str, Callable[[Material], Iterator[Variant]]] = {
    "mirrored": _mirrored,
    "recoloured": _recoloured,
    "frame": _frames,
    "flat": _flat,
}
VARIANTS = tuple(MAKERS)
RULES = {
    "mirrored": "left and right changed, of things without a direction, letter or order",
    "recoloured": "pictures in which one hue prevails (the mean of the pixels' hues, weighted by chroma in Oklch, has "
    f"a length of {LEAST_CONCENTRATION:g} or more), turned to {', '.join(HUES)}, and as light as these are; kept where "
    f"the colour is {LEAST_SHOWN:.0%} of what is drawn, and no emoji bears that name",
    "frame": f"at most {MOST_FRAMES} of the animated emoji, {FRAMES_APART:g} of 255 or more from the picture and from "
    "each other (root mean square)",
    "flat": "drawn without light and shadow; their captions say flat",
}
"""How each kind is made, for the card"""
