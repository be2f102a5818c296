"""The weight files of a component's folder: one safetensors file, or shards and the index that names them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubgen.formats.headers import HOW_TO_CONVERT, PICKLED, TensorHeader, listing, read_header

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"


def index_names(stem: str, variant: str | None) -> tuple[str, ...]:
    """File names that an index may have, today's first."""
    if variant is None:
        return (f"{stem}.safetensors.index.json",)
    # the last is how diffusers wrote it before 0.28
    return (f"{stem}.safetensors.index.{variant}.json", f"{stem}.safetensors.{variant}.index.json")


def weights_name(stem: str, variant: str | None) -> str:
    """File name of the weights: `diffusion_pytorch_model.fp16.safetensors` of variant "fp16"."""
    return f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"


def weight_patterns(stem: str, variant: str | None, subfolder: str = "") -> list[str]:
    """Globs of the weight files to bring from the Hub for one component and variant, without their indices."""
    shards = (
        [f"{stem}-*-of-*.safetensors"]
        if variant is None
        else [f"{stem}.{variant}-*-of-*.safetensors", f"{stem}-*-of-*.{variant}.safetensors"]
    )
    prefix = f"{subfolder}/" if subfolder else ""
    return [prefix + name for name in [weights_name(stem, variant), *shards]]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one component, as their headers tell."""

    source: Path
    """The file, or the index of the shards"""
    sharded: bool
    tensors: dict[str, TensorHeader]


def read_checkpoint(folder: Path, variant: str | None = None, stem: str = DIFFUSERS_STEM) -> Checkpoint:
    """Every tensor of a folder's checkpoint by name. Reads the index and the headers only.

    Args:
        folder: Of one component.
        variant: As in `diffusion_pytorch_model.fp16.safetensors`; None for the files without one.
        stem: `diffusion_pytorch_model`, or `model` for those of transformers.

    Raises:
        FileNotFoundError: The folder has no weights of this variant; lists what it has.
        ValueError: Only pickled weights are there; an index or a file is damaged; the index and its shards disagree, or
            it names a file outside the folder.
    """
    # the index comes first where a folder has both, as in diffusers
    for name in index_names(stem, variant):
        if (folder / name).is_file():
            return Checkpoint(folder / name, True, sharded_headers(folder / name))
    path = folder / weights_name(stem, variant)
    if path.is_file():
        return Checkpoint(path, False, read_header(path))
    raise missing_weights(folder, variant, stem)


def missing_weights(folder: Path, variant: str | None, stem: str, in_repo: list[str] | None = None) -> Exception:
    """The error to raise for a folder without safetensors; `in_repo` are the files of its repository, if it is one."""
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = [*found, *(in_repo or [])]
    pickled = [name for name in found if name.endswith(PICKLED)]
    wanted = weights_name(stem, variant)
    if pickled and not any(name.endswith(".safetensors") for name in found):
        source, target = str(folder / pickled[0]), str(folder / wanted)
        advice = HOW_TO_CONVERT.format(source=source, target=target)
        return ValueError(f"{folder}: only pickled weights ({', '.join(pickled)}), no {wanted}. {advice}")
    listed = ", ".join(name for name in found if name.endswith((".safetensors", ".json", *PICKLED))) or "no such files"
    asked = "" if variant is None else f" (variant {variant!r})"
    others = sorted({match[1] for name in found if (match := re.match(rf"{stem}\.(\w+)[-\w]*\.safetensors$", name))})
    hint = f" Pass variant={others[0]!r}." if variant is None and others else ""
    return FileNotFoundError(f"{folder}: no {wanted}{asked} and no index of shards; found {listed}.{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, or not an object; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, expected a JSON object.")
    return content


def shard_path(index: Path, name: Any) -> Path:
    """Where a shard lies that an index names.

    Raises:
        ValueError: The name is none, or leads out of the index's folder. Links of the Hub's cache, which lead to the
            `blobs` of the same repository, are taken.
        FileNotFoundError: There is no such file.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\x00:]", name)
    if not plain:
        raise ValueError(f"{index}: weight_map names {name!r}; a shard is to be a plain file name in the same folder.")
    path = index.parent / name
    if path.is_symlink():
        folder, target = index.parent.resolve(), path.resolve()
        blobs = [above / "blobs" for above in index.parent.absolute().parents if (above / "snapshots").is_dir()]
        if not any(target.is_relative_to(home.resolve()) for home in (folder, *blobs)):
            raise ValueError(f"{index}: weight_map names {name!r}, a link out of the folder (to {target}).")
    if not path.is_file():
        raise FileNotFoundError(f"{index}: weight_map names {name!r}, which is not in the folder.")
    if not name.endswith(".safetensors"):
        raise ValueError(f"{index}: weight_map names {name!r}; only safetensors files are read.")
    return path


def read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> shard, all paths checked before any shard is opened."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: got `weight_map` {str(weight_map)[:80]}, expected tensors' names to files.")
    paths: dict[str, Path] = {}
    for name in weight_map.values():
        if not isinstance(name, str) or name not in paths:  # what is no string is refused by name
            paths[name] = shard_path(index, name)
    return {tensor: paths[name] for tensor, name in weight_map.items()}


def sharded_headers(index: Path) -> dict[str, TensorHeader]:
    """The tensors of all shards that an index names; index and shards must agree."""
    weight_map = read_index(index)
    headers = {path: read_header(path) for path in sorted(set(weight_map.values()))}
    found = {(name, path) for path, tensors in headers.items() for name in tensors}
    promised = set(weight_map.items())
    lines = [f"{name}: not in {path.name}" for name, path in sorted(promised - found)]
    lines += [f"{name}: in {path.name}, but not so in weight_map" for name, path in sorted(found - promised)]
    if lines:
        raise ValueError(f"{index}: {len(lines)} entries disagree with the shards:{listing(lines)}")
    return {name: headers[path][name] for name, path in weight_map.items()}
