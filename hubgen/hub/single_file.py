"""Whole pipelines out of single files in an original layout, and into such files."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from hubgen.formats.atomic import written
from hubgen.formats.checkpoints import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    index_names,
    weight_patterns,
)
from hubgen.formats.folders import check_pipeline_folder, has_weights
from hubgen.formats.layouts import LAYOUTS, SingleFile, open_single_file
from hubgen.formats.loading import CONFIG, HUB_ARGUMENTS, fetch
from hubgen.formats.plain import plain_model
from hubgen.formats.single_file import (
    NO_EFFECT,
    Loader,
    check_keywords,
    find_file,
    original_text_encoder,
    prepare_part,
    prepare_text_encoder,
)
from hubgen.hub.classes import require_class
from hubgen.hub.native import NativePipeline
from hubgen.hub.trained_schedule import adjusted_scheduler, markers_of

# What a pipeline's folder holds beside weights.
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# Components that no single file brings, and that a pipeline does without where they are not handed over.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
OFFICIAL = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "flux": "black-forest-labs/FLUX.1-dev",
}


class SingleFilePipelineMixin:
    """Adds `from_single_file` and `save_single_file` to a pipeline."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        config: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | None = None,
        extract_ema: bool = False,
        **kwargs: Any,
    ) -> Self:
        """A pipeline out of a single safetensors file in an original layout.

        The file brings the backbone and, as the case may be, the autoencoder and text encoders. Tokenizers, scheduler
        and the text encoders' configs come from a pipeline's folder or repository, and so do models that the file
        lacks, if that folder has their weights. All is checked before the first weight is read.

        Args:
            pretrained_model_link_or_path: The file, or its address on the Hub.
            config: A pipeline's folder or repository. Its configs of backbone and autoencoder hold where it has them.
                By default the official repository of the family, and then those configs are inferred from the file.
            torch_dtype: Of all models; float32 by default.
            extract_ema: Take the averaged weights of the backbone, where the file has both.
            **kwargs: Components to take instead (`text_encoder_3=None` does without one), values for the pipeline's
                constructor, and `token`, `cache_dir`, `local_files_only`. What diffusers' method takes and has no
                meaning here (`use_safetensors=True`, `variant`, ...) is passed over.

        What the file says of its noise schedule and its latents (`hubgen.formats.markers`) holds against the folder's.

        Raises:
            FileNotFoundError: There is no such file, or no such folder.
            ValueError: As of the models' `from_single_file`; or components are nowhere to be found: all are named.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        known = [*inspect.signature(cls.__init__).parameters][1:]
        check_keywords(f"{cls.__name__}.from_single_file", kwargs, known)
        kwargs = {name: value for name, value in kwargs.items() if name not in NO_EFFECT}
        file = open_single_file(find_file(pretrained_model_link_or_path, hub), extract_ema)
        nets = {name: layout.backbone_class for name, layout in LAYOUTS.items() if layout.backbone == "controlnet"}
        alone = {None: "AutoencoderKL", **nets}
        if file.layout in alone:
            raise ValueError(
                f"{file.path} holds {file.describe()}, no pipeline; `{alone[file.layout]}.from_single_file` reads it."
            )
        source = config_source(file, config, hub)
        return cls(**build(cls, file, source, torch_dtype, kwargs))

    def save_single_file(self, path: str | os.PathLike[str], torch_dtype: torch.dtype | None = None) -> None:
        """Writes backbone, autoencoder and text encoders as one safetensors file in the family's original layout.

        Tokenizers, scheduler and configs have no place there. Stable Diffusion 2's file lacks the text encoder's last
        layer, which no one reads.

        Args:
            path: Of the file; it is written beside and renamed.
            torch_dtype: Of the floating-point tensors; by default they stay as they are.

        Raises:
            ValueError: The components are of no family that has such a layout, or a tensor has no place in it.
        """
        from safetensors.torch import save_file

        tensors = {
            name: (tensor if torch_dtype is None or not tensor.is_floating_point() else tensor.to(torch_dtype))
            for name, tensor in original_tensors(self).items()
        }
        with written(Path(path)) as temporary:
            save_file(
                {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"}
            )


@dataclass(frozen=True)
class Source:
    """Where a pipeline's parts come from that are not in the file."""

    folder: Path
    repo: str | None
    """The repository that the folder is a snapshot of, if it is one"""
    configs: bool
    """Whether the configs of backbone and autoencoder there hold for the file too"""
    hub: Mapping[str, Any]
    """Arguments for the Hub; not `revision`, which is the file's"""

    def with_weights(self, name: str, component: type) -> Path:
        """A component's folder, its weights brought from the repository if it is one."""
        if self.repo is not None:
            ours = component.__module__.startswith(("hubgen.", "diffusers."))
            stem = DIFFUSERS_STEM if ours else TRANSFORMERS_STEM
            patterns = [f"{name}/{index}" for index in index_names(stem, None)] + weight_patterns(stem, None, name)
            fetch(self.repo, patterns, self.hub, keep=self.folder)
        return self.folder / name


def config_source(file: SingleFile, config: str | os.PathLike[str] | None, hub: Mapping[str, Any]) -> Source:
    """The folder or repository that was named, or the official one of the family.

    Raises:
        ValueError: The family has no official repository to fall back on.
    """
    assert file.layout is not None
    named = config if config is not None else OFFICIAL.get(file.layout)
    if named is None:
        raise ValueError(
            f"{file.path} holds {file.describe()}, of which there are several kinds that a file does not tell apart; "
            "say by `config` which pipeline's folder or repository has its tokenizer and scheduler."
        )
    options = {name: value for name, value in hub.items() if name != "revision"}
    if Path(named).is_dir():
        return Source(Path(named), None, True, options)
    repo = os.fspath(named)
    return Source(fetch(repo, SMALL_FILES, options), repo, config is not None, options)


def build(
    cls: Any,
    file: SingleFile,
    source: Source,
    torch_dtype: torch.dtype | None,
    passed: Mapping[str, Any],
) -> dict[str, Any]:
    """What a pipeline's constructor is to be called with."""
    folder = source.folder
    index = cls.load_config(str(folder))
    if issubclass(cls, NativePipeline):
        cls.check_index(index, str(folder), passed)
    parameters = inspect.signature(cls.__init__).parameters
    values: dict[str, Any] = {}
    classes: dict[str, type] = {}
    for name, value in index.items():
        if name in passed or name not in parameters:
            continue
        if not isinstance(value, list | tuple) or len(value) != 2 or name in LEFT_OUT:
            if name not in LEFT_OUT:
                values[name] = value
        elif value[0] is None:
            values[name] = None
        else:
            classes[name] = require_class(*value, where=f"{folder}: `{name}`")
    if "requires_safety_checker" in values and "safety_checker" not in passed:
        values["requires_safety_checker"] = False
    for name in LEFT_OUT:
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            values[name] = None
    loaders, elsewhere = plan(file, source, classes)
    missing = [name for name in elsewhere if not has_any_weights(source.with_weights(name, classes[name]))]
    if missing:
        listed = ", ".join(f"{name} ({classes[name].__name__})" for name in sorted(missing))
        raise ValueError(
            f"{file.path} holds {file.describe()}; "
            f"{listed} are neither there nor, with weights, in {source.repo or folder}. "
            "Name another `config`, or hand them over as arguments (None to do without an optional one)."
        )
    check_pipeline_folder(folder, {name: classes[name] for name in elsewhere})
    for name, component in classes.items():
        if name in loaders:
            values[name] = loaders[name](torch_dtype)
        elif issubclass(component, nn.Module):
            values[name] = component.from_pretrained(str(folder / name), torch_dtype=torch_dtype or torch.float32)  # type: ignore[attr-defined]
        else:
            values[name] = component.from_pretrained(str(folder / name))  # type: ignore[attr-defined]
    if values.get("scheduler") is not None:
        values["scheduler"] = adjusted_scheduler(values["scheduler"], file.markers)
    return {**values, **passed}


def plan(file: SingleFile, source: Source, classes: Mapping[str, type]) -> tuple[dict[str, Loader], list[str]]:
    """Loaders of the checked models that the file has, and the names of those that it lacks."""
    loaders: dict[str, Loader] = {}
    elsewhere = []
    for name, component in classes.items():
        if not issubclass(component, nn.Module):
            continue
        if name not in file.parts:
            elsewhere.append(name)
        elif name.startswith("text_encoder"):
            config = component.config_class.from_pretrained(str(source.folder / name))  # type: ignore[attr-defined]
            loaders[name] = prepare_text_encoder(component, file, name, config)
        else:
            own = source.folder / name if source.configs and (source.folder / name / CONFIG).is_file() else None
            loaders[name] = prepare_part(component, file, own)
    return loaders, elsewhere


def has_any_weights(folder: Path) -> bool:
    """Whether the folder has weights that diffusers or transformers would load."""
    return folder.is_dir() and any(has_weights(folder, stem) for stem in (DIFFUSERS_STEM, TRANSFORMERS_STEM))


def layout_of(components: Mapping[str, Any]) -> str:
    """The layout of a pipeline's components, a key of `LAYOUTS`.

    Raises:
        ValueError: They are of none.
    """
    components = {name: value for name, value in components.items() if value is not None}
    backbone = components.get("transformer", components.get("unet"))
    bases = {base.__name__ for base in type(backbone).__mro__}
    if "SD3Transformer2DModel" in bases:
        return "sd3"
    if "FluxTransformer2DModel" in bases:
        return "flux"
    if "UNet2DConditionModel" in bases:
        if "text_encoder_2" in components:
            return "sdxl" if "text_encoder" in components else "sdxl-refiner"
        return "sd2" if components["unet"].config.use_linear_projection else "sd1"
    raise ValueError(f"No single-file layout is known for a {type(backbone).__name__}.")


def original_tensors(pipe: Any) -> dict[str, torch.Tensor]:
    """All weights of a pipeline under the names of its family's single files."""
    components = {name: plain_model(component) for name, component in pipe.components.items()}
    layout = LAYOUTS[layout_of(components)]
    backbone, vae = components[layout.backbone], components["vae"]
    tensors = {f"model.diffusion_model.{name}": value for name, value in backbone.to_original().items()}
    tensors |= {f"{layout.vae_prefix}{name}": value for name, value in vae.to_original().items()}
    for component, prefix in layout.text_encoders.items():
        encoder = components.get(component)
        if encoder is not None:
            if not type(encoder).__name__.startswith(("CLIPText", "T5")):
                raise ValueError(f"{layout.title} has no place for a {type(encoder).__name__} as its {component}.")
            named = original_text_encoder(encoder.state_dict(), encoder.config, prefix)
            tensors |= {prefix + name: value for name, value in named.items()}
    return {**tensors, **markers_of(pipe.scheduler, vae)}
