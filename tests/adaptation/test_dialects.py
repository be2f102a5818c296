"""Adapters in every layout, from a writer of its own (tests/adaptation/dialects.py): what is read is what they add."""

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import hubgen
from hubgen.adaptation.attach import adaptable, difference_of, holders, layers_of, weight_of
from hubgen.adaptation.lora_files import AdapterError, AdapterFile, as_kohya, read_adapter
from tests.adaptation.dialects import (
    BACKBONE,
    KINDS,
    LAYOUTS,
    MMDITS,
    Known,
    Tensors,
    adapter,
    deltas_in,
    kohya,
    of_kind,
    only,
    thinned,
)

Pipes = Callable[[str], Any]
Deltas = Mapping[str, Mapping[str, torch.Tensor]]
FAMILIES = list(BACKBONE)
HEADER = "lora_adapter_metadata"


@pytest.fixture(scope="module")
def opened(official: Callable[[str], Path]) -> Pipes:
    """`opened("sd1")`: the tiny pipeline, one for all tests."""

    @functools.cache
    def pipe(family: str) -> Any:
        made = hubgen.TextToImagePipeline.from_pretrained(official(family))
        made.set_progress_bar_config(disable=True)
        return made

    return pipe


@pytest.fixture
def pipes(opened: Pipes) -> Iterator[Pipes]:
    """`pipes("sd1")`: the tiny pipeline, without adapters; whatever the test loads is taken off again."""
    used = set()

    def pipe(family: str) -> Any:
        used.add(family)
        return opened(family)

    yield pipe
    for family in used:
        opened(family).unload_lora_weights()


def models_of(pipe: Any, text: bool = True) -> dict[str, nn.Module]:
    return {name: model for name, model in pipe.adaptable_models().items() if text or not name.startswith("text")}


def deltas_of(known: Known, models: Mapping[str, nn.Module]) -> Deltas:
    """What the factors come to, by the models' own names."""
    plain = {name: dict(model.named_modules()) for name, model in models.items()}
    return {
        part: {
            name if name in plain[part] else name.removeprefix("text_model."): one.delta() for name, one in some.items()
        }
        for part, some in known.items()
    }


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-6, what: str = "") -> None:
    """To `atol` of the largest expected number."""
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-9)
    assert error < atol, f"{what}: differs by {error:.2e}"


def assert_read(found: AdapterFile, tensors: Tensors, deltas: Deltas, models: Mapping[str, nn.Module]) -> None:
    """All tensors were taken, and each layer gets exactly what the file says."""
    assert found.left == [] and sum(found.taken.values()) == len(tensors)
    assert {part: set(some) for part, some in found.layers.items()} == {
        part: set(some) for part, some in deltas.items()
    }
    for part, some in deltas.items():
        for name, expected in some.items():
            weight = models[part].get_submodule(name).weight
            assert_close(found.layers[part][name].delta(weight), expected, what=f"{part}.{name}")


@torch.no_grad()
def assert_attached(pipe: Any, deltas: Deltas, biases: Deltas = {}, atol: float = 1e-5) -> None:  # noqa: B006
    """Each layer computes with the changed weight."""
    for part, some in deltas.items():
        for name, delta in some.items():
            module = getattr(pipe, part).get_submodule(name)
            base = module.get_base_layer()
            sides = (4, base.in_features) if isinstance(base, nn.Linear) else (2, base.in_channels, 5, 5)
            x = torch.randn(*sides, generator=torch.Generator().manual_seed(0))
            weight, bias = base.weight.double() + delta, base.bias
            if bias is not None:
                bias = bias.double() + biases.get(part, {}).get(name, torch.zeros(1))
            if isinstance(base, nn.Linear):
                expected = F.linear(x.double(), weight, bias)
            else:
                expected = F.conv2d(x.double(), weight, bias, base.stride, base.padding)
            assert_close(module(x), expected, atol, f"{part}.{name}")


CASES = [(layout, family) for layout, one in LAYOUTS.items() for family in one.families]


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_every_layer_of_every_layout_is_read_as_what_it_adds(pipes: Pipes, layout: str, family: str) -> None:
    pipe, how = pipes(family), LAYOUTS[layout]
    models = models_of(pipe, how.text)
    known = only(adapter(family, models, seed=1, shared=how.shared), how.layers)
    tensors = how.write(family, known)
    assert_read(read_adapter(tensors, {}, pipe.adaptable_models()), tensors, deltas_of(known, models), models)
    some = thinned(family, known, every=8)
    pipe.load_lora_weights(how.write(family, some))
    assert_attached(pipe, deltas_of(some, models))


WITH_KERNEL = ("LoCon with a kernel between", "LoHa, Tucker", "LoKr, Tucker")
KIND_CASES = [(kind, family) for kind in KINDS for family in ("sd1", "sd3", "flux-dev")]


@pytest.mark.parametrize(
    ("kind", "family"), [case for case in KIND_CASES if case[0] not in WITH_KERNEL or case[1] == "sd1"]
)
def test_every_kind_of_adapter_is_read_as_what_it_adds(pipes: Pipes, kind: str, family: str) -> None:
    pipe = pipes(family)
    models = models_of(pipe)
    file = of_kind(KINDS[kind], family, models, every=3)
    assert_read(read_adapter(file.tensors, {}, models), file.tensors, file.deltas, models)
    pipe.load_lora_weights(file.tensors)
    assert_attached(pipe, file.deltas)


PEFT_TARGETS = ["to_q", "to_out.0", "conv1", "conv_shortcut", "net.2"]
PEFT_CONFIGS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(r=4, lora_alpha=3, alpha_pattern={"to_q": 5, "mid_block.resnets.0.conv1": 1.5}),
    "rsLoRA": LoraConfig(r=4, lora_alpha=3, use_rslora=True, rank_pattern={"to_q": 2}),
    "DoRA": LoraConfig(r=2, lora_alpha=3, use_dora=True),
    "LoHa": LoHaConfig(r=2, alpha=3, alpha_pattern={"to_q": 5}),
    "LoHa, Tucker": LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=2, alpha=3, decompose_both=True, decompose_factor=2),
    "LoKr, whole": LoKrConfig(r=8, alpha=3, rank_pattern={"to_q": 16}),
    "LoKr, Tucker": LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, decompose_factor=2),
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_a_folder_of_peft_is_what_peft_says_it_adds(
    pipes: Pipes, official: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    config = copy.deepcopy(PEFT_CONFIGS[kind])
    config.target_modules = set(PEFT_TARGETS)
    setattr(config, "init_lora_weights" if isinstance(config, LoraConfig) else "init_weights", False)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(official("sd1"), subfolder="unet")
    get_peft_model(theirs, config).save_pretrained(tmp_path)
    of_dora = getattr(config, "use_dora", False)
    deltas = {
        name: difference_of(module, "default") if of_dora else module.get_delta_weight("default").detach()
        for name, module in holders(theirs, "default")
    }
    pipe = pipes("sd1")
    read = pipe.load_lora_weights(tmp_path).layers["unet"]
    ours = layers_of(theirs, "default")
    assert set(read) == set(ours) == set(deltas) and len(deltas) > 10
    for name, expected in deltas.items():
        weight = pipe.unet.get_submodule(name).get_base_layer().weight
        assert_close(read[name].delta(weight), expected, what=name)
        assert_close(ours[name].delta(weight), expected, what=name)
    assert_attached(pipe, {"unet": deltas})


def test_alphas_in_a_header_count_by_layer(pipes: Pipes) -> None:
    models = models_of(pipes("sd1"))
    special = "text_model.encoder.layers.0.self_attn.q_proj"
    header = {
        "unet.lora_alpha": 3,
        "unet.alpha_pattern": {"attn1.to_q": 5, "to_q": 7, "^conv_in": 0.5},
        "text_encoder.lora_alpha": 2,
        "text_encoder.use_rslora": True,
        "text_encoder.alpha_pattern": {special: 11},
    }
    known = thinned("sd1", adapter("sd1", models, seed=1), every=2)
    tensors, expected = {}, {part: {} for part in known}
    for part, some in known.items():
        for name, one in some.items():
            tensors |= {f"{part}.{name}.lora_A.weight": one.down, f"{part}.{name}.lora_B.weight": one.up}
            alpha = {"attn1.to_q": 5, "attn2.to_q": 7}.get(".".join(name.split(".")[-2:]), 3)
            alpha = 0.5 if name == "conv_in" else alpha
            if part == "text_encoder":
                alpha = (11 if name == special else 2) * one.rank**0.5
            expected[part][name] = replace(one, alpha=alpha)
    assert "conv_in" in known["unet"] and special in known["text_encoder"]
    found = read_adapter(tensors, {HEADER: json.dumps(header)}, models)
    assert_read(found, tensors, deltas_of(expected, models), models)


@pytest.mark.parametrize("kind", ["LoRA", "full"])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_biases_are_added_too(pipes: Pipes, kind: str, family: str) -> None:
    pipe = pipes(family)
    models = models_of(pipe)
    file = of_kind(KINDS[kind], family, models, every=4, bias=True)
    assert file.biases
    found = read_adapter(file.tensors, {}, models)
    assert_read(found, file.tensors, file.deltas, models)
    for part, some in file.biases.items():
        for name, expected in some.items():
            assert_close(found.layers[part][name].bias, expected)
    pipe.load_lora_weights(file.tensors)
    assert_attached(pipe, file.deltas, file.biases)
    before = {part: copy.deepcopy(model.state_dict()) for part, model in models.items()}
    pipe.fuse_lora()
    for part, some in file.biases.items():
        now = models[part].state_dict()
        for name, expected in some.items():
            key = f"{name}.base_layer.bias"
            assert_close(now[key] - before[part][key], expected, 1e-5, key)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    alone = {key: value for key, value in file.tensors.items() if key.endswith(".diff_b")}
    for layers in read_adapter(alone, {}, models).layers.values():
        assert all(torch.count_nonzero(layer.product()) == 0 and layer.bias is not None for layer in layers.values())


def saved(pipe: Any, folder: Path, layout: str, **options: Any) -> Tensors:
    pipe.save_adapter(folder / f"{layout}.safetensors", layout=layout, **options)
    return load_file(folder / f"{layout}.safetensors")


@pytest.mark.parametrize(("family", "blocks"), [(one, False) for one in FAMILIES] + [(one, True) for one in MMDITS])
def test_a_file_of_kohya_comes_back_bit_for_bit(pipes: Pipes, tmp_path: Path, family: str, blocks: bool) -> None:
    pipe = pipes(family)
    known = thinned(family, adapter(family, models_of(pipe), seed=2, shared=not blocks), every=4)
    tensors = kohya(family, known, blocks)
    pipe.load_lora_weights(tensors)
    again = saved(pipe, tmp_path, "kohya")
    assert set(again) == set(tensors)
    for key, value in tensors.items():
        assert again[key].dtype == value.dtype and torch.equal(again[key], value), key
    halves = {key: value.half() for key, value in tensors.items()}
    pipe.unload_lora_weights()
    pipe.load_lora_weights(halves)
    again = saved(pipe, tmp_path, "kohya", dtype=torch.float16)
    assert all(torch.equal(again[key], value) for key, value in halves.items())


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux-dev"])
def test_magnitudes_come_back_bit_for_bit_and_biases_to_rounding(pipes: Pipes, tmp_path: Path, family: str) -> None:
    pipe = pipes(family)
    for kind, bias in (("DoRA of the outputs", False), ("LoRA", True)):
        tensors = of_kind(KINDS[kind], family, models_of(pipe), every=5, bias=bias).tensors
        assert any(key.endswith(".diff_b" if bias else ".dora_scale") for key in tensors)
        pipe.load_lora_weights(tensors)
        again = saved(pipe, tmp_path, "kohya")
        assert set(again) == set(tensors)
        for key, value in tensors.items():
            if bias and key.endswith(".diff_b"):
                assert_close(again[key], value)  # PEFT's is scaled
            else:
                assert torch.equal(again[key], value), key
        pipe.unload_lora_weights()


def test_alphas_may_be_integers_and_factors_of_few_bits(pipes: Pipes) -> None:
    pipe = pipes("sd3")
    known = few(pipe, "sd3", seed=1, pattern=r".*attn\.to_[qkv]")
    known = {"transformer": {name: replace(one, alpha=3.0) for name, one in known["transformer"].items()}}
    tensors = kohya("sd3", known, blocks=True)
    tensors = {
        key: value.int() if key.endswith("alpha") else value.to(torch.float8_e4m3fn) for key, value in tensors.items()
    }
    wide = {key: value.float() for key, value in tensors.items()}
    deltas = deltas_in(wide, "kohya", "sd3", models_of(pipe))
    pipe.load_lora_weights(tensors)
    assert_attached(pipe, deltas)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA of the inputs", "DoRA of the outputs"])
def test_a_quantised_base_takes_adapters(official: Callable[[str], Path], kind: str) -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    model = hubgen.FluxTransformer2DModel.from_pretrained(official("flux-dev"), subfolder="transformer")
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and ".attn." in name:
            new = layers.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32, quant_type="nf4")
            new.load_state_dict(old.state_dict())
            model.set_submodule(name, new.to("cpu"))  # which quantises it
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8
    pipe = hubgen.TextToImagePipeline.from_pretrained(official("flux-dev"), transformer=model)
    whole = {name: weight_of(layer) for name, layer in adaptable(model).items()}
    plain = hubgen.FluxTransformer2DModel.from_pretrained(official("flux-dev"), subfolder="transformer")
    for name, weight in whole.items():
        plain.get_submodule(name).weight.data = weight
    file = of_kind(KINDS[kind], "flux-dev", {"transformer": plain}, every=5)
    assert any(".attn." in name for name in file.deltas["transformer"])
    pipe.load_lora_weights(file.tensors)
    for name, delta in file.deltas["transformer"].items():
        module = model.get_submodule(name)
        x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0))
        expected = module.get_base_layer()(x).double() + x.double() @ delta.T
        assert_close(module(x), expected, 1e-5, name)


WRITTEN = {"kohya": FAMILIES, "comfyui": ["sdxl", "sd3", "sd3.5", "flux-dev"]}
"""Of ComfyUI's layout this test knows no names for SD 1 and 2"""


def some_of(family: str, models: Mapping[str, nn.Module]) -> Known:
    """What separate training may leave: ranks differ from layer to layer, and keys have no adapter."""
    by_rank = [adapter(family, models, seed=rank, rank=rank) for rank in (1, 2, 3)]
    found: Known = {}
    for part, layers in by_rank[0].items():
        names = [name for name in layers if not re.search(r"(to_k|add_k_proj|k_proj|\.k)$", name)]
        found[part] = {name: by_rank[number % 3][part][name] for number, name in enumerate(names)}
    return thinned(family, found, every=3)


@pytest.mark.parametrize(
    ("family", "layout"), [(one, layout) for one in FAMILIES for layout in WRITTEN if one in WRITTEN[layout]]
)
def test_layers_trained_apart_are_the_same_in_a_layout_that_has_them_in_one(
    pipes: Pipes, tmp_path: Path, family: str, layout: str
) -> None:
    pipe = pipes(family)
    models = models_of(pipe)
    known = some_of(family, models)
    pipe.load_lora_weights(LAYOUTS["diffusers"].write(family, known))
    tensors = saved(pipe, tmp_path, layout)
    pipe.unload_lora_weights()
    theirs = deltas_in(tensors, layout, family, models)
    ours = read_adapter(tensors, {}, models)
    for part, some in theirs.items():
        assert set(ours.layers[part]) == set(some)
        for name, delta in some.items():
            expected = deltas_of(known, models)[part].get(name, torch.zeros_like(delta))
            assert_close(delta, expected, what=name)
            assert_close(ours.layers[part][name].delta(), expected, what=name)


READ_BY_DIFFUSERS = r".*(attn\d\.to_\w+(\.0)?|ff\.net\.(0\.proj|2)|proj_in|proj_out|(q|k|v|out)_proj|fc[12])"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_kohya_file_of_ours_is_the_same_in_diffusers(
    pipes: Pipes, official: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    pipe = pipes(family)
    models = models_of(pipe)
    known = only(adapter(family, models, seed=3), READ_BY_DIFFUSERS)
    pipe.load_lora_weights(LAYOUTS["diffusers"].write(family, known))
    saved(pipe, tmp_path, "kohya")
    theirs = diffusers.DiffusionPipeline.from_pretrained(official(family))
    theirs.load_lora_weights(tmp_path / "kohya.safetensors")
    for part, some in deltas_of(known, models).items():
        assert set(dict(holders(getattr(theirs, part), "default_0"))) == set(some)
        for name, module in holders(getattr(theirs, part), "default_0"):
            assert_close(module.get_delta_weight("default_0"), some[name], what=name)


@pytest.mark.parametrize("blocks", [False, True], ids=["shared", "blocks"])
def test_kohyas_flux_at_its_true_widths_is_read_as_by_diffusers(blocks: bool) -> None:
    with torch.device("meta"):
        model = hubgen.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    assert model.proj_out.in_features == 3072
    known = adapter("flux-dev", {"transformer": model}, seed=4, shared=not blocks)
    tensors = kohya("flux-dev", known, blocks)
    ours = read_adapter(tensors, {}, {"transformer": model})
    assert ours.left == [] and ours.taken == {"transformer": len(tensors)}
    again, _ = as_kohya(ours.layers, {"transformer": model})
    assert all(torch.equal(again[key], value) for key, value in tensors.items()) and set(again) == set(tensors)
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    theirs = {key.removeprefix("transformer."): value for key, value in theirs.items()}
    for name, layer in ours.layers["transformer"].items():
        down, up = theirs.pop(f"{name}.lora_A.weight"), theirs.pop(f"{name}.lora_B.weight")
        if name in ("norm_out.linear", "proj_out"):
            up = up * layer.scale  # the converter forgets their alphas
        x = torch.randn(layer.down.shape[1], 2, generator=torch.Generator().manual_seed(0)).double()
        expected = up.double() @ (down.double() @ x)
        assert_close(layer.up.double() @ (layer.down.double() @ x) * layer.scale, expected, what=name)
    assert not theirs


# ---- several adapters, their weights, and others in their place ----


def few(pipe: Any, family: str, seed: int, rank: int = 4, pattern: str = r".*to_q") -> Known:
    """A small adapter of the backbone."""
    return only(adapter(family, models_of(pipe, text=False), seed=seed, rank=rank), pattern)


def scaled(deltas: Deltas, by: float) -> dict[str, Tensors]:
    return {part: {name: by * delta for name, delta in some.items()} for part, some in deltas.items()}


def added(one: Deltas, other: Deltas) -> dict[str, Tensors]:
    return {part: {name: delta + other[part][name] for name, delta in some.items()} for part, some in one.items()}


def state(pipe: Any) -> dict[str, Any]:
    """Modules, configs of adapters and weights of the models."""
    found: dict[str, Any] = {}
    for part, model in models_of(pipe).items():
        found |= {f"{part}.{name}": type(module) for name, module in model.named_modules()}
        found[f"{part}: adapters"] = set(getattr(model, "peft_config", {})), bool(model._hf_peft_config_loaded)
        found |= {f"{part}.{name}, value": value.clone() for name, value in model.state_dict().items()}
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key


def test_adapters_add_up_with_their_weights_and_can_be_deleted_one_by_one(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    before = state(pipe)
    one, two = (few(pipe, "sd1", seed, rank) for seed, rank in ((1, 4), (2, 3)))
    first, second = (deltas_of(known, models_of(pipe)) for known in (one, two))
    pipe.load_lora_weights(kohya("sd1", one), adapter_name="one")
    pipe.load_lora_weights(LAYOUTS["diffusers"].write("sd1", two), adapter_name="two")
    assert_attached(pipe, second)  # the last one that was loaded
    pipe.set_adapters(["one", "two"], [0.5, -2.0])
    assert_attached(pipe, added(scaled(first, 0.5), scaled(second, -2.0)))
    pipe.delete_adapters("two")
    assert_attached(pipe, scaled(first, 0.5))
    assert pipe.get_list_adapters() == {"unet": ["one"]}
    pipe.unload_lora_weights()
    assert_same(before, state(pipe))


def test_a_u_net_takes_a_weight_for_each_block(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    known = few(pipe, "sd1", seed=1, pattern=r".*attn1\.to_q")
    deltas = deltas_of(known, models_of(pipe))["unet"]
    pipe.load_lora_weights(kohya("sd1", known), adapter_name="one")
    up = [0.25, 0.75]
    pipe.set_adapters("one", {"unet": {"down": 0.5, "mid": 2.0, "up": {"block_1": up}}})
    weights = {"down_blocks.0.attentions.0": 0.5, "mid_block": 2.0}
    weights |= {f"up_blocks.1.attentions.{number}": weight for number, weight in enumerate(up)}
    assert len(deltas) == len(weights)
    for start, weight in weights.items():
        (name,) = (name for name in deltas if name.startswith(start))
        assert_attached(pipe, {"unet": {name: weight * deltas[name]}})


@pytest.mark.parametrize("family", ["sd1", "flux-dev"])
def test_a_hot_swapped_adapter_is_the_second_one_alone_with_the_weight_of_the_first(pipes: Pipes, family: str) -> None:
    pipe = pipes(family)
    one, two = (few(pipe, family, seed, rank, r".*(to_q|to_out\.0|conv1)") for seed, rank in ((1, 4), (2, 3)))
    second = deltas_of(two, models_of(pipe))
    pipe.load_lora_weights(LAYOUTS["diffusers with kohya's tensors"].write(family, one), adapter_name="a")
    pipe.set_adapters("a", 0.5)
    modules = {name: id(module) for name, module in pipe.components[BACKBONE[family]].named_modules()}
    pipe.load_lora_weights(LAYOUTS["OneTrainer"].write(family, two), adapter_name="a", hotswap=True)
    assert_attached(pipe, scaled(second, 0.5))
    assert modules == {name: id(module) for name, module in pipe.components[BACKBONE[family]].named_modules()}
    fewer = thinned(family, two, every=2)
    some = deltas_of(fewer, models_of(pipe))
    pipe.load_lora_weights(LAYOUTS["diffusers"].write(family, fewer), adapter_name="a", hotswap=True)
    zeros = {part: {name: torch.zeros_like(delta) for name, delta in layers.items()} for part, layers in second.items()}
    assert_attached(pipe, {part: {**zeros[part], **scaled(some, 0.5)[part]} for part in zeros})
    for part, layers in pipe.adapter_layers("a").items():
        for name, expected in {**zeros[part], **some[part]}.items():
            assert_close(layers[name].product(), expected, what=name)


def test_a_hot_swap_empties_what_the_second_has_nothing_for(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    models = models_of(pipe)
    one = thinned("sd1", adapter("sd1", models, seed=1), every=6)
    two = {"unet": thinned("sd1", adapter("sd1", models, seed=2), every=6)["unet"]}
    zeros = {name: 0 * delta for name, delta in deltas_of(one, models)["text_encoder"].items()}
    second = deltas_of(two, models)
    pipe.load_lora_weights(kohya("sd1", one), adapter_name="a")
    pipe.load_lora_weights(kohya("sd1", two), adapter_name="a", hotswap=True)
    assert_attached(pipe, {**second, "text_encoder": zeros})


def test_a_larger_rank_is_swapped_in_only_where_there_is_room(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    one, two = (few(pipe, "sd1", seed, rank, r".*(to_q|conv1)") for seed, rank in ((1, 2), (2, 4)))
    pipe.load_lora_weights(kohya("sd1", one), adapter_name="a")
    before = state(pipe)
    with pytest.raises(ValueError, match=r"unet\.\S+: got rank 4, expected at most 2.*target_rank=4"):
        pipe.load_lora_weights(kohya("sd1", two), adapter_name="a", hotswap=True)
    other = few(pipe, "sd1", 3, 2, r".*to_k")
    with pytest.raises(ValueError, match="'a' is not on this layer; expected the same layers"):
        pipe.load_lora_weights(kohya("sd1", other), adapter_name="a", hotswap=True)
    with pytest.raises(ValueError, match="got True for 'b', expected the name of an adapter; there are \\['a'\\]"):
        pipe.load_lora_weights(kohya("sd1", one), adapter_name="b", hotswap=True)
    assert_same(before, state(pipe))
    pipe.unload_lora_weights()
    pipe.enable_lora_hotswap(target_rank=5)
    pipe.load_lora_weights(kohya("sd1", one), adapter_name="a")
    assert_attached(pipe, deltas_of(one, models_of(pipe)))
    pipe.load_lora_weights(kohya("sd1", two), adapter_name="a", hotswap=True)
    assert_attached(pipe, deltas_of(two, models_of(pipe)))


def test_a_dora_is_swapped_for_another_and_refused_for_a_lora(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    models = models_of(pipe, text=False)
    first, second = (of_kind(KINDS["DoRA of the outputs"], "sd1", models, every=every) for every in (4, 8))
    pipe.load_lora_weights(first.tensors, adapter_name="a")
    pipe.load_lora_weights(second.tensors, adapter_name="a", hotswap=True)
    zeros = {name: torch.zeros_like(delta) for name, delta in first.deltas["unet"].items()}
    assert_attached(pipe, {"unet": {**zeros, **second.deltas["unet"]}})
    plain = {key: value for key, value in second.tensors.items() if not key.endswith("dora_scale")}
    with pytest.raises(ValueError, match="with DoRA's magnitudes and one without"):
        pipe.load_lora_weights(plain, adapter_name="a", hotswap=True)


def test_an_adapter_is_put_on_a_model_whose_weights_are_stored_in_float8(official: Callable[[str], Path]) -> None:
    pipe = hubgen.TextToImagePipeline.from_pretrained(official("sd1"))
    known = few(pipe, "sd1", seed=1)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe.load_lora_weights(kohya("sd1", known))
    for name, delta in deltas_of(known, models_of(pipe))["unet"].items():
        module = pipe.unet.get_submodule(name)
        assert module.get_base_layer().weight.dtype == torch.float8_e4m3fn
        x = torch.eye(module.in_features)
        assert_close(module(x) - module.get_base_layer()(x), delta.T, 1e-5, name)


def test_an_adapter_is_put_on_an_offloaded_pipeline(official: Callable[[str], Path]) -> None:
    pipe = hubgen.TextToImagePipeline.from_pretrained(official("sd1"))
    known = few(pipe, "sd1", seed=1)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    pipe.load_lora_weights(kohya("sd1", known))
    assert_attached(pipe, deltas_of(known, models_of(pipe)))


# ---- bad input ----

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
SAME_LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
NO_LORA: dict[str, None] = {"lora_down.weight": None, "lora_up.weight": None, "alpha": None}
ONES, NAN = torch.ones, float("nan")

# What the tensors of one layer, 16 x 16 of rank 4, are made: others, or none; and what is said about the layer then.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "A without B": ({"lora_up.weight": None}, "has alpha, down without up (LoRA)"),
    "B without A": ({"lora_down.weight": None}, "has alpha, up without down (LoRA)"),
    "alpha alone": ({"lora_down.weight": None, "lora_up.weight": None}, "has alpha without down, up (LoRA)"),
    "not a number": ({"lora_down.weight": torch.full((4, 16), NAN)}, "down has numbers that are not finite"),
    "infinite": ({"lora_up.weight": ONES(16, 4) / 0}, "up has numbers that are not finite"),
    "alpha 0": ({"alpha": torch.tensor(0.0)}, "has alpha 0 at rank 4, expected more than 0 and at most 10000 r"),
    "alpha below 0": ({"alpha": torch.tensor(-2.0)}, "has alpha -2 at rank 4, expected more than 0"),
    "alpha of 1e9": ({"alpha": torch.tensor(1e9)}, "has alpha 1e+09 at rank 4, expected more than 0"),
    "alpha not a number": ({"alpha": torch.tensor(NAN)}, "alpha has numbers that are not finite"),
    "two alphas": ({"alpha": ONES(2)}, "alpha has shape [2], expected numbers: 1"),
    "up too high": ({"lora_up.weight": ONES(17, 4)}, "up has shape [17, 4], expected [16, 4]"),
    "down too wide": ({"lora_down.weight": ONES(4, 9)}, "down has shape [4, 9], expected [4, 16]"),
    "two ranks": ({"lora_down.weight": ONES(3, 16)}, "up has shape [16, 4], expected [16, 3]"),
    "rank 0": ({"lora_down.weight": ONES(0, 16), "lora_up.weight": ONES(16, 0)}, "down has shape [0, 16], expected"),
    "a rank of 99": (
        {"lora_down.weight": ONES(99, 16), "lora_up.weight": ONES(16, 99)},
        "down has rank 99, expected at most 32",
    ),
    "a vector": ({"lora_down.weight": ONES(16)}, "down has shape [16], expected a matrix"),
    "integers": ({"lora_up.weight": ONES(16, 4).int()}, "up has torch.int32, expected floating-point numbers"),
    "a kernel for a linear layer": ({"lora_mid.weight": ONES(4, 4, 3, 3)}, "middle has shape [4, 4, 3, 3], expected"),
    "two of a kind": ({"lora_A.weight": ONES(4, 16)}, "there is another tensor of its kind for the layer"),
    "two kinds": ({"diff": ONES(16, 16)}, "has diff beside down, up (LoRA)"),
    "half a LoKr": (
        {**NO_LORA, "lokr_w1": ONES(2, 2), "lokr_w2_a": ONES(8, 2)},
        "has lokr_w1, lokr_w2_a without lokr_w2_b (LoKr)",
    ),
    "LoKr that divides nothing": (
        {**NO_LORA, "lokr_w1": ONES(3, 2), "lokr_w2": ONES(8, 8)},
        "lokr_w1 is [3, 2], expected what divides the layer's [16, 16]",
    ),
    "LoHa of other widths": (
        {**NO_LORA, **{f"hada_w{n}_{side}": ONES(2, 2) for n in (1, 2) for side in "ab"}},
        "hada_w1_a has shape [2, 2], expected [16, 2]",
    ),
    "magnitudes of nothing": ({"dora_scale": ONES(7, 1)}, "dora_scale has shape [7, 1], expected [16, 1] or [1, 16]"),
    "a bias of a layer without": ({"diff_b": ONES(16)}, "has a bias, expected none: the layer has none"),
}
BAD_HEADERS = {
    "damaged": ('{"unet.r": 4', "its header's lora_adapter_metadata is '{\"unet.r\": 4', expected a JSON object"),
    "a list": ("[]", "its header's lora_adapter_metadata is '[]', expected a JSON object"),
    "a regular expression": (
        json.dumps({"unet.alpha_pattern": {"(a+)+$": 4}}),
        "its header's unet.alpha_pattern has '(a+)+$', expected the name of a layer",
    ),
    "alpha as text": (json.dumps({"lora_alpha": "4"}), "its header's lora_alpha is '4', expected a number"),
    "alpha not a number": ('{"unet.lora_alpha": NaN}', "its header's unet.lora_alpha is nan, expected a number"),
    "alpha 0": ('{"unet.lora_alpha": 0}', "has alpha 0 at rank 4, expected more than 0"),
    "a pattern with text": (
        json.dumps({"unet.alpha_pattern": {"to_q": "much"}}),
        "its header's unet.alpha_pattern of to_q is 'much', expected a number",
    ),
}


def test_a_damaged_file_is_refused_in_words_and_nothing_is_attached(pipes: Pipes, tmp_path: Path) -> None:
    pipe = pipes("sd1")
    known = few(pipe, "sd1", seed=1)
    good, headless = kohya("sd1", known), LAYOUTS["diffusers"].write("sd1", known)
    pipe.load_lora_weights(good, adapter_name="good")
    before = state(pipe)
    file = tmp_path / "bad.safetensors"

    def assert_refused(tensors: Tensors, message: str, header: dict[str, str] | None = None, **options: Any) -> None:
        save_file(tensors, file, header)
        with pytest.raises(AdapterError) as caught:
            pipe.load_lora_weights(file, adapter_name="bad", **options)
        assert str(caught.value).startswith(f"{file}: ") and message in str(caught.value)

    for changes, message in BAD.values():
        tensors = good | {f"{LAYER}.{ending}": value for ending, value in changes.items()}
        tensors = {key: value for key, value in tensors.items() if value is not None}
        for strict in (True, False):
            assert_refused(tensors, f"    {LAYER}", strict=strict)
            assert_refused(tensors, f": {message}", strict=strict)
    assert_refused({}, "holds no tensors, expected those of an adapter")
    twice = "for mid_block.attentions.0.transformer_blocks.0.attn1.to_q, which another name in the file is for as well"
    assert_refused({**good, f"{SAME_LAYER}.diff": ONES(16, 16)}, twice)
    assert_refused({**good, "lora_unet_input_blocks_99.alpha": ONES(1)}, "s_99.alpha: for no layer of these models")
    assert_refused({**good, f"{LAYER}.oft_blocks": ONES(1)}, f"{LAYER}.oft_blocks: of no kind that is known")
    for text, message in BAD_HEADERS.values():
        assert_refused(headless, message, {HEADER: text})
    assert_same(before, state(pipe))


def test_what_belongs_nowhere_is_listed_if_the_file_may_have_it(pipes: Pipes) -> None:
    pipe = pipes("sd1")
    known = few(pipe, "sd1", seed=1)
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha"
    tensors = {**kohya("sd1", known), t5: ONES(1), f"{LAYER}.oft_blocks": ONES(1)}
    found = pipe.load_lora_weights(tensors, strict=False)
    assert found.left == [f"{t5}: for no layer of these models", f"{LAYER}.oft_blocks: of no kind that is known"]
    assert str(found).startswith(f"{len(tensors) - 2} tensors: ") and "; 2 left:" in str(found)
    assert_attached(pipe, deltas_of(known, models_of(pipe)))


OTHERS = [("flux-dev", "sd1"), ("sd1", "flux-dev"), ("sd3", "sdxl"), ("sd1", "sdxl"), ("sdxl", "sd1")]


@pytest.mark.parametrize(("file", "family"), OTHERS)
def test_a_file_for_another_family_is_refused(pipes: Pipes, file: str, family: str) -> None:
    known = adapter(file, models_of(pipes(file), text=False), seed=1, shared=True)
    before = state(pipes(family))
    for strict in (True, False):
        with pytest.raises(AdapterError, match=r"the state dict: (is for other models|\d+ of its \d+ tensors)"):
            pipes(family).load_lora_weights(kohya(file, known), strict=strict)
    assert_same(before, state(pipes(family)))


def test_what_is_no_file_of_one_adapter_is_refused_by_name(pipes: Pipes, tmp_path: Path) -> None:
    pipe = pipes("sd1")
    tensors = kohya("sd1", few(pipe, "sd1", seed=1))
    before = state(pipe)
    (tmp_path / "empty.safetensors").touch()
    torch.save(tensors, tmp_path / "pickled.safetensors")
    torch.save(tensors, tmp_path / "pickled.bin")
    save_file(tensors, tmp_path / "whole.safetensors")
    cut = (tmp_path / "whole.safetensors").read_bytes()[:-9]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    (tmp_path / "two").mkdir()
    for name in ("one", "two"):
        save_file(tensors, tmp_path / "two" / f"{name}.safetensors")
    (tmp_path / "none").mkdir()
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    messages = {
        "empty.safetensors": "empty.safetensors: not a safetensors file: it is 0 bytes long",
        "pickled.safetensors": "pickled.safetensors: a pickled file",
        "pickled.bin": "pickled.bin: a pickled file",
        "cut.safetensors": "cut.safetensors: the file is truncated",
        "two": r"two: got one.safetensors, two.safetensors, expected `weight_name` to say which",
        "none": r"none: got no weights, expected one safetensors file",
        "peft": r"adapter_model.safetensors: its header's lora_adapter_metadata is '\{', expected a JSON object",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(tmp_path / name)
    with pytest.raises(AdapterError, match="two: has no three.safetensors; it has one.safetensors, two.safetensors"):
        pipe.load_lora_weights(tmp_path / "two", weight_name="three.safetensors")
    with pytest.raises(OSError, match="neither a folder nor the name of a repository"):
        pipe.load_lora_weights(tmp_path / "nowhere")
    assert_same(before, state(pipe))
    pipe.load_lora_weights(tmp_path / "two", weight_name="two.safetensors", adapter_name="a")
    before = state(pipe)
    with pytest.raises(
        ValueError, match=r"`adapter_name`: got 'a', expected a name that is not taken; taken are \['a'\]"
    ):
        pipe.load_lora_weights(tensors, adapter_name="a")
    with pytest.raises(ValueError, match="`adapter_name`: got 'a.b', expected a name without dots"):
        pipe.load_lora_weights(tensors, adapter_name="a.b")
    assert_same(before, state(pipe))


def test_what_fails_on_the_way_leaves_the_models_as_they_were(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipes("sd1")
    known = thinned("sd1", adapter("sd1", models_of(pipe), seed=1), every=8)
    before, calls = state(pipe), []

    def fails_late(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == len(known["unet"]) + 2:
            raise MemoryError

    monkeypatch.setattr("hubgen.adaptation.attach.fill", fails_late)
    with pytest.raises(MemoryError):
        pipe.load_lora_weights(kohya("sd1", known))
    assert_same(before, state(pipe))
