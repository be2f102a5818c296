"""What the ControlNets of U-Nets have in common: a trained copy of the encoder half, between zero convolutions.

Zhang et al. 2023 (https://arxiv.org/abs/2302.05543, figures 2 and 3):

    hint ─> embedding ──┐
                        v
    sample ─> conv_in ─> + ─> down_blocks ─> mid_block         the copy, which is trained
                        │         │              │
                        0         0              0             1x1 convolutions that start at zero
                        v         v              v
                      conv_in  down_blocks    mid_block        the base, which is not: each of its feature maps
                                                               on the way down is added to, and its middle

Shapes: B batch, H and W height and width in latent pixels, C_i channels of level i (`block_out_channels`), T features
of the time embedding, c channels of the hint (`conditioning_channels`).
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.controlnets.controlnet import ControlNetOutput as DiffusersControlNetOutput
from torch import nn

from hubgen.backbones.unet_condition_config import LEFT_OUT, check_encoder
from hubgen.backbones.unet_condition_encoder import UNetConditionEncoder
from hubgen.checks import is_number
from hubgen.formats import ldm_controlnet
from hubgen.formats.headers import TensorHeader
from hubgen.formats.plain import plain_model
from hubgen.layers.checks import require_all_positive, require_supported

COPIED = (
    "conv_in",
    "time_embedding",
    "class_embedding",
    "encoder_hid_proj",
    "add_embedding",
    "down_blocks",
    "mid_block",
)
"""Parts that a ControlNet has of its base"""


@dataclass
class ControlNetOutput(DiffusersControlNetOutput):
    """What the ControlNets of U-Nets return: diffusers' output, which can be made of a dictionary as its others can.

    accelerate does so where a model is spread over devices.
    """

    down_block_res_samples: tuple[torch.Tensor, ...] = ()
    """One for each feature map of the base's way down, (B, C_i, H_i, W_i)"""
    mid_block_res_sample: torch.Tensor | None = None
    """(B, C_last, H', W')"""


def zero_convolution(channels: int) -> nn.Conv2d:
    """A 1x1 convolution that answers zero until it is trained."""
    return zeroed(nn.Conv2d(channels, channels, 1))


def zeroed(layer: Any) -> Any:
    """The layer itself, all its parameters zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ControlNetConditioningEmbedding(nn.Module):
    """A hint's pixels to features of latents' size, by a small convolutional network (2302.05543, section 3.2).

    (B, c, 2^n H, 2^n W) -> (B, C_0, H, W), rounded up, where n is the number of widths less one. The last layer starts
    at zero.

    Args:
        conditioning_embedding_channels: C_0.
        conditioning_channels: c.
        block_out_channels: Widths at full size, at half of it, and so on.
    """

    def __init__(
        self,
        conditioning_embedding_channels: int,
        conditioning_channels: int = 3,
        block_out_channels: tuple[int, ...] = (16, 32, 96, 256),
    ):
        super().__init__()
        widths = block_out_channels
        self.conv_in = nn.Conv2d(conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for i in range(len(widths) - 1):
            self.blocks.append(nn.Conv2d(widths[i], widths[i], 3, padding=1))
            self.blocks.append(nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, stride=2))
        self.conv_out = zeroed(nn.Conv2d(widths[-1], conditioning_embedding_channels, 3, padding=1))

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.conv_in(conditioning))  # (B, widths[0], 2^n H, 2^n W)
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)  # (B, C_0, H, W)


class ControlNetEncoder(UNetConditionEncoder):
    """Base of the ControlNets of U-Nets; a subclass calls `build_net` in its constructor."""

    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["BasicTransformerBlock", "ResnetBlock2D"]
    _skip_layerwise_casting_patterns = ["norm"]

    def build_net(self) -> None:
        """Checks the config, and makes the copied encoder, the hint's embedding and the zero convolutions."""
        config = self.config
        self.check_net()
        self.build_way_down()
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            config.block_out_channels[0], config.conditioning_channels, config.conditioning_embedding_out_channels
        )
        levels = zip(config.block_out_channels, self.per_level("layers_per_block"), strict=True)
        # One for each feature map on the way down: what `conv_in` makes, what each residual block makes, and what each
        # level but the last is halved to.
        widths = [config.block_out_channels[0]]
        widths += [width for width, layers in levels for _ in range(layers + 1)][:-1]
        self.controlnet_down_blocks = nn.ModuleList([zero_convolution(width) for width in widths])
        self.controlnet_mid_block = zero_convolution(config.block_out_channels[-1])
        self.build_middle()

    def check_net(self) -> None:
        """Raises ValueError naming the argument whose value cannot be built or does not fit another."""
        config = self.config
        require_supported(
            config,
            {
                "class_embed_type": (None, "timestep", "identity", "projection"),
                "controlnet_conditioning_channel_order": ("rgb", "bgr"),
            },
        )
        check_encoder(config)
        require_all_positive("conditioning_channels", config.conditioning_channels)
        widths = config.conditioning_embedding_out_channels
        if not isinstance(widths, list | tuple) or not widths:
            raise ValueError(f"`conditioning_embedding_out_channels`: got {widths!r}, expected one width or more.")
        require_all_positive("conditioning_embedding_out_channels", widths)

    @classmethod
    def made_for(cls, unet: Any, load_weights: bool, **own: Any) -> Self:
        """The network of a base, which is read and left as it is.

        Args:
            unet: A `UNet2DConditionModel` of hubgen or diffusers, compiled, offloaded or with adapters as it may be.
            load_weights: Whether it starts from the base's encoder half; else from fresh weights.
            own: Values of the config that no base has.

        Raises:
            ValueError: The base is no such U-Net, or has something that a ControlNet's config has no place for.
        """
        config = getattr(unet, "config", None)
        if not isinstance(config, Mapping) or not hasattr(unet, "up_blocks") or "cross_attention_dim" not in config:
            raise ValueError(f"`unet`: got a {type(unet).__name__}, expected a UNet2DConditionModel.")
        keys = inspect.signature(cls.__init__).parameters
        lost = {
            name: config[name]
            for name, value in LEFT_OUT.items()
            if name not in keys and name != "dropout" and config.get(name, value) != value
        }
        if lost:
            expected = {name: LEFT_OUT[name] for name in lost}
            raise ValueError(f"`unet`: got one with {lost}, expected {expected}: a {cls.__name__} has nothing else.")
        net = cls(**{**{name: copy.deepcopy(value) for name, value in config.items() if name in keys}, **own})
        if load_weights:
            base = plain_model(unet)
            for name in COPIED:
                part = getattr(net, name, None)
                if part is not None:
                    part.load_state_dict(getattr(base, name).state_dict())
        return net

    @classmethod
    def config_of_tensors(cls, tensors: Mapping[str, TensorHeader]) -> dict[str, Any] | None:
        """The config of a file in diffusers' layout, as far as its keys and shapes tell it."""
        return ldm_controlnet.infer_own_config(tensors)

    def residuals(
        self,
        x: torch.Tensor,
        temb: torch.Tensor,
        attended: dict[str, Any],
        scale: float | torch.Tensor,
        guess_mode: bool,
        return_dict: bool,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What a forward returns, from the first feature map on.

        Args:
            x: Of sample and hint, (B, C_0, H, W).
            temb: (B, T).
            attended: See `UNetConditionEncoder.attended`.
            scale: Of all residuals.
            guess_mode: Whether the scale rises from a tenth at the first to the whole at the middle, evenly in its
                logarithm. Where residuals are averaged over the picture (`global_pool_conditions`), it does not.
            return_dict: Whether an object or a tuple is returned.
        """
        x, maps = self.way_down(x, temb, attended)  # (B, C_last, H', W')
        x = self.mid_block(x, temb, **attended)
        zeros = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        found = [zero(one) for zero, one in zip(zeros, [*maps, x], strict=True)]
        pooled = self.config.global_pool_conditions
        if guess_mode and not pooled:
            rising = torch.logspace(-1, 0, len(found), device=x.device) * scale  # (maps and middle,)
            found = [one * by for one, by in zip(found, rising, strict=True)]
        else:
            found = [one * scale for one in found]
        if pooled:
            found = [one.mean(dim=(2, 3), keepdim=True) for one in found]  # (B, C_i, 1, 1)
        down, mid = tuple(found[:-1]), found[-1]
        return ControlNetOutput(down_block_res_samples=down, mid_block_res_sample=mid) if return_dict else (down, mid)

    def check_hint(self, name: str, hint: Any, sample: torch.Tensor) -> None:
        """Raises ValueError unless a hint has the right channels and the size of `sample` in pixels."""
        halvings = len(self.config.conditioning_embedding_out_channels) - 1
        factor, (height, width) = 2**halvings, sample.shape[-2:]
        channels, rows = self.config.conditioning_channels, sample.shape[0]
        shape = tuple(hint.shape) if torch.is_tensor(hint) else None
        fits = (
            shape is not None
            and len(shape) == 4
            and shape[0] in (1, rows)
            and shape[1] == channels
            and (-(-shape[2] // factor), -(-shape[3] // factor)) == (height, width)
        )
        if not fits:
            batch = "1" if rows == 1 else f"{rows} or 1"
            raise ValueError(
                f"`{name}`: got {type(hint).__name__ if shape is None else shape}, expected "
                f"({batch}, {channels}, {factor * height}, {factor * width}): `conditioning_channels` = {channels}, "
                f"and {factor} pixels a latent."
            )


def check_scale(name: str, scale: Any) -> None:
    """Raises ValueError unless `scale` is a finite number; of a tensor, which may lie on another device, the shape."""
    if torch.is_tensor(scale):
        if scale.numel() != 1:
            raise ValueError(f"`{name}`: got a tensor of shape {tuple(scale.shape)}, expected one number.")
    elif not torch.compiler.is_compiling() and not is_number(scale):  # compiled code is for any number
        raise ValueError(f"`{name}`: got {scale!r}, expected a finite number.")
