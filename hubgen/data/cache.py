"""What a frozen encoder says about the data, computed once: posteriors of the pictures, embeddings of the captions.

A cache file's name is a digest of everything that its content follows from: the encoder's weights and config, the data
(files, transform, captions), and the layout. When any of it changes, the name does, so a stale file is never read.
Files are safetensors, written under another name and renamed; one whose bytes rotted is made anew.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from hubgen.conditioning.text import TextCondition, TextEmbeddings
from hubgen.data.errors import DataError
from hubgen.formats.atomic import written

LAYOUT = 1
"""Version of the files' content; part of every name."""


@dataclass(frozen=True)
class LatentCache:
    """The autoencoder's posterior of every picture, so that each use can draw from it anew, as live encoding would."""

    mean: torch.Tensor
    """(N, C, h, w) float32."""

    std: torch.Tensor
    """(N, C, h, w) float32; standard deviation."""

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, indices: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Draws from the posteriors of the pictures at `indices`, (B, C, h, w), neither shifted nor scaled."""
        rows = torch.as_tensor(indices)
        mean = self.mean[rows]
        return mean + self.std[rows] * torch.randn(mean.shape, generator=generator)


class TextCache:
    """Embeddings by caption; padding is not stored, and put back as zeros.

    Args:
        captions: M distinct captions.
        lengths: (M,) tokens of each.
        tokens: (sum of lengths, D) token states, one caption after the other.
        pooled: (M, P).
        max_length: L of the batches that `__call__` returns.
    """

    def __init__(
        self,
        captions: Sequence[str],
        lengths: torch.Tensor,
        tokens: torch.Tensor,
        pooled: torch.Tensor,
        max_length: int,
    ):
        self.rows = {caption: row for row, caption in enumerate(captions)}
        self.lengths, self.pooled, self.max_length = lengths, pooled, max_length
        self.starts = lengths.cumsum(0) - lengths
        # A last row of zeros is what every padded position points to.
        self.tokens = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])

    def __call__(self, captions: Sequence[str]) -> TextEmbeddings:
        """Tokens (B, L, D) and pooled (B, P) of captions that were cached.

        Raises:
            DataError: A caption was not.
        """
        try:
            rows = torch.tensor([self.rows[caption] for caption in captions])
        except KeyError as unknown:
            raise DataError(f"caption {unknown} is not among the {len(self.rows)} that were cached.") from None
        position = torch.arange(self.max_length)
        index = self.starts[rows, None] + position  # (B, L)
        index = torch.where(position < self.lengths[rows, None], index, len(self.tokens) - 1)
        return TextEmbeddings(tokens=self.tokens[index], pooled=self.pooled[rows])


def module_digest(module: nn.Module) -> str:
    """Hex sha256 of a model's config, and of the name, shape, dtype and bytes of each of its tensors."""
    digest = hashlib.sha256()
    config = getattr(module, "config", None)
    if config is not None:
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        # Where a model lies (_name_or_path) and which version wrote it does not change what it says.
        values = {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    digest.update(_digest(module.state_dict()).encode())
    return digest.hexdigest()


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def cache_latents(
    vae: Any,
    dataset: Any,
    cache_dir: str | Path,
    batch_size: int = 32,
    show_progress: bool = True,
) -> LatentCache:
    """The posterior of every picture of `dataset`, from the cache if it is there.

    Args:
        vae: An AutoencoderKL in evaluation mode.
        dataset: Rows with "pixel_values" (3, H, W) in [-1, 1], and `fingerprint`, a string that changes with the
            pictures, their order, and how they become pixels.
        cache_dir: Folder of the cache files.
        batch_size: Pictures encoded at once.
        show_progress: Whether a progress bar shows the encoding.
    """

    def encode() -> dict[str, torch.Tensor]:
        device, dtype = vae.device, vae.dtype
        means, stds = [], []
        for start in tqdm(range(0, len(dataset), batch_size), desc="encoding pictures", disable=not show_progress):
            rows = range(start, min(start + batch_size, len(dataset)))
            pixels = torch.stack([dataset[row]["pixel_values"] for row in rows])
            posterior = vae.encode(pixels.to(device, dtype)).latent_dist
            means.append(posterior.mean.float().cpu())
            stds.append(posterior.std.float().cpu())
        return {"mean": torch.cat(means), "std": torch.cat(stds)}

    key = {"content": "latents", "autoencoder": module_digest(vae), "data": str(dataset.fingerprint)}
    return LatentCache(**_cached(Path(cache_dir), key, encode))


@torch.no_grad()
def cache_text_embeddings(
    text_condition: TextCondition,
    captions: Sequence[str],
    cache_dir: str | Path,
    batch_size: int = 64,
    show_progress: bool = True,
) -> TextCache:
    """Embeddings of `captions` and of the empty prompt, from the cache if they are there.

    Args:
        text_condition: The encoder.
        captions: Any order, repetitions allowed.
        cache_dir: Folder of the cache files.
        batch_size: Captions encoded at once.
        show_progress: Whether a progress bar shows the encoding.
    """
    distinct = sorted({"", *captions})

    def encode() -> dict[str, torch.Tensor]:
        lengths, tokens, pooled = [], [], []
        for start in tqdm(range(0, len(distinct), batch_size), desc="encoding captions", disable=not show_progress):
            embeddings = text_condition.encode(distinct[start : start + batch_size])
            states = embeddings.tokens.float().cpu()  # (B, L, D)
            # The length is where zeros begin: what lies behind it is padding, whatever the tokenizer's rules are.
            position = torch.arange(1, states.shape[1] + 1)
            length = (states.ne(0).any(dim=-1) * position).amax(dim=1)
            lengths.append(length)
            tokens.append(states[position <= length[:, None]])
            pooled.append(embeddings.pooled.float().cpu())
        return {"lengths": torch.cat(lengths), "tokens": torch.cat(tokens), "pooled": torch.cat(pooled)}

    key = {
        "content": "text",
        "encoder": module_digest(text_condition.text_encoder),
        "tokenizer": _tokenizer_digest(text_condition.tokenizer),
        "max_length": text_condition.max_length,
        "captions": hashlib.sha256("\0".join(distinct).encode()).hexdigest(),
    }
    content = _cached(Path(cache_dir), key, encode)
    return TextCache(distinct, max_length=text_condition.max_length, **content)


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Not part of the tokenizer: how it was called last.
        content["padding"] = content["truncation"] = None
    else:
        content = tokenizer.get_vocab()
    description = f"{type(tokenizer).__name__} {tokenizer.padding_side} {json.dumps(content, sort_keys=True)}"
    return hashlib.sha256(description.encode()).hexdigest()


def _cached(
    folder: Path, key: dict[str, Any], compute: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The tensors stored for `key`, or those that `compute` makes, which are then stored."""
    key = {**key, "layout": LAYOUT}
    description = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(description.encode()).hexdigest()[:24]
    path = folder / f"{key['content']}-{digest}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if metadata == {"key": description, "sha256": _digest(tensors)}:
            return tensors
    except (FileNotFoundError, SafetensorError):
        pass  # not there, or not whole: made anew
    tensors = {name: tensor.contiguous() for name, tensor in sorted(compute().items())}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DataError(
                f"{key['content']}: the encoder's {name} holds NaN or infinite values; expected finite ones."
            )
    folder.mkdir(parents=True, exist_ok=True)
    with written(path, durable=False) as temporary:  # its digest tells a damaged one
        save_file(tensors, temporary, metadata={"key": description, "sha256": _digest(tensors)})
    return tensors
