"""What diffusers offers for a model works on every model of hubgen, whether or not it works on diffusers' own.

Each feature is one function of a library's name and a network: it builds that library's model in miniature, uses the
feature and asserts that it did what it is for. hubgen has to pass; how diffusers' class fares is recorded beside it,
for the README's table.
"""

import copy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from peft import LoraConfig
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.models import DENOISERS, LIBRARIES, NETWORKS, Network
from tests.parity import first_output, randomize_

TESTS = Path(__file__).parent.parent
Feature = Callable[[str, Network, Path], None]


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's output; its inputs stay as they are."""
    return first_output(model(**copy.deepcopy(inputs)))


@torch.no_grad()
def predicted(model: nn.Module, network: Network) -> torch.Tensor:
    return run(model, network.inputs())


def assert_same(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4) -> None:
    scale = expected.float().std().item()
    assert scale > 1e-4, f"the output (std {scale}) is too trivial to compare"
    error = (actual.float() - expected.float()).abs().max().item()
    assert error <= rtol * scale, f"outputs differ by {error / scale:.1e} of their standard deviation"


def assert_differ(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() > 1e-4 * expected.std()


def gradient_checkpointing(library: str, network: Network, folder: Path) -> None:
    """Computing activations again in the backward pass leaves the output and every gradient as they were."""
    model = network.build(library).train()
    gradients: list[dict[str, torch.Tensor]] = []
    outputs = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        torch.manual_seed(0)  # for what is dropped in training
        output = run(model, network.inputs())
        output.square().mean().backward()
        outputs.append(output.detach())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert_same(outputs[1], outputs[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def attention_processors(library: str, network: Network, folder: Path) -> None:
    """A processor set by name is called in the place of the model's own."""
    model = network.build(library)
    expected = predicted(model, network)
    own = model.attn_processors
    assert own, "the model names no attention processor"
    called = []

    def counted(name: str, processor: Any) -> Any:
        class Counting(type(processor)):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                called.append(name)
                return super().__call__(*args, **kwargs)

        return Counting()

    model.set_attn_processor({name: counted(name, processor) for name, processor in own.items()})
    assert_same(predicted(model, network), expected)
    assert set(called) == set(own)


def attention_backend(library: str, network: Network, folder: Path) -> None:
    """Another kernel is chosen by name and computes the same."""
    model = network.build(library)
    expected = predicted(model, network)
    model.set_attention_backend("_native_math")

    class Watched(TorchFunctionMode):
        fused: ClassVar[list[bool]] = []

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.nn.functional.scaled_dot_product_attention:
                self.fused.append(torch.backends.cuda.flash_sdp_enabled())
            return function(*args, **(kwargs or {}))

    with Watched():
        assert_same(predicted(model, network), expected)
    assert Watched.fused and not any(Watched.fused), "an attention did not take the plain kernel"


def adapters(library: str, network: Network, folder: Path) -> None:
    """Several LoRA adapters load by name, are weighted, switched off, fused and unfused, and saved again."""
    model = network.build(library)
    expected = predicted(model, network)
    for seed, name in enumerate(("one", "two"), start=1):
        donor = network.build(library)
        donor.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), name)
        before = {key: value.clone() for key, value in donor.state_dict().items() if "lora" not in key}
        randomize_(donor, seed)
        donor.load_state_dict(before, strict=False)
        donor.save_lora_adapter(folder / name, adapter_name=name)
        model.load_lora_adapter(
            folder / name, prefix=None, adapter_name=name, weight_name="pytorch_lora_weights.safetensors"
        )
    alone = {}
    for name in ("one", "two"):
        model.set_adapters([name], [1.0])
        alone[name] = predicted(model, network)
        assert_differ(alone[name], expected)
    assert_differ(alone["one"], alone["two"])
    model.set_adapters(["one", "two"], [0.5, 0.25])
    both = predicted(model, network)
    model.fuse_lora(adapter_names=["one", "two"])
    assert_same(predicted(model, network), both, rtol=1e-3)
    model.unfuse_lora()
    assert_same(predicted(model, network), both, rtol=1e-3)
    model.disable_lora()
    assert_same(predicted(model, network), expected, rtol=1e-3)
    model.enable_lora()
    model.delete_adapters(["one", "two"])
    assert_same(predicted(model, network), expected, rtol=1e-3)


def compiled_blocks(library: str, network: Network, folder: Path) -> None:
    """Regional compilation finds the repeated blocks, compiles without a graph break and computes the same."""
    model = network.build(library)
    expected = predicted(model, network)
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert_same(predicted(model, network), expected)
    torch.compiler.reset()


def device_map(library: str, network: Network, folder: Path) -> None:
    """Weights that do not all fit are spread by `device_map`, whole blocks at a time, and the rest stays on disk."""
    model = network.build(library)
    expected = predicted(model, network)
    model.save_pretrained(folder / "model")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    spread = type(model).from_pretrained(
        folder / "model",
        device_map="auto",
        max_memory={"cpu": int(0.75 * size)},
        offload_folder=str(folder / "offload"),
        offload_state_dict=True,
    )
    assert "disk" in spread.hf_device_map.values(), "everything fitted, so nothing was tried"
    assert_same(predicted(spread, network), expected)


def layerwise_casting(library: str, network: Network, folder: Path) -> None:
    """Weights are kept in 8 bits and computed with in 32; the output stays near."""
    model = network.build(library)
    expected = predicted(model, network)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = {parameter.dtype for name, parameter in model.named_parameters()}
    assert torch.float8_e4m3fn in kept
    actual = predicted(model, network)
    assert torch.isfinite(actual).all()
    assert (actual - expected).std() < 0.5 * expected.std()


def group_offload(library: str, network: Network, folder: Path) -> None:
    """Groups of blocks are brought to the device when they are computed, by blocks and by leaves."""
    for kind in ("block_level", "leaf_level"):
        model = network.build(library)
        expected = predicted(model, network)
        model.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1,
            offload_to_disk_path=str(folder / kind),
        )
        assert_same(predicted(model, network), expected)


def step_cache(library: str, network: Network, folder: Path) -> None:
    """With a step cache the second of two near steps computes less; without, or with another prompt, it does not."""
    model = network.build(library)
    inputs = network.inputs()
    expected = predicted(model, network)
    skipped: list[int] = []
    if hasattr(model, "transformer_blocks"):
        model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        last = list(model.transformer_blocks)[-1]
        layer = next(module for module in last.modules() if isinstance(module, nn.Linear))
    else:
        model.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_block_identifiers=("attentions", "attn1"),
                spatial_attention_timestep_skip_range=(-1, 1001),
                current_timestep_callback=lambda: 500,
            )
        )
        layer = next(module for name, module in model.named_modules() if name.endswith("to_q"))
    layer.register_forward_hook(lambda *_: skipped.append(1))
    with torch.no_grad(), model.cache_context("cond"):
        assert_same(run(model, inputs), expected)
        first = len(skipped)
        run(model, inputs)
    assert first >= 1 and len(skipped) == first, "the second step was computed in full"
    model.disable_cache()
    assert_same(predicted(model, network), expected)


def sharded(library: str, network: Network, folder: Path) -> None:
    """Saved in many files with an index, and loaded from them."""
    model = network.build(library)
    model.save_pretrained(folder / "model", max_shard_size="2KB")
    assert len(list((folder / "model").glob("*.safetensors"))) > 1
    assert_same(predicted(type(model).from_pretrained(folder / "model"), network), predicted(model, network))


def variant(library: str, network: Network, folder: Path) -> None:
    """`variant="fp16"` and `torch_dtype`: half-precision files beside the others, loaded in the dtype asked for."""
    model = network.build(library)
    model.save_pretrained(folder / "model")
    copy.deepcopy(model).half().save_pretrained(folder / "model", variant="fp16")
    with safe_open(folder / "model" / "diffusion_pytorch_model.fp16.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}
    half = type(model).from_pretrained(folder / "model", variant="fp16", torch_dtype=torch.float16)
    assert half.dtype == torch.float16
    back = type(model).from_pretrained(folder / "model", variant="fp16", torch_dtype=torch.float32)
    rounded = copy.deepcopy(model).half().float()
    assert back.dtype == torch.float32
    assert_same(predicted(back, network), predicted(rounded, network), rtol=0.01)


FEATURES: dict[str, Feature] = {
    "gradient checkpointing": gradient_checkpointing,
    "attention processors": attention_processors,
    "attention backends": attention_backend,
    "LoRA adapters": adapters,
    "compile_repeated_blocks": compiled_blocks,
    "device_map": device_map,
    "layerwise casting": layerwise_casting,
    "group offload": group_offload,
    "step cache": step_cache,
    "sharded files": sharded,
    "variant, torch_dtype": variant,
}
CASES = [(name, feature) for name in NETWORKS for feature in FEATURES if name in DENOISERS or feature != "step cache"]


@pytest.mark.parametrize(("name", "feature"), CASES, ids=[f"{name}-{feature}" for name, feature in CASES])
def test_the_feature_works(name: str, feature: str, tmp_path: Path, shows: Callable[..., None]) -> None:
    network, function = NETWORKS[name], FEATURES[feature]
    if not all(hasattr(library, network.class_name) for library in LIBRARIES.values()):
        pytest.fail(f"{network.class_name} is not in both libraries")
    reason = None
    try:
        function("diffusers", network, tmp_path / "theirs")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(where).is_relative_to(TESTS) and not isinstance(error, AssertionError):
            raise  # the test itself is broken: this says nothing about diffusers
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    shows(name, feature, reason is None, reason)
    function("hubgen", network, tmp_path / "ours")


# ---- what every model keeps to, beside diffusers' class ----


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_config_and_names_are_those_of_diffusers(name: str) -> None:
    ours, theirs = (NETWORKS[name].build(library) for library in LIBRARIES)
    # Arguments that hubgen's class does not have are those that choose variants which it does not build.
    assert {key: theirs.config[key] for key in ours.config if not key.startswith("_")} == {
        key: value for key, value in ours.config.items() if not key.startswith("_")
    }
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert list(ours.attn_processors) == list(getattr(theirs, "attn_processors", ours.attn_processors))


@pytest.mark.parametrize("saver", LIBRARIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_saved_by_one_library_a_model_loads_in_the_other(name: str, saver: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    (loader,) = LIBRARIES.keys() - {saver}
    model = network.build(saver)
    model.save_pretrained(tmp_path)
    loaded = getattr(LIBRARIES[loader], network.class_name).from_pretrained(tmp_path)
    assert_same(predicted(loaded, network), predicted(model, network))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_is_an_object_or_a_tuple(name: str) -> None:
    network = NETWORKS[name]
    model = network.build("hubgen")
    assert torch.equal(model(**network.inputs()).sample, model(**network.inputs(), return_dict=False)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", DENOISERS)
def test_one_timestep_serves_the_whole_batch(name: str) -> None:
    network, (model, inputs) = NETWORKS[name], (NETWORKS[name].build("hubgen"), NETWORKS[name].inputs())
    one = inputs[network.steps][:1]
    each = run(model, {**inputs, network.steps: one.expand(2)})
    assert_same(run(model, {**inputs, network.steps: one}), each, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", DENOISERS)
def test_the_whole_forward_compiles_without_a_graph_break(name: str) -> None:
    network = NETWORKS[name]
    model = network.build("hubgen")
    expected = predicted(model, network)
    torch.compiler.reset()
    assert_same(run(torch.compile(model, fullgraph=True, backend="eager"), network.inputs()), expected)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_fused_projections_compute_the_same(name: str) -> None:
    network = NETWORKS[name]
    model = network.build("hubgen")
    expected = predicted(model, network)
    model.fuse_qkv_projections()
    assert any(getattr(module, "fused_projections", False) for module in model.modules())
    assert_same(predicted(model, network), expected)
    model.unfuse_qkv_projections()
    assert torch.equal(predicted(model, network), expected)
