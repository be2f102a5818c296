"""Textual inversion (2208.01618): words of one's own, each of them learned rows of a text encoder's embedding table.

A word of n vectors is n tokens, `<cat>`, `<cat>_1`, ...; prompts name the first (`hubgen.conditioning.text`). Files:

    diffusers           {word: (n, D)}
    A1111               {"emb_params": (n, D)}; the word is the file's name, or `name` of its header
    several encoders    {"clip_l": (n, D), "clip_g": (n, E)}, as A1111, ComfyUI and diffusers' scripts have it for SDXL;
                        T5's part is "t5xxl" or "t5"; the word is named as in A1111's

Shapes: n vectors of D (or E) features, as wide as the encoder's table.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hubgen.adaptation.header_keys import A1111, PARTS, WORD
from hubgen.conditioning.prompts import T5
from hubgen.conditioning.text import tokens_of
from hubgen.diffusers_contract import forget_tokens
from hubgen.formats.atomic import written
from hubgen.formats.headers import HOW_TO_CONVERT, PICKLED, read_header, read_metadata
from hubgen.formats.loading import fetch
from hubgen.formats.single_file import find_file

USUAL = "learned_embeds.safetensors"
"""Name of diffusers' file"""
PICKLED_BY_A1111 = "\nOf one of A1111's: tensors = {'emb_params': state['string_to_param']['*']}."

Source = str | os.PathLike[str] | Mapping[str, Any] | torch.Tensor


class EmbeddingError(ValueError):
    """Learned embeddings that cannot be read, or do not fit the text encoder."""


@dataclass(frozen=True)
class LearnedWord:
    """What a file says about one word."""

    token: str
    vectors: torch.Tensor
    """(n, D)"""
    part: str | None
    """The value of `PARTS` that it is for; `None` where the file does not say"""
    where: str
    """For messages"""

    @property
    def tokens(self) -> list[str]:
        """Of each of its vectors."""
        return [self.token, *(f"{self.token}_{number}" for number in range(1, len(self.vectors)))]


@dataclass(frozen=True)
class Reader:
    """A text encoder that may learn words, with its tokenizer."""

    name: str
    """Of the component"""
    encoder: Any
    tokenizer: Any

    @property
    def part(self) -> str:
        """The value of `PARTS` that means it."""
        return "t5" if self.encoder.config.model_type in T5 else self.name

    @property
    def table(self) -> nn.Embedding:
        """Rows of D features by token."""
        table: nn.Embedding = self.encoder.get_input_embeddings()
        return table

    def learned(self) -> dict[str, int]:
        """The tokens that were added to those that the tokenizer was built with, and their ids."""
        added = self.tokenizer.added_tokens_decoder.items()
        first = self.tokenizer.vocab_size
        return {token.content: index for index, token in added if index >= first and not token.special}

    def check(self, word: LearnedWord, others: Collection[str] = ()) -> None:
        """Raises EmbeddingError unless the word can be added, beside other tokens that will be."""
        width, (count, found) = self.table.weight.shape[1], word.vectors.shape
        if found != width:
            raise EmbeddingError(
                f"{word.where}: got {found} features for {word.token!r}, expected the {width} of `{self.name}`."
            )
        room = self.tokenizer.model_max_length - self.tokenizer.num_special_tokens_to_add()
        if count > room:
            raise EmbeddingError(
                f"{word.where}: got {count} vectors for {word.token!r}, expected at most the {room} tokens that "
                f"`{self.name}` reads."
            )
        vocabulary = {*self.tokenizer.get_vocab(), *others}
        for token in word.tokens:
            if token in vocabulary:
                raise EmbeddingError(
                    f"{word.where}: got the word {word.token!r}, expected another: `{self.name}` knows the token "
                    f"{token!r} already. `token` gives it another name, `unload_textual_inversion` removes the old one."
                )
        stem = re.match(r"(.+)_\d+$", word.token)
        if stem and stem[1] in {*self.learned(), *others}:
            raise EmbeddingError(
                f"{word.where}: got the word {word.token!r}, expected another: it would read as a further vector of "
                f"{stem[1]!r}."
            )
        if f"{word.token}_{count}" in vocabulary:
            raise EmbeddingError(
                f"{word.where}: got the word {word.token!r}, expected another: {word.token}_{count} is a word already, "
                "and would read as its further vector."
            )

    @torch.no_grad()
    def add(self, word: LearnedWord) -> None:
        """Adds a word that was checked."""
        self.tokenizer.add_tokens(word.tokens)
        ids = self.tokenizer.convert_tokens_to_ids(word.tokens)
        rows = max(ids) + 1
        if rows > len(self.table.weight):
            self.encoder.resize_token_embeddings(rows, mean_resizing=False)
        self.table.weight[ids] = word.vectors.to(self.table.weight)

    @torch.no_grad()
    def remove(self, tokens: Sequence[str]) -> None:
        """Takes tokens out of vocabulary and table, as far as they are in it; later ones move up."""
        known = self.learned()
        gone = sorted(known[token] for token in tokens if token in known)
        if not gone:
            return
        weight = self.table.weight
        # A table with more rows than there are tokens was so from the beginning (T5's): it keeps its size.
        spare = gone if len(weight) > len(self.tokenizer) else []
        forget_tokens(self.tokenizer, set(tokens) & known.keys())
        rows = [row for row in range(gone[0], len(weight)) if row not in set(gone)] + spare
        size = gone[0] + len(rows)
        weight[gone[0] : size] = weight[rows]
        if size < len(weight):
            self.encoder.resize_token_embeddings(size, mean_resizing=False)


# ---- files ----


def read_words(
    source: Source,
    tokens: Sequence[str] | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> list[LearnedWord]:
    """The words of a file, by encoder where it has several.

    Args:
        source: A safetensors file, a folder or repository with one, its tensors, or the vectors themselves.
        tokens: Names in the place of the file's: one, or as many as there are vectors, each of which is a word then.
        weight_name: Of the file in a folder or repository.
        subfolder: Of the folder or repository.
        hub: `revision`, `token` and the like.

    Raises:
        EmbeddingError: These are no embeddings, or they hold NaN, or more or fewer than there are names.
        ValueError: The file is a pickle, or no whole safetensors file.
        OSError: There is no such file, folder or repository.
    """
    where, found, name = opened(source, weight_name, subfolder, hub or {})
    parts = {key: PARTS.get(key) for key in found}
    nameless = found.keys() == {A1111} or None not in parts.values()
    several = len(found) > 1 and not nameless
    if not found or (several and any(key in (*PARTS, A1111) or "." in key for key in found)):
        raise EmbeddingError(
            f"{where}: got the tensors [{', '.join(list(found)[:5])}{', ...' if len(found) > 5 else ''}], expected "
            f"words, or `{A1111}`, or one of {', '.join(PARTS)} for each text encoder."
        )
    if tokens and several:
        raise EmbeddingError(f"`token`: got {', '.join(tokens)}, expected None: {where} names {', '.join(found)}.")
    words = []
    for key, value in found.items():
        vectors = as_vectors(value, key, where)
        names = tokens or ([name] if nameless else [key])
        if len(names) not in (1, len(vectors)):
            raise EmbeddingError(f"`token`: got {len(names)} names for {where}, expected one, or {len(vectors)}.")
        rows = [vectors] if len(names) == 1 else vectors.split(1)
        words += [LearnedWord(token, row, parts[key], where) for token, row in zip(names, rows, strict=True)]
    for token in {word.token for word in words}:
        if not isinstance(token, str) or not token or token != token.strip():
            raise EmbeddingError(f"`token`: got {token!r} for {where}, expected a name without spaces around it.")
    return words


def opened(
    source: Source, weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]
) -> tuple[str, dict[str, Any], Any]:
    """Where the embeddings are, for messages; the tensors by key; the word's name where it is not one of the keys."""
    if isinstance(source, torch.Tensor):
        return "the tensor", {A1111: source}, None
    if isinstance(source, Mapping):
        if "string_to_param" in source:  # what torch.load makes of A1111's pickles
            return "the state dict", {A1111: source["string_to_param"]["*"]}, source.get("name")
        return "the state dict", dict(source), None
    path = find_embeddings(source, weight_name, subfolder, hub)
    return str(path), load_embeddings(path), read_metadata(path).get(WORD) or path.stem


def find_embeddings(
    source: str | os.PathLike[str], weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]
) -> Path:
    """The safetensors file of learned embeddings; see `read_words`."""
    path, inside = Path(source), subfolder or ""
    if path.is_file() or str(source).startswith(("http://", "https://")):
        return find_file(source, hub)
    if (weight_name or str(source)).endswith(PICKLED):
        raise pickled(weight_name or str(source))
    local = path.is_dir()
    home = path if local else fetch(str(source), [f"{inside}/{weight_name or '*.safetensors'}".lstrip("/")], hub)
    found = sorted(file.name for file in (home / inside).glob("*.safetensors"))
    wanted = weight_name or (USUAL if USUAL in found or len(found) != 1 else found[0])
    if wanted in found:
        return home / inside / wanted
    if found:
        expected = weight_name or "`weight_name` to say which"
        raise EmbeddingError(f"{source}: got {', '.join(found)}, expected {expected}.")
    names = os.listdir(home / inside) if local else files_of(str(source), inside, home.name, hub)
    for name in sorted(name for name in names if name.endswith(PICKLED)):
        raise pickled(f"{source}/{inside}/{name}".replace("//", "/"))
    raise EmbeddingError(f"{source}: got no safetensors file, expected {wanted}.")


def files_of(repo: str, subfolder: str, revision: str, hub: Mapping[str, Any]) -> list[str]:
    """Names of the files in a folder of a repository; of none where the Hub is not to be asked."""
    if hub.get("local_files_only"):
        return []
    from huggingface_hub import HfApi

    paths = map(Path, HfApi().list_repo_files(repo, revision=revision, token=hub.get("token")))
    return [path.name for path in paths if path.parent == Path(subfolder)]


def pickled(name: str) -> EmbeddingError:
    """The refusal of a pickle."""
    advice = HOW_TO_CONVERT.format(source=name, target=str(Path(name).with_suffix(".safetensors")))
    return EmbeddingError(f"{name}: a pickled file. {advice}{PICKLED_BY_A1111}")


def load_embeddings(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; raises ValueError for pickles and damaged files."""
    from safetensors.torch import load_file

    if path.suffix in PICKLED:
        raise pickled(str(path))
    read_header(path)
    return load_file(path)


def as_vectors(value: Any, key: str, where: str) -> torch.Tensor:
    """(n, D) of a file's value; raises EmbeddingError unless it is one vector or several, and finite."""
    shaped = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim in (1, 2) and value.numel()
    if not shaped:
        found = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise EmbeddingError(f"{where}: got {found} for {key!r}, expected vectors, (n, D).")
    vectors = value.detach().reshape(-1, value.shape[-1])
    if not vectors.float().isfinite().all():
        raise EmbeddingError(f"{where}: got NaN or infinity in {key!r}, expected finite numbers.")
    return vectors


def save_embeddings(
    path: str | os.PathLike[str],
    embeddings: Mapping[str, torch.Tensor | Mapping[str, torch.Tensor]],
    layout: Literal["diffusers", "a1111"] = "diffusers",
) -> None:
    """Writes a learned word as a file.

    Args:
        path: Of the file, which is written beside and renamed. In A1111's layout its name is the word.
        embeddings: The word and its vectors, (n, D) or (D,); of several encoders by their keys in files, `clip_l`,
            `clip_g`, ..., which is the same file in both layouts.
        layout: diffusers', or A1111's, which ComfyUI reads too.

    Raises:
        ValueError: Not one word (other programs read one from a file), no vectors, NaN, or another layout or key.
    """
    from safetensors.torch import save_file

    if layout not in ("diffusers", "a1111"):
        raise ValueError(f"`layout`: got {layout!r}, expected 'diffusers' or 'a1111'.")
    if len(embeddings) != 1:
        raise ValueError(f"`embeddings`: got {len(embeddings)} words, expected one: other programs read one a file.")
    ((token, value),) = embeddings.items()
    if isinstance(value, Mapping):
        unknown = sorted(value.keys() - PARTS.keys())
        if unknown or not value:
            raise ValueError(f"`embeddings`: got the keys {unknown}, expected some of {', '.join(PARTS)}.")
        tensors = dict(value)
    else:
        tensors = {token if layout == "diffusers" else A1111: value}
    tensors = {key: as_vectors(one, key, "`embeddings`").clone().contiguous() for key, one in tensors.items()}
    with written(Path(path)) as temporary:
        save_file(tensors, temporary, {"format": "pt", WORD: token})


# ---- onto text encoders ----


def plan(words: Sequence[LearnedWord], readers: Sequence[Reader]) -> list[tuple[Reader, LearnedWord]]:
    """Which encoder gets which word: the one that the file names, else the first that is as wide.

    Args:
        words: Of one or several files.
        readers: In the pipeline's order.

    Raises:
        EmbeddingError: A word fits none of them, is known already, or is there twice.
    """
    found: list[tuple[Reader, LearnedWord]] = []
    for word in words:
        fitting = readers
        if word.part is not None:
            fitting = [reader for reader in readers if reader.part == word.part]
            if not fitting:
                keys = [key for key, part in PARTS.items() if part == word.part]
                names = ", ".join(f"`{reader.name}`" for reader in readers)
                raise EmbeddingError(
                    f"{word.where}: got vectors for `{keys[0]}`, expected some for the text encoders that there are: "
                    f"{names}."
                )
        width = word.vectors.shape[1]
        reader = next((one for one in fitting if one.table.weight.shape[1] == width), fitting[0])
        others = {token for other, known in found if other is reader for token in known.tokens}
        if word.token in others:
            raise EmbeddingError(f"{word.where}: got {word.token!r} a second time, expected each word once.")
        reader.check(word, others)
        found.append((reader, word))
    return found


def add_words(planned: Sequence[tuple[Reader, LearnedWord]]) -> None:
    """Adds the words of a plan: all of them or, if something fails, none."""
    with ExitStack() as undo:
        for reader, word in planned:
            undo.callback(reader.remove, word.tokens)
            reader.add(word)
        undo.pop_all()


def remove_words(readers: Sequence[Reader], tokens: Sequence[str] | None) -> None:
    """Removes learned words from the text encoders that have them.

    Args:
        readers: The encoders.
        tokens: The words, with all their vectors; `None` for all that were added.

    Raises:
        EmbeddingError: None of the encoders has such a word; nothing is removed then.
    """
    gone: dict[int, list[str]] = {}
    for number, reader in enumerate(readers):
        known = reader.learned()
        wanted = [piece for token in tokens if token in known for piece in tokens_of(token, known)] if tokens else known
        gone[number] = list(dict.fromkeys(wanted))
    for token in tokens or ():
        if not any(token in pieces for pieces in gone.values()):
            names = sorted({name for reader in readers for name in reader.learned()})
            raise EmbeddingError(f"`tokens`: got {token!r}, expected one of the learned words: {names}.")
    for number, pieces in gone.items():
        if pieces:
            readers[number].remove(pieces)
