"""An optimized model computes what it did, whatever happens to it in between."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hubgen
from hubgen.acceleration import kernels, winograd
from hubgen.acceleration import layers as fast_layers
from hubgen.acceleration import optimize as optimizing
from hubgen.acceleration.layers import FastConv2d, FastLinear, Swapped
from hubgen.acceleration.optimize import optimized, prepared
from hubgen.acceleration.upsampling import convolve_doubled, phase_kernels
from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.backbones.dit import DiTTransformer2DModel
from hubgen.backbones.flux import FluxTransformer2DModel
from hubgen.backbones.sd3 import SD3Transformer2DModel
from hubgen.backbones.unet import UNet2DModel
from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.conditioning.inputs import BackboneCall
from hubgen.conditioning.text import TextEmbeddings
from hubgen.layers.resnet import Upsample2D
from tests import tiny
from tests.parity import first_output, randomize_

packed_kernels = pytest.mark.skipif(not kernels.available(torch.float32), reason="this torch has no packed kernels")


@pytest.fixture(autouse=True)
def everything_is_worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers take the fast paths, too."""
    tiny_limits = {"SMALL": 0, "WINOGRAD_PIXELS": 60, "WINOGRAD_CHANNELS": 4, "DOUBLED_PIXELS": 0}
    for name, value in tiny_limits.items():
        monkeypatch.setattr(fast_layers, name, value)
    for name in ("WORTHWHILE", "WORTHWHILE_BFLOAT16"):
        monkeypatch.setattr(optimizing, name, 0.0)


def unet_inputs(size: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, *size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, tiny.TEXT_WIDTH),
    }


def mmdit_inputs(size: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, *size),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 5, tiny.TEXT_WIDTH),
        "pooled_projections": torch.randn(batch, tiny.TEXT_WIDTH),
    }


def flux_inputs(size: tuple[int, int], batch: int) -> dict[str, Any]:
    tokens = size[0] * size[1] // 4
    return {
        "hidden_states": torch.randn(batch, tokens, 16),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
        "pooled_projections": torch.randn(batch, 16),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.randn(tokens, 3).round(),
        "txt_ids": torch.zeros(5, 3),
    }


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        norm_type="ada_norm_zero",
    )


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def pixel_unet() -> nn.Module:
    return UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[tuple[int, int], int], dict[str, Any]], tuple[int, int]]] = {
    "unet-condition": (tiny.unet, unet_inputs, (9, 13)),
    "unet": (pixel_unet, lambda s, b: {"sample": torch.randn(b, 3, *s), "timestep": 10}, (10, 14)),
    "mmdit": (tiny.transformer, mmdit_inputs, (6, 10)),
    "flux": (flux, flux_inputs, (6, 10)),
    "dit": (
        dit,
        lambda s, b: {
            "hidden_states": torch.randn(b, 4, 8, 8),
            "timestep": torch.full((b,), 7),
            "class_labels": torch.arange(b),
        },
        (8, 8),
    ),
    "autoencoder": (tiny.vae, lambda s, b: {"sample": torch.randn(b, 3, *s)}, (18, 22)),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return first_output(model(**inputs))


def model_and_inputs(name: str = "unet-condition", batch: int = 2) -> tuple[Any, dict[str, Any]]:
    build, inputs, size = CASES[name]
    return randomize_(build()).eval(), inputs(size, batch)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_fast_equals_plain_at_the_first_and_every_later_call(name: str, batch: int, packing: bool) -> None:
    model, inputs = model_and_inputs(name, batch)
    plain = run(model, inputs)
    hubgen.optimize(model, packing=5.0 if packing else False)
    first, second = run(model, inputs), run(model, inputs)
    assert relative(first, plain) < 1e-5
    assert torch.equal(first, second)
    assert torch.equal(run(hubgen.restore(model), inputs), plain)


@packed_kernels
def test_most_layers_of_a_unet_are_packed_within_the_budget() -> None:
    model, inputs = model_and_inputs()
    hubgen.optimize(model, packing=5.0)
    run(model, inputs)
    records = [layer._fast for layer in model.modules() if isinstance(layer, FastLinear | FastConv2d)]
    assert sum(record.packed is not None for record in records) > 0.5 * len(records)
    hubgen.optimize(model, packing=0.3)
    run(model, inputs)
    plan = next(layer._fast.plan for layer in model.modules() if isinstance(layer, FastLinear))
    assert 0 < plan.spent <= 0.3 * sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 2)])
def test_a_doubled_picture_is_convolved_from_the_small_one(size: tuple[int, int]) -> None:
    weight, bias, x = torch.randn(5, 3, 3, 3).double(), torch.randn(5).double(), torch.randn(2, 3, *size).double()
    exact = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    small = [kernel.double() for kernel in phase_kernels(weight)]
    fast = convolve_doubled(
        x.contiguous(memory_format=torch.channels_last), lambda window, phase: F.conv2d(window, small[phase], bias)
    )
    assert fast.shape == exact.shape
    assert relative(fast, exact) < 1e-6  # kernels are summed in float32


@packed_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsampling_takes_the_small_picture_and_sees_new_weights(dtype: torch.dtype) -> None:
    layer = nn.Sequential(Upsample2D(16)).to(dtype).requires_grad_(False)
    x = torch.randn(2, 16, 4, 6).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    plain, odd = layer(x), layer[0](x, (7, 12))
    hubgen.optimize(layer, packing=5.0)
    assert relative(layer(x), plain) < tolerance
    assert isinstance(layer[0].conv._fast.packed, tuple)
    assert relative(layer[0](x, (7, 12)), odd) < tolerance
    assert relative(layer(x), plain) < tolerance
    layer[0].conv.weight.data.mul_(2)
    layer[0].conv.bias.data.mul_(2)
    assert relative(layer(x), 2 * plain) < tolerance
    assert relative(hubgen.restore(layer)(x), 2 * plain) < tolerance


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (4, 5), (1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_winograds_convolution_is_the_convolution(size: tuple[int, int], bias: bool) -> None:
    conv = nn.Conv2d(24, 20, 3, padding=1, bias=bias)
    x = torch.randn(3, 24, *size)
    with torch.no_grad():
        fast = winograd.convolve(x, winograd.transform_kernel(conv.weight), conv.bias)
        exact = copy.deepcopy(conv).double()(x.double())
    assert fast.shape == exact.shape
    assert relative(fast.double(), exact) < 5e-6


@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 1, 1), (1, 0, 2), (2, 0, 1)])
def test_a_convolution_by_columns_is_the_convolution(stride: int, padding: int, dilation: int) -> None:
    conv = nn.Conv2d(6, 8, 3, stride=stride, padding=padding, dilation=dilation)
    x = torch.randn(2, 6, 9, 11)
    geometry = kernels.Geometry((stride,) * 2, (padding,) * 2, (dilation,) * 2, 1)
    with torch.no_grad():
        assert relative(kernels.convolve_columns(x, conv.weight, conv.bias, geometry), conv(x)) < 1e-6


EDITS: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda weight: weight.mul_(0.9),
    "by data, which leaves the version as it is": lambda weight: weight.data.add_(0.1 * torch.randn_like(weight)),
    "by data, assigned": lambda weight: setattr(weight, "data", weight.data * 0.9),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_weights_are_seen(edit: Callable[[nn.Parameter], Any]) -> None:
    model, inputs = model_and_inputs()
    run(hubgen.optimize(model, packing=5.0), inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            edit(parameter)
    fast = run(model, inputs)
    assert relative(fast, run(hubgen.restore(model), inputs)) < 1e-5


def test_loaded_weights_are_seen() -> None:
    model, inputs = model_and_inputs()
    other = randomize_(tiny.unet(), seed=1)
    run(hubgen.optimize(model), inputs)
    for assign in (False, True):
        model.load_state_dict(randomize_(other, seed=int(assign) + 1).state_dict(), assign=assign)
        assert relative(run(model, inputs), run(other.eval(), inputs)) < 1e-5


@pytest.mark.parametrize("name", ["unet-condition", "mmdit", "flux"])
def test_adapters_count_while_loaded_fused_unfused_and_unloaded(name: str) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = model_and_inputs(name)
    plain = copy.deepcopy(model)
    run(hubgen.optimize(model, packing=5.0), inputs)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    for each in (model, plain):
        torch.manual_seed(1)
        each.add_adapter(config)
    for change in ("", "fuse_lora", "unfuse_lora", "fuse_lora", "unload_lora"):
        if change:
            getattr(model, change)()
            getattr(plain, change)()
        assert relative(run(model, inputs), run(plain, inputs)) < 1e-5, change


def test_gradients_are_those_of_the_plain_model() -> None:
    model, inputs = model_and_inputs()
    plain = copy.deepcopy(model)
    run(hubgen.optimize(model), inputs)
    for each in (model, plain):
        first_output(each(**inputs)).square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_state_dict_and_parameters_stay_the_same_objects() -> None:
    model, inputs = model_and_inputs()
    before, names = dict(model.named_parameters()), list(model.state_dict())
    text = repr(model)
    run(hubgen.optimize(model), inputs)
    assert list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert repr(model) == text


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain_and_independent(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        expected = hubgen.optimize(layer)(x)
        twin = duplicate(layer)
        assert not optimized(twin) and all(type(part) is nn.Conv2d for part in twin)
        assert relative(twin(x), expected) < 1e-5
    assert all("_fast" not in part.__dict__ for part in twin)


def test_another_dtype_is_computed_in_that_dtype() -> None:
    model, inputs = model_and_inputs()
    run(hubgen.optimize(model), inputs)
    model.double()
    doubled = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    assert torch.equal(run(model, doubled), run(hubgen.restore(model), doubled))


def test_bfloat16_differs_by_rounding_only() -> None:
    model, inputs = model_and_inputs("mmdit")
    exact = run(model, inputs)
    model.bfloat16()
    halved = {name: x.bfloat16() for name, x in inputs.items()}
    plain = relative(run(model, halved).float(), exact)
    assert relative(run(hubgen.optimize(model), halved).float(), exact) < 1.5 * plain + 1e-3


def test_autocast_and_functional_transforms_take_the_plain_path() -> None:
    layer = hubgen.optimize(nn.Linear(8, 8))
    x = torch.randn(4, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    jacobian = torch.func.jacrev(layer)(x[0])
    assert torch.allclose(jacobian, layer.weight, atol=1e-6)


def test_offloading_hooks_keep_the_plain_path() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = model_and_inputs()
    plain = run(model, inputs)
    run(hubgen.optimize(model), inputs)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model, inputs), run(model, inputs))
    assert relative(run(model, inputs), plain) < 1e-5


@pytest.mark.parametrize("name", ["unet-condition", "mmdit"])
def test_an_optimized_model_compiles_without_graph_breaks(name: str) -> None:
    model, inputs = model_and_inputs(name)
    plain = run(hubgen.optimize(model), inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert relative(run(model, inputs), plain) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_modulations_of_a_grid_are_those_of_its_steps(batch: int) -> None:
    """And they are looked up, not computed: the projections are not called inside the walk."""
    model, inputs = model_and_inputs("mmdit", batch)
    width = tiny.TEXT_WIDTH
    negative, positive = (TextEmbeddings(torch.randn(batch, 5, width), torch.randn(batch, width)) for _ in range(2))
    call, grid = BackboneCall(model, positive, negative), torch.tensor([900.0, 500.0, 250.0, 10.0])
    x = inputs["hidden_states"]

    def walk() -> list[torch.Tensor]:
        steps = [(t, guided) for t, guided in zip(grid, (False, True, True, False), strict=True)]
        return [call(torch.cat([x, x]) if g else x, t.expand((1 + g) * batch), g) for t, g in steps]

    with torch.no_grad():
        plain = walk()
        hubgen.optimize(model, packing=False)
        with prepared(model, grid, call.conditions):  # without memory to spend nothing is kept
            assert type(model.transformer_blocks[0].norm1.linear) is nn.Linear
        hubgen.optimize(model)
        with prepared(model, grid, call.conditions):
            norm = model.transformer_blocks[0].norm1.linear
            assert norm._fast.table is not None
            found = [norm._fast.recall(torch.nn.functional.silu(embedded(model, call, t, True))) for t in grid]
            assert all(row is not None for row in found)
            fast = walk()
    assert all(relative(f, p) < 1e-5 for f, p in zip(fast, plain, strict=True))
    assert norm._fast.table is None


def embedded(model: SD3Transformer2DModel, call: BackboneCall, t: torch.Tensor, guided: bool) -> torch.Tensor:
    pooled = call.told[guided]["pooled_projections"]
    return model.time_text_embed(t.expand(len(pooled)), pooled)


def test_modulations_of_a_dit_are_looked_up_too() -> None:
    """Those of all its blocks and of the output, whose embedders are the first block's."""
    model, inputs = model_and_inputs("dit")
    grid, x, labels = torch.tensor([999, 500, 0]), inputs["hidden_states"], torch.tensor([4, 1])
    with torch.no_grad():
        plain = [model(x, t.expand(2), labels)[0] for t in grid]
        hubgen.optimize(model)
        with prepared(model, grid, {"class_labels": labels}):
            tables = [layer for layer in model.modules() if isinstance(layer, FastLinear) and layer._fast.table]
            assert len(tables) == 3 * len(model.transformer_blocks) + 1
            fast = [model(x, t.expand(2), labels)[0] for t in grid]
            assert [layer._fast.row for layer in tables] == [4] * len(tables)
            other = model(x, grid[:1].expand(2), labels.flip(0))[0]
        assert relative(other, model(x, grid[:1].expand(2), labels.flip(0))[0]) < 1e-5
    assert all(relative(f, p) < 1e-5 for f, p in zip(fast, plain, strict=True))


@pytest.mark.parametrize("pooled", [False, True])
def test_time_projections_of_a_unet_are_looked_up_too(pooled: bool) -> None:
    config = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if pooled else {}
    size = {"projection_class_embeddings_input_dim": 16 + 6 * 4} if pooled else {}
    model, inputs = randomize_(tiny.unet(**config, **size)).eval(), unet_inputs((8, 8), 2)
    if pooled:
        numbers = torch.tensor([[64.0, 64, 0, 0, 64, 64], [32, 64, 0, 0, 64, 64]])
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 16), "time_ids": numbers}
    grid = torch.tensor([999, 500, 0])
    conditions = {name: inputs[name] for name in inputs if name not in ("sample", "timestep")}

    def walk() -> list[torch.Tensor]:
        return [model(**{**inputs, "timestep": t})[0] for t in grid]

    with torch.no_grad():
        plain = walk()
        hubgen.optimize(model)
        with prepared(model, grid, conditions):
            records = [layer._fast for layer in model.modules() if isinstance(layer, FastLinear)]
            assert records[0].plan.least is None and all(record.granted is None for record in records)
            projections = [layer for name, layer in model.named_modules() if name.endswith("time_emb_proj")]
            assert projections and all(layer._fast.table is not None for layer in projections)
            fast = walk()
            assert [layer._fast.row for layer in projections] == [4] * len(projections)
    assert all(relative(f, p) < 1e-5 for f, p in zip(fast, plain, strict=True))


def test_text_keys_are_computed_once_a_prompt_and_anew_for_another() -> None:
    model, inputs = model_and_inputs()
    hubgen.optimize(model)
    first = run(model, inputs)
    layer = next(part for name, part in model.named_modules() if name.endswith("attn2.to_k"))
    kept = next(iter(layer._fast.answers.values()))[2]
    assert torch.equal(run(model, inputs), first)
    assert next(iter(layer._fast.answers.values()))[2] is kept
    inputs["encoder_hidden_states"].mul_(2)
    changed = run(model, inputs)
    assert not torch.allclose(changed, first)
    assert relative(changed, run(hubgen.restore(model), inputs)) < 1e-5


@pytest.mark.parametrize("backbone", ["unet", "transformer"])
def test_pipelines_optimize_themselves_unless_told_otherwise(backbone: str) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    pipe, plain = tiny.pipeline(backbone), hubgen.restore(tiny.pipeline(backbone))
    images = [p("a red cat", generator=tiny.seeded(0)[0], **arguments).images for p in (pipe, pipe, plain)]
    assert optimized(pipe) and not optimized(plain)
    assert (images[0] == images[1]).all()
    assert abs(images[0] - images[2]).max() < 1e-4


def test_a_model_in_training_is_left_alone() -> None:
    pipe = tiny.pipeline("unet")
    pipe.unet.train()
    pipe("a red cat", num_inference_steps=1, output_type="np")
    assert not optimized(pipe.unet) and optimized(pipe.vae)


def test_approximations_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="step_cache"):
        hubgen.optimize(tiny.vae(), step_cache=object())
    with pytest.raises(ValueError, match="packing"):
        hubgen.optimize(tiny.vae(), packing=-1.0)
    with pytest.raises(TypeError, match="model"):
        hubgen.optimize("model")


def test_the_classes_of_the_cases_are_all_there_is() -> None:
    known = (UNet2DConditionModel, UNet2DModel, SD3Transformer2DModel, FluxTransformer2DModel, DiTTransformer2DModel,
             AutoencoderKL)  # fmt: skip
    assert {type(build()) for build, _, _ in CASES.values()} == set(known)
    assert issubclass(FastLinear, Swapped)
