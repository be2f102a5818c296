"""A frozen base with a control that learns, as one network: what a training step calls.

    learner = WithControlNet(pipe, net)                    # or WithPicture, Editing
    trained = run.trains("controlnet", learner.learns, s.optim, learner)
    ...
    prediction = trained.module(x_t, timestep, condition, beside)

Each calls base and control as sampling does: by the family, by the network's kind, by the parts of attention. The base
is no part of the module, so that checkpoints, averages and data parallelism see what learns alone.

Shapes: B pictures, x_t and predictions (B, C, h, w).
"""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hubgen.adaptation.widening import widen
from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.backbones.controlnet import ControlNetModel
from hubgen.backbones.controlnet_dit import DiTControlNetModel
from hubgen.backbones.controlnet_flux import FluxControlNetModel
from hubgen.backbones.controlnet_sd3 import SD3ControlNetModel
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import BackboneFamily, Doors
from hubgen.conditioning.families.dit import DiTFamily
from hubgen.conditioning.families.flux import FluxFamily
from hubgen.conditioning.families.mmdit import MMDiTFamily
from hubgen.conditioning.families.unet import UNetFamily
from hubgen.conditioning.predict import predict
from hubgen.controls.control import opened
from hubgen.controls.image_attention import Adapter, attention, check_takes_parts, places
from hubgen.controls.image_encoders import PooledLatents, described, features_of
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.controls.net_kinds import AdapterNet, NetKind, Rows, TransformerNet, check_modes, kind_of
from hubgen.controls.opening import network
from hubgen.controls.shown_picture import INSTRUCTION, EditInput
from hubgen.errors import one_line
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from hubgen.training.kit.adapters import backbone_name
from hubgen.training.kit.bases import AdaptedBase
from hubgen.training.kit.beside import target_of
from hubgen.training.kit.groups import Network, PictureAdapter
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.publishing import place_of
from hubgen.training.kit.quantization import refuse_quantised

HINT_WIDTHS = (16, 32, 96, 256)
"""Of published ControlNets, whose autoencoder has 8 pixels a latent"""
LAYERS = 4, 10
"""Double and single blocks of FLUX's usual ControlNets"""


class Controlled(nn.Module, ABC):
    """Base: a base with a control.

    Args:
        pipe: The base, frozen.
        learns: The control's weights.
    """

    def __init__(self, pipe: Any, learns: nn.Module) -> None:
        super().__init__()
        self.learns = learns.requires_grad_(True)
        self._pipe = (pipe,)  # in a tuple, which keeps it from becoming a part

    @property
    def pipe(self) -> Any:
        """The base."""
        return self._pipe[0]

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes activations in the backward pass: the base's too, through which gradients come."""
        for one in (self.pipe.backbone, self.learns):
            if hasattr(one, "enable_gradient_checkpointing"):
                one.enable_gradient_checkpointing()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Inside, the base is ready for calls and their backward passes."""
        yield

    @abstractmethod
    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor, condition: Condition, beside: Any) -> torch.Tensor:
        """What the base predicts with the control, (B, C', h, w).

        Args:
            x_t: (B, C, h, w).
            timestep: (B,), as the path has it.
            condition: Of the same B.
            beside: What the control is shown, see `hubgen.training.kit.beside`.
        """


def in_dtype(weights: Any, dtype: torch.dtype) -> Any:
    """A control's weights in the base's type, as a call has them: themselves, or a copy where they learn in another.

    Args:
        weights: A network.
        dtype: The base's.
    """
    return weights if weights.dtype == dtype else copy.deepcopy(weights).to(dtype)


# ---- ControlNets ----


class WithControlNet(Controlled):
    """A base and a ControlNet: what `ControlNet` does at scale 1 in a call with one branch."""

    def __init__(self, pipe: Any, net: nn.Module) -> None:
        super().__init__(pipe, net)
        self.kind = kind_of(net)
        for part in unread(net):
            part.requires_grad_(False)

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor, condition: Condition, beside: Any) -> torch.Tensor:
        backbone, kind = self.pipe.backbone, self.kind
        told = condition.map(lambda value: value.to(kind.net.dtype) if value.is_floating_point() else value)
        rows = Rows(x_t, timestep, kind.keywords(told))
        size = tuple(side * self.pipe.latent_space.factor for side in x_t.shape[2:])
        target = target_of(self.pipe, size, len(x_t), x_t.device)  # type: ignore[arg-type]
        residuals = in_type(kind.residuals(target, rows, beside, 1.0), backbone.dtype)
        return predict(backbone, x_t, timestep, condition, Doors(residuals=residuals))


def unread(net: Any) -> list[nn.Module]:
    """What of a network computes its last block's text, which nobody reads; processes would wait for its gradients."""
    if len(getattr(net, "single_transformer_blocks", ())) or not len(getattr(net, "transformer_blocks", ())):
        return []
    last = net.transformer_blocks[-1]
    parts = [getattr(last, "ff_context", None), getattr(getattr(last, "attn", None), "to_add_out", None)]
    return [part for part in parts if isinstance(part, nn.Module)]


def in_type(features: Any, dtype: torch.dtype) -> Any:
    """Residuals of any nesting in a type."""
    if isinstance(features, Mapping):
        return {name: in_type(one, dtype) for name, one in features.items()}
    if isinstance(features, list | tuple):
        return [in_type(one, dtype) for one in features]
    return None if features is None else features.to(dtype)


def net_for(pipe: Any, folder: str | None, settings: Network) -> Any:
    """The ControlNet that learns: fresh, made of the base, or one that is trained further; in float32.

    Args:
        pipe: The base.
        folder: Folder or repository of one that there is; `None` for a fresh one.
        settings: Of a fresh one.

    Raises:
        SettingsError: The settings do not suit the base, or the network does not.
    """
    try:
        if folder is None:
            make = FRESH[next(kind for kind in FRESH if isinstance(pipe.family, kind))]
            net = make(pipe, settings)
        else:
            net = network(folder)
        kind = kind_of(net)
        side = pipe.latent_space.default_size
        kind.check(target_of(pipe, side, 1, torch.device("cpu")))
        check_modes(kind, () if settings.mode is None else (settings.mode,), 1)
        check_learns(kind)
        if folder is None:
            check_reaches(kind, pipe)
    except SettingsError:
        raise
    except Exception as error:  # folders of weights fail in every way there is
        name = "settings of 'network'" if folder is None else f"setting 'base.controlnet': {folder}"
        raise SettingsError(f"{name}: {one_line(error)}") from error
    return net if net.dtype == torch.float32 else net.to(torch.float32)


def check_learns(kind: NetKind) -> None:
    """Raises SettingsError for networks that are not called anew at each step, or are shown more than a hint."""
    name = type(kind.net).__name__
    if isinstance(kind, AdapterNet):
        raise SettingsError(f"setting 'base.controlnet': got a {name}, expected a ControlNet.")
    if kind.modes and not kind.is_union:
        raise SettingsError(
            f"setting 'base.controlnet': got a {name} of Stability's, which sees edges in a range of its own; expected "
            "another."
        )
    if kind.masked or kind.image_channels != 3:
        what = "a mask" if kind.masked else f"{kind.image_channels} channels"
        raise SettingsError(f"setting 'base.controlnet': got a {name} that is shown {what}, expected RGB hints alone.")


def check_reaches(kind: NetKind, pipe: Any) -> None:
    """Raises SettingsError for a network of so many blocks that some of them add to no block of the base."""
    names = {"num_layers": "layers", "num_single_layers": "single_layers"}
    if not isinstance(kind, TransformerNet):
        return
    rule = kind.rule
    for keyword, (counted, _) in kind.base_blocks.items():
        there, own = pipe.backbone.config[counted], kind.config[counted]

        def served(layers: int, keyword: str = keyword, there: int = there) -> int:
            return len(set(rule(keyword)(range(layers), there)) - {None})

        if served(own) < own:
            fits = max(layers for layers in range(1, own) if served(layers) == layers)
            raise SettingsError(
                f"setting 'network.{names[counted]}': got {own}, expected {fits}, of the base's {there}: by the rule "
                f"of such networks only {served(own)} of {own} would add to a block."
            )


def unet_net(pipe: Any, settings: Network) -> Any:
    """A fresh network of a U-Net."""
    halvings = pipe.latent_space.factor.bit_length() - 1
    widths = settings.hint_widths or (HINT_WIDTHS + HINT_WIDTHS[-1:] * halvings)[: halvings + 1]
    if len(widths) != halvings + 1:
        raise SettingsError(
            f"setting 'network.hint_widths': got {len(widths)}, expected {halvings + 1} for {2**halvings} pixels a "
            "latent."
        )
    return ControlNetModel.from_unet(pipe.backbone, conditioning_embedding_out_channels=tuple(widths))


def sd3_net(pipe: Any, settings: Network) -> Any:
    """A fresh network of an MM-DiT."""
    layers = settings.layers or max(pipe.backbone.config.num_layers // 2, 1)
    return SD3ControlNetModel.from_transformer(pipe.backbone, layers, num_extra_conditioning_channels=0)


def flux_net(pipe: Any, settings: Network) -> Any:
    """A fresh network of FLUX."""
    config, single = pipe.backbone.config, settings.single_layers
    return FluxControlNetModel.from_transformer(
        pipe.backbone,
        num_layers=settings.layers or min(LAYERS[0], config.num_layers),
        num_single_layers=min(LAYERS[1], config.num_single_layers) if single is None else single,
    )


def dit_net(pipe: Any, settings: Network) -> Any:
    """A fresh network of a DiT."""
    return DiTControlNetModel.from_transformer(pipe.backbone, settings.layers)


FRESH: Mapping[type[BackboneFamily], Callable[[Any, Network], Any]] = {
    UNetFamily: unet_net,
    MMDiTFamily: sd3_net,
    FluxFamily: flux_net,
    DiTFamily: dit_net,
}


# ---- IP-Adapters ----


class WithPicture(Controlled):
    """A base that sees pictures by an IP-Adapter: what `IPAdapter` does at scale 1.

    Call it, and its backward pass, inside `looking()`: blocks that are computed again see the same.
    """

    def __init__(self, pipe: Any, adapter: Adapter) -> None:
        super().__init__(pipe, adapter.network)
        self.seen = IPAdapter(adapter).in_training(pipe.backbone)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """The base's attention looks at what it is shown last, inside."""
        with opened(self.pipe.backbone, [self.seen]):
            yield

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor, condition: Condition, beside: Any) -> torch.Tensor:
        self.seen.show(beside.to(self.seen.network.dtype), self.pipe.family.timestep(timestep))
        return predict(self.pipe.backbone, x_t, timestep, condition)


def image_encoder_for(pipe: Any, settings: PictureAdapter, side: int) -> tuple[Any, Any]:
    """What sees the pictures, frozen, and its image processor; `None` for the usual one.

    Args:
        pipe: The base.
        settings: Which.
        side: Height and width of the run's pictures.

    Raises:
        SettingsError: There is none, or it cannot be read.
    """
    name = settings.image_encoder
    if name is None:
        if getattr(pipe, "image_encoder", None) is None:
            raise SettingsError(
                "setting 'adapter.image_encoder': got none, and the base has none; expected the folder of a vision "
                "model, efficientnet, or latents."
            )
        return pipe.image_encoder, getattr(pipe, "feature_extractor", None)
    if name == "latents":
        return PooledLatents(pipe.vae, size=side), None
    try:
        if name == "efficientnet":
            return EfficientNetLite0.from_pretrained(), None
        return vision_model(name)
    except Exception as error:  # damaged files give errors of every library below
        raise SettingsError(f"setting 'adapter.image_encoder': {name}: {one_line(error)}") from error


def opening_lines(name: str | None, encoder: Any) -> list[str]:
    """Lines of Python that open an adapter as `control`, see `ControlUsage`.

    Args:
        name: The setting; of the base's own encoder, and of hubgen's, which the adapter's file names, nothing is said.
        encoder: What sees the pictures.
    """
    if name is None or described(encoder) is not None:
        return ["control = IPAdapter(PLACE, image=image)"]
    cls = type(encoder).__name__
    return [
        f"from transformers import {cls}",
        "",
        f"encoder = {cls}.from_pretrained({json.dumps(place_of(name))})",
        "control = IPAdapter(PLACE, image=image, image_encoder=encoder)",
    ]


def vision_model(name: str) -> tuple[Any, Any]:
    """A vision model of transformers and, if its folder has one, its image processor."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection, SiglipVisionModel

    kind = AutoConfig.from_pretrained(name).model_type
    siglip = SiglipVisionModel if "siglip" in kind else AutoModel
    cls = CLIPVisionModelWithProjection if kind.startswith("clip") else siglip
    encoder = cls.from_pretrained(name, use_safetensors=True)
    try:
        extractor = AutoImageProcessor.from_pretrained(name)
    except OSError:
        extractor = None  # diffusers' folders of image encoders have none
    features_of(encoder, False)
    return encoder.eval().requires_grad_(False), extractor


def adapter_for(pipe: Any, file: str | None, settings: PictureAdapter, encoder: Any) -> Adapter:
    """The IP-Adapter that learns: fresh, or one that is trained further; in float32.

    Args:
        pipe: The base.
        file: Of one that there is; `None` for a fresh one.
        settings: Of a fresh one.
        encoder: What sees the pictures.

    Raises:
        SettingsError: It does not suit the base or the encoder.
    """
    backbone = pipe.backbone
    try:
        if file is None:
            adapter = Adapter.fresh(backbone, features_of(encoder, False), settings.tokens)
            if settings.init == "text":
                begin_as_text(adapter, backbone)
        else:
            adapter = Adapter.read(file)
        check_takes_parts(backbone, adapter.names(backbone))
        if not adapter.kind.reads_pictures:
            raise ValueError("got IP-Adapter FaceID, expected one that sees what an image encoder says.")
        projection = adapter.network.image_proj
        found = features_of(encoder, projection.reads_patches)
        if found != projection.image_features:
            raise ValueError(f"for {projection.image_features} features, expected {found}, those of the image encoder.")
    except Exception as error:  # files of weights fail in every way there is
        name = "settings of 'adapter'" if file is None else f"setting 'base.ip_adapter': {file}"
        raise SettingsError(f"{name}: {one_line(error)}") from error
    adapter.network.to(torch.float32)
    adapter.seen_by = described(encoder)
    return adapter


@torch.no_grad()
def begin_as_text(adapter: Adapter, backbone: Any) -> None:
    """Gives a fresh adapter's layers the weights that make keys and values of text (the paper's code).

    A layer without text keeps what it has.
    """
    for number, name in places(backbone, adapter.layout).items():
        attn, layer = attention(backbone, name), adapter.network.layer(number)
        own = ("to_k", "to_v") if attn.is_cross_attention else ("add_k_proj", "add_v_proj")
        for ours, theirs in zip((layer.to_k_ip, layer.to_v_ip), own, strict=True):
            source = getattr(attn, theirs, None)
            if source is not None and source.weight.shape == ours.weight.shape:
                ours.weight.copy_(source.weight)


# ---- editors ----


class Editing(Controlled):
    """A backbone that is shown a picture in channels beside x_t, all of which learns."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe, pipe.backbone)

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor, condition: Condition, beside: Any) -> torch.Tensor:
        return predict(self.learns, x_t, timestep, condition, Doors(channels=[beside]))


def made_editor(pipe: Any) -> EditInput:
    """Makes a pipeline one that edits pictures by instructions, and returns what it is shown; its backbone in float32.

    Args:
        pipe: One of prompts, whose backbone is widened by zeros; or one that is an editor already, as it is.

    Raises:
        SettingsError: It is one of classes, inpaints, or is shown something else.
    """
    if isinstance(pipe, ClassToImagePipeline):
        raise SettingsError("setting 'base.model': got a model of classes, expected one that is given prompts.")
    name, space = backbone_name(pipe), pipe.latent_space
    refuse_quantised(name, pipe.backbone)
    if pipe.family.channels == space.channels and pipe.shown is None:
        pipe.register_modules(**{name: widen(pipe.backbone, space.channels)})
        pipe.register_to_config(edit_input=INSTRUCTION.name)
    kind = pipe.shown
    if kind is None or kind.name != INSTRUCTION.name or kind.masked:
        raise SettingsError(
            f"setting 'base.model': got a backbone of {pipe.family.channels} channels, expected one that is given "
            f"prompts alone, {space.channels}, or one that edits pictures by instructions, {2 * space.channels}."
        )
    if pipe.backbone.dtype != torch.float32:
        pipe.backbone.to(torch.float32)
    return kind


def check_unpacked(base: AdaptedBase) -> None:
    """Raises SettingsError where a fresh network would have to copy weights that are packed."""
    packed = [name for name in base.quantization if name in ("unet", "transformer")]
    if packed:
        raise SettingsError(
            f"setting 'base.quantization': got {packed[0]}, expected it as it is: a fresh network copies its weights; "
            "base.controlnet trains one further that there is."
        )
