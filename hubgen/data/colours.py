"""Colours as captions name them: which of them pictures show, and pictures turned to another.

colour_shares(pixels)                            # how much of each picture is red, orange, ...
hue = dominant_hue(picture)                      # None where no one hue prevails
recoloured(picture, hue, "purple")
"""

import re
from dataclasses import dataclass

import numpy as np
import torch

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""In the order of `colour_shares`"""


def colour_words(caption: str) -> list[str]:
    """The colours that a caption names, in `COLOURS`."""
    words = re.findall(r"[a-z]+", caption.lower())
    return [colour for colour in COLOURS if colour in words]


def colour_shares(pixels: torch.Tensor) -> torch.Tensor:
    """How much of each colour is in pictures.

    Background is what is almost white. A colour is a box in hue, saturation and value, as the emoji use the word: their
    black is a dark violet grey, their red leans to pink. Boxes overlap where two words fit; some pixels are in none.

    Args:
        pixels: (N, 3, H, W) in [-1, 1].

    Returns:
        (N, 10), the share of each of `COLOURS` among the pixels that are not background.
    """
    red, green, blue = ((pixels.float().clamp(-1, 1) + 1) / 2).unbind(dim=1)  # each (N, H, W)
    value, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    saturation = chroma / value.clamp(min=1e-6)
    safe = chroma.clamp(min=1e-6)
    from_green = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = 60 * (torch.where(value == red, (green - blue) / safe, from_green) % 6)  # degrees

    foreground = (value < 0.97) | (saturation > 0.05)
    black = (value < 0.45) & (chroma < 0.16)
    clear = (saturation >= 0.2) & ~black
    classes = {
        "red": _between(hue, 335, 10) & (saturation >= 0.5) & (value >= 0.55),
        "orange": _between(hue, 2, 40) & (saturation >= 0.5) & (value >= 0.75),
        "yellow": _between(hue, 28, 68) & (saturation >= 0.4) & (value >= 0.7),
        "green": _between(hue, 68, 170) & clear,
        "blue": _between(hue, 170, 255) & clear,
        "purple": _between(hue, 240, 315) & (saturation >= 0.3) & ~black,
        "pink": (_between(hue, 315, 340) & clear & (value >= 0.75))
        | (_between(hue, 335, 15) & clear & (saturation < 0.55) & (value >= 0.85)),
        "brown": _between(hue, 335, 40) & (saturation >= 0.25) & (value < 0.78) & (chroma < 0.45) & ~black,
        "black": black,
        "white": (saturation < 0.2) & (value >= 0.65),
    }
    area = foreground.sum(dim=(1, 2)).clamp(min=1)
    return torch.stack([(classes[colour] & foreground).sum(dim=(1, 2)) / area for colour in COLOURS], dim=1)


def _between(hue: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """Whether the hue lies in [start, end), going round through 0 where start is larger."""
    return (hue >= start) & (hue < end) if start <= end else (hue >= start) | (hue < end)


# ---- other colours ----

HUES = {"red": 25, "orange": 58, "yellow": 100, "green": 145, "blue": 255, "purple": 305, "pink": 355}
"""Degrees in Oklch of the colours that a picture can be turned to"""
LIGHTNESS = {"red": 0.6, "orange": 0.74, "yellow": 0.87, "green": 0.7, "blue": 0.62, "purple": 0.58, "pink": 0.76}
"""In Oklch, from 0 to 1, of what people call so: a dark yellow is brown, a light red is pink"""
TOWARDS = 0.7
"""Part of the way that the lightness of coloured pixels goes towards it"""
LEAST_CHROMA = 0.04
"""In Oklch, of a pixel that has a hue"""
# Björn Ottosson, "A perceptual color space for image processing" (2020): linear sRGB to cone responses, their cube
# roots to Oklab.
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@dataclass(frozen=True)
class Hue:
    """The hue that prevails in a picture."""

    angle: float
    """Radians in Oklch"""
    concentration: float
    """Length of the mean of the pixels' hues, weighted by their chroma: 1 where all have one"""
    lightness: float
    """Mean of the coloured pixels, from 0 to 1"""
    share: float
    """Of the coloured pixels among those that are not white"""


def dominant_hue(picture: np.ndarray) -> Hue:
    """The hue that prevails in a picture, (H, W, 3) uint8; its concentration says how much it does."""
    lightness, chroma, hue = to_oklch(picture)
    weight = np.where(chroma >= LEAST_CHROMA, chroma, 0.0)
    total = max(float(weight.sum()), 1e-9)
    mean = complex((weight * np.exp(1j * hue)).sum()) / total
    drawn = (picture < 250).any(-1).sum()
    return Hue(
        float(np.angle(mean)),
        abs(mean),
        float((weight * lightness).sum()) / total,
        float((weight > 0).sum() / max(drawn, 1)),
    )


def recoloured(picture: np.ndarray, hue: Hue, colour: str) -> np.ndarray:
    """A picture whose prevailing hue is turned to a colour of `HUES`, other hues by the same angle.

    Coloured pixels get lighter or darker together, as the colour's name asks; grey, black and white stay.

    Args:
        picture: (H, W, 3) uint8.
        hue: Its own.
        colour: A key of `HUES`.

    Returns:
        (H, W, 3) uint8.
    """
    lightness, chroma, angle = to_oklch(picture)
    step = (LIGHTNESS[colour] - hue.lightness) * TOWARDS
    room = (1 - lightness) / (1 - hue.lightness) if step > 0 else lightness / hue.lightness  # black and white stay
    coloured = np.clip(chroma / 0.1, 0, 1)
    return from_oklch(lightness + coloured * step * room, chroma, angle + np.radians(HUES[colour]) - hue.angle)


def to_oklch(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lightness from 0 to 1, chroma, and hue in radians, each (H, W), of (H, W, 3) uint8 in sRGB."""
    values = picture.astype(np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ TO_CONES.T) @ TO_LAB.T
    return lab[..., 0], np.hypot(lab[..., 1], lab[..., 2]), np.arctan2(lab[..., 2], lab[..., 1])


def from_oklch(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 in sRGB; a colour that no screen shows loses chroma until one does."""
    as_it_is = _on_screen(_linear(lightness, chroma, hue))
    least, most = np.zeros_like(chroma), chroma
    for _ in range(12):
        middle = (least + most) / 2
        fits = _on_screen(_linear(lightness, middle, hue))
        least, most = np.where(fits, middle, least), np.where(fits, most, middle)
    linear = np.clip(_linear(lightness, np.where(as_it_is, chroma, least), hue), 0, 1)
    values = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(values * 255).astype(np.uint8)


def _linear(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], -1)
    return (lab @ np.linalg.inv(TO_LAB).T) ** 3 @ np.linalg.inv(TO_CONES).T


def _on_screen(linear: np.ndarray) -> np.ndarray:
    return np.all((linear > -1e-4) & (linear < 1 + 1e-4), axis=-1)
