"""Settings for a first success: what suits a number of pictures and a base, where nothing is asked for.

material = Material("bundled", pipe, examples, captioned=True)
settings = settings_of(script, {**completed(asked, given, material), **given}, {})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

SMALL = 100_000_000
"""Numbers of a backbone that takes tens of pictures at once on any machine"""
PROMPTS = 4
"""Of the captions, as many are drawn where no prompt is given"""
SHOWN_BETWEEN = 4
"""How often pictures are drawn along the way"""
CLIP_TOKENS = 77
"""That most text encoders read"""
RATES = {"ControlNet": 1e-5, "IP-Adapter": 1e-4, "editor": 5e-5}
"""Learning rates of what is no adapter, on large bases: those of the papers"""


@dataclass(frozen=True)
class Usual:
    """Settings for a first success."""

    batch_size: int
    steps: int
    rank: int
    learning_rate: float
    targets: str


def usual(pictures: int, parameters: int, batch_size: int | None = None) -> Usual:
    """What suits a number of pictures and a base.

    A *small* base (below 100 M numbers, as the bundled model) takes many pictures at once on any machine: 8 a step,
    since a mean over fewer is mostly noise of the times drawn, and up to 32 where there are as many. Its layers are
    narrow, so the feed-forward ones learn too, and 0.001 moves them in time. A *large* one takes 1 at 1024 pixels on
    one accelerator; there attention at 0.0001 is what kohya's tools and diffusers' scripts have settled on.

    Rank 16 holds a subject or a style in all of these; more adds little but size below hundreds of pictures.

    Steps: each picture is to be seen about 100 times, which is where people stop with 10 to 30 pictures; 500 steps at
    least, since fewer move little at these rates, and 2,000 at most, since many pictures teach each other: it is a
    first look, and the same command goes on with more. The rate stays constant for that.

    Args:
        pictures: Of an epoch.
        parameters: Numbers of the backbone.
        batch_size: Of a step, if it was given.
    """
    small = parameters < SMALL
    batch = batch_size or (min(32, max(8, pictures)) if small else 1)
    steps = min(2000, max(500, math.ceil(100 * pictures / batch / 50) * 50))
    if small:
        return Usual(batch, steps, 16, 1e-3, "attention_and_feed_forward")
    return Usual(batch, steps, 16, 1e-4, "attention")


@dataclass(frozen=True)
class Material:
    """What a run is made of."""

    base: str
    """Its name"""
    pipe: Any
    """The base, without weights"""
    examples: Any
    """The pictures"""
    captioned: bool
    """Whether they have captions of their own"""

    @cached_property
    def parameters(self) -> int:
        """Numbers of the backbone."""
        return sum(one.numel() for one in self.pipe.backbone.parameters())

    def pictures(self, repeats: int) -> int:
        """Of an epoch, each as often as its folder and the settings say."""
        return repeats * sum(self.examples.repeats)

    def side(self, size: int | None) -> int:
        """Of the pictures in pixels."""
        return size or int(self.pipe.default_size[0])

    def smaller(self, side: int) -> int:
        """How many pictures have to be enlarged."""
        return sum(min(size) < side for size in self.examples.sizes)


def completed(asked: Any, known: Collection[str], material: Material) -> dict[str, Any]:
    """The settings that are chosen, by dotted name; what is given wins over them.

    Args:
        asked: The settings with what is given alone.
        known: Names of what is given.
        material: Of the run.
    """
    pictures = material.pictures(asked.data.repeats)
    chosen = usual(pictures, material.parameters, asked.run.batch_size if "run.batch_size" in known else None)
    steps = asked.run.max_train_steps if "run.max_train_steps" in known else chosen.steps
    between = max(steps // SHOWN_BETWEEN, 1)
    defaults = material.pipe.defaults()
    values: dict[str, Any] = {
        "run.batch_size": chosen.batch_size,
        "run.max_train_steps": chosen.steps,
        "run.checkpoint_steps": min(between, 250),
        "run.log_steps": max(min(steps // 20, 50), 1),
        "optim.learning_rate": chosen.learning_rate,
        "data.upscale": material.smaller(material.side(asked.data.size)) > 0,
        "validation.steps": between,
        "validation.inference_steps": defaults.steps,
    }
    kind = control_of(asked)
    if kind is None:
        values |= {
            "adapter.rank": chosen.rank,
            "adapter.targets": chosen.targets,
            "validation.prompts": prompts_of(asked, material),
        }
    elif material.parameters >= SMALL:
        values["optim.learning_rate"] = RATES[kind]
    elif kind == "IP-Adapter" and getattr(material.pipe, "image_encoder", None) is None:
        values["adapter.image_encoder"] = "latents"
    if kind == "ControlNet" and material.parameters < SMALL:
        values["optim.lr_warmup_steps"] = 0
    if kind != "editor":
        values["validation.guidance_scale"] = defaults.guidance_scale
    if material.parameters >= SMALL:
        values |= {"base.frozen_dtype": "bfloat16", "run.mixed_precision": "bf16", "run.gradient_checkpointing": True}
    return values


def prompts_of(asked: Any, material: Material) -> list[str]:
    """What is drawn where no prompt is given: a few captions, or the words of the subject and its class."""
    if material.captioned:
        found = (asked.data.caption_prefix + wordings[0] for wordings in material.examples.captions if wordings)
        return list(dict.fromkeys(found))[:PROMPTS]
    return [asked.instance.prompt, *([asked.prior.prompt] if asked.prior.weight and asked.prior.prompt else [])]


def control_of(settings: Any) -> str | None:
    """Which of `RATES` a script's settings are for; `None` for adapters of weights."""
    if hasattr(settings, "network"):
        return "ControlNet"
    if not hasattr(settings, "adapter"):
        return "editor"
    return "IP-Adapter" if hasattr(settings.adapter, "image_encoder") else None


def control_learns(kind: str, settings: Any, pipe: Any) -> tuple[str, int]:
    """The same as `what_learns`, of what is no adapter of weights."""
    from hubgen.training.kit.controlled import adapter_for, image_encoder_for, net_for

    def made() -> Any:
        if kind == "ControlNet":
            return net_for(pipe, settings.base.controlnet, settings.network)
        if kind == "editor":
            return pipe.backbone
        encoder, _ = image_encoder_for(pipe, settings.adapter, settings.data.size or pipe.default_size[0])
        return adapter_for(pipe, settings.base.ip_adapter, settings.adapter, encoder).network

    further = getattr(settings.base, {"ControlNet": "controlnet", "IP-Adapter": "ip_adapter"}.get(kind, ""), None)
    learns = without_weights(made) if further is None else made()
    what = f"{'all of ' if kind == 'editor' else ''}{type(learns).__name__}"
    if kind == "IP-Adapter":
        what = f"an IP-Adapter of {learns.image_proj.image_features} features of a picture"
    return what + ("" if further is None else f", which goes on from {further}"), sum(
        one.numel() for one in learns.parameters()
    )


def without_weights(make: Callable[[], Any]) -> Any:
    """What a function makes, with weights that take no memory."""
    import torch

    with torch.device("meta"):
        return make()


def what_learns(settings: Any, pipe: Any) -> tuple[str, int]:
    """What of the base learns, in words, and how many numbers that are.

    Raises:
        ValueError: No layer is meant.
    """
    from hubgen.adaptation.adapters import targets
    from hubgen.adaptation.attach import adaptable, shape_of

    kind = control_of(settings)
    if kind is not None:
        return control_learns(kind, settings, pipe)
    names = ["transformer" if pipe.unet is None else "unet"]
    if settings.adapter.text_encoder:
        names += [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None)]
    if getattr(settings, "learns", "adapter") == "all":
        count = sum(one.numel() for name in names for one in getattr(pipe, name).parameters())
        return f"all of {' and '.join(names)}", count
    numbers, layers = 0, 0
    for name in names:
        known = adaptable(getattr(pipe, name))
        chosen = targets(getattr(pipe, name), settings.adapter.targets)
        layers += len(chosen)
        for layer in chosen:
            out, *inputs = shape_of(known[layer])
            numbers += settings.adapter.rank * (out + math.prod(inputs))
    return (
        f"a {settings.adapter.kind} on {layers} layers of {' and '.join(names)} ({settings.adapter.targets})",
        numbers,
    )


def disk_needed(settings: Any, material: Material, numbers: int) -> int:
    """About how many bytes a run writes: checkpoints, what encoders said, pictures of the class, the result."""
    checkpoints = numbers * 4 * 3 * (settings.run.keep_checkpoints + 1)  # weights and both moments of Adam
    side, pipe, prior = material.side(settings.data.size), material.pipe, getattr(settings, "prior", None)
    made = prior.pictures if prior is not None and prior.weight else 0
    cached = 0
    if settings.data.cache:
        _, channels, height, width = pipe.latent_space.shape(1, (side, side))
        data = settings.data
        views = max(data.random_crops, 1) * (data.random_moves + 1) * (1 + data.mirror)
        beside = 1 + bool(data.beside or getattr(data, "hint", None))
        cached = (len(material.examples) * views * beside + made) * 2 * channels * height * width * 4  # mean, deviation
        wordings = {one for some in material.examples.captions for one in some} if material.captioned else {1, 2}
        config = pipe.backbone.config
        features = config.get("joint_attention_dim") or config.get("cross_attention_dim") or 0
        number = 4 if settings.base.frozen_dtype == "float32" else 2
        cached += (len(wordings) + 1) * (CLIP_TOKENS + (pipe.condition.t5_tokens or 0)) * features * number
    validation = settings.validation
    drawn = len(validation.prompts) if hasattr(validation, "prompts") else validation.samples * 4
    grids = (drawn * (SHOWN_BETWEEN + 1) + made) * side * side * 2
    return int(checkpoints + cached + grids + numbers * 2)
