"""Perceptual distance between pictures, in the manner of LPIPS, on any feature network.

Paper: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (https://arxiv.org/abs/1801.03924),
equation 1: features of each stage are scaled to unit length over the channels, subtracted, squared, weighted, averaged
over space and summed over the stages. Published LPIPS weights belong to AlexNet and VGG; for another network the
weights are one for each stage (the paper's baseline without learned heads), or those that the caller brings. Distances
of different networks, stages or resolutions are therefore not comparable with each other.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-10


class FeatureNetwork(Protocol):
    """What a perceptual distance needs of a network: pixels to a list of feature maps, differentiable in the pixels."""

    def forward_features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Returns one (B, C_k, H_k, W_k) map for each stage; `pixels` (B, 3, H, W) in [-1, 1]."""
        ...


class PerceptualLoss(nn.Module):
    """LPIPS-style distance; gradients reach both pictures and never the feature network.

    Computed in float32 also under autocast: it is a small part of a training step, and a difference of near-equal
    features is where half precision hurts.

    Args:
        features: A module with `forward_features`, or any module that returns a list of feature maps when called.
            It is frozen and set to evaluation mode.
        weights: One weight for each stage: a number, or a (C_k,) tensor as LPIPS' linear heads have. `None` for ones.
        stages: The stages to compare, passed on as `forward_features(pixels, stages=...)`; `None` for the network's
            own choice.
        resize: Side in pixels that both pictures are scaled to first (bilinear); `None` compares at their own size.
    """

    def __init__(
        self,
        features: nn.Module,
        weights: Sequence[float | torch.Tensor] | None = None,
        stages: Sequence[int] | None = None,
        resize: int | None = None,
    ):
        super().__init__()
        if resize is not None and resize < 1:
            raise ValueError(f"`resize`: got {resize}, expected a positive number of pixels or None.")
        self.features = features.requires_grad_(False).eval()
        self.stages = None if stages is None else tuple(stages)
        self.resize = resize
        self.has_weights = weights is not None
        for index, weight in enumerate(weights or ()):
            # buffers, so that they move with the module
            self.register_buffer(f"weight_{index}", torch.as_tensor(weight, dtype=torch.float32).reshape(-1, 1, 1))
        self.weight_count = len(weights or ())

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """The feature network stays in evaluation mode: a metric must not depend on the batch."""
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Returns the distances (B,) between `pixels` and `target`, both (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: The shapes differ, or the number of weights is not that of the stages.
        """
        if pixels.shape != target.shape or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"`pixels`, `target`: got {tuple(pixels.shape)} and {tuple(target.shape)}, expected (B, 3, H, W) twice."
            )
        with torch.autocast(pixels.device.type, enabled=False):
            pixels_maps = self._stage_features(pixels.float())
            with torch.set_grad_enabled(torch.is_grad_enabled() and target.requires_grad):
                target_maps = self._stage_features(target.float())
        if self.has_weights and self.weight_count != len(pixels_maps):
            raise ValueError(f"{self.weight_count} weights for {len(pixels_maps)} stages of features")

        distance = torch.zeros(len(pixels), device=pixels.device)
        for index, (x, y) in enumerate(zip(pixels_maps, target_maps, strict=True)):
            difference = (x - y).square()  # (B, C, h, w)
            if self.has_weights:
                difference = difference * self.get_buffer(f"weight_{index}")
            distance = distance + difference.sum(dim=1).mean(dim=(1, 2))
        return distance

    def _stage_features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, C_k, h_k, w_k) of unit length over the channels."""
        if self.resize is not None and pixels.shape[-2:] != (self.resize, self.resize):
            pixels = F.interpolate(
                pixels, size=(self.resize, self.resize), mode="bilinear", align_corners=False, antialias=True
            )
        extract = getattr(self.features, "forward_features", self.features)
        maps = extract(pixels) if self.stages is None else extract(pixels, stages=self.stages)
        return [unit_normalise(x) for x in maps]


def unit_normalise(x: torch.Tensor) -> torch.Tensor:
    """Scales `x` (B, C, H, W) to unit length over the channels; a zero vector stays zero and has a finite gradient."""
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + NORM_EPS)
