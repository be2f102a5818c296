"""Pictures and captions as frozen encoders give them, from a cache or made at each use; training cannot tell which.

Shapes: B pictures of H x W pixels, latents (B, C, h, w).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from hubgen.acceleration.optimize import accelerated
from hubgen.autoencoders.latents import normalised, posterior
from hubgen.conditioning.prompts import PromptCondition
from hubgen.conditioning.text import TextEmbeddings
from hubgen.data.cache import PartCaches, module_digest, tokenizer_digest
from hubgen.data.examples import Examples
from hubgen.data.order import Draw, generator_of
from hubgen.data.views import Views, pixels_of

Tensors = Mapping[str, torch.Tensor]


class LatentSource:
    """Latents of the views of pictures, drawn anew from the autoencoder's posterior at each use.

    Args:
        vae: Between pixels and latents, frozen.
        examples: The pictures.
        views: Of them.
        seed: Of the draws.
        cache_dir: Where the posteriors are kept; `None` encodes pictures at each use.
        batch_size: Pictures that are encoded at once for the cache.
        column: Of `examples.beside`: the further pictures of the rows are meant, in the same views.
    """

    def __init__(
        self,
        vae: Any,
        examples: Examples,
        views: Views,
        seed: int,
        cache_dir: Path | None = None,
        batch_size: int = 32,
        column: str | None = None,
    ) -> None:
        self.vae, self.examples, self.views, self.seed, self.batch_size = vae, examples, views, seed, batch_size
        self.column = column
        self.cache: PartCaches[tuple[int, int]] | None = None
        if cache_dir is not None:
            content = {"content": "latents", "autoencoder": module_digest(vae)}
            self.cache = PartCaches(cache_dir, content, len(examples.parts), self._keys)

    def fill(self, rank: int = 0, world_size: int = 1, show_progress: bool = True) -> None:
        """Makes what the cache lacks; see `PartCaches.fill`."""
        if self.cache is not None:
            self.cache.fill(self._encode, rank, world_size, show_progress)

    def _keys(self, part: int) -> dict[str, tuple[int, int]]:
        """Row and view of each key of a part."""
        rows, count = self.examples.parts[part], self.views.count
        return {self._key(row, number): (row, number) for row in rows for number in range(count)}

    @torch.no_grad()
    def _encode(self, places: Mapping[str, tuple[int, int]], keys: Sequence[str]) -> Iterator[tuple[str, Tensors]]:
        by_size: dict[Any, list[str]] = {}
        for key in keys:
            by_size.setdefault(self.views.buckets[places[key][0]], []).append(key)
        for same in by_size.values():
            for first in range(0, len(same), self.batch_size):
                chosen = same[first : first + self.batch_size]
                pixels = torch.stack([self._pixels(*places[key]) for key in chosen])
                mean, std = self._posterior(pixels.to(self.vae.device))
                for key, one_mean, one_std in zip(chosen, mean, std, strict=True):
                    yield key, {"mean": one_mean, "std": one_std}

    def _posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with accelerated(self.vae) as fast, fast.network():
            return posterior(self.vae, pixels)

    def _pixels(self, row: int, number: int) -> torch.Tensor:
        examples = self.examples
        picture = examples.picture(row) if self.column is None else examples.further(row, self.column)
        return pixels_of(self.views.view(row, number).of(picture))

    def _key(self, row: int, number: int) -> str:
        """What names the pixels of a view."""
        own = self.views.key(row, number)
        if self.column is None:
            return own
        # A picture that stands beside several is encoded once.
        return f"{self.examples.beside[self.column][row].digest} {own.partition(' ')[2]}"

    def read(self, draws: Sequence[Draw]) -> dict[str, torch.Tensor]:
        """What is needed of pictures, each in the view drawn for it: posteriors from the cache, or pixels."""
        chosen = [(draw.row, self.views.drawn(self.seed, draw.place)) for draw in draws]
        if self.cache is None:
            return {"pixels": torch.stack([self._pixels(row, number) for row, number in chosen])}
        found = [self.cache.of(self.examples.part_of(row))[self._key(row, number)] for row, number in chosen]
        return {name: torch.stack([one[name] for one in found]) for name in ("mean", "std")}

    @torch.no_grad()
    def latents(self, read: Tensors, draws: Sequence[Draw], device: torch.device) -> torch.Tensor:
        """The latents of what `read` gave for the same draws, (B, C, h, w) in float32, as the backbone has them."""
        mean, std = self._found(read, device)
        stream = "posterior" if self.column is None else f"posterior of {self.column}"
        generators = [generator_of(self.seed, draw.place, stream) for draw in draws]
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        return normalised(mean + std * noise.to(device), self.vae)

    @torch.no_grad()
    def modes(self, read: Tensors, device: torch.device) -> torch.Tensor:
        """The posterior's mode of what `read` gave, (B, C, h, w) in float32, as the autoencoder itself has it."""
        return self._found(read, device)[0]

    def _found(self, read: Tensors, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation."""
        if "pixels" in read:
            return self._posterior(read["pixels"].to(device))
        return read["mean"].to(device), read["std"].to(device)


class TextSource:
    """Embeddings of captions.

    Args:
        condition: The text encoders, frozen.
        captions: All that will be asked for; of a source in several parts, those of the first.
        cache_dir: Where the embeddings are kept; `None` encodes captions at each use.
        batch_size: Captions that are encoded at once for the cache.
        parts: How many parts the source has.
        of_part: The captions of a part, by its number.
    """

    def __init__(
        self,
        condition: PromptCondition,
        captions: Sequence[str],
        cache_dir: Path | None = None,
        batch_size: int = 64,
        parts: int = 1,
        of_part: Callable[[int], Sequence[str]] | None = None,
    ) -> None:
        self.condition, self.captions, self.batch_size = condition, captions, batch_size
        self.parts, self._of_part = parts, of_part
        self.cache: PartCaches[None] | None = None
        if cache_dir is not None:
            content: dict[str, Any] = {
                "content": "text",
                "condition": type(condition).__name__,
                "t5_tokens": condition.t5_tokens,
            }
            present = [number for number, one in enumerate(condition.encoders) if one is not None]
            content["encoders"] = [module_digest(condition.encoders[number]) for number in present]  # type: ignore[arg-type]
            content["tokenizers"] = [tokenizer_digest(condition.tokenizers[number]) for number in present]
            content["lengths"] = [condition.tokenizers[number].model_max_length for number in present]
            self.cache = PartCaches(cache_dir, content, parts, self._keys)

    def _keys(self, part: int) -> dict[str, None]:
        of_part = self._of_part
        return dict.fromkeys(self.captions if part == 0 or of_part is None else of_part(part))

    def fill(self, rank: int = 0, world_size: int = 1, show_progress: bool = True) -> None:
        """Makes what the cache lacks; see `PartCaches.fill`."""
        if self.cache is not None:
            with quiet("hubgen.conditioning.text"):  # `too_long` counts them
                self.cache.fill(self._encode, rank, world_size, show_progress)

    def too_long(self) -> list[str]:
        """A line for each of `captions` that is longer than what the text encoders read."""
        longest = self.condition.longest()
        return [line for caption in self.captions if (line := longest.not_read(caption)) is not None]

    @torch.no_grad()
    def _encode(self, _: Mapping[str, None], keys: Sequence[str]) -> Iterator[tuple[str, Tensors]]:
        for first in range(0, len(keys), self.batch_size):
            chosen = keys[first : first + self.batch_size]
            embeddings = self.condition.encode(chosen)
            states = embeddings.tokens  # (B, L, D)
            length = states.new_tensor(states.shape[1], dtype=torch.int64)
            # What lies behind the last token that is not zero is padding, whatever the tokenizer's rules are.
            position = torch.arange(1, states.shape[1] + 1, device=states.device)
            ends = (states.ne(0).any(dim=-1) * position).amax(dim=1).tolist()
            for caption, tokens, pooled, end in zip(chosen, states, embeddings.pooled, ends, strict=True):
                yield caption, {"tokens": tokens[:end], "pooled": pooled, "length": length}

    @torch.no_grad()
    def __call__(
        self, captions: Sequence[str], device: torch.device, parts: Sequence[int] | None = None
    ) -> TextEmbeddings:
        """Tokens (B, L, D) and pooled (B, P) of captions, each of them one of those announced.

        Args:
            captions: B.
            device: Where the embeddings go.
            parts: Which part each is announced of; the first if not given.

        Raises:
            DataError: One was not.
        """
        if self.cache is None:
            number = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
            with quiet("hubgen.conditioning.text"):
                embeddings = self.condition.encode(list(number), device)
            return embeddings[torch.tensor([number[caption] for caption in captions], device=device)]
        found = [self.cache.of(part)[text] for part, text in zip(parts or [0] * len(captions), captions, strict=True)]
        tokens = [pad(one["tokens"], (0, 0, 0, int(one["length"]) - len(one["tokens"]))) for one in found]
        pooled = [one["pooled"] for one in found]
        return TextEmbeddings(torch.stack(tokens), torch.stack(pooled)).to(device)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """A logger says nothing inside."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
