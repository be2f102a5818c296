"""`from_pretrained` that checks a checkpoint as a whole before any of it is loaded.

diffusers warns about missing and unknown keys and leaves the missing parameters on the meta device. Here the config,
every key and every shape are compared with the model on the meta device first, from the files' headers alone: what does
not fit is an error that lists all of it, and no memory was taken by then.
"""

import copy
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.models.modeling_utils import ModelMixin

from hubgen.diffusers_contract import no_init_weights
from hubgen.formats.checkpoints import (
    DIFFUSERS_STEM,
    Checkpoint,
    index_names,
    missing_weights,
    read_checkpoint,
    read_json,
    weight_patterns,
)
from hubgen.formats.headers import PICKLED, TensorHeader, check_finite, listing
from hubgen.formats.legacy import current_name, same_but_for_ones
from hubgen.formats.plain import plain_model

CONFIG = "config.json"
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "force_download", "local_files_only", "proxies")
# config keys that say how many of something a model has: each needs a tensor of its own at least
COUNTS = re.compile(r"(^|_)(layers|blocks|depth)(_|$)")
LISTED = 50  # lines of one kind in an error message
MOST_BUFFER_ELEMENTS = 2**26  # tables that a model computes for itself, beyond those in its file


class StrictModelMixin(ModelMixin):
    """A `ModelMixin` whose `from_pretrained` takes a checkpoint that fits the model exactly, or none.

    Old attention keys (`legacy.py`) are renamed as in diffusers, and keys that match a pattern of the class's
    `_keys_to_ignore_on_load_unexpected` may be there; nothing else is passed over.
    """

    _config_class_names: ClassVar[tuple[str, ...]] = ()
    """Class names that official configs give this architecture, beside those of the class and its bases"""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Self:
        """A model from a folder or a repository of the Hub.

        Takes the arguments of diffusers' method (`subfolder`, `variant`, `torch_dtype`, `device_map`, `revision`, ...)
        and values that override the config's. Everything is checked before weights are read. For the Hub the config
        is fetched and checked first, then the weights of the asked variant alone.

        Args:
            pretrained_model_name_or_path: A local folder or `owner/name`.
            check_finite: Also reads all weights beforehand and refuses NaN and infinity. Off by default: it reads
                the file twice.
            **kwargs: As above.

        Raises:
            FileNotFoundError: There is no config or no weights of that variant.
            ValueError: The config is damaged, of another class or absurd; weights are pickled or damaged; keys are
                missing or unknown, or shapes differ: all are listed.
        """
        if pretrained_model_name_or_path is None:
            raise ValueError("`pretrained_model_name_or_path`: got None, expected a folder or a repository.")
        if kwargs.get("use_safetensors") is False or kwargs.get("use_flashpack"):
            raise ValueError("hubgen reads weights from safetensors only; drop `use_safetensors` or `use_flashpack`.")
        finite = kwargs.pop("check_finite", False)
        source = os.fspath(pretrained_model_name_or_path)
        if os.path.isfile(source):
            raise ValueError(f"{source} is a file, not a model's folder; single files are for `from_single_file`.")
        subfolder, variant = kwargs.pop("subfolder", None) or "", kwargs.get("variant")
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        home = Path(source)
        if not home.is_dir():
            home = fetch(source, [f"{subfolder}/{CONFIG}".lstrip("/"), *index_patterns(variant, subfolder)], hub)
            cls.check_config_file(read_json(home / subfolder / CONFIG), home / subfolder / CONFIG)
            home = fetch(source, weight_patterns(DIFFUSERS_STEM, variant, subfolder), hub, keep=home)
            refuse_pickles_only(source, home, subfolder, variant, hub)
        checkpoint = cls.check_pretrained(home / subfolder, **kwargs)
        if finite:
            check_finite(checkpoint.tensors)
        kwargs["use_safetensors"] = True
        loaded = super().from_pretrained(str(home / subfolder), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        model.register_to_config(_name_or_path=source)
        return loaded

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at its signature
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' method; what is saved is the plain model, see `hubgen.formats.plain`."""
        super(StrictModelMixin, plain_model(self)).save_pretrained(*args, **kwargs)

    @classmethod
    def check_pretrained(
        cls, folder: Path, variant: str | None = None, ignore_mismatched_sizes: bool = False, **kwargs: Any
    ) -> Checkpoint:
        """Checks a component's folder without loading it; the errors are those of `from_pretrained`.

        Args:
            folder: With config.json and weights.
            variant: Of the weights.
            ignore_mismatched_sizes: Let shapes differ, as diffusers does with this argument.
            **kwargs: Values that override the config's; other arguments of `from_pretrained` are passed over.
        """
        config = read_json(folder / CONFIG)
        cls.check_config_file(config, folder / CONFIG)
        checkpoint = read_checkpoint(folder, variant)
        if config.get("quantization_config") is not None:  # packed weights: the quantizer knows their keys and shapes
            return checkpoint
        config.update({key: value for key, value in kwargs.items() if key in cls._get_init_keys(cls)})
        model = on_meta(cls, config, checkpoint.tensors, str(folder / CONFIG))
        cls.check_checkpoint(model, checkpoint, ignore_mismatched_sizes)
        return checkpoint

    @classmethod
    def check_config_file(cls, config: Mapping[str, Any], path: Path) -> None:
        """Raises ValueError where a config is another class's or holds numbers that no model has."""
        names = {base.__name__ for base in cls.__mro__} | set(cls._config_class_names)
        found = config.get("_class_name", cls.__name__)
        if found not in names:
            raise ValueError(f"{path}: the config of a {found}, expected a {cls.__name__}.")
        lines = [f"{key}={value}" for key, value in whole_numbers(config) if value < 0 and not key.startswith("_")]
        if lines:
            raise ValueError(f"{path}: negative numbers:{listing(lines)}")

    @classmethod
    def check_checkpoint(
        cls, model: torch.nn.Module, checkpoint: Checkpoint, ignore_mismatched_sizes: bool = False
    ) -> None:
        """Compares a checkpoint with a model on the meta device.

        Raises:
            ValueError: Tensors are missing, unknown or of another shape or kind; it lists all of them.
        """
        expected = model.state_dict()
        # as in diffusers, which reads old names from single files alone: shards are younger than the new names
        names = {name: name if checkpoint.sharded else current_name(name, expected) for name in checkpoint.tensors}
        problems = describe_difference(
            {names[name]: header for name, header in checkpoint.tensors.items()},
            expected,
            ignored=cls._keys_to_ignore_on_load_unexpected or (),
            shapes=not ignore_mismatched_sizes,
            legacy=not checkpoint.sharded,
        )
        if len(set(names.values())) < len(names):
            problems += "\n  some tensors are there under an old and a new name"
        if problems:
            raise ValueError(f"{checkpoint.source} does not fit the config of the {cls.__name__}:{problems}")

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Called by diffusers' loader: old names and 1x1-convolution shapes become those of the model."""
        expected = self.state_dict()
        for name in list(state_dict):
            now = current_name(name, expected)
            value = state_dict.pop(name)
            if now in expected and same_but_for_ones(now, value.shape, expected[now].shape):
                value = value.reshape(expected[now].shape)
            state_dict[now] = value
        return state_dict


def on_meta(cls: type[ModelMixin], config: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> ModelMixin:
    """The model of a config without memory.

    Args:
        cls: Of the model.
        config: Keyword arguments, and keys that begin with an underscore, which are passed over.
        tensors: Those of its file. A config whose counts exceed their number is refused before it is built.
        where: What errors name.
    """
    lines = [f"{key}={value}" for key, value in whole_numbers(config) if COUNTS.search(key) and value > len(tensors)]
    lines += [
        f"{key} has {len(v)} entries" for key, v in config.items() if isinstance(v, list) and len(v) > len(tensors)
    ]
    if lines:
        raise ValueError(f"{where}: asks for more layers than the {len(tensors)} tensors of its file:{listing(lines)}")
    # what the class does not know, diffusers' loader reports when it builds the model
    known = {key: value for key, value in config.items() if key in cls._get_init_keys(cls) or key.startswith("_")}
    try:
        with torch.device("meta"), no_init_weights():
            model = cls.from_config(copy.deepcopy(known))
    except Exception as error:
        raise ValueError(f"{where}: no {cls.__name__} can be made of it: {error}") from error
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if buffers > MOST_BUFFER_ELEMENTS + sum(int(torch.Size(tensor.shape).numel()) for tensor in tensors.values()):
        raise ValueError(f"{where}: asks for tables of {buffers:,} numbers beside the weights.")
    return model


def whole_numbers(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """All whole numbers in a config, with their keys, those in (nested) lists included."""
    found: list[tuple[str, int]] = []

    def visit(key: str, value: Any) -> None:
        if isinstance(value, int) and not isinstance(value, bool):
            found.append((key, value))
        elif isinstance(value, list | tuple):
            for item in value:
                visit(key, item)

    for key, value in config.items():
        visit(key, value)
    return found


def describe_difference(
    found: Mapping[str, TensorHeader | torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    ignored: tuple[str, ...] | list[str] = (),
    shapes: bool = True,
    legacy: bool = False,
) -> str:
    """All that two sets of tensors differ in, for an error message; empty where they agree.

    Args:
        found: The file's.
        expected: The model's.
        ignored: Patterns of names that the file may have beyond the model.
        shapes: Compare them.
        legacy: Take an attention's 1x1 convolution for a linear layer and the other way round.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not any(re.search(p, name) for p in ignored)]
    wrong = []
    for name in expected.keys() & found.keys():
        ours, theirs = expected[name], found[name]
        same = tuple(ours.shape) == tuple(theirs.shape) or (
            legacy and same_but_for_ones(name, theirs.shape, ours.shape)
        )
        if shapes and not same:
            wrong.append(f"{name}: {list(theirs.shape)}, expected {list(ours.shape)}")
        elif ours.dtype.is_floating_point != theirs.dtype.is_floating_point:
            wrong.append(f"{name}: of type {theirs.dtype}, expected a floating-point type")
    text = ""
    for title, lines in (("missing", missing), ("unknown", extra), ("of another shape or type", wrong)):
        if lines:
            text += f"\n  {len(lines)} tensors {title}:{listing(sorted(lines), LISTED)}"
    return text


def index_patterns(variant: str | None, subfolder: str) -> list[str]:
    """Names of the index files to ask the Hub for."""
    prefix = f"{subfolder}/" if subfolder else ""
    return [prefix + name for name in index_names(DIFFUSERS_STEM, variant)]


def fetch(repo: str, patterns: list[str], hub: Mapping[str, Any], keep: Path | None = None) -> Path:
    """Brings files of a repository into the Hub's cache and returns the snapshot's folder.

    Args:
        repo: `owner/name`.
        patterns: Globs of the files.
        hub: `revision`, `token` and the like.
        keep: A snapshot that was fetched before: the same commit is taken again.

    Raises:
        OSError: There is no such folder or repository, or the Hub is out of reach and the cache has none of it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    options = {name: value for name, value in hub.items() if value is not None}
    if keep is not None:
        options["revision"] = keep.name
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, **options))
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo}: neither a folder nor the name of a repository (owner/name).") from error


def refuse_pickles_only(repo: str, home: Path, subfolder: str, variant: str | None, hub: Mapping[str, Any]) -> None:
    """Where a repository had no safetensors to fetch, raises the error that says what it has instead."""
    folder = home / subfolder
    if any(entry.suffix == ".safetensors" for entry in folder.iterdir()):
        return
    from huggingface_hub import HfApi

    if hub.get("local_files_only"):
        names = []
    else:
        files = HfApi().list_repo_files(repo, revision=home.name, token=hub.get("token"))
        names = [Path(name).name for name in files if str(Path(name).parent) == (subfolder or ".")]
    others = [name for name in names if name.endswith((".safetensors", *PICKLED))]
    raise missing_weights(folder, variant, DIFFUSERS_STEM, others)
