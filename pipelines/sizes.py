"""Which size a picture is made at, where a call hands one in.

Shapes: H and W pixels, (n, C, h, w) latents as the backbone has them.
"""

import logging
from typing import Any

from hubgen.autoencoders.latents import TRAINED_SIDE, LatentSpace
from hubgen.data.images import Canvas, one_size

logger = logging.getLogger(__name__)

KONTEXT_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    *((1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688)),
    (1568, 672),
)
"""Widths and heights of the pictures that FLUX.1 Kontext was shown in training, of about 1024 x 1024 pixels"""


def result_size(
    name: str, image: Any, space: LatentSpace, height: int | None, width: int | None, keeps: bool
) -> tuple[int, int]:
    """(H, W) of the result: as was asked, else the image's own or the model's.

    Args:
        name: Of the argument with the image.
        image: What `read_images` gives; latents cannot be resized.
        space: Of the latents.
        height: H, if it was asked for.
        width: W, if it was asked for.
        keeps: Whether the image's own size is taken, cut to what the model can make.

    Raises:
        ValueError: No size that the model makes, or not that of the latents.
    """
    is_latent, found = Canvas.is_latent(image), one_size(name, image)
    if is_latent:
        own = found = (found[0] * space.factor, found[1] * space.factor)
    else:
        own = cut(found, space.multiple) if keeps else space.default_size
    size = (own[0] if height is None else height, own[1] if width is None else width)
    if is_latent and size != found:
        raise ValueError(
            f"`height`, `width`: got {size[0]}x{size[1]}, expected {found[0]}x{found[1]}, because `{name}` holds "
            "latents of that size, which cannot be resized."
        )
    if size != found:
        logger.warning(
            "The image of %dx%d pixels (height x width) is resized to %dx%d; `height` and `width` choose another "
            "size, in multiples of %d.",
            *found,
            *size,
            space.multiple,
        )
    return space.checked_size(*size)


def cut(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The multiples below height and width, but not 0."""
    return max(size[0] // multiple, 1) * multiple, max(size[1] // multiple, 1) * multiple


def reference_size(found: tuple[int, int], space: LatentSpace) -> tuple[int, int]:
    """(H, W) at which FLUX.1 Kontext is shown a picture: of those of its training, the one of the nearest form.

    Args:
        found: Height and width of the picture.
        space: Of the latents; for a model of another default size, the sizes are as much larger or smaller.
    """
    form = found[1] / found[0]
    _, width, height = min((abs(form - width / height), width, height) for width, height in KONTEXT_SIZES)
    scale = space.default_size[0] / (TRAINED_SIDE * 8)
    return cut((int(height * scale), int(width * scale)), space.multiple)
