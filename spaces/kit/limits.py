"""What a page asks of strangers: every limit in one record, with the checks that say in words what is wrong.

Widgets keep their limits in the browser alone; whoever calls the server by hand sends what they like. So every value
passes here, whatever a widget has said about it before.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubgen.checks import is_number, is_whole
from hubgen.hub.provenance import LARGEST_SEED

PREFIX = "HUBGEN_LIMIT_"


class Refused(ValueError):
    """What was asked for cannot be had; the message is shown to whoever asked, and names no file and no secret."""


@dataclass(frozen=True)
class Limits:
    """Of one page; each can be set by the environment, as HUBGEN_LIMIT_STEPS=30."""

    prompt_characters: int = 500
    """Of a prompt, and of a negative prompt"""
    steps: int = 50
    """From noise to a picture"""
    guidance: int = 20
    """The largest strength"""
    pixels: int = 1024 * 1024
    """Of one picture that is drawn"""
    pictures: int = 4
    """Of one call"""
    styles: int = 4
    """Adapters on the model at once"""
    control: int = 2
    """The largest strength of a network that steers"""
    upload_bytes: int = 10_000_000
    """Of a file that is sent here"""
    upload_pixels: int = 25_000_000
    """Of a picture that is sent here; seen in its header, before it is decoded"""
    request_bytes: int = 1_000_000
    """Of a request that is no file"""
    queue: int = 20
    """Requests that wait at once"""
    queue_of_one: int = 4
    """Those of one visitor among them"""
    seconds: int = 180
    """Of work for one request, the time in the queue aside"""
    session_pictures: int = 24
    """That a visitor's gallery keeps"""
    kept_seconds: int = 6 * 3600
    """After which files of visitors are removed"""
    fewest_pictures: int = 5
    """That a training begins with"""
    training_pictures: int = 20
    """That a training takes"""
    training_steps: int = 2000
    """Of a training"""
    training_rank: int = 64
    """Of what is trained"""
    training_seconds: int = 3600
    """Of a training, the time of waiting aside"""
    trainings_waiting: int = 5
    """Trainings that wait at once; one runs"""
    sessions: int = 50
    """Visitors with pictures at once"""
    session_bytes: int = 2_000_000_000
    """That one visitor's pictures and training take on the disk"""
    away_seconds: int = 180
    """Without a word from a visitor's page, after which their training is stopped and their files are removed"""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Limits":
        """The defaults, with what the environment says.

        Raises:
            ValueError: A variable of that kind is no whole number from 1, or names no limit.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for variable, text in environment.items():
            if not variable.startswith(PREFIX):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in names:
                raise ValueError(f"{variable}: no such limit; there are {', '.join(sorted(names))}")
            if not (text.isascii() and text.isdecimal() and len(text) < 16 and int(text)):
                raise ValueError(f"{variable}: got {text!r}, expected a whole number from 1")
            values[name] = int(text)
        return cls(**values)

    def checked_prompt(self, value: Any, name: str = "The prompt", empty: bool = False) -> str:
        """Words of at most so many characters, without blanks around them.

        Args:
            value: Whatever was sent.
            name: What messages call it.
            empty: Whether there may be none.
        """
        if value is None and empty:
            return ""
        if not isinstance(value, str):
            raise Refused(f"{name} is not text.")
        if len(value) > self.prompt_characters:
            raise Refused(f"{name} has {len(value):,} characters; at most {self.prompt_characters:,} are read.")
        if value.encode("utf-8", "replace").decode() != value or "\0" in value:
            raise Refused(f"{name} has characters in it that are no text.")
        words = " ".join(value.split())
        if not words and not empty:
            raise Refused("Say in a few words what the picture shows.")
        return words

    def checked_steps(self, value: Any) -> int:
        """From 1."""
        return checked_whole("Steps", value, 1, self.steps)

    def checked_training_steps(self, value: Any) -> int:
        """Of a training, from 1."""
        return checked_whole("Steps", value, 1, self.training_steps)

    def checked_rank(self, value: Any) -> int:
        """From 1."""
        return checked_whole("The rank", value, 1, self.training_rank)

    def checked_learning_rate(self, value: Any) -> float:
        """Above 0, at most 0.1."""
        rate = checked_number("The learning rate", value, 0, 0.1)
        if rate < 1e-7:
            raise Refused("The learning rate is so small that nothing would be learned; it goes from 1e-7 to 0.1.")
        return rate

    def checked_pictures(self, value: Any) -> int:
        """From 1."""
        return checked_whole("The number of pictures", value, 1, self.pictures)

    def checked_seed(self, value: Any) -> int:
        """A seed that every generator takes, with room for those of the further pictures of a call."""
        return checked_whole("The seed", value, 0, LARGEST_SEED - self.pictures)

    def checked_guidance(self, value: Any) -> float:
        """From 0."""
        return checked_number("Guidance", value, 0, self.guidance)

    def checked_strength(self, value: Any) -> float:
        """Above 0, at most 1."""
        strength = checked_number("Strength", value, 0, 1)
        if strength == 0:
            raise Refused("Strength is 0, which would leave the picture as it is; it goes up to 1.")
        return strength

    def checked_sides(self, width: Any, height: Any) -> tuple[int, int]:
        """(width, height) of so many pixels at most; whether the model makes them is the model's to say."""
        sides = checked_whole("Width", width, 1, 8192), checked_whole("Height", height, 1, 8192)
        if sides[0] * sides[1] > self.pixels:
            raise Refused(f"{sides[0]} × {sides[1]} pixels are too many; a picture has at most {self.pixels:,} here.")
        return sides


def checked_whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number in [least, most]; 3.0 is one, since JSON does not tell the two apart."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not is_whole(value, least, most):
        raise Refused(f"{name} {said(value)}; it is a whole number from {least:,} to {most:,}.")
    return int(value)


def checked_number(name: str, value: Any, least: float, most: float) -> float:
    """A finite number in [least, most]."""
    if not is_number(value) or not least <= value <= most:
        raise Refused(f"{name} {said(value)}; it is a number from {least:g} to {most:g}.")
    return float(value)


def said(value: Any) -> str:
    """What was sent in place of a number, in a few words."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:g}" if isinstance(value, float) else str(value) if abs(value) < 10**30 else "far too large"
        return "is not a number" if text == "nan" else f"is {text}"
    return "is missing" if value is None else "is not a number"
