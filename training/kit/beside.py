"""What a control is shown of pictures while it learns: hints, what an image encoder says of them, what they were.

    pictures = told_pictures(pipe, s.data, s.data.split, run, ...)
    pictures.beside = Hints(pipe, pictures.pictures, "conditioning_image", kind_of(net))
    pictures.encode(cache_dir)                             # what frozen encoders make of both
    pictures.shown(draws, batch).beside                    # in the same views, on the run's device

Shapes: B pictures of H x W pixels, latents (B, C, h, w), F features and P patches of an image encoder.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from hubgen.conditioning.guidance import POSITIVE
from hubgen.controls.control import Target
from hubgen.controls.image_attention import Adapter
from hubgen.controls.image_encoders import encode, is_pooling, pixels_of
from hubgen.controls.net_kinds import Hint, NetKind
from hubgen.controls.shown_picture import EditInput
from hubgen.data.cache import PartCaches, module_digest
from hubgen.data.encoded import LatentSource
from hubgen.data.order import Draw, generator_of
from hubgen.training.kit.pictures import Pictures


class LeftOut(NamedTuple):
    """What a model is not told about a picture."""

    text: bool
    """Its caption or class"""
    picture: bool
    """What is shown beside it"""


def left_out(rate: float, seed: int, place: int) -> LeftOut:
    """What is left out at a place of the endless row.

    Text alone, picture alone, and both, each with probability `rate`, by one uniform number (InstructPix2Pix,
    2211.09800, section 3.2.1; IP-Adapter, 2308.06721, section 4.1): below 2 `rate` the text, from `rate` to 3 `rate`
    the picture.
    """
    if not rate:
        return LeftOut(False, False)
    drawn = torch.rand((), generator=generator_of(seed, place, "left out"), dtype=torch.float64).item()
    return LeftOut(drawn < 2 * rate, rate <= drawn < 3 * rate)


class Source(Protocol):
    """Something that caches what frozen encoders make."""

    def fill(self, rank: int = 0, world_size: int = 1, show_progress: bool = True) -> None:
        """Makes what the cache lacks."""


class Beside(ABC):
    """Base: what is shown beside the pictures of a split."""

    @abstractmethod
    def sources(self, seed: int, cache_dir: Path | None) -> Sequence[Source]:
        """What encoders have to make.

        Args:
            seed: Of all that is drawn for the pictures.
            cache_dir: Where it is kept; `None` makes it at each use.
        """

    @abstractmethod
    def read(self, draws: Sequence[Draw]) -> Any:
        """What is needed of pictures, on the CPU, in a worker process or not."""

    @abstractmethod
    def shown(self, read: Any, draws: Sequence[Draw], kept: Sequence[bool], device: torch.device) -> Any:
        """What `read` gave, as a control takes it.

        Args:
            read: Of these draws.
            draws: B.
            kept: Which of them are shown; nothing is in the place of others.
            device: Where the run computes.
        """


# ---- hints ----


class Hints(Beside):
    """Hints, which a ControlNet is shown as in sampling: by its kind.

    Args:
        pipe: The base.
        pictures: With a column of hints.
        column: Its name.
        kind: Of the network.
        mode: Which kind of hint it is, for a union.
    """

    def __init__(self, pipe: Any, pictures: Pictures, column: str, kind: NetKind, mode: int | None = None) -> None:
        self.pipe, self.pictures, self.column, self.kind = pipe, pictures, column, kind
        self.modes = () if mode is None else (mode,)
        self.latents: LatentSource | None = None

    def sources(self, seed: int, cache_dir: Path | None) -> Sequence[Source]:
        if not self.kind.sees_latents:
            return []
        examples, views = self.pictures.examples, self.pictures.views
        self.latents = LatentSource(self.pipe.vae, examples, views, seed, cache_dir, column=self.column)
        return [self.latents]

    def read(self, draws: Sequence[Draw]) -> Any:
        return self.pictures.further(draws, self.column) if self.latents is None else self.latents.read(draws)

    @torch.no_grad()
    def shown(self, read: Any, draws: Sequence[Draw], kept: Sequence[bool], device: torch.device) -> Any:
        size = self.pictures.views.buckets[draws[0].row]
        if self.latents is None:
            hint = Hint([read.to(device)], modes=self.modes)
        else:
            hint = Hint([], modes=self.modes, latents=self.latents.latents(read, draws, device))
        return self.kind.shown(hint, target_of(self.pipe, size, len(draws), device))


def target_of(pipe: Any, size: tuple[int, int], batch: int, device: torch.device) -> Target:
    """What a control may know of a step, as it knows it of a call: one picture a condition, no negative ones."""
    return Target(
        backbone=pipe.backbone,
        family=pipe.family,
        vae=pipe.vae,
        scheduler=pipe.scheduler,
        latents=pipe.latent_space,
        size=size,
        batch=batch,
        per_prompt=1,
        branches=(POSITIVE,),
        timesteps=torch.zeros(1, device=device),
    )


# ---- pictures, as image encoders see them ----


class Seen(Beside):
    """What an image encoder says of each picture as a whole, which an IP-Adapter is shown.

    Args:
        pictures: That it sees.
        encoder: Of transformers or of hubgen, frozen.
        extractor: Its image processor; `None` for the usual one.
        adapter: Which says whether patches count, and what stands for no picture.
    """

    def __init__(self, pictures: Pictures, encoder: Any, extractor: Any, adapter: Adapter) -> None:
        self.examples, self.encoder, self.extractor = pictures.examples, encoder, extractor
        self.patches, self.without = adapter.network.image_proj.reads_patches, adapter.kind.without
        self._nothing: torch.Tensor | None = None

    def sources(self, seed: int, cache_dir: Path | None) -> Sequence[Source]:
        self.embeds = Embeddings(self, cache_dir)
        return [self.embeds]

    def read(self, draws: Sequence[Draw]) -> Any:
        if self.embeds.cache is None:
            return [self.examples.picture(draw.row) for draw in draws]
        caches = [self.embeds.cache.of(self.examples.part_of(draw.row)) for draw in draws]
        found = [cache[self.examples.digests[draw.row]] for cache, draw in zip(caches, draws, strict=True)]
        return torch.stack([one["embeds"] for one in found])

    @torch.no_grad()
    def shown(self, read: Any, draws: Sequence[Draw], kept: Sequence[bool], device: torch.device) -> torch.Tensor:
        embeds = read.to(device) if torch.is_tensor(read) else self.of(read)  # (B, F) or (B, P, F)
        if all(kept):
            return embeds
        rows = torch.tensor(kept, device=device).view(-1, *[1] * (embeds.ndim - 1))
        return torch.where(rows, embeds, self.nothing(embeds))

    def of(self, pictures: list[Image.Image]) -> torch.Tensor:
        """What the encoder says, (n, F) or (n, P, F) in float32."""
        return encode(self.encoder, pixels_of(pictures, self.encoder, self.extractor), self.patches).float()

    def nothing(self, like: torch.Tensor) -> torch.Tensor:
        """What is shown where no picture is, (1, F) or (1, P, F), as in sampling."""
        if self.without == "zeros":
            return torch.zeros_like(like[:1])
        if self._nothing is None:
            pixels = pixels_of([Image.new("RGB", (64, 64))], self.encoder, self.extractor)
            pixels = torch.zeros_like(pixels) if self.without == "zero pixels" else pixels
            self._nothing = encode(self.encoder, pixels, self.patches).float().to(like.device)
        return self._nothing


class Embeddings:
    """The cache of what an image encoder says.

    Args:
        seen: The pictures and the encoder.
        cache_dir: Where it is kept; `None`: nowhere.
        batch_size: Pictures that are encoded at once.
    """

    def __init__(self, seen: Seen, cache_dir: Path | None, batch_size: int = 32) -> None:
        self.seen, self.batch_size = seen, batch_size
        self.cache: PartCaches[int] | None = None
        if cache_dir is not None:
            encoder, extractor = seen.encoder, seen.extractor
            sizes = {name: getattr(encoder, name, None) for name in ("image_size", "places")}
            content = {
                "content": "picture embeddings",
                "encoder": module_digest(encoder),
                "sizes": sizes if is_pooling(encoder) else None,
                "extractor": None if extractor is None else extractor.to_json_string(),
                "patches": seen.patches,
            }
            self.cache = PartCaches(cache_dir, content, len(seen.examples.parts), self._rows)

    def _rows(self, part: int) -> dict[str, int]:
        """The row of each key of a part."""
        return {self.seen.examples.digests[row]: row for row in self.seen.examples.parts[part]}

    def fill(self, rank: int = 0, world_size: int = 1, show_progress: bool = True) -> None:
        """Makes what the cache lacks; see `PartCaches.fill`."""
        if self.cache is not None:
            self.cache.fill(self._encode, rank, world_size, show_progress)

    @torch.no_grad()
    def _encode(self, rows: Mapping[str, int], keys: Sequence[str]) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
        for first in range(0, len(keys), self.batch_size):
            chosen = keys[first : first + self.batch_size]
            embeds = self.seen.of([self.seen.examples.picture(rows[key]) for key in chosen])
            for key, one in zip(chosen, embeds, strict=True):
                yield key, {"embeds": one}


# ---- pictures before an edit ----


class Originals(Beside):
    """Pictures before an edit, which an editor is shown as in sampling: by what it takes.

    Args:
        pipe: The editor.
        pictures: After the edit, with a column of those before it.
        column: Its name.
        kind: What the editor takes.
    """

    def __init__(self, pipe: Any, pictures: Pictures, column: str, kind: EditInput) -> None:
        self.pipe, self.pictures, self.column, self.kind = pipe, pictures, column, kind

    def sources(self, seed: int, cache_dir: Path | None) -> Sequence[Source]:
        examples, views = self.pictures.examples, self.pictures.views
        self.latents = LatentSource(self.pipe.vae, examples, views, seed, cache_dir, column=self.column)
        return [self.latents]

    def read(self, draws: Sequence[Draw]) -> Any:
        return self.latents.read(draws)

    @torch.no_grad()
    def shown(self, read: Any, draws: Sequence[Draw], kept: Sequence[bool], device: torch.device) -> torch.Tensor:
        shown = self.kind.of_mode(self.pipe.vae, self.latents.modes(read, device))  # (B, C, h, w)
        return shown * torch.tensor(kept, device=device).view(-1, 1, 1, 1)
