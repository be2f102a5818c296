"""Two implementations on one set of weights: what every parity test needs.

Fresh weights prove nothing where a layer starts at zero, so every parameter is drawn anew first.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubgen.formats.headers import TensorHeader


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter anew, zero-initialised ones included, at scales that keep activations around one.

    Matrices and kernels get a standard deviation of 1/sqrt(inputs), scales of norms 1 ± 0.2, all other vectors ± 0.2.
    Two models with the same parameter names get the same values, in whatever order they registered them.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            value /= parameter[0].numel() ** 0.5
        else:
            value *= 0.2
            if name.endswith("weight"):
                value += 1
        parameter.copy_(value)
    return model


def share_weights_(ours: nn.Module, theirs: nn.Module, seed: int = 0) -> None:
    """Draws the parameters of `theirs` anew and makes them those of `ours`; keys and shapes must be the same."""
    randomize_(theirs, seed)
    ours.load_state_dict(theirs.state_dict())


def first_output(output: Any) -> torch.Tensor:
    """The first tensor of whatever a model returned; of a ControlNet, which returns many, all their values in a row."""
    if isinstance(output, torch.Tensor):
        return output
    first = output[0]
    if isinstance(first, torch.Tensor):
        return first
    groups = [output[i] for i in range(len(output))]
    lists = [group if isinstance(group, list | tuple) else [group] for group in groups if group is not None]
    return torch.cat([tensor.flatten() for tensors in lists for tensor in tensors])


@torch.no_grad()
def assert_parity(ours: nn.Module, theirs: nn.Module, inputs: dict[str, Any], atol: float = 1e-4) -> torch.Tensor:
    """Asserts that both return the same for `inputs`, to `atol` of the output's standard deviation; returns ours.

    Both models are put into evaluation mode.
    """
    expected = first_output(theirs.eval()(**copy.deepcopy(inputs)))
    actual = first_output(ours.eval()(**copy.deepcopy(inputs)))
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    scale = expected.std().item()
    assert torch.isfinite(expected).all() and scale > 1e-3, f"the output (std {scale}) is too trivial to compare"
    error = (actual - expected).abs().max().item()
    assert error < atol * scale, f"outputs differ by {error}, {error / scale:.2e} of their standard deviation"
    return actual


@torch.no_grad()
def quiet_(net: nn.Module, factor: float = 0.2) -> nn.Module:
    """Scales what a ControlNet adds to its base, so that random residuals do not drown it."""
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_") and "embed" not in name:
            parameter *= factor
    return net.eval()


@torch.no_grad()
def certain_(vae: Any, exactly: bool = False) -> Any:
    """Takes an autoencoder's posterior the variance, as far as it goes.

    Args:
        vae: The autoencoder.
        exactly: Whether the means are moved far away from 0, where the least variance that there is, exp(-30), is lost
            in rounding: then whatever is drawn is the same to the last bit.
    """
    last = vae.encoder.conv_out if getattr(vae, "quant_conv", None) is None else vae.quant_conv
    half = last.weight.shape[0] // 2
    last.weight[half:] = 0
    last.bias[half:] = -30
    if exactly:
        last.bias[:half] += 64
    return vae


def plain(config: Any) -> dict[str, Any]:
    """A model's arguments, without what says how it was made."""
    return {key: value for key, value in config.items() if key[0] != "_"}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of a model's tensors, by name."""
    return {name: value.shape for name, value in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same tensors, to the last bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def headers(state: Mapping[str, torch.Tensor]) -> dict[str, TensorHeader]:
    """What a file with these tensors would say of them."""
    return {name: TensorHeader(tuple(value.shape), value.dtype, Path("x")) for name, value in state.items()}
