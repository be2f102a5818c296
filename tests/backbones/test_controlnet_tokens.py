"""What holds for the ControlNets of all transformers: fresh ones, their bases' step caches, acceleration, refusals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import nn

import hubgen
from tests.models import NETWORKS, Network
from tests.parity import first_output, plain, randomize_


@dataclass(frozen=True)
class Kind:
    """A network, with its base."""

    name: str
    """Of its class"""
    base: Network
    config: dict[str, Any]
    inputs: Callable[..., dict[str, Any]]
    """Keywords of its forward, for changes of the config"""
    keywords: tuple[str, ...]
    """Of the base's forward, for each group of residuals"""
    last: tuple[str, str]
    """The base's last blocks, and a layer in them that a cached step leaves out"""
    told: tuple[str, ...]
    """What a table of modulations is computed of"""

    @property
    def cls(self) -> Any:
        return getattr(hubgen, self.name)

    def build(self, **changes: Any) -> Any:
        """A network of which all weights are random."""
        return randomize_(self.cls(**{**self.config, **changes})).eval()


def dit_inputs(**changes: Any) -> dict[str, Any]:
    told = NETWORKS["DiT"].inputs()
    return {**told, "controlnet_cond": torch.randn(told["hidden_states"].shape, generator=torch.Generator())}


def of(network: str) -> dict[str, Any]:
    """Config and inputs of a network of tests/models.py."""
    return {"config": NETWORKS[network].config, "inputs": NETWORKS[network].inputs}


ONE = ("block_controlnet_hidden_states",)
DOUBLE_AND_SINGLE = ("controlnet_block_samples", "controlnet_single_block_samples")
MMDIT_TABLE = ("timestep", "pooled_projections")
KINDS = {
    "SD3": Kind(
        "SD3ControlNetModel",
        NETWORKS["SD 3"],
        **of("ControlNet, SD 3"),
        keywords=ONE,
        last=("transformer_blocks", "ff"),
        told=MMDIT_TABLE,
    ),
    "SD3.5, image alone": Kind(
        "SD3ControlNetModel",
        NETWORKS["SD 3"],
        **of("ControlNet, SD 3.5 large"),
        keywords=ONE,
        last=("transformer_blocks", "ff"),
        told=MMDIT_TABLE,
    ),
    "FLUX.1": Kind(
        "FluxControlNetModel",
        NETWORKS["FLUX.1 dev"],
        **of("ControlNet, FLUX.1"),
        keywords=DOUBLE_AND_SINGLE,
        last=("single_transformer_blocks", "proj_mlp"),
        told=(*MMDIT_TABLE, "guidance"),
    ),
    "DiT": Kind(
        "DiTControlNetModel",
        NETWORKS["DiT"],
        {**{key: value for key, value in NETWORKS["DiT"].config.items() if key != "out_channels"}, "num_layers": 2},
        dit_inputs,
        keywords=ONE,
        last=("transformer_blocks", "ff"),
        told=("timestep", "class_labels"),
    ),
}
FRESH: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"load_weights_from_transformer": load}) for name in ("SD3", "FLUX.1", "DiT") for load in (True, False)],
    ("SD3", {"num_extra_conditioning_channels": 1}),
    ("FLUX.1", {"num_mode": 4}),
    ("FLUX.1", {"conditioning_embedding_channels": 4}),
]
USUAL: dict[str, dict[str, Any]] = {
    "SD3": {"num_extra_conditioning_channels": 0},
    "FLUX.1": {"num_single_layers": 2},
}
"""Of `from_transformer`, for a small network with a hint like x_t"""


def fresh(kind: str, **options: Any) -> Any:
    """A network made of its base."""
    return KINDS[kind].cls.from_transformer(KINDS[kind].base.build(), 2, **{**USUAL.get(kind, {}), **options})


@pytest.mark.parametrize(("name", "options"), FRESH)
def test_a_fresh_network_adds_exactly_zero_and_only_its_zero_layers_learn_at_first(
    name: str, options: dict[str, Any]
) -> None:
    net = fresh(name, **options).train()  # a label that training may drop is dropped by the trainer, not here
    inputs, zeros = KINDS[name].inputs(**plain(net.config)), ("controlnet_blocks.", "controlnet_single_blocks.")
    out = first_output(net(**inputs))
    assert torch.count_nonzero(out) == 0
    (out - 1).square().mean().backward()
    for layer, parameter in net.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros(1)
        assert bool(grad.any()) == layer.startswith(zeros), layer

    # once these have left zero, the way of the hint learns
    with torch.no_grad():
        for layer, parameter in net.named_parameters():
            if layer.startswith(zeros) and layer.endswith("weight"):
                nn.init.eye_(parameter)
    (first_output(net(**inputs)) - 1).square().mean().backward()
    hint = getattr(net, "input_hint_block", None)
    way = getattr(net, "controlnet_x_embedder", None) if hint is None else hint.conv_out
    way = net.pos_embed_input.proj if way is None else way
    assert way.weight.grad.any() and way.bias.grad.any()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [("SD3", {}), ("SD3.5, image alone", {}), ("FLUX.1", {}), ("FLUX.1", {"num_single_layers": 0}), ("DiT", {})],
)
def test_a_first_block_cache_of_the_base_keeps_the_residuals(name: str, changes: dict[str, Any]) -> None:
    kind = KINDS[name]
    base, inputs = kind.base.build(), kind.base.inputs()
    groups = kind.build(**changes)(**kind.inputs(**changes), return_dict=False)
    inputs |= dict(zip(kind.keywords, groups, strict=True))
    expected = base(**inputs).sample
    base.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    ran: list[int] = []
    blocks, layer = kind.last
    getattr(getattr(base, blocks)[-1], layer).register_forward_hook(lambda *_: ran.append(1))
    with base.cache_context("cond"):
        for _ in range(2):
            torch.testing.assert_close(base(**inputs).sample, expected, rtol=0, atol=1e-6)
    assert len(ran) == 1, "the second step was computed in full"


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_modulations_and_accelerated_calls_are_those_of_plain_layers(name: str) -> None:
    net, inputs = KINDS[name].build(), KINDS[name].inputs()
    expected = first_output(net(**inputs))
    table, seen = dict(net.modulations(**{one: inputs[one] for one in KINDS[name].told})), {}
    hooks = [layer.register_forward_hook(lambda layer, _, out: seen.update({layer: out})) for layer in table]
    net(**inputs)
    assert seen.keys() == table.keys() and all(torch.equal(seen[layer], out) for layer, out in table.items())
    for hook in hooks:
        hook.remove()
    hubgen.optimize(net)
    torch.testing.assert_close(first_output(net(**inputs)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SD3", "FLUX.1", "DiT"])
def test_what_is_no_base_is_refused(name: str) -> None:
    kind = KINDS[name]
    others = [nn.Linear(1, 1), kind.build(), *(one.base.fresh() for one in KINDS.values() if one.base != kind.base)]
    for other in others:
        message = f"`transformer`: got a {type(other).__name__}, expected a {kind.base.class_name}"
        with pytest.raises(ValueError, match=message):
            kind.cls.from_transformer(other)
    base = kind.base.fresh()
    blocks = base.config.num_layers
    with pytest.raises(
        ValueError, match=f"`num_layers`: got {blocks + 1}, expected a whole number, from 0 to {blocks}"
    ):
        kind.cls.from_transformer(base, blocks + 1)
