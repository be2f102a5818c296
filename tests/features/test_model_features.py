"""What diffusers offers for a model works on every model of hubgen, whether or not it works on diffusers' own.

Each feature is one function of a library's name and a network: it builds that library's model in miniature, uses the
feature and asserts that it did what it is for. hubgen has to pass; how diffusers' class fares is recorded beside it,
for the README's table. What a class of diffusers lacks is one of `MISSING`; whatever else it raises fails the test.
"""

import copy
import re
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

from tests.compatibility import REPOSITORIES
from tests.models import DENOISERS, NETWORKS, Network
from tests.parity import first_output, randomize_

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
    assert torch.equal(outputs[1], outputs[0])
    trained = {n for n, p in model.named_parameters() if p.requires_grad and not re.search(network.unread, n)}
    assert gradients[0].keys() == gradients[1].keys() == trained
    torch.testing.assert_close(gradients[1], gradients[0])


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
    if not Watched.fused or any(Watched.fused):
        raise BackendIgnored("an attention did not take the plain kernel")


class BackendIgnored(AssertionError):
    """A model takes the name of a backend and goes on as before."""


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
MISSING: dict[str, tuple[type[Exception], str]] = {
    "gradient checkpointing": (ValueError, "does not support gradient checkpointing"),
    "attention processors": (AttributeError, "has no attribute 'attn_processors'"),
    "attention backends": (BackendIgnored, "did not take the plain kernel"),
    "LoRA adapters": (AttributeError, "has no attribute 'add_adapter'"),
    "compile_repeated_blocks": (ValueError, "`_repeated_blocks` attribute is empty"),
    "device_map": (ValueError, "does not support `device_map='auto'`"),
    "group offload": (ValueError, "does not support group offloading"),
    "step cache": (AttributeError, "has no attribute 'enable_cache'"),
}
"""How a class of diffusers fails that is without a feature."""
BROKEN: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("ControlNet Union, SDXL", "layerwise casting"): (RuntimeError, "must have the same dtype"),
    ("ControlNet Union, SDXL", "group offload"): (AssertionError, "outputs differ by"),
}
"""How one fails that has the feature: the union's attention reads the weights of a layer that is never called."""
CASES = [
    (name, feature)
    for name in NETWORKS
    for feature in FEATURES
    if (name in DENOISERS or feature != "step cache")
    # Its residual blocks come in more shapes than torch recompiles one piece of code for.
    and (name, feature) != ("guided diffusion", "compile_repeated_blocks")
]


@pytest.mark.parametrize(("name", "feature"), CASES, ids=[f"{name}-{feature}" for name, feature in CASES])
def test_the_feature_works(name: str, feature: str, tmp_path: Path, shows: Callable[..., None]) -> None:
    network, function = NETWORKS[name], FEATURES[feature]
    reason = None
    try:
        function("diffusers", network, tmp_path / "theirs")
    except Exception as problem:
        kind, message = BROKEN.get((name, feature)) or MISSING.get(feature, ((), ""))
        if not isinstance(problem, kind) or message not in str(problem):
            raise
        reason = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"[:200]
    if name in REPOSITORIES:
        shows(name, feature, reason is None, reason)
    function("hubgen", network, tmp_path / "ours")


def test_what_is_not_a_missing_feature_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(library: str, network: Network, folder: Path) -> None:
        raise ImportError("a name that the harness does not find")

    monkeypatch.setitem(FEATURES, "step cache", broken)
    with pytest.raises(ImportError):
        test_the_feature_works("SD 1.x", "step cache", tmp_path, lambda *_: pytest.fail("something was shown"))
