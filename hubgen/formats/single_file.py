"""`from_single_file`: models from the original-layout safetensors files that people trade, and the way back.

A file is checked as a whole first: the key map runs on tensors without storage, and the result is compared with the
model on the meta device. Only then are weights read.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging

from hubgen.diffusers_contract import no_init_weights
from hubgen.formats import clip_layout, ldm_vae
from hubgen.formats.checkpoints import Checkpoint, read_json
from hubgen.formats.headers import TensorHeader, listing, read_header
from hubgen.formats.key_maps import Rule, to_original, to_ours
from hubgen.formats.layouts import LAYOUTS, SingleFile, open_single_file
from hubgen.formats.loading import CONFIG, HUB_ARGUMENTS, describe_difference, fetch, on_meta
from hubgen.formats.markers import autoencoder_config, controlnet_config

logger = logging.get_logger(__name__)

HUB_URL = re.compile(r"^(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?]+)")
# Names of tensors that only the layout of diffusers has.
OWN_LAYOUT = re.compile(
    r"(down_blocks|up_blocks)\.\d+\.resnets\.|(single_)?transformer_blocks\.\d+\.attn1?\.(?!qkv\.|proj\.)"
    r"|encoder\.down_blocks\."
)
# Keywords of diffusers' `from_single_file` that choose how files are read or where they are put, not what is read.
NO_EFFECT = ("use_safetensors", "variant", "disable_mmap", "low_cpu_mem_usage", "resume_download")
Loader = Callable[[torch.dtype | None], Any]
Config = str | os.PathLike[str] | Mapping[str, Any] | None


class SingleFileMixin:
    """Adds `from_single_file` and `to_original` to a model that has an original layout."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        config: Config = None,
        torch_dtype: torch.dtype | None = None,
        subfolder: str | None = None,
        extract_ema: bool = False,
        **hub: Any,
    ) -> Self:
        """This model out of a single file, which may hold others too.

        Args:
            pretrained_model_link_or_path: A safetensors file, or its address on the Hub
                (`https://huggingface.co/owner/name/blob/main/file.safetensors`), in an original layout, or with this
                model alone in diffusers' layout. Weights in scaled float8 are multiplied out.
            config: By default inferred from keys and shapes. A dictionary changes single values of that. A folder or
                repository, of the model or of a pipeline with it, is taken as it stands. Not to be seen in a file
                are an autoencoder's latent scale (taken from the family; that of a file with a bare autoencoder is
                taken for Stable Diffusion's or FLUX's by its channels, with a warning), a U-Net's heads, and whether an
                SD3 ControlNet is given the pooled text. A file in diffusers' layout needs it, but for a ControlNet.
            torch_dtype: Of the model; float32 by default, as with `from_pretrained`.
            subfolder: Of `config`, where the model's config lies in it; found by itself in a pipeline's folder.
            extract_ema: Take the averaged weights, where the file has both.
            **hub: `revision`, `token`, `cache_dir`, `local_files_only`, ...; and what diffusers' method takes and has
                no meaning here (`NO_EFFECT`).

        Raises:
            FileNotFoundError: There is no such file, or no config.
            ValueError: A pickled or damaged file, an unknown layout, another model's; keys or shapes that do not fit,
                all of them listed.
        """
        check_keywords(f"{cls.__name__}.from_single_file", hub, HUB_ARGUMENTS)
        path = find_file(pretrained_model_link_or_path, hub)
        if subfolder and isinstance(config, str | os.PathLike) and Path(config, subfolder).is_dir():
            config = Path(config, subfolder)
        headers = read_header(path)
        if is_in_our_layout(headers):
            return prepare_own_layout(cls, path, headers, config, hub)(torch_dtype)
        return prepare_part(cls, open_single_file(path, extract_ema), config, hub)(torch_dtype)

    def to_original(self) -> dict[str, torch.Tensor]:
        """The state dict in the original layout, without a prefix: the inverse of `from_single_file`."""
        return to_original(self.state_dict(), key_map_of(type(self), self.config))  # type: ignore[attr-defined]

    @classmethod
    def config_of_tensors(cls, tensors: Mapping[str, TensorHeader]) -> dict[str, Any] | None:
        """The config of a file in diffusers' layout; `None` where such a file does not tell it."""
        return None


def check_keywords(method: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError for keywords that are not `known`, and have a meaning in diffusers that they have not here.

    Args:
        method: For the message.
        given: The keywords.
        known: Names of those that have a meaning here.
    """
    if given.get("use_safetensors") is False:
        raise ValueError("`use_safetensors`: got False, expected True: only safetensors files are read.")
    unknown = [name for name in given if name not in known and name not in NO_EFFECT]
    if unknown:
        taken = ", ".join(sorted(known))
        hint = " (`config` takes the place of `original_config`)" if "original_config" in unknown else ""
        raise ValueError(f"{method} does not take {', '.join(unknown)}; it takes {taken}{hint}.")


def is_in_our_layout(names: Iterable[str]) -> bool:
    """Whether tensors are named as diffusers and hubgen name those of a U-Net, a transformer or an autoencoder."""
    return any(OWN_LAYOUT.match(name) for name in names)


def prepare_own_layout(
    cls: Any, path: Path, headers: Mapping[str, TensorHeader], config: Config, hub: Mapping[str, Any]
) -> Loader:
    """Checks a model that is alone in a file, in diffusers' layout; the function that it returns loads it.

    Raises:
        ValueError: Without a config, where such a file does not tell it; or keys and shapes do not fit it.
    """
    told = isinstance(config, str | os.PathLike)
    inferred = None if told else own_config(cls, path, headers)
    if not told and inferred is None:
        raise ValueError(
            f"`config`: got {config!r}, expected a folder or repository: {path} is in diffusers' layout, which does "
            "not tell the config."
        )
    settings = resolve_config(config, component_name(cls), lambda: inferred, hub)
    cls.check_config_file(settings, Path(os.fspath(config), CONFIG) if told else path)  # type: ignore[arg-type]
    meta = on_meta(cls, settings, headers, f"the config for {path}")
    cls.check_checkpoint(meta, Checkpoint(path, False, dict(headers)))

    def load(torch_dtype: torch.dtype | None = None) -> Any:
        from safetensors.torch import load_file

        model = empty(cls, settings)
        tensors = model._fix_state_dict_keys_on_load(load_file(path))
        ignored, expected = cls._keys_to_ignore_on_load_unexpected or (), model.state_dict()
        kept = {
            name: value
            for name, value in tensors.items()
            if name in expected or not any(re.search(pattern, name) for pattern in ignored)
        }
        loaded = assigned(model, kept, torch_dtype)
        loaded.register_to_config(_name_or_path=str(path))
        return loaded

    return load


def own_config(cls: Any, path: Path, headers: Mapping[str, TensorHeader]) -> dict[str, Any] | None:
    """`config_of_tensors`, whose errors name the file."""
    try:
        return cls.config_of_tensors(headers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def component_name(cls: type) -> str:
    """What pipelines call a model of this class."""
    names = {base.__name__ for base in cls.__mro__}
    other = "controlnet" if any("ControlNet" in name for name in names) else "vae"
    return next((layout.backbone for layout in LAYOUTS.values() if layout.backbone_class in names), other)


def find_file(path: str | os.PathLike[str], hub: Mapping[str, Any]) -> Path:
    """A local file, or one of the Hub brought into its cache."""
    text = os.fspath(path)
    match = None if os.path.exists(text) else HUB_URL.match(text)
    if not match:
        if os.path.isdir(text):
            raise ValueError(f"{text} is a folder; folders are for `from_pretrained`.")
        return Path(text)
    if not match[3].endswith(".safetensors"):
        raise ValueError(f"{text}: only safetensors files are read. Convert it, or take another file of {match[1]}.")
    from huggingface_hub import hf_hub_download

    options = {name: hub[name] for name in HUB_ARGUMENTS if hub.get(name) is not None}
    return Path(hf_hub_download(match[1], match[3], **{"revision": match[2], **options}))


def key_map_of(cls: type, config: Mapping[str, Any]) -> list[Rule]:
    """The key map of a model class.

    Raises:
        ValueError: No original layout of it is known.
    """
    names = {base.__name__ for base in cls.__mro__}
    if "AutoencoderKL" in names:
        return ldm_vae.key_map(config)
    for layout in LAYOUTS.values():
        if layout.backbone_class in names:
            return layout.key_map(config)
    raise ValueError(f"{cls.__name__} has no original layout that is known.")


def prepare_part(cls: Any, file: SingleFile, config: Config, hub: Mapping[str, Any] | None = None) -> Loader:
    """Checks one of our models in a file, without reading weights; the function that it returns loads it.

    Arguments and errors are those of `SingleFileMixin.from_single_file`.
    """
    component = component_of(cls, file)
    if file.others:
        logger.warning(f"{file.path}: {len(file.others)} tensors belong to no known part:{listing(file.others)}")
    settings = resolve_config(config, component, lambda: inferred_config(file, component), hub or {})
    if component == "vae":
        settings = {**settings, **autoencoder_config(file.markers)}
    if component == "controlnet":
        try:
            settings = {**settings, **controlnet_config(file.markers)}
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from error
    headers = file.parts[component]
    meta = on_meta(cls, settings, headers, f"the config for {file.path}")
    table = key_map_of(cls, meta.config)
    try:
        found = to_ours({name: header.meta() for name, header in headers.items()}, table)
    except ValueError as error:
        raise ValueError(f"{file.path}: {component}: {error}") from error
    problems = describe_difference(found, meta.state_dict())
    if problems:
        raise ValueError(f"{file.path} does not fit the config of the {cls.__name__}:{problems}")

    def load(torch_dtype: torch.dtype | None = None) -> Any:
        model = assigned(empty(cls, settings), to_ours(read_part(file, component), table), torch_dtype)
        model.register_to_config(_name_or_path=str(file.path))
        return model

    return load


def component_of(cls: type, file: SingleFile) -> str:
    """The part of a file that a class loads.

    Raises:
        ValueError: The file has no such part.
    """
    backbone = None if file.layout is None else LAYOUTS[file.layout]
    names = {base.__name__ for base in cls.__mro__}
    if "AutoencoderKL" in names:
        component = "vae"
    elif backbone is not None and backbone.backbone_class in names:
        component = backbone.backbone
    elif LAYOUTS["controlnet"].backbone_class in names and (backbone is None or backbone.backbone != "controlnet"):
        component = "controlnet"  # beside its base
    else:
        raise ValueError(f"{file.path} holds {file.describe()}, no {cls.__name__}.")
    if component not in file.parts:
        raise ValueError(f"{file.path} holds {file.describe()}, no {cls.__name__}.")
    return component


def inferred_config(file: SingleFile, component: str) -> dict[str, Any]:
    """Our config of a part, from its keys and shapes."""
    headers = file.parts[component]
    try:
        if component != "vae":
            assert file.layout is not None
            beside = LAYOUTS[file.layout].backbone != component  # a ControlNet and its base
            return LAYOUTS[component if beside else file.layout].infer_config(headers)
        if file.layout is not None:
            return ldm_vae.infer_config(headers, LAYOUTS[file.layout].latents)
        config = ldm_vae.infer_config(headers, "sd")
        if config["latent_channels"] == 16:
            config = ldm_vae.infer_config(headers, "flux")
        logger.warning(
            f"{file.path}: an autoencoder alone does not say how its latents are scaled; took "
            f"scaling_factor={config['scaling_factor']}, shift_factor={config.get('shift_factor')}. Stable Diffusion "
            "XL's is 0.13025, SD3's 1.5305 with shift 0.0609: say so by `config`."
        )
        return config
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def resolve_config(config: Config, component: str, infer: Any, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Inferred values, changed by a dictionary; or what a folder or repository says."""
    if config is None:
        return infer()
    if isinstance(config, Mapping):
        return {**infer(), **config}
    folder = Path(config)
    if not folder.is_dir():
        options = {name: hub[name] for name in HUB_ARGUMENTS if name in hub and name != "revision"}
        folder = fetch(os.fspath(config), [CONFIG, f"{component}/{CONFIG}"], options)
    inner = folder / component / CONFIG
    return read_json(inner if inner.is_file() else folder / CONFIG)


def empty(cls: type[ModelMixin], settings: Mapping[str, Any]) -> ModelMixin:
    """A model whose parameters have no storage yet; what it computes for itself is there."""
    from accelerate import init_empty_weights

    with init_empty_weights(), no_init_weights():
        return cls.from_config(dict(settings))


def read_part(file: SingleFile, component: str) -> dict[str, torch.Tensor]:
    """A component's tensors, without prefix. They stay on the disk until they are touched."""
    from safetensors import safe_open

    scales = file.scales[component]
    with safe_open(file.path, framework="pt") as weights:
        tensors = {name: weights.get_tensor(key) for name, key in file.keys[component].items()}
        for name, key in scales.items():
            tensors[name] = tensors[name].float() * weights.get_tensor(key).float()
    return tensors


def assigned(model: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Any:
    """The model with these tensors as its own, in evaluation mode.

    Args:
        model: Without storage.
        tensors: All that it needs.
        dtype: Floating-point tensors are converted to it, but for the modules that the class keeps in float32; None
            for the default dtype.
    """
    keep = set(model._keep_in_fp32_modules or ()) if getattr(model, "_keep_in_fp32_modules", None) else set()
    dtype = dtype or torch.get_default_dtype()
    state = {
        name: (
            tensor.to(torch.float32 if keep & set(name.split(".")) else dtype) if tensor.is_floating_point() else tensor
        )
        for name, tensor in tensors.items()
    }
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, strict=True, assign=True)
    for name, buffer in model.named_buffers():  # those that no file has
        if name not in state and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return model.eval()


def prepare_text_encoder(cls: Any, file: SingleFile, component: str, config: Any) -> Loader:
    """Checks a text encoder of transformers in a file; the function that it returns loads it.

    Args:
        cls: `CLIPTextModel`, `CLIPTextModelWithProjection` or `T5EncoderModel`.
        file: With the component among its parts.
        component: `text_encoder`, `text_encoder_2` or `text_encoder_3`.
        config: Of that class.

    Raises:
        ValueError: Keys or shapes do not fit the config; all are listed.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = cls(config)
    expected = model.state_dict()
    headers = {name: header.meta() for name, header in file.parts[component].items()}
    try:
        found = text_encoder_tensors(headers, config, expected)
    except ValueError as error:
        raise ValueError(f"{file.path}: {component}: {error}") from error
    problems = describe_difference(found, expected)
    if problems:
        raise ValueError(f"{file.path}: {component} does not fit the config of the {cls.__name__}:{problems}")

    def load(torch_dtype: torch.dtype | None = None) -> Any:
        tensors = text_encoder_tensors(read_part(file, component), config, expected)
        loaded = assigned(model, tensors, torch_dtype)
        loaded.tie_weights()  # T5 has its token table under two names
        return loaded

    return load


def text_encoder_tensors(
    tensors: Mapping[str, torch.Tensor], config: Any, expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A file's text encoder under the names of transformers, without what the model has no use for."""
    if "shared.weight" in expected:  # T5
        found = dict(tensors)
        twin = {"shared.weight": "encoder.embed_tokens.weight", "encoder.embed_tokens.weight": "shared.weight"}
        for name, other in twin.items():
            if name in expected and name not in found and other in found:
                found[name] = found[other]
            elif name not in expected:
                found.pop(name, None)
        return found
    settings = config.to_dict()
    used = {name: tensor for name, tensor in tensors.items() if not clip_layout.unused(name, settings, expected)}
    if clip_layout.is_open_clip(used):
        used = to_ours(used, clip_layout.key_map(settings))
    found = clip_layout.with_prefix(used, expected)
    if "text_projection.weight" in expected and "text_projection.weight" not in found:
        # early SD3 files leave out the small encoder's projection, which is the identity there
        rows, columns = expected["text_projection.weight"].shape
        if rows == columns:
            sample = next(iter(found.values()))
            found["text_projection.weight"] = torch.eye(rows, dtype=sample.dtype, device=sample.device)
    return found


def original_text_encoder(tensors: Mapping[str, torch.Tensor], config: Any, prefix: str) -> dict[str, torch.Tensor]:
    """The inverse of `load_text_encoder`'s renaming, for the layout that files have under `prefix`."""
    if "shared.weight" in tensors:  # T5 keeps its names, and its token table under both of them
        return dict(tensors)
    named = clip_layout.with_prefix(tensors, {"text_model.": None})
    if prefix.endswith(".model."):
        return to_original(named, clip_layout.key_map(config.to_dict()))
    return named
