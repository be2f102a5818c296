"""More inputs for a trained backbone, beside x_t: what InstructPix2Pix (2211.09800, section 3.2) starts from.

    wide = widen(pipe.unet, 4)                                           # x_t and a picture's latents, 4 channels each
    prediction = predict(wide, x_t, t, condition, Doors(channels=[picture]))

The weights of the new inputs are 0. So the prediction is that of the base at first, whatever the new inputs hold.
"""

import copy
import inspect
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights

from hubgen.checks import whole
from hubgen.conditioning.families import family_of
from hubgen.formats.plain import plain_model

Network = TypeVar("Network", bound=Any)


def widen(backbone: Network, channels: int) -> Network:
    """A network with further input channels, which come after those of x_t; the base stays as it is.

    Args:
        backbone: A U-Net, DiT, SD3's or FLUX' transformer, of hubgen or diffusers. Adapters on it are left out.
        channels: How many, of latents (B, `channels`, h, w): for FLUX they are packed four to one outside.

    Returns:
        A network of the same class, with copies of all weights, on the same device and in the same precision.

    Raises:
        ValueError: The backbone is of no known family, or `channels` no whole number above 0.
    """
    whole("channels", channels)
    family, base = family_of(backbone), plain_model(backbone)
    inputs = base.config.in_channels
    features = inputs // family.channels  # of the input layer, for a channel of the latents
    known = inspect.signature(type(base).__init__).parameters
    config = {name: copy.deepcopy(value) for name, value in base.config.items() if name in known}
    # Where the config does not say what comes out, it is as much as goes in.
    config["out_channels"] = inputs if config.get("out_channels") is None else config["out_channels"]
    config["in_channels"] = inputs + channels * features
    with init_empty_weights(include_buffers=False):
        wide = type(base)(**config)
    shapes = {name: value.shape for name, value in wide.state_dict().items()}
    tensors = {name: widened(value, shapes[name]) for name, value in base.state_dict().items()}
    wide.load_state_dict(tensors, strict=True, assign=True)
    return wide.to(base.device).train(base.training)


def widened(weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A copy of weights, (out, in, ...), with zeros behind their inputs where `shape` has more of them."""
    if weights.shape == shape:
        return weights.clone()
    wide = weights.new_zeros(shape)
    wide[:, : weights.shape[1]] = weights
    return wide
