"""A ControlNet's residuals in transformers: which block adds which, and that step caches count them in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from packaging import version
from torch import nn

import hubgen
from hubgen.layers.residuals import in_turns, shared_by_neighbours, spread_evenly
from tests.parity import first_output, randomize_

B, TEXT = 2, 5
Case = tuple[nn.Module, dict[str, Any], dict[str, Any]]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def residuals(count: int, tokens: int, width: int, seed: int = 9) -> list[torch.Tensor]:
    return [drawn(B, tokens, width, seed=seed + i) for i in range(count)]


def sd3() -> Case:
    model = hubgen.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": drawn(B, 4, 8, 8),
        "encoder_hidden_states": drawn(B, TEXT, 12, seed=1),
        "pooled_projections": drawn(B, 6, seed=2),
        "timestep": torch.tensor([7.0, 900.0]),
    }
    return model, inputs, {"block_controlnet_hidden_states": residuals(2, 16, 16)}


def flux() -> Case:
    model = hubgen.FluxTransformer2DModel(
        in_channels=8,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": drawn(B, 12, 8),
        "encoder_hidden_states": drawn(B, TEXT, 12, seed=1),
        "pooled_projections": drawn(B, 6, seed=2),
        "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": torch.zeros(12, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    given = {
        "controlnet_block_samples": residuals(2, 12, 32),
        "controlnet_single_block_samples": residuals(2, 12, 32, seed=20),
    }
    return model, inputs, given


def dit() -> Case:
    model = hubgen.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=4, sample_size=8, num_embeds_ada_norm=5
    )
    inputs = {
        "hidden_states": drawn(B, 4, 8, 8),
        "timestep": torch.tensor([7, 900]),
        "class_labels": torch.tensor([0, 5]),
    }
    return model, inputs, {"block_controlnet_hidden_states": residuals(2, 16, 16)}


FAMILIES: dict[str, Callable[[], Case]] = {"sd3": sd3, "flux": flux, "dit": dit}
every_family = pytest.mark.parametrize("family", FAMILIES)


def built(family: str) -> Case:
    model, inputs, given = FAMILIES[family]()
    return randomize_(model).eval(), inputs, given


@torch.no_grad()
def predicted(model: nn.Module, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return first_output(model(**inputs, **more))


def blocks(model: nn.Module) -> list[nn.Module]:
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


@every_family
def test_residuals_change_the_prediction_and_zeros_do_not(family: str) -> None:
    model, inputs, given = built(family)
    plain = predicted(model, inputs)
    assert (predicted(model, inputs, **given) - plain).abs().max() > 0.1 * plain.std()
    zeros = {name: [torch.zeros_like(one) for one in value] for name, value in given.items()}
    assert torch.equal(predicted(model, inputs, **zeros), plain)


@every_family
def test_blocks_add_their_residuals_themselves(family: str) -> None:
    """So that whatever is hooked to a block, a step cache or an offload, has them within."""
    model, inputs, given = built(family)
    outputs: list[torch.Tensor] = []
    entered: list[torch.Tensor] = []
    for block in blocks(model):
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        block.register_forward_hook(lambda _, args, out: outputs.append(out if torch.is_tensor(out) else out[1]))
    predicted(model, inputs, **given)
    assert len(outputs) == len(blocks(model))
    for left, into in zip(outputs[:-1], entered[1:], strict=True):
        assert torch.equal(left, into)


@every_family
def test_a_step_cache_that_never_skips_changes_nothing(family: str) -> None:
    model, inputs, given = built(family)
    later = {**inputs, "hidden_states": inputs["hidden_states"] + 0.1}
    plain = [predicted(model, one, **given) for one in (inputs, later)]
    model.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    with model.cache_context("cond"):
        for one, expected in zip((inputs, later), plain, strict=True):
            assert torch.equal(predicted(model, one, **given), expected)


@every_family
def test_a_skipped_step_has_the_residuals_once(family: str) -> None:
    """The same step again is the same prediction: what was kept of the blocks has their residuals in it."""
    model, inputs, given = built(family)
    plain = predicted(model, inputs, **given)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("cond"):
        torch.testing.assert_close(predicted(model, inputs, **given), plain)
        computed: list[int] = []
        layer = next(module for module in blocks(model)[-1].modules() if isinstance(module, nn.Linear))
        layer.register_forward_hook(lambda *_: computed.append(1))
        torch.testing.assert_close(predicted(model, inputs, **given), plain, rtol=1e-5, atol=1e-5)
    assert not computed


@every_family
def test_gradient_checkpointing_has_the_residuals(family: str) -> None:
    model, inputs, given = built(family)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        leaves = {name: [one.clone().requires_grad_() for one in value] for name, value in given.items()}
        sample = first_output(model(**inputs, **leaves))
        sample.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append([sample, *gradients, *(one.grad for value in leaves.values() for one in value)])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@every_family
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_has_the_residuals(family: str, kind: str, tmp_path: Path) -> None:
    model, inputs, given = built(family)
    plain = predicted(model, inputs, **given)
    if version.parse(diffusers.__version__) < version.parse("0.38") and torch.accelerator.current_accelerator() is None:
        pytest.skip("this diffusers offloads groups beside an accelerator only")
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    assert torch.equal(predicted(model, inputs, **given), plain)


def names(spread: list[Any]) -> str:
    """One letter a block, in which a residual of its own is a letter of its own."""
    return "".join("-" if one is None else chr(ord("a") + int(one)) for one in spread)


def numbered(count: int) -> list[torch.Tensor]:
    return [torch.tensor(i) for i in range(count)]


def test_each_network_has_its_rule() -> None:
    assert names(shared_by_neighbours(numbered(2), 5)) == "aaabb"
    assert names(shared_by_neighbours(numbered(6), 19)) == "aaaabbbbccccddddeee"  # the sixth serves none
    assert names(in_turns(numbered(2), 5)) == "ababa"
    assert names(spread_evenly(numbered(2), 6)) == "aaabb-"
    assert names(spread_evenly(numbered(4), 6)) == "aabcc-"


@pytest.mark.parametrize("rule", [shared_by_neighbours, in_turns, spread_evenly])
def test_as_many_residuals_as_blocks_are_one_each(rule: Any) -> None:
    last = "-" if rule is spread_evenly else "d"
    assert names(rule(numbered(4), 4)) == "abc" + last


@pytest.mark.parametrize("rule", [shared_by_neighbours, in_turns, spread_evenly])
@pytest.mark.parametrize("nothing", [None, []])
def test_without_residuals_no_block_gets_one(rule: Any, nothing: Any) -> None:
    assert names(rule(nothing, 4)) == "----"
