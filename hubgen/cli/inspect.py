"""`hubgen inspect`: what a file or folder of weights is, from its headers and configs alone."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubgen.cli.arguments import add_command

if TYPE_CHECKING:
    from hubgen.adaptation.describe import AdapterDescription, EmbeddingDescription
    from hubgen.formats.headers import TensorHeader

INSPECT_DESCRIPTION = """\
Say what a safetensors file is: an adapter (LoRA, DoRA, LoHa, LoKr, full differences; in whose layout, for which base,
with what ranks, alphas and trained words), learned words (textual inversion), a whole model in an original layout, an
autoencoder, or one network of diffusers or transformers; and its precision and size. A folder may be given for the one
file in it, or for a pipeline, whose class and components are named.

Only headers are read, so that the largest files answer at once.
"""

INSPECT_EPILOG = """\
examples:
  hubgen inspect style.safetensors
  hubgen inspect runs/cats-lora/lora
  hubgen inspect v1-5.safetensors
  hubgen inspect my/sdxl-folder

exit status:
  0 done, 2 no such file, a pickle or a damaged file (one line says what), 130 interrupted, 1 a fault in hubgen
"""

USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "learned_embeds.safetensors")
"""Files that a folder is looked at for, before any other"""
FEW = 6
"""Names that are listed, of many"""
Lines = Iterator[tuple[str, str]]
"""What is said: what of, and what"""


def add_inspect(commands: Any) -> None:
    """Adds `hubgen inspect` to the command line."""
    parser = add_command(
        commands,
        "inspect",
        summary="say what a file of weights is",
        description=INSPECT_DESCRIPTION,
        epilog=INSPECT_EPILOG,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file, or a folder")
    parser.set_defaults(run=inspect)


def inspect(arguments: argparse.Namespace) -> None:
    """`hubgen inspect`: what a file or folder is."""
    path = arguments.file.expanduser()
    if path.is_dir() and (path / "model_index.json").is_file():
        lines = pipeline_lines(path)
    elif path.is_dir():
        lines = folder_lines(path)
    else:
        lines = file_lines(path)
    found = list(lines)  # all of it before the first line is printed: an error stands alone
    width = max(len(name) for name, _ in found) + 2
    for name, text in found:
        print(f"{name:{width}}{text}")


# ---- folders ----


def pipeline_lines(folder: Path) -> Lines:
    """About the folder of a pipeline."""
    from hubgen.formats.checkpoints import read_json
    from hubgen.hub.carried_code import as_installed, is_carried
    from hubgen.pipelines.loading import READERS

    written = read_json(folder / "model_index.json")
    index = as_installed(written)
    yield "folder", str(folder)
    yield "is", f"a pipeline: {index.get('_class_name', 'of no class that its index names')}"
    if is_carried(written.get("_class_name")):
        yield "code", f"comes along in {written['_class_name'][0]}.py, for machines where hubgen is not installed"
    total = 0
    for name, value in written.items():
        if not isinstance(value, list) or len(value) != 2 or None in value or name.startswith("_"):
            continue
        files = sorted((folder / name).glob("*.safetensors"))
        tensors = {key: one for file in files for key, one in headers(file).items()}
        total += sum(file.stat().st_size for file in files)
        weights = f", {counted(tensors)}" if tensors else ""
        yield name, f"{value[1]} ({value[0]}){weights}"
    yield "size", size_text(total)
    if index.get("_class_name") in READERS:
        yield "use", f"hubgen generate --model {folder}"


def folder_lines(folder: Path) -> Lines:
    """About a folder with one file, or with one network."""
    from hubgen.formats.headers import PICKLED

    names = sorted(path.name for path in folder.glob("*.safetensors"))
    usual = [name for name in USUAL if name in names]
    if usual or len(names) == 1:
        return file_lines(folder / (usual or names)[0])
    if names and (folder / "config.json").is_file():
        return model_lines(folder, [folder / name for name in names])
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    inner = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
    if names:
        raise ValueError(f"{folder}: holds {listed(names)}; expected one file, name it")
    if pickles:
        raise ValueError(f"{folder}: holds the pickles {listed(pickles)}; expected a safetensors file")
    also = f"; there are some in {listed(dict.fromkeys(inner))}" if inner else ""
    raise ValueError(f"{folder}: holds no safetensors file, expected one, or a model_index.json{also}")


def model_lines(folder: Path, files: list[Path]) -> Lines:
    """About the folder of one network, whose weights may lie in several files."""
    tensors = {key: one for file in files for key, one in headers(file).items()}
    yield "folder", str(folder)
    yield "is", f"one network: {class_in(folder) or 'of no class that its config names'}"
    yield from numbers_of(tensors, sum(file.stat().st_size for file in files))


def class_in(folder: Path) -> str | None:
    """The class that a config of diffusers or transformers names."""
    from hubgen.formats.checkpoints import read_json

    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    return name if isinstance(name, str) else None


# ---- files ----


def file_lines(path: Path) -> Lines:
    """About a file."""
    from hubgen.adaptation.describe import describe_adapter, describe_embeddings

    tensors = headers(path)
    embeddings = describe_embeddings(path)
    adapter = None if embeddings is not None else describe_adapter(path)
    yield "file", str(path)
    if embeddings is not None:
        yield from embedding_lines(embeddings)
        model = "" if embeddings.base.startswith("hubgen") else " --model MODEL"
        yield "use", f"hubgen generate {shlex.quote(f'a {embeddings.word}')}{model} --embedding {path}"
    elif adapter is not None:
        yield from adapter_lines(adapter)
    else:
        yield from checkpoint_lines(path, tensors)
    yield from numbers_of(tensors, path.stat().st_size)
    if adapter is not None:
        model = "" if adapter.base.startswith("hubgen") else " --model MODEL"
        yield "use", f"hubgen generate PROMPT{model} --lora {path}"


def adapter_lines(found: AdapterDescription) -> Lines:
    """About an adapter."""
    yield "is", f"an adapter: {' and '.join(found.kinds)}"
    yield "layout", found.layout
    yield "for", found.base or "unknown models: neither names nor widths of its layers tell"
    yield "layers", ", ".join(f"{count} of {name}" for name, count in found.components.items())
    if len(found.kinds) > 1:
        yield "kinds", ", ".join(f"{name} in {count} layers" for name, count in found.kinds.items())
    if found.ranks:
        alone = len(found.ranks) == 1
        ranks = [f"{rank}" if alone else f"{rank} in {count} layers" for rank, count in found.ranks.items()]
        yield "rank", listed(ranks)
        alphas = [f"{alpha:g}" for alpha in found.alphas]
        yield "alpha", listed(alphas) or "none: each counts as its rank"
    for where, words in found.words.items():
        yield "words", f"{words} ({where})"
    for where, base in found.named_bases.items():
        yield "base", f"{base} ({where})"
    if found.unknown:
        yield "unknown", f"{len(found.unknown)} of its tensors or layers: {listed(found.unknown)}"


def embedding_lines(found: EmbeddingDescription) -> Lines:
    """About learned words."""
    yield "is", "learned words (textual inversion)"
    yield "for", found.base or "unknown models: the widths do not tell"
    for word, (count, width) in found.words.items():
        yield "word", f"{word}: {count} {'vector' if count == 1 else 'vectors'} of {width}"


def checkpoint_lines(path: Path, tensors: Mapping[str, TensorHeader]) -> Lines:
    """About a file of whole networks."""
    from hubgen.formats.headers import read_metadata
    from hubgen.formats.layouts import HINTS, LAYOUTS, QUANTISED, VAE_KEY, VAE_PREFIXES, detect, open_single_file

    packed = next((what for pattern, what in QUANTISED if any(re.search(pattern, key) for key in tensors)), None)
    layout, _ = detect(tensors)
    autoencoder = any(prefix + VAE_KEY in tensors for prefix in VAE_PREFIXES)
    hint = next((what for pattern, what in HINTS if any(re.search(pattern, key) for key in tensors)), None)
    named = class_in(path.parent)
    if layout is not None:
        yield "is", f"a model in its original layout: {LAYOUTS[layout].title}"
    elif autoencoder:
        yield "is", "an autoencoder in its original layout"
    elif named is not None:
        yield "is", f"one network: {named}"
    elif hint is not None:
        yield "is", hint
    else:
        yield "is", f"nothing that is known; its first tensors: {listed(sorted(tensors)) or 'none'}"
    if packed is not None:
        yield "quantised", packed
    elif layout is not None or autoencoder:
        file = open_single_file(path)
        for part, inside in file.parts.items():
            yield part, counted(inside)
        if layout is not None and LAYOUTS[layout].backbone != "controlnet":  # which stands beside a model
            lacking = sorted({*LAYOUTS[layout].text_encoders, "vae"} - file.parts.keys())
            if lacking:
                yield "lacks", ", ".join(lacking)
        if file.markers:
            yield "says", ", ".join(file.markers)
        if file.others:
            yield "beside", f"{len(file.others)} tensors of no part: {listed(file.others)}"
    header = read_metadata(path)
    for key in ("modelspec.title", "modelspec.architecture", "modelspec.prediction_type"):
        if header.get(key):
            yield key.removeprefix("modelspec."), str(header[key])


# ---- numbers ----


def headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file; ValueError for what is none."""
    from hubgen.formats.headers import read_header

    return read_header(path)


def numbers_of(tensors: Mapping[str, TensorHeader], size: int) -> Lines:
    """How many numbers there are, in which precision, and what they take on the disk."""
    yield "numbers", f"{sum(math.prod(one.shape) for one in tensors.values()):,} in {len(tensors)} tensors"
    yield "precision", precision(tensors) or "none"
    yield "size", size_text(size)


def counted(tensors: Mapping[str, TensorHeader]) -> str:
    """Numbers and precision of some tensors."""
    return f"{sum(math.prod(one.shape) for one in tensors.values()):,} numbers in {precision(tensors)}"


def precision(tensors: Mapping[str, TensorHeader]) -> str:
    """Types of numbers, that of the most first."""
    found: Counter[str] = Counter()
    for one in tensors.values():
        found[str(one.dtype).removeprefix("torch.")] += max(math.prod(one.shape), 1)
    (first, *others) = [name for name, _ in found.most_common()] or [""]
    return f"{first} and some {', '.join(others)}" if others else first


def size_text(size: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def listed(names: Iterable[str]) -> str:
    """The first of many names."""
    known = list(names)
    more = f", and {len(known) - FEW} more" if len(known) > FEW else ""
    return ", ".join(known[:FEW]) + more
