"""DiTControlNetModel: diffusers has none, so that it is held against the blocks of its base and against sums."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hubgen
from tests.models import LIBRARIES, NETWORKS
from tests.parity import first_output, randomize_

BASE = NETWORKS["DiT"]
CONFIG = {key: value for key, value in BASE.config.items() if key != "out_channels"}


def net_of(**changes: Any) -> hubgen.DiTControlNetModel:
    """A network of which all weights are random."""
    return randomize_(hubgen.DiTControlNetModel(**{**CONFIG, "num_layers": 2, **changes})).eval()


def inputs(*size: tuple[int, int]) -> dict[str, Any]:
    told = BASE.inputs(*size)
    return {**told, "controlnet_cond": torch.randn(told["hidden_states"].shape, generator=torch.Generator())}


@torch.no_grad()
@pytest.mark.parametrize("library", LIBRARIES)
def test_with_identities_for_zero_layers_and_no_hint_residuals_are_the_outputs_of_the_bases_blocks(
    library: str,
) -> None:
    base = BASE.build(library)
    net = hubgen.DiTControlNetModel.from_transformer(base, num_layers=3)
    for zero in net.controlnet_blocks:
        nn.init.eye_(zero.weight)
    seen: list[torch.Tensor] = []
    for block in base.transformer_blocks:
        block.register_forward_hook(lambda block, args, out: seen.append(out))
    base(**BASE.inputs())
    (residuals,) = net.eval()(**inputs(), return_dict=False)
    torch.testing.assert_close(residuals, seen, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_hint_that_is_embedded_as_x_t_counts_as_a_change_of_x_t() -> None:
    """The embedding of patches is linear: hint and x_t add up in front of the first block."""
    net, told = net_of(), inputs()
    net.pos_embed_input.proj.weight.copy_(net.pos_embed.proj.weight)
    net.pos_embed_input.proj.bias.zero_()
    found = first_output(net(**told))
    moved = {**told, "hidden_states": told["hidden_states"] + told["controlnet_cond"]}
    moved["controlnet_cond"] = torch.zeros_like(moved["controlnet_cond"])
    torch.testing.assert_close(first_output(net(**moved)), found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_residuals_are_one_a_block_and_as_strong_as_the_scale() -> None:
    net, told = net_of(), inputs((4, 6))
    out = net(**told)
    assert [one.shape for one in out.controlnet_block_samples] == [(2, 6, 16)] * 2
    assert torch.equal(first_output(net(**told, return_dict=False)), first_output(out))
    half = first_output(net(**told, conditioning_scale=0.5))
    torch.testing.assert_close(half, 0.5 * first_output(out))
    for value in ("timestep", "class_labels", "controlnet_cond"):
        one = {**told, value: told[value][:1]}
        both = {**told, value: told[value][:1].expand_as(told[value])}
        torch.testing.assert_close(first_output(net(**one)), first_output(net(**both)))


@torch.no_grad()
def test_the_base_adds_each_residual_behind_neighbouring_blocks() -> None:
    base, (residuals,) = BASE.build(num_layers=4), net_of()(**inputs(), return_dict=False)
    found = base(**BASE.inputs(), block_controlnet_hidden_states=residuals).sample
    for block, residual in zip(base.transformer_blocks, [residuals[0]] * 2 + [residuals[1]] * 2, strict=True):
        block.register_forward_hook(lambda _, args, out, residual=residual: out + residual)
    torch.testing.assert_close(base(**BASE.inputs()).sample, found)


def test_the_full_size_is_half_of_dit_xl_2() -> None:
    with torch.device("meta"):
        net = hubgen.DiTControlNetModel()
    width, classes = 1152, 1000
    embedders = (256 + 1) * width + (width + 1) * width + (classes + 1) * width
    block = (
        embedders
        + 6 * (width + 1) * width
        + 4 * (width + 1) * width
        + (width + 1) * 4 * width
        + (4 * width + 1) * width
    )
    patches = 2 * (4 * 4 + 1) * width
    assert sum(parameter.numel() for parameter in net.parameters()) == 14 * (block + (width + 1) * width) + patches


# from a base


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_network_of_a_base_is_half_of_it_and_leaves_it_alone(library: str, tmp_path: Path) -> None:
    base = BASE.build(library)
    config, weights = dict(base.config), {name: value.clone() for name, value in base.state_dict().items()}
    for layers in (None, 3):
        net = hubgen.DiTControlNetModel.from_transformer(base, layers)
        assert net.config.num_layers == len(net.transformer_blocks) == (layers or 2)
        copied = {name for name in net.state_dict() if not name.startswith(("controlnet_blocks.", "pos_embed_input."))}
        assert all(torch.equal(net.state_dict()[name], weights[name]) for name in copied)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(7.0)
        assert dict(base.config) == config
        assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    base.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


@torch.no_grad()
def test_a_saved_network_comes_back(tmp_path: Path) -> None:
    net = net_of(attention_bias=False)
    net.save_pretrained(tmp_path)
    again = hubgen.DiTControlNetModel.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in net.config.items() if k[0] != "_"
    }
    assert torch.equal(first_output(again(**inputs())), first_output(net(**inputs())))
    with pytest.raises(ValueError, match="config of a DiTControlNetModel, expected a DiTTransformer2DModel"):
        hubgen.DiTTransformer2DModel.from_pretrained(tmp_path)


# what is refused


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_layers`: got 0, expected at least 1"):
        hubgen.DiTControlNetModel.from_transformer(BASE.fresh(), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controlnet_cond": torch.zeros(2, 3, 8, 8)}, r"`controlnet_cond`: got \(2, 3, 8, 8\), .*\(2 or 1, 4, 8, 8\)"),
        ({"controlnet_cond": torch.zeros(2, 4, 8, 6)}, r"`controlnet_cond`: got \(2, 4, 8, 6\)"),
        ({"controlnet_cond": torch.zeros(3, 4, 8, 8)}, r"`controlnet_cond`: got \(3, 4, 8, 8\)"),
        ({"controlnet_cond": None}, "`controlnet_cond`: got NoneType"),
        ({"conditioning_scale": "much"}, "`conditioning_scale`: got 'much', expected a finite number"),
        ({"class_labels": torch.tensor([0, 11])}, r"`class_labels`: got \[11\], expected 0 to 9, or 10 for no class"),
        ({"timestep": None}, r"`timestep`: got None, expected \(2\)"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_before_anything_is_computed(
    change: dict[str, Any], message: str
) -> None:
    net = net_of()
    net.pos_embed.forward = None  # whoever calls it fails otherwise
    with pytest.raises(ValueError, match=message):
        net(**{**inputs(), **change})
