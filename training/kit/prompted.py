"""Pictures with captions, as a model of prompts is shown them.

pictures = PromptedPictures(pipe, s.data, s.data.split, run)
run.open({..., "data": pictures.fingerprint}, s.optim)
pictures.encode(cache_dir)                             # what frozen encoders make of them
batches = run.batches(pictures.row(), pictures.read)
...
shown = pictures.shown(draws, batch)                   # latents, condition, mask on the run's device

Several of them may be shown in one run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hubgen.conditioning.condition import Condition
from hubgen.data.captions import Captions
from hubgen.data.encoded import LatentSource, TextSource
from hubgen.data.order import Draw, EndlessRow, generator_of
from hubgen.training.kit.groups import CaptionedData, Data
from hubgen.training.kit.pictures import captions_of, open_pictures
from hubgen.training.kit.run import Run


@dataclass(frozen=True)
class Shown:
    """A batch of B pictures as a step takes them."""

    x_0: torch.Tensor
    """(B, C, h, w), latents"""
    captions: Sequence[str]
    condition: Condition
    mask: torch.Tensor | None
    """(B, 1, h, w) in [0, 1], how much each place counts"""
    generators: Sequence[torch.Generator]
    """Of the noise and time of each picture"""


class PromptedPictures:
    """The pictures of a split with their captions.

    Args:
        pipe: Text encoders, autoencoder and backbone; only read.
        data: The settings.
        split: Which.
        run: The processes, their device and seed.
        guidance_scale: That a model is told which takes it as an input.
        train: Whether views and captions are drawn; else each picture has its middle and its first caption.
        prompt: Of all pictures, in the place of captions.
        seed: Of all that is drawn for them; the run's if not given.

    Raises:
        SettingsError: The model cannot make such sizes.
        DataError: A picture or row cannot be used.
    """

    def __init__(
        self,
        pipe: Any,
        data: Data,
        split: str,
        run: Run,
        guidance_scale: float = 1.0,
        train: bool = True,
        prompt: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.pipe, self.data, self.run, self.train = pipe, data, run, train
        space, family = pipe.latent_space, pipe.family
        self.takes_micro, self.factor = "micro" in family.takes, space.factor
        self.guidance_scale = guidance_scale if family.distilled else None
        self.seed = (run.options.seed if seed is None else seed) if train else 0
        self.pictures = open_pictures(
            data,
            split,
            self.seed,
            side=space.default_size[0],
            multiple=space.multiple,
            caption_column=data.caption_column if isinstance(data, CaptionedData) and prompt is None else None,
            train=train,
        )
        if isinstance(data, CaptionedData) and prompt is None:
            self.captions = captions_of(self.pictures, data)
        else:
            self.captions = Captions([[prompt or ""]] * len(self.pictures))
        self.texts: TextSource | None = None

    @property
    def tokens(self) -> int:
        """Image tokens of a picture of the usual size."""
        return self.pipe.latent_space.tokens((self.pictures.side, self.pictures.side))

    @property
    def fingerprint(self) -> str:
        """What tells one data set from another."""
        return self.pictures.examples.fingerprint

    def wordings(self) -> list[str]:
        """Every caption that may be shown."""
        if self.train:
            return self.captions.all()
        return sorted({self.captions.first(row) for row in range(len(self.pictures))})

    def encode(self, cache_dir: Path | None, cache_texts: bool = True) -> None:
        """Makes what caches lack; all processes share the work.

        Args:
            cache_dir: Where latents and embeddings are kept; `None` makes them at each use.
            cache_texts: Whether embeddings are kept too.
        """
        run, seen = self.run, self.pictures
        texts_dir = cache_dir if cache_texts else None
        self.texts = TextSource(self.pipe.condition, self.wordings(), texts_dir)
        self.latents = LatentSource(self.pipe.vae, seen.examples, seen.views, self.seed, cache_dir)
        for source in (self.texts, self.latents):
            source.fill(run.rank, run.world_size, show_progress=run.writer)

    def row(self) -> EndlessRow:
        """The endless row that the run takes them from."""
        return self.pictures.row(self.data, self.run.batch_size)

    def notes(self) -> list[str]:
        """What to say about rows that are left out, and about captions of which a part is not read."""
        assert self.texts is not None
        found = self.texts.too_long()
        what = f"{len(found)} of {len(self.texts.captions)} captions are longer than the text encoder reads; the first:"
        return [*self.pictures.examples.left_out(), *([f"{what} {found[0]}"] if found else [])]

    def read(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """What is needed of pictures, on the CPU, in a worker process or not."""
        return {
            "latents": self.latents.read(draws),
            "captions": [self._caption(draw) for draw in draws],
            "micro": self.pictures.micro(draws) if self.takes_micro else None,
            "masks": self.pictures.masks(draws, self.factor) if self.train else None,
        }

    def _caption(self, draw: Draw) -> str:
        if not self.train:
            return self.captions.first(draw.row)
        return self.captions.drawn(self.seed, draw.place, draw.row)

    def shown(self, draws: Sequence[Draw], batch: dict[str, Any], embedded: bool = True) -> Shown:
        """What `read` gave, as a step takes it.

        Args:
            draws: The same that `read` was given.
            batch: Of them.
            embedded: Whether the condition has the text; a text encoder that learns makes it itself.
        """
        device = self.run.device
        x_0 = self.latents.latents(batch["latents"], draws, device)
        condition = Condition()
        if embedded:
            assert self.texts is not None
            condition = Condition.of_text(self.texts(batch["captions"], device))
        if batch["micro"] is not None:
            condition = replace(condition, micro=batch["micro"].to(device))
        condition = replace(condition, guidance_scale=self.guidance_scale)
        mask = None if batch["masks"] is None else batch["masks"].to(device)
        generators = [generator_of(self.seed, draw.place) for draw in draws]
        return Shown(x_0, batch["captions"], condition, mask, generators)

    def measured(self, draws: Sequence[Draw]) -> tuple[torch.Tensor, Condition]:
        """Latents and conditions of pictures, always the same for the same; see `HeldOut`."""
        shown = self.shown(draws, self.read(draws))
        return shown.x_0, shown.condition
