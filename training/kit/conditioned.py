"""Pictures with what a model is told about them, prompts or classes, as the steps of a run take them.

    pictures = PromptedPictures(pipe, s.data, s.data.split, run)
    run.open({..., "data": pictures.fingerprint}, s.optim)
    pictures.encode(cache_dir)                             # what frozen encoders make of them
    batches = run.batches(pictures.row(), pictures.read)
    ...
    shown = pictures.shown(draws, batch)                   # latents, condition, mask on the run's device

A run may show several of them. `pictures.beside` is what a control is shown of each (`hubgen.training.kit.beside`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.data.captions import Captions
from hubgen.data.encoded import LatentSource, TextSource
from hubgen.data.lazy import Lazy
from hubgen.data.order import Draw, EndlessRow, generator_of
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from hubgen.schedulers.objective import Objective
from hubgen.training.kit.beside import Beside, LeftOut, Source, left_out
from hubgen.training.kit.groups import CaptionedData, CaptionedOrLabelledData, Data, LabelledData
from hubgen.training.kit.labels import Labels
from hubgen.training.kit.pictures import Pictures, captions_of, open_pictures
from hubgen.training.kit.run import Run


@dataclass(frozen=True)
class Shown:
    """A batch of B pictures as a step takes them."""

    x_0: torch.Tensor
    """(B, C, h, w), latents"""
    captions: Sequence[str]
    """Of pictures with prompts"""
    condition: Condition
    mask: torch.Tensor | None
    """(B, 1, h, w) in [0, 1], how much each place counts"""
    generators: Sequence[torch.Generator]
    """Of the noise and time of each picture"""
    beside: Any = None
    """What a control is shown of each"""


def ask(network: Any, x_t: torch.Tensor, timestep: torch.Tensor, condition: Condition, beside: Any = None) -> Any:
    """A backbone's prediction, (B, C', h, w), or that of one with a control that is shown something."""
    if beside is None:
        return predict(network, x_t, timestep, condition)
    return network(x_t, timestep, condition, beside)


def losses_of(network: Any, objective: Objective, shown: Shown) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network is to learn from a batch.

    Args:
        network: The backbone, or one with a control, as a step calls it.
        objective: What it learns.
        shown: The batch.

    Returns:
        The losses (B,), and the times (B,) that were drawn.
    """
    sample = objective.draw(shown.x_0, shown.generators)
    prediction = ask(network, sample.x_t, objective.timestep(sample), shown.condition, shown.beside)
    return objective.loss(prediction, sample, shown.mask), sample.t


class ConditionedPictures(ABC):
    """Base: the pictures of a split, as latents.

    Args:
        pipe: Autoencoder and backbone; only read.
        pictures: Of the split.
        data: The settings.
        run: The processes, their device and seed.
        train: Whether views and conditions are drawn; else each picture is always shown alike.
        seed: Of all that is drawn for them.
    """

    def __init__(self, pipe: Any, pictures: Pictures, data: Data, run: Run, train: bool, seed: int) -> None:
        self.pipe, self.pictures, self.data, self.run, self.train, self.seed = pipe, pictures, data, run, train, seed
        self.factor = pipe.latent_space.factor
        self.beside: Beside | None = None
        """What a control is shown of each"""
        self.condition_dropout: float = getattr(data, "condition_dropout", 0.0) if train else 0.0

    @property
    def side(self) -> int:
        """Height and width in pixels of the square whose area the pictures have."""
        return self.pictures.side

    @property
    def tokens(self) -> int:
        """Image tokens of a picture of the usual size."""
        return self.pipe.latent_space.tokens((self.side, self.side))

    @property
    def fingerprint(self) -> Any:
        """What tells one data set from another, as JSON."""
        return self.pictures.examples.fingerprint

    def encode(self, cache_dir: Path | None) -> None:
        """Makes what caches lack; all processes share the work.

        Args:
            cache_dir: Where latents are kept; `None` makes them at each use.
        """
        self.latents = LatentSource(self.pipe.vae, self.pictures.examples, self.pictures.views, self.seed, cache_dir)
        self._fill(self.latents)
        if self.beside is not None:
            for source in self.beside.sources(self.seed, cache_dir):
                self._fill(source)

    def _fill(self, source: Source) -> None:
        source.fill(self.run.rank, self.run.world_size, show_progress=self.run.writer)

    def row(self) -> EndlessRow:
        """The endless row that the run takes them from."""
        return self.pictures.row(self.data, self.run.batch_size)

    def names(self, draws: Sequence[Draw]) -> list[str]:
        """Of pictures, for messages."""
        return self.pictures.names(draws)

    def notes(self) -> list[str]:
        """What to say before the first step."""
        return self.pictures.examples.left_out()

    def read(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """What is needed of pictures, on the CPU, in a worker process or not."""
        masks = self.pictures.masks(draws, self.factor) if self.train else None
        beside = None if self.beside is None else self.beside.read(draws)
        return {"latents": self.latents.read(draws), "masks": masks, "beside": beside, **self._told(draws)}

    def left_out(self, draw: Draw) -> LeftOut:
        """What the model is not told about a picture at a place."""
        return left_out(self.condition_dropout, self.seed, draw.place)

    @abstractmethod
    def words(self, rows: Sequence[int]) -> dict[str, Any]:
        """What a call of the pipeline is told about pictures, by its arguments."""

    @abstractmethod
    def _told(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """What the model is told about pictures, as far as it is at hand."""

    @abstractmethod
    def _condition(self, batch: dict[str, Any], embedded: bool) -> Condition:
        """What `_told` gave, on the run's device; see `shown`."""

    def shown(self, draws: Sequence[Draw], batch: dict[str, Any], embedded: bool = True) -> Shown:
        """What `read` gave, as a step takes it.

        Args:
            draws: The same that `read` was given.
            batch: Of them.
            embedded: Whether the condition has the text; a text encoder that learns makes it itself.
        """
        x_0 = self.latents.latents(batch["latents"], draws, self.run.device)
        mask = None if batch["masks"] is None else batch["masks"].to(self.run.device)
        generators = [generator_of(self.seed, draw.place) for draw in draws]
        beside = None
        if self.beside is not None:
            kept = [not self.left_out(draw).picture for draw in draws]
            beside = self.beside.shown(batch["beside"], draws, kept, self.run.device)
        return Shown(x_0, batch.get("captions", ()), self._condition(batch, embedded), mask, generators, beside)

    def measured(self, draws: Sequence[Draw]) -> tuple[torch.Tensor, Condition, Any]:
        """Latents, conditions and what is shown beside, always the same for the same pictures; see `HeldOut`."""
        shown = self.shown(draws, self.read(draws))
        return shown.x_0, shown.condition, shown.beside


class PromptedPictures(ConditionedPictures):
    """Pictures with captions.

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
        seed = (run.options.seed if seed is None else seed) if train else 0
        captioned = data if isinstance(data, CaptionedData) and prompt is None else None
        space = pipe.latent_space
        pictures = open_pictures(
            data,
            split,
            seed,
            side=space.default_size[0],
            multiple=space.multiple,
            caption_column=None if captioned is None else captioned.caption_column,
            train=train,
        )
        super().__init__(pipe, pictures, data, run, train, seed)
        self.takes_micro = "micro" in pipe.family.takes
        self.guidance_scale = guidance_scale if pipe.family.distilled else None
        if captioned is not None:
            self.captions = captions_of(pictures, captioned)
        else:
            self.captions = Captions(Lazy(len(pictures), partial(_alike, [prompt or ""])))

    @property
    def fingerprint(self) -> Any:
        """Of the pictures, and how often they are shown with captions that a model wrote."""
        found, synthetic = super().fingerprint, self.captions.synthetic
        return {"pictures": found, "synthetic_captions": synthetic} if synthetic else found

    def wordings(self, part: int = 0) -> list[str]:
        """Every caption that may be shown of a part of the data, which is all of most data."""
        rows = self.pictures.examples.parts[part]
        if self.train:
            return self.captions.all(rows)
        return sorted({self.captions.first(row) for row in rows})

    def encode(self, cache_dir: Path | None) -> None:
        """Makes what caches lack, of latents and, with `data.cache_texts`, of captions; see the base."""
        folder, parts = cache_dir if self.data.cache_texts else None, len(self.pictures.examples.parts)
        self.texts = TextSource(self.pipe.condition, self.wordings(), folder, parts=parts, of_part=self.wordings)
        self._fill(self.texts)
        super().encode(cache_dir)

    def notes(self) -> list[str]:
        """What to say about rows that are left out, and about captions of which a part is not read."""
        found = self.texts.too_long()
        where = " of the first shard" if self.texts.parts > 1 else ""
        what = f"{len(found)} of {len(self.texts.captions)} captions{where} are longer than the text encoder reads; "
        what += "the first:"
        return [*super().notes(), *([f"{what} {found[0]}"] if found else [])]

    def words(self, rows: Sequence[int]) -> dict[str, Any]:
        return {"prompt": [self.captions.first(row) for row in rows]}

    def _told(self, draws: Sequence[Draw]) -> dict[str, Any]:
        if self.train:
            captions = [
                "" if self.left_out(draw).text else self.captions.drawn(self.seed, draw.place, draw.row)
                for draw in draws
            ]
        else:
            captions = [self.captions.first(draw.row) for draw in draws]
        parts = [self.pictures.examples.part_of(draw.row) for draw in draws]
        micro = self.pictures.micro(draws) if self.takes_micro else None
        return {"captions": captions, "parts": parts, "micro": micro}

    def _condition(self, batch: dict[str, Any], embedded: bool) -> Condition:
        device = self.run.device
        condition = Condition()
        if embedded:
            condition = Condition.of_text(self.texts(batch["captions"], device, batch["parts"]))
        micro = None if batch["micro"] is None else batch["micro"].to(device)
        return replace(condition, micro=micro, guidance_scale=self.guidance_scale)


def _alike(value: list[str], row: int) -> list[str]:
    return value


class LabelledPictures(ConditionedPictures):
    """Pictures with classes.

    Args:
        pipe: Autoencoder, backbone and the names of its classes; only read.
        pictures: Of the split.
        data: The settings.
        run: The processes, their device and seed.
        train: Whether views and classes are drawn; else each picture has its middle and its class.

    Raises:
        DataError: The model has no such class.
    """

    def __init__(self, pipe: Any, pictures: Pictures, data: LabelledData, run: Run, train: bool = True) -> None:
        super().__init__(pipe, pictures, data, run, train, run.options.seed if train else 0)
        self.labels = Labels(pictures, data, pipe)

    @property
    def fingerprint(self) -> Any:
        """Of the pictures and of their classes."""
        return {"pictures": super().fingerprint, "labels": self.labels.fingerprint}

    def words(self, rows: Sequence[int]) -> dict[str, Any]:
        return {"class_labels": [self.labels.numbers[row] for row in rows]}

    def _told(self, draws: Sequence[Draw]) -> dict[str, Any]:
        if self.train:
            drawn = [
                self.labels.none if self.left_out(draw).text else self.labels.drawn(self.seed, draw) for draw in draws
            ]
            return {"labels": torch.tensor(drawn)}
        return {"labels": torch.tensor([self.labels.numbers[draw.row] for draw in draws])}

    def _condition(self, batch: dict[str, Any], embedded: bool) -> Condition:
        return Condition(labels=batch["labels"].to(self.run.device))


def labelled_pictures(data: LabelledData, split: str, run: Run, side: int, multiple: int, train: bool) -> Pictures:
    """The pictures of a split with the column of their classes.

    Args:
        data: The settings.
        split: Which.
        run: For its seed.
        side: Where the settings name no size.
        multiple: What height and width have to be multiples of.
        train: Whether views are drawn.
    """
    columns = [] if data.label_column is None else [data.label_column]
    seed = run.options.seed if train else 0
    return open_pictures(data, split, seed, side=side, multiple=multiple, columns=columns, train=train)


def told_pictures(
    pipe: Any, data: CaptionedOrLabelledData, split: str, run: Run, guidance_scale: float, train: bool
) -> ConditionedPictures:
    """The pictures of a split with what a pipeline is told: captions, or classes where it is one of classes.

    Arguments are those of `PromptedPictures`.
    """
    if not isinstance(pipe, ClassToImagePipeline):
        return PromptedPictures(pipe, data, split, run, guidance_scale, train)
    space = pipe.latent_space
    pictures = labelled_pictures(data, split, run, space.default_size[0], space.multiple, train)
    return LabelledPictures(pipe, pictures, data, run, train)
