"""How each backbone's forward is called: the one place that knows, by the backbone's config.

Latents are (B, C, h, w) everywhere else, timesteps 0 ... 1000, guidance two halves of a batch. Here, at the backbone's
door, FLUX gets tokens of 2x2 latents and times in [0, 1], SDXL the numbers that describe a picture, distilled models
the guidance scale as an input, and inpainting models their extra channels.

Shapes: B pictures of H x W pixels, L text tokens of D features, P features of pooled text, T tokens of 2x2 latents.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hubgen.conditioning.text import TextEmbeddings

# Side of the square of latents that FLUX takes as one token.
PACKED = 2


def takes_pooled(backbone: nn.Module) -> bool:
    """Whether a backbone is told the pooled text, beside the token states."""
    config: Any = backbone.config
    return (
        config.get("pooled_projection_dim") is not None
        or config.get("class_embed_type") == "projection"
        or config.get("addition_embed_type") == "text_time"
    )


def takes_sizes(backbone: nn.Module) -> bool:
    """Whether a backbone is told sizes and crop of the picture (SDXL)."""
    config: Any = backbone.config
    return config.get("addition_embed_type") == "text_time"


def takes_tokens(backbone: nn.Module) -> bool:
    """Whether a backbone takes latents as a sequence of tokens with positions (FLUX)."""
    config: Any = backbone.config
    return config.get("axes_dims_rope") is not None


def takes_guidance(backbone: nn.Module) -> bool:
    """Whether `guidance_scale` is something for the backbone: FLUX (of which schnell has no use for it), LCM."""
    config: Any = backbone.config
    return "guidance_embeds" in config or config.get("time_cond_proj_dim") is not None


def attention_argument(backbone: nn.Module) -> str | None:
    """The keyword by which a backbone's forward takes options for its attention processors; None if it takes none."""
    known = inspect.signature(backbone.forward).parameters
    return next((name for name in ("cross_attention_kwargs", "joint_attention_kwargs") if name in known), None)


@dataclass(frozen=True)
class PictureNumbers:
    """What SDXL is told about a picture (2307.01952, section 2.2); sizes are (height, width) in pixels."""

    original_size: tuple[int, int]
    """before it was cropped and resized for training"""
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int]
    aesthetic_score: float | None = None
    """of the refiner, which is told it in place of the target size"""

    @property
    def values(self) -> tuple[float, ...]:
        """In the order in which they are embedded."""
        last = self.target_size if self.aesthetic_score is None else (self.aesthetic_score,)
        return (*self.original_size, *self.crops_coords_top_left, *last)


def condition_inputs(
    backbone: nn.Module,
    embeddings: TextEmbeddings,
    size: tuple[int, int] | None = None,
    numbers: Sequence[PictureNumbers] | None = None,
    guidance_scale: float | None = None,
) -> dict[str, Any]:
    """The keywords by which a backbone's forward takes everything but x_t and the timestep.

    Args:
        backbone: A model with a diffusers config: MM-DiT (token states and pooled), FLUX (these, positions, guidance),
            U-Net (token states, and pooled only where the config asks for it). Unwrapped, where a trainer has wrapped
            it.
        embeddings: Of B prompts.
        size: Height and width in pixels of the pictures, for U-Nets that are told (SDXL); the picture counts as whole,
            not as a crop, unless
        numbers: says otherwise: one for all prompts, or one for each of their equal parts (unconditional, conditional).
        guidance_scale: For backbones that take it as an input.

    Raises:
        ValueError: The config asks for something that text does not give, or for `size` or `guidance_scale` where it is
            `None`, or for other numbers than there are.
    """
    config: Any = backbone.config
    batch, tokens, pooled = len(embeddings), embeddings.tokens, embeddings.pooled
    inputs: dict[str, Any] = {"encoder_hidden_states": tokens}
    if config.get("pooled_projection_dim") is not None:
        inputs["pooled_projections"] = pooled
    if config.get("class_embed_type") == "projection":
        inputs["class_labels"] = pooled
    elif config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise ValueError("The backbone wants class labels (`class_embed_type`, `num_class_embeds`); text gives none.")
    if takes_sizes(backbone):
        if numbers is None and size is None:
            raise ValueError(
                "`size` must be (height, width), because the backbone has `addition_embed_type='text_time'`."
            )
        if numbers is None and size is not None:
            numbers = [PictureNumbers(size, (0, 0), size)]
        values = torch.tensor([part.values for part in numbers or ()], dtype=pooled.dtype, device=pooled.device)
        check_numbers(config, values.shape[1], pooled.shape[1])
        time_ids = values.repeat_interleave(batch // len(values), 0)  # (B, 6) or (B, 5)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    elif config.get("addition_embed_type") is not None:
        raise ValueError(
            f"`addition_embed_type` of the backbone must be None or 'text_time', got {config['addition_embed_type']!r}."
        )
    if takes_tokens(backbone):
        inputs["txt_ids"] = tokens.new_zeros(tokens.shape[1], 3, dtype=torch.float32)
    if config.get("guidance_embeds") or config.get("time_cond_proj_dim") is not None:
        if guidance_scale is None:
            raise ValueError("`guidance_scale` must be given: it is an input of this backbone.")
        scales = torch.full((batch,), guidance_scale, dtype=torch.float32, device=tokens.device)
        if config.get("guidance_embeds"):
            inputs["guidance"] = scales
        else:
            inputs["timestep_cond"] = guidance_embedding(scales, config.time_cond_proj_dim).to(tokens.dtype)
    return inputs


def check_numbers(config: Any, count: int, pooled: int) -> None:
    """Raises ValueError unless a U-Net is told `count` numbers about a picture beside `pooled` features of text."""
    expected = (config.projection_class_embeddings_input_dim - pooled) / config.addition_time_embed_dim
    if count != expected:
        raise ValueError(
            f"The backbone is told {expected:g} numbers about a picture beside {pooled} features of text, got {count}. "
            "Of the pipeline's config, `requires_aesthetics_score` must be true for 5, which is SDXL's refiner, and "
            "false for 6."
        )


def guidance_embedding(scale: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoids of a guidance scale, (B,) -> (B, dim), for models distilled by it (LCM, 2310.04378, section 4.2)."""
    half = dim // 2
    frequencies = torch.logspace(0, -4, half, device=scale.device)  # 1 ... 1/10000
    angles = 1000 * (scale[:, None] - 1) * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, T, 4 C): tokens of 2x2 latents, in each the channels outermost."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // PACKED, PACKED, width // PACKED, PACKED)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, T, 4 C) -> (B, C, h, w), the inverse of `pack`; `height` and `width` are h and w."""
    squares = tokens.unflatten(2, (-1, PACKED, PACKED)).unflatten(1, (height // PACKED, width // PACKED))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def token_positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """(T, 3): 0, row and column of each token of `pack`, for h x w latents."""
    rows, columns = height // PACKED, width // PACKED
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).flatten(0, 1).to(device, torch.float32)


class BackboneCall:
    """`(x_t, timestep, guided) -> prediction` of the denoising loop, for one backbone and one set of conditions.

    Args:
        backbone: See `condition_inputs`.
        positive: Of B prompts.
        negative: What guidance leads away from; `None` if no step is guided.
        numbers: Of the conditional and of the unconditional half, for backbones that are told sizes.
        guidance_scale: For backbones that take it as an input.
        attention_kwargs: Options for the backbone's attention processors.
        extra_channels: (B, C', h, w), joined to x_t: mask and masked picture of inpainting U-Nets.
    """

    def __init__(
        self,
        backbone: nn.Module,
        positive: TextEmbeddings,
        negative: TextEmbeddings | None = None,
        numbers: tuple[PictureNumbers, PictureNumbers] | None = None,
        guidance_scale: float | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        extra_channels: torch.Tensor | None = None,
    ):
        self.backbone = backbone
        self.numbers = numbers
        self.guidance_scale = guidance_scale
        self.extra_channels = extra_channels
        self.options: dict[str, Any] = {}
        self._positions: tuple[tuple[int, int], torch.Tensor] | None = None
        argument = attention_argument(backbone)
        if attention_kwargs is not None and argument is not None:
            self.options[argument] = dict(attention_kwargs)
        self._positive, self._negative = positive, negative
        self._tell()

    @property
    def embeddings(self) -> tuple[torch.Tensor | None, ...]:
        """Token states and pooled vectors of the prompts, then of the negative ones; a walk may replace them."""
        negative = self._negative
        return (
            self._positive.tokens,
            self._positive.pooled,
            None if negative is None else negative.tokens,
            None if negative is None else negative.pooled,
        )

    @embeddings.setter
    def embeddings(self, embeddings: tuple[torch.Tensor | None, ...]) -> None:
        tokens, pooled, negative_tokens, negative_pooled = embeddings
        assert tokens is not None and pooled is not None
        self._positive = TextEmbeddings(tokens, pooled)
        if self._negative is not None:
            assert negative_tokens is not None and negative_pooled is not None
            self._negative = TextEmbeddings(negative_tokens, negative_pooled)
        self._tell()

    @property
    def conditions(self) -> dict[str, Any]:
        """What the backbone is told, beside x_t and the time, in a guided step; in all of them if none is guided."""
        return self.told.get(True, self.told[False])

    def _tell(self) -> None:
        backbone, scale, numbers = self.backbone, self.guidance_scale, self.numbers
        one, both = (None, None) if numbers is None else (numbers[:1], numbers[::-1])
        self.told = {False: condition_inputs(backbone, self._positive, None, one, scale)}
        if self._negative is not None:
            halves = TextEmbeddings.cat([self._negative, self._positive])
            self.told[True] = condition_inputs(backbone, halves, None, both, scale)

    def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor, guided: bool) -> torch.Tensor:
        """The prediction of x_t's shape, (B, C, h, w) or, guided, (2 B, C, h, w), unconditional half first.

        Args:
            x_t: Likewise.
            timestep: (B,) or (2 B,), as the scheduler has it.
            guided: Whether there are two halves.
        """
        backbone: Any = self.backbone
        x = x_t.to(backbone.dtype)
        if self.extra_channels is not None:
            extra = self.extra_channels.to(x.dtype)
            x = torch.cat([x, torch.cat([extra, extra]) if guided else extra], dim=1)
        inputs: dict[str, Any] = {**self.told[guided], **self.options, "timestep": timestep, "return_dict": False}
        height, width = x.shape[-2:]
        packed = takes_tokens(backbone)
        if packed:
            x = pack(x)
            if self._positions is None or self._positions[0] != (height, width):  # the same tensor at every step
                self._positions = (height, width), token_positions(height, width, x.device)
            inputs["img_ids"] = self._positions[1]
            inputs["timestep"] = timestep / 1000
        # Step caches tell apart, by this name, what they keep of calls on other batches.
        cached = hasattr(backbone, "cache_context")
        with backbone.cache_context("cond_uncond" if guided else "cond") if cached else nullcontext():
            prediction = backbone(x, **inputs)[0]
        return unpack(prediction, height, width) if packed else prediction
