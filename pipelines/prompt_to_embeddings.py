"""The prompts of a call, or embeddings in their place: checked, and made into the conditions of its branches."""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from hubgen.checks import whole
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import BackboneFamily
from hubgen.conditioning.guidance import NEGATIVE, PICTURE, POSITIVE
from hubgen.conditioning.prompts import ClipAndT5, PromptCondition, TwoClips, TwoClipsAndT5

logger = logging.getLogger(__name__)

# Arguments that stand for prompts: whose branch's condition they are, and which field of it.
EMBEDDINGS = {
    "prompt_embeds": (POSITIVE, "tokens"),
    "pooled_prompt_embeds": (POSITIVE, "pooled"),
    "negative_prompt_embeds": (NEGATIVE, "tokens"),
    "negative_pooled_prompt_embeds": (NEGATIVE, "pooled"),
}
# What a callback may ask for: whose branches' rows a tensor has, as far as the call has them, and which field of their
# conditions.
ALL = (NEGATIVE, PICTURE, POSITIVE)
SHOWN = {
    "prompt_embeds": (ALL, "tokens"),
    "pooled_prompt_embeds": (ALL, "pooled"),
    "add_text_embeds": (ALL, "pooled"),
    "add_time_ids": (ALL, "micro"),
    "negative_prompt_embeds": ((NEGATIVE,), "tokens"),
    "negative_pooled_prompt_embeds": ((NEGATIVE,), "pooled"),
    "negative_add_time_ids": ((NEGATIVE,), "micro"),
}
PROMPTS = ("prompt", "prompt_2", "prompt_3")
NEGATIVES = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")

# The arguments of `encode_prompt` of diffusers' pipelines, in their orders: Stable Diffusion 1 and 2 (and whatever has
# one text encoder), and by the way in which several are joined.
EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
POOLED_EMBEDS = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
CALL = ("device", "num_images_per_prompt", "do_classifier_free_guidance")
ONE_PROMPT = ("prompt", *CALL, "negative_prompt", *EMBEDS, "lora_scale", "clip_skip")
SEVERAL_PROMPTS: dict[type[PromptCondition], tuple[str, ...]] = {
    TwoClips: (*PROMPTS[:2], *CALL, *NEGATIVES[:2], *EMBEDS, *POOLED_EMBEDS, "lora_scale", "clip_skip"),
    TwoClipsAndT5: (
        *(*PROMPTS, *CALL, *NEGATIVES, *EMBEDS, *POOLED_EMBEDS),
        *("clip_skip", "max_sequence_length", "lora_scale"),
    ),
    ClipAndT5: (
        *(*PROMPTS[:2], *CALL[:2]),
        *("prompt_embeds", "pooled_prompt_embeds", "max_sequence_length", "lora_scale"),
    ),
}

Prompt = str | list[str] | None


@dataclass(frozen=True)
class PromptArguments:
    """The arguments of the same names of `TextToImagePipeline.__call__`."""

    prompt: Prompt = None
    prompt_2: Prompt = None
    prompt_3: Prompt = None
    negative_prompt: Prompt = None
    negative_prompt_2: Prompt = None
    negative_prompt_3: Prompt = None
    prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    num_images_per_prompt: int = 1
    clip_skip: int | None = None
    max_sequence_length: int | None = None

    @property
    def count(self) -> int:
        """The number of prompts."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt or ())

    @property
    def batch(self) -> int:
        """B, the number of pictures."""
        return self.count * self.num_images_per_prompt

    @property
    def has_negative(self) -> bool:
        """Whether there is something that guidance is to lead away from, if only the empty string."""
        return any(getattr(self, name) is not None for name in (*NEGATIVES, "negative_prompt_embeds"))

    def texts(self, names: Sequence[str]) -> list[list[str]]:
        """For each of `names` a list of prompts; the first stands for those that were not given."""
        first = getattr(self, names[0])
        values = [getattr(self, name) or first or "" for name in names]
        return [[value] * self.count if isinstance(value, str) else list(value) for value in values]

    @property
    def read_by_all(self) -> list[str]:
        """The prompts, where all text encoders read the same ones; none where they do not, or for embeddings."""
        first, *others = self.texts(PROMPTS)
        return first if self.prompt is not None and all(texts == first for texts in others) else []

    def check(self, condition: PromptCondition, family: BackboneFamily, guided: bool) -> None:
        """Raises ValueError where prompts, embeddings and their options are wrong or do not fit each other."""
        whole("num_images_per_prompt", self.num_images_per_prompt)
        given: dict[str, Any] = {name: getattr(self, name) for name in EMBEDDINGS}
        if (self.prompt is None) == (given["prompt_embeds"] is None):
            found = "neither" if self.prompt is None else "both"
            raise ValueError(f"`prompt`, `prompt_embeds`: got {found}, expected exactly one of them.")
        if self.negative_prompt is not None and given["negative_prompt_embeds"] is not None:
            raise ValueError("`negative_prompt`, `negative_prompt_embeds`: got both, expected at most one of them.")
        if self.prompt is None and not torch.is_tensor(self.prompt_embeds):
            raise ValueError(f"`prompt_embeds`: got {self.prompt_embeds!r}, expected a tensor.")
        self._check_texts(condition.prompts)
        self._check_embeddings(given, "pooled" in family.takes)
        condition.check_options(self.clip_skip, self.max_sequence_length)
        if condition.missing and self.prompt is not None:
            names = ", ".join(f"`{name}`" for name in condition.missing)
            raise ValueError(f"`prompt`: the pipeline has no {names} to read it; expected `prompt_embeds`.")
        negative = guided and given["negative_prompt_embeds"] is None
        if condition.missing and negative and (self.has_negative or not condition.zero_without_prompt):
            names = ", ".join(f"`{name}`" for name in condition.missing)
            raise ValueError(
                f"`negative_prompt_embeds`: got None, expected them, because the pipeline guides and has no {names}."
            )

    def _check_texts(self, known: int) -> None:
        for number, name in enumerate((*PROMPTS, *NEGATIVES)):
            value = getattr(self, name)
            if value is None:
                continue
            if number % len(PROMPTS) >= known:
                raise ValueError(
                    f"`{name}`: the text encoders of this model read {known}, not {number % 3 + 1} prompts."
                )
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list | tuple) or not texts:
                raise ValueError(f"`{name}`: got {value!r}, expected a string or a non-empty list of strings.")
            for position, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"`{name}`: got {text!r} as number {position}, expected a string.")
            if not isinstance(value, str) and len(value) != self.count:
                raise ValueError(
                    f"`{name}`: got {len(value)}, expected one for all or one for each of the {self.count} prompts."
                )
            if name in PROMPTS[1:] and self.prompt is None:
                raise ValueError(f"`{name}`: got one beside `prompt_embeds`, expected it beside `prompt`.")
            if name in NEGATIVES[1:] and self.negative_prompt_embeds is not None:
                raise ValueError(f"`{name}`: got one beside `negative_prompt_embeds`, expected at most one of them.")

    def _check_embeddings(self, given: dict[str, Any], pools: bool) -> None:
        names = list(EMBEDDINGS)
        for tokens, pooled in (names[:2], names[2:]):
            if given[pooled] is not None and given[tokens] is None:
                raise ValueError(f"`{pooled}`: got a tensor without `{tokens}`, expected both or none.")
            if given[tokens] is not None and given[pooled] is None and pools:
                raise ValueError(
                    f"`{pooled}`: got None beside `{tokens}`, expected both: the backbone takes pooled text."
                )
        for name, ndim in zip(EMBEDDINGS, (3, 2, 3, 2), strict=True):
            tensor = given[name]
            if tensor is not None and (not torch.is_tensor(tensor) or tensor.ndim != ndim or len(tensor) != self.count):
                found = str(tuple(tensor.shape)) if torch.is_tensor(tensor) else repr(tensor)
                features = "tokens, features" if ndim == 3 else "features"
                raise ValueError(f"`{name}`: got {found}, expected a tensor of shape ({self.count}, {features}).")
        positive, negative = given["prompt_embeds"], given["negative_prompt_embeds"]
        if positive is not None and negative is not None and positive.shape != negative.shape:
            raise ValueError(
                f"`negative_prompt_embeds`: got {tuple(negative.shape)}, expected the shape of `prompt_embeds`, "
                f"{tuple(positive.shape)}."
            )


def embed(
    arguments: PromptArguments,
    condition: PromptCondition,
    takes: frozenset[str],
    guided: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Condition]:
    """The conditions of B pictures by branch: what is wanted and, if a step is guided, what to lead away from.

    Args:
        arguments: Checked.
        condition: The text encoders.
        takes: What the backbone reads of a condition.
        guided: Whether there is a negative branch.
        device: Where the text encoders run and the embeddings go.
        dtype: Of the embeddings.

    Raises:
        ValueError: Prompts and negative prompts became embeddings of different shapes.
    """

    def encoded(names: Sequence[str], clip_skip: int | None = None) -> Condition:
        first, second, third = arguments.texts(names)
        made = condition.encode(
            first,
            device,
            prompts_2=second,
            prompts_3=third,
            clip_skip=clip_skip,
            max_sequence_length=arguments.max_sequence_length,
        )
        return Condition.of_text(made)

    if arguments.prompt_embeds is None:
        positive = encoded(PROMPTS, arguments.clip_skip)
    else:
        positive = Condition(tokens=arguments.prompt_embeds, pooled=arguments.pooled_prompt_embeds)
    branches = {POSITIVE: positive}
    if not guided:
        if arguments.has_negative:
            logger.warning("The negative prompt has no effect without guidance.")
    elif arguments.negative_prompt_embeds is not None:
        branches[NEGATIVE] = Condition(
            tokens=arguments.negative_prompt_embeds, pooled=arguments.negative_pooled_prompt_embeds
        )
    elif condition.zero_without_prompt and not arguments.has_negative:
        branches[NEGATIVE] = positive.map(torch.zeros_like)
    else:
        branches[NEGATIVE] = encoded(NEGATIVES)

    tokens = {branch: one.tokens for branch, one in branches.items() if one.tokens is not None}
    if guided and tokens[NEGATIVE].shape != tokens[POSITIVE].shape:
        raise ValueError(
            f"`negative_prompt_embeds`: got {tuple(tokens[NEGATIVE].shape)}, expected the shape of the prompts' "
            f"embeddings, {tuple(tokens[POSITIVE].shape)}."
        )
    if "pooled" not in takes:
        branches = {branch: replace(one, pooled=None) for branch, one in branches.items()}
    count = arguments.num_images_per_prompt
    return {
        branch: one.map(lambda value: value.to(device, dtype).repeat_interleave(count, 0))
        for branch, one in branches.items()
    }


def encoding_arguments(condition: PromptCondition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an `encode_prompt` that are not `None`, as diffusers' pipeline with such text encoders has them.

    Args:
        condition: The text encoders.
        args: Given by position.
        kwargs: Given by name.

    Raises:
        TypeError: Too many, unknown ones, or one twice.
    """
    # The pooled text behind it is for hubgen's own models, with one text encoder and a backbone that takes both.
    names = SEVERAL_PROMPTS.get(type(condition), (*ONE_PROMPT, *POOLED_EMBEDS))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names])
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"encode_prompt: {error}; expected ({', '.join(names)}).") from error
    return {name: value for name, value in arguments.items() if value is not None}


@contextmanager
def scaled_adapters(models: Sequence[Any], scale: float | None) -> Iterator[None]:
    """Has the adapters of text encoders count `scale` as much inside; `None` leaves them."""
    if scale is None or scale == 1.0:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for model in models if model is not None for layer in model.modules()]
    scalings = [layer.scaling for layer in layers if isinstance(layer, BaseTunerLayer) and hasattr(layer, "scaling")]
    before = [dict(scaling) for scaling in scalings]
    try:
        for scaling in scalings:
            scaling.update({adapter: value * scale for adapter, value in scaling.items()})
        yield
    finally:
        for scaling, values in zip(scalings, before, strict=True):
            scaling.update(values)
