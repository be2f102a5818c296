"""The pictures of a run: opened, brought to sizes, in an endless row."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch.nn.functional import interpolate

from hubgen.data.captions import SYNTHETIC, Captions
from hubgen.data.errors import DataError
from hubgen.data.examples import Examples
from hubgen.data.lazy import Lazy, each
from hubgen.data.order import Draw, EndlessRow
from hubgen.data.sources import open_examples
from hubgen.data.views import Size, Views, bucket_of, bucket_sizes, pixels_of
from hubgen.training.kit.groups import CaptionedData, Data
from hubgen.training.kit.parse import SettingsError

MEASURED = 20_000
"""Pictures of shards at most of which something is measured"""


@dataclass(frozen=True)
class Pictures:
    """Of one split."""

    examples: Examples
    views: Views
    side: int
    """Height and width of the square whose area they have"""
    seed: int
    mask_column: str | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def row(self, data: Data, batch_size: int) -> EndlessRow:
        """The endless row that a run takes them from."""
        views = self.views
        return self.examples.endless_row(views.buckets, views.known, batch_size, self.seed, data.repeats)

    def shown(self, draw: Draw) -> int:
        """The number of the view of a picture at a place."""
        return self.views.drawn(self.seed, draw.place)

    def pixels(self, draws: Sequence[Draw]) -> torch.Tensor:
        """Pictures in the views drawn for them, (B, 3, H, W) in [-1, 1]."""
        pictures = [self.views.view(draw.row, self.shown(draw)).of(self.examples.picture(draw.row)) for draw in draws]
        return torch.stack([pixels_of(picture) for picture in pictures])

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """All pictures in order, (B, 3, H, W) in [-1, 1], B of one size at a time; each in its first view.

        Of shards, which may be endlessly many, the first `MEASURED`.
        """
        by_size: dict[Size, list[int]] = {}
        for row in range(min(len(self), MEASURED) if isinstance(self.examples.sizes, Lazy) else len(self)):
            by_size.setdefault(self.views.buckets[row], []).append(row)
        for rows in by_size.values():
            for first in range(0, len(rows), size):
                chosen = rows[first : first + size]
                shown = [self.views.view(row, 0).of(self.examples.picture(row)) for row in chosen]
                yield torch.stack([pixels_of(picture) for picture in shown])

    def plain(self, rows: Sequence[int], column: str | None = None) -> list[Image.Image]:
        """Pictures of some rows in their first view, or those of a column of `examples.beside`."""
        of = self.examples.picture if column is None else partial(self.examples.further, column=column)
        return [self.views.view(row, 0).of(of(row)) for row in rows]

    def further(self, draws: Sequence[Draw], column: str) -> torch.Tensor:
        """What a column of `examples.beside` has for pictures, in the same views, (B, 3, H, W) in [0, 1]."""
        shown = [
            self.views.view(draw.row, self.shown(draw)).of(self.examples.further(draw.row, column)) for draw in draws
        ]
        return torch.stack([(pixels_of(picture) + 1) / 2 for picture in shown])

    def micro(self, draws: Sequence[Draw]) -> torch.Tensor:
        """What SDXL is told about them, (B, 6)."""
        views = [self.views.view(draw.row, self.shown(draw)) for draw in draws]
        return torch.cat([view.micro().rows(1) for view in views])

    def masks(self, draws: Sequence[Draw], factor: int) -> torch.Tensor | None:
        """How much each place of the latents counts, (B, 1, h, w) in [0, 1], h = H / factor; `None` without masks."""
        if self.mask_column is None:
            return None
        masks = []
        for draw in draws:
            mask, view = self.examples.mask(draw.row, self.mask_column), self.views.view(draw.row, self.shown(draw))
            if mask is None:
                masks.append(torch.ones(1, *view.size))
            else:
                masks.append((pixels_of(view.of(mask).convert("RGB"))[:1] + 1) / 2)
        return interpolate(torch.stack(masks), scale_factor=1 / factor, mode="area")

    def names(self, draws: Sequence[Draw]) -> list[str]:
        """Of the pictures, for messages."""
        return [self.examples.file_names[draw.row] for draw in draws]


def open_pictures(
    data: Data,
    split: str,
    seed: int,
    *,
    side: int,
    multiple: int = 1,
    caption_column: str | None = None,
    columns: Sequence[str] = (),
    train: bool = True,
) -> Pictures:
    """The pictures of a split, at the sizes that the settings ask for.

    Args:
        data: The settings.
        split: Which.
        seed: Of the run.
        side: Where the settings name no size.
        multiple: What height and width have to be multiples of.
        caption_column: Column of the captions, if they are needed.
        columns: Further ones.
        train: Whether crops are drawn and pictures mirrored; else each has one view, the middle.

    Raises:
        SettingsError: The model cannot make such sizes.
        DataError: A picture or row cannot be used.
    """
    side = data.size or side
    if side % multiple:
        raise SettingsError(f"setting 'data.size': got {side}, expected a multiple of {multiple}.")
    sizes: list[Size] = [(side, side)]
    if data.buckets:
        step = math.lcm(data.bucket_step, multiple)
        try:
            sizes = bucket_sizes(side, step, *data.bucket_sides)
        except ValueError as error:
            raise SettingsError(f"setting 'data.bucket_sides': {error}") from error
    columns = [*columns, *([] if data.mask_column is None else [data.mask_column])]
    if train and caption_column is not None and getattr(data, "synthetic_captions", 0.0) > 0:
        columns.append(SYNTHETIC)
    examples = open_examples(
        data.source,
        split,
        caption_column=caption_column,
        columns=columns,
        on_error=data.on_bad_picture,
        max_pixels=data.max_pixels,
        cache_dir=data.cache_dir,
        beside=data.beside,
        picture=data.picture,
        shards={"window": data.window, "most": data.cache_shards},
    )
    if data.on_bad_picture == "skip" and not data.upscale:
        small = {
            row: f"{examples.file_names[row]}: got {width}x{height} pixels, smaller than it is brought to"
            for row, (height, width) in enumerate(examples.sizes)
            if any(a < b for a, b in zip((height, width), bucket_of((height, width), sizes), strict=True))
        }
        if small:
            examples.drop(small)
    views = Views(
        examples.sizes,
        examples.digests,
        sizes,
        crops=data.random_crops if train else 0,
        moves=data.random_moves if train else 0,
        mirror=data.mirror and train,
        upscale=data.upscale,
        seed=seed,
        names=examples.file_names,
    )
    return Pictures(examples, views, side, seed, data.mask_column)


def captions_of(pictures: Pictures, data: CaptionedData) -> Captions:
    """The texts that the pictures may be shown with.

    Raises:
        DataError: No picture has the caption of a model that the settings ask for.
    """
    examples = pictures.examples
    written: Sequence[str | None] = []
    if SYNTHETIC in examples.columns:
        written = each(examples.columns[SYNTHETIC], partial(_written, examples.place))
        if not isinstance(written, Lazy) and not any(written):
            raise DataError(
                f"{examples.place}: got no {SYNTHETIC} of any picture, expected some for data.synthetic_captions "
                f"{data.synthetic_captions:g}; `hubgen data recaption` writes them"
            )
    return Captions(
        examples.captions,
        variants=data.caption_variants,
        dropout=data.caption_dropout,
        prefix=data.caption_prefix,
        shuffles=data.tag_orders,
        kept_tags=data.kept_tags,
        seed=pictures.seed,
        written=written,
        synthetic=data.synthetic_captions if SYNTHETIC in examples.columns else 0.0,
    )


def _written(place: str, row: int, value: object) -> str | None:
    """The caption that a model wrote, if it wrote one."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: got {type(value).__name__} {value!r:.40} as {SYNTHETIC}, expected a string")
    return value if value is not None and value.strip() else None
