"""Every model is the one of diffusers by the same name: in names, files, outputs and gradients; and works as models do.

What only some variants of a config have is tested beside their classes, in tests/backbones and tests/autoencoders.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.models import DENOISERS, LIBRARIES, NETWORKS, Network
from tests.parity import assert_parity, first_output, randomize_

BY_FAMILY = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
BY_DENOISER = pytest.mark.parametrize("network", DENOISERS.values(), ids=DENOISERS)
NUMBERS = ("UNet2DConditionModel", "UNet2DModel")
"""Classes that take the timestep as a plain number, too."""
REQUIRED = {"UNet2DModel": {"sample_size": 32}, "ControlNetUnionModel": {"addition_time_embed_dim": 256}}
"""What the class of diffusers cannot be made without, in spite of its defaults."""
ADAPTER_SCALE = {
    "UNet2DConditionModel": "cross_attention_kwargs",
    "DiTTransformer2DModel": "cross_attention_kwargs",
    "SD3Transformer2DModel": "joint_attention_kwargs",
    "FluxTransformer2DModel": "joint_attention_kwargs",
}
"""The keyword of the forward that carries an adapter's scale."""


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return first_output(model(**inputs))


def shapes(output: Any) -> dict[str, Any]:
    """Of every tensor of an output, by its field."""
    return {
        name: value.shape if isinstance(value, torch.Tensor) else [tensor.shape for tensor in value]
        for name, value in output.items()
    }


def processors(model: nn.Module) -> list[str]:
    return [f"{name}.processor" for name, module in model.named_modules() if hasattr(module, "set_processor")]


@BY_FAMILY
def test_config_parameters_and_processors_are_named_as_in_diffusers(network: Network) -> None:
    ours, theirs = network.pair()
    assert dict(ours.config) == dict(theirs.config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    # IP-Adapter files number their weights by this order.
    assert list(ours.attn_processors) == list(getattr(theirs, "attn_processors", processors(theirs)))


@pytest.mark.parametrize("name", sorted({network.class_name for network in NETWORKS.values()}))
def test_the_default_config_is_that_of_diffusers(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = (getattr(library, name) for library in LIBRARIES.values())
        ours, theirs = (cls(**REQUIRED.get(name, {})) for cls in (ours, theirs))
    assert dict(ours.config) == dict(theirs.config)


@BY_FAMILY
def test_output_and_gradients_agree_with_diffusers(network: Network) -> None:
    ours, theirs = network.pair()
    assert_parity(ours, theirs, network.inputs())
    for model in (ours, theirs):
        run(model, network.inputs()).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@BY_FAMILY
def test_a_saved_model_loads_in_diffusers_and_the_other_way_round(network: Network, tmp_path: Path) -> None:
    ours, theirs = network.pair()
    for model, other in ((ours, theirs), (theirs, ours)):
        folder = tmp_path / type(model).__module__
        model.save_pretrained(folder)
        assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
        assert_parity(type(other).from_pretrained(folder), model, network.inputs())


@pytest.mark.parametrize("name", [name for name in DENOISERS if name != "NCSN++"])  # its picture's way is no residual
def test_a_fresh_model_predicts_exactly_zero_and_learns(name: str) -> None:
    model = DENOISERS[name].fresh().eval()
    out = run(model, DENOISERS[name].inputs())
    assert torch.count_nonzero(out) == 0
    (out - 1).square().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@BY_DENOISER
@torch.no_grad()
def test_one_timestep_serves_the_whole_batch(network: Network) -> None:
    model, inputs = network.build(), network.inputs()
    value = inputs["timestep"][0].item()
    several = {"timestep", "guidance"} & inputs.keys()
    inputs |= {name: inputs[name][:1].expand(2) for name in several}
    expected = run(model, inputs)
    forms: list[Any] = [{name: inputs[name][:1] for name in several}]
    if network.class_name in NUMBERS:
        forms += [{"timestep": form} for form in (value, torch.tensor(value))]
    for form in forms:
        torch.testing.assert_close(run(model, {**inputs, **form}), expected)


@BY_FAMILY
@torch.no_grad()
def test_the_output_is_an_object_or_a_tuple(network: Network) -> None:
    (ours, theirs), inputs = network.pair(), network.inputs()
    output, expected = ours(**inputs), theirs(**inputs)
    assert shapes(output) == shapes(expected)
    assert torch.equal(first_output(ours(**inputs, return_dict=False)), first_output(output))


@BY_DENOISER
@torch.no_grad()
def test_the_forward_compiles_without_a_graph_break(network: Network) -> None:
    model, inputs = network.build(), network.inputs()
    torch.compiler.reset()
    torch.testing.assert_close(run(torch.compile(model, backend="eager", fullgraph=True), inputs), run(model, inputs))


@BY_DENOISER
@torch.no_grad()
def test_bfloat16_stays_near_the_float32_output(network: Network) -> None:
    def half(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: half(inner) for key, inner in value.items()}
        return value.bfloat16() if value.is_floating_point() else value

    model, inputs = network.build(), network.inputs()
    expected = run(model, inputs)
    kept = {name: inputs[name] for name in ("timestep", "img_ids", "txt_ids") if name in inputs}
    out = run(model.to(torch.bfloat16), {**half(inputs), **kept})
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).std() < 0.2 * expected.std()


@BY_DENOISER
@torch.no_grad()
def test_stored_in_bfloat16_layers_compute_in_float32_and_norms_stay(network: Network) -> None:
    model, inputs = network.build(), network.inputs()
    expected = run(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert torch.bfloat16 in stored.values()
    assert {dtype for name, dtype in stored.items() if "norm" in name} == {torch.float32}
    out = run(model, inputs)
    assert out.dtype == torch.float32
    assert (out - expected).std() < 0.05 * expected.std()


@pytest.mark.parametrize("name", [name for name, network in DENOISERS.items() if network.class_name in ADAPTER_SCALE])
@torch.no_grad()
def test_an_adapter_loads_in_diffusers_and_acts_by_the_scale_of_the_call(name: str, tmp_path: Path) -> None:
    network = DENOISERS[name]
    (ours, theirs), inputs = network.pair(), network.inputs()
    plain = run(ours, inputs)
    ours.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    torch.testing.assert_close(run(ours, inputs), plain, rtol=1e-5, atol=1e-5)  # fresh, it changes nothing
    layers = [module for module in ours.modules() if hasattr(module, "lora_A")]
    assert len(layers) >= 3 * len(ours.attn_processors)  # FLUX's single blocks have no way out of their own
    for layer in layers:
        randomize_(layer.lora_A)
        randomize_(layer.lora_B)

    def scaled(scale: float) -> dict[str, Any]:
        return {**inputs, ADAPTER_SCALE[network.class_name]: {"scale": scale}}

    full = run(ours, inputs)
    half = run(ours, scaled(0.5))
    torch.testing.assert_close(run(ours, scaled(0.0)), plain)
    torch.testing.assert_close(run(ours, inputs), full)
    assert min((a - b).abs().max() for a, b in ((full, plain), (half, plain), (full, half))) > 1e-2
    if hasattr(theirs, "load_lora_adapter"):
        ours.save_lora_adapter(tmp_path)
        theirs.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert_parity(ours, theirs, inputs)
        assert_parity(ours, theirs, scaled(0.5))
    ours.delete_adapters("default")
    torch.testing.assert_close(run(ours, inputs), plain)


@BY_FAMILY
@torch.no_grad()
def test_fusing_and_unfusing_the_projections_leaves_the_output_unchanged(network: Network) -> None:
    model, inputs = network.build(), network.inputs()
    plain = run(model, inputs)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, inputs), plain, rtol=1e-4, atol=1e-4)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), plain)


@BY_DENOISER
@torch.no_grad()
def test_a_keyword_of_the_call_reaches_every_processor_but_those_of_a_second_attention(network: Network) -> None:
    if network.class_name not in ADAPTER_SCALE:
        pytest.skip("its forward has no keywords for processors")
    model, inputs, notes = network.build(), network.inputs(), []
    expected = run(model, inputs)

    def noting(processor: Any) -> Any:
        class Noting(type(processor)):  # type: ignore[misc]
            def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, note=None, **rest):
                notes.append(note)
                return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **rest)

        return Noting()

    model.set_attn_processor({name: noting(processor) for name, processor in model.attn_processors.items()})
    keyword = ADAPTER_SCALE[network.class_name]
    assert torch.equal(run(model, {**inputs, keyword: {"note": "seen"}}), expected)
    second = sum(name.endswith("attn2.processor") for name in model.attn_processors if network.class_name[:2] == "SD")
    assert notes.count("seen") == len(model.attn_processors) - second and len(notes) == len(model.attn_processors)
