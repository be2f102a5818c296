"""The two sides of a comparison: diffusers makes a checkpoint and computes, hubgen loads it and computes.

    python -m tests.full_size.sides diffusers "SDXL U-Net" FOLDER      FOLDER/model and FOLDER/diffusers.safetensors
    python -m tests.full_size.sides hubgen "SDXL U-Net" FOLDER         FOLDER/hubgen.safetensors

Each runs in a process of its own, so that one network at a time is in memory and its peak can be told.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from tests.full_size.cases import CASES, LIBRARIES, Case, Config, Inputs
from tests.parity import randomize_

# A shard is copied once while it is written.
SHARD = "2GB"


def random_network(case: Case, config: Config) -> nn.Module:
    """diffusers' network, every parameter drawn at random, without the time that its own initialisation takes."""
    with init_empty_weights(include_buffers=False):
        network = case.build("diffusers", config)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
    return randomize_(network)


def saved(case: Case, config: Config, folder: Path) -> nn.Module:
    """diffusers' random network, saved by diffusers."""
    network = random_network(case, config)
    network.save_pretrained(folder, max_shard_size=SHARD)
    return network


def loaded(case: Case, folder: Path) -> nn.Module:
    """hubgen's network from that folder."""
    return getattr(LIBRARIES["hubgen"], case.class_name).from_pretrained(folder)


@torch.no_grad()
def outputs(network: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """What a network predicts; of an autoencoder the moments of pixels and the pixels of latents."""
    network.eval()
    if "pixels" not in inputs:
        return {"sample": network(**inputs).sample}
    return {
        "moments": network.encode(inputs["pixels"]).latent_dist.parameters,
        "decoded": network.decode(inputs["latents"]).sample,
    }


def error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of all outputs, in standard deviations of the output that it is in."""
    assert actual.keys() == expected.keys()
    errors = []
    for name, tensor in expected.items():
        assert torch.isfinite(tensor).all() and tensor.std() > 1e-3, f"{name} is too trivial to compare"
        assert actual[name].shape == tensor.shape, f"{name}: {tuple(actual[name].shape)} is not {tuple(tensor.shape)}"
        errors.append(((actual[name] - tensor).abs().max() / tensor.std()).item())
    return max(errors)


def run(side: str, name: str, folder: Path) -> dict[str, Any]:
    """Computes one side, stores its outputs and returns what it took; seconds and bytes."""
    case = CASES[name]
    config = case.config
    start = time.perf_counter()
    network = saved(case, config, folder / "model") if side == "diffusers" else loaded(case, folder / "model")
    ready = time.perf_counter()
    tensors = outputs(network, case.inputs(config))
    done = time.perf_counter()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{side}.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds_to_make_or_load": ready - start,
        "seconds": done - ready,
        "peak_bytes": peak if sys.platform == "darwin" else 1024 * peak,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


if __name__ == "__main__":
    side, name, folder = sys.argv[1:]
    print(json.dumps(run(side, name, Path(folder))))
