"""An accelerated model computes what it did, whatever happens to it in between, and carries no trace of it."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hubgen
from hubgen.acceleration import optimize as optimizing
from hubgen.acceleration.cpu import kernels
from hubgen.acceleration.cpu import layers as fast_layers
from hubgen.acceleration.cpu import packing as cpu_packing
from hubgen.acceleration.optimize import accelerated, optimized
from hubgen.backbones.dit import DiTTransformer2DModel
from hubgen.backbones.flux import FluxTransformer2DModel
from hubgen.backbones.unet import UNet2DModel
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import Predictor
from hubgen.layers.resnet import Upsample2D
from tests import models
from tests.parity import first_output, randomize_

BOTH = ("negative", "positive")
packed_kernels = pytest.mark.skipif(not kernels.available(torch.float32), reason="this torch has no packed kernels")


@pytest.fixture(autouse=True)
def everything_is_worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers take the fast paths, too."""
    tiny_limits = {"SMALL": 0, "WINOGRAD_PIXELS": 60, "WINOGRAD_CHANNELS": 4, "DOUBLED_PIXELS": 0}
    for name, value in tiny_limits.items():
        monkeypatch.setattr(fast_layers, name, value)
    for name in ("WORTHWHILE", "WORTHWHILE_BFLOAT16"):
        monkeypatch.setattr(cpu_packing, name, 0.0)


def unet_inputs(size: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, *size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, models.TEXT_WIDTH),
    }


def mmdit_inputs(size: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, *size),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 5, models.TEXT_WIDTH),
        "pooled_projections": torch.randn(batch, models.TEXT_WIDTH),
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
    "unet-condition": (models.unet, unet_inputs, (9, 13)),
    "unet": (pixel_unet, lambda s, b: {"sample": torch.randn(b, 3, *s), "timestep": 10}, (10, 14)),
    "mmdit": (models.transformer, mmdit_inputs, (6, 10)),
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
    "autoencoder": (models.vae, lambda s, b: {"sample": torch.randn(b, 3, *s)}, (18, 22)),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def apart(a: Any, b: Any) -> float:
    """The same of pictures."""
    return relative(torch.as_tensor(a), torch.as_tensor(b))


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return first_output(model(**inputs))


def packed(model: nn.Module) -> dict[nn.Module, Any]:
    """The packed weights of a model's layers."""
    records = optimizing._packings[model].records
    return {layer: record.packed for layer, record in records.items() if record.packed is not None}


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
def test_most_layers_of_a_unet_are_packed_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_packing, "SMALL_LAYER", 0)  # those are packed beyond it
    model, inputs = model_and_inputs()
    hubgen.optimize(model, packing=5.0)
    run(model, inputs)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(packed(model)) > 0.5 * len(layers)
    hubgen.optimize(model, packing=0.3)
    run(model, inputs)
    spent = optimizing._packings[model].spent
    assert 0 < spent <= 0.3 * sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsampling_takes_the_small_picture_and_sees_new_weights(dtype: torch.dtype) -> None:
    if not kernels.available(dtype):
        pytest.skip("this machine has no packed kernels of this type")
    layer = nn.Sequential(Upsample2D(16)).to(dtype).requires_grad_(False)
    x = torch.randn(2, 16, 4, 6).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    plain, odd = layer(x), layer[0](x, (7, 12))
    hubgen.optimize(layer, packing=5.0)
    assert relative(layer(x), plain) < tolerance
    assert isinstance(packed(layer)[layer[0].conv], tuple)
    assert relative(layer[0](x, (7, 12)), odd) < tolerance
    assert relative(layer(x), plain) < tolerance
    layer[0].conv.weight.data.mul_(2)
    layer[0].conv.bias.data.mul_(2)
    assert relative(layer(x), 2 * plain) < tolerance
    assert relative(hubgen.restore(layer)(x), 2 * plain) < tolerance


EDITS: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda weight: weight.mul_(0.9),
    "by data, which leaves the version as it is": lambda weight: weight.data.add_(0.1 * torch.randn_like(weight)),
    "a single value by data": lambda weight: weight.data.view(-1)[:1].add_(1.0),
    "rows that change places": lambda weight: weight.data.copy_(weight.data.flip(0).clone()),
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
    other = randomize_(models.unet(), seed=1)
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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain_and_independent(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        expected = hubgen.optimize(layer)(x)
        twin = duplicate(layer)
        assert not optimized(twin) and all(type(part) is nn.Conv2d for part in twin)
        assert relative(twin(x), expected) < 1e-5


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


# ---- what is computed once ----


def conditions(batch: int, **more: Any) -> dict[str, Condition]:
    width = models.TEXT_WIDTH

    def one() -> Condition:
        return Condition(tokens=torch.randn(batch, 5, width), pooled=torch.randn(batch, width), **more)

    return {branch: one() for branch in BOTH}


TABLED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Condition]]]] = {
    "mmdit": (models.transformer, conditions),
    "mmdit with two attentions": (lambda: models.transformer(dual_attention_layers=(0,)), conditions),
    "flux": (flux, lambda batch: conditions(batch, guidance_scale=3.5)),
    "unet": (models.unet, conditions),
    "sdxl": (
        lambda: models.unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
        ),
        lambda batch: conditions(batch, micro=torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(batch, 1)),
    ),
    "dit": (
        dit,
        lambda batch: {
            branch: Condition(labels=torch.arange(batch) + 3 * number) for number, branch in enumerate(BOTH)
        },
    ),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", TABLED)
@torch.no_grad()
def test_what_depends_on_the_time_alone_is_looked_up_by_the_number_of_the_step(name: str, batch: int) -> None:
    """In steps with and without guidance: the layers' own weights are not used there, and may be anything."""
    build, make = TABLED[name]
    model = randomize_(build()).eval()
    grid, x = torch.tensor([900, 500, 250, 10]), torch.randn(batch, 4, 8, 8)
    predictor = Predictor(model, make(batch))
    steps = [(step, t, BOTH if step in (1, 2) else BOTH[1:]) for step, t in enumerate(grid)]

    def predict(step: int, t: torch.Tensor, branches: tuple[str, ...]) -> torch.Tensor:
        rows = len(branches) * batch
        return predictor(torch.cat([x] * len(branches)), t.expand(rows), branches, step)

    plain = [predict(*step) for step in steps]
    with accelerated(model) as fast:
        predictor.tabulate(fast, grid, BOTH)
        layers = list(fast._tables.rows)
        assert layers and all(isinstance(layer, nn.Linear) or name == "dit" for layer in layers)
        kept = [layer.weight.data.clone() for layer in layers if isinstance(layer, nn.Linear)]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.weight.data.fill_(torch.nan)
        accelerated_predict = fast.around(predictor)
        for (step, t, branches), expected in zip(steps, plain, strict=True):
            rows = len(branches) * batch
            found = accelerated_predict(torch.cat([x] * len(branches)), t.expand(rows), branches, step)
            assert relative(found, expected) < 1e-5
        for layer, weight in zip((layer for layer in layers if isinstance(layer, nn.Linear)), kept, strict=True):
            layer.weight.data.copy_(weight)
    assert relative(predict(*steps[1]), plain[1]) == 0


@torch.no_grad()
def test_without_memory_to_spend_or_with_listeners_nothing_is_tabulated() -> None:
    model = randomize_(models.transformer()).eval()
    predictor = Predictor(model, conditions(1))
    with accelerated(hubgen.optimize(model, packing=False)) as fast:
        predictor.tabulate(fast, torch.tensor([900, 500]), BOTH)
        assert fast._tables is None
    hubgen.optimize(model)
    handle = model.time_text_embed.register_forward_hook(lambda *_: None)
    with accelerated(model) as fast:
        predictor.tabulate(fast, torch.tensor([900, 500]), BOTH)
        assert fast._tables is None
        handle.remove()


@torch.no_grad()
def test_the_image_attention_of_sd35_medium_is_packed_and_no_text_layer() -> None:
    model = randomize_(models.transformer(dual_attention_layers=(0,))).eval()
    run(hubgen.optimize(model, packing=5.0), mmdit_inputs((8, 8), 2))
    attention = model.transformer_blocks[0].attn2
    assert attention.context_layers() == []
    assert {attention.to_q, attention.to_k, attention.to_v} <= set(packed(model)) or not kernels.available(
        torch.float32
    )


@torch.no_grad()
def test_text_keys_are_computed_once_a_call_and_anew_for_another_text() -> None:
    model, inputs = model_and_inputs()
    attention = next(part for name, part in model.named_modules() if name.endswith("attn2"))
    layer, text = attention.to_k, inputs["encoder_hidden_states"]
    plain = run(model, inputs)
    with accelerated(model) as fast:
        with fast.network():
            first = layer(text)
            assert layer(text) is first and relative(run(model, inputs), plain) < 1e-5
            assert layer(text.clone()) is not first
            text.mul_(2)
            assert not torch.allclose(layer(text), first)
        changed = layer(text)
    assert torch.equal(changed, layer(text))


# ---- no trace ----


def state(module: Any) -> list[Any]:
    """Everything of all modules of a pipeline's networks that a user can see."""
    networks = [module] if isinstance(module, nn.Module) else [module.backbone, module.vae]
    seen: list[Any] = []
    for network in networks:
        for name, part in network.named_modules():
            hooks = (len(part._forward_hooks), len(part._forward_pre_hooks))
            seen.append((name, id(part), type(part), sorted(part.__dict__), hooks, repr(part)))
        seen += [(name, value.data_ptr(), value._version) for name, value in network.state_dict().items()]
        seen += [(name, id(value)) for name, value in network.named_parameters()]
    return seen


SHORT: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}


class Stop(BaseException):
    """As KeyboardInterrupt, which no `except Exception` sees."""


@pytest.mark.parametrize("backbone", ["unet", "transformer"])
def test_models_are_what_they_were_after_a_call_an_error_and_an_interruption(backbone: str) -> None:
    pipe = models.pipeline(backbone)
    before = state(pipe)
    pipe("a red cat", **SHORT)
    assert state(pipe) == before
    layer = next(part for part in pipe.backbone.modules() if isinstance(part, nn.Linear))
    for error in (RuntimeError, Stop):

        def fail(*_: Any, error: type[BaseException] = error) -> None:
            raise error

        handle = layer.register_forward_hook(fail)
        with pytest.raises(error):
            pipe("a red cat", **SHORT)
        handle.remove()
        assert state(pipe) == before


@pytest.mark.parametrize("backbone", ["unet", "transformer"])
def test_models_are_plain_in_a_callback_and_a_call_inside_one_is_a_call(backbone: str) -> None:
    pipe = models.pipeline(backbone)
    alone = pipe("a blue dog", generator=models.seeded(1)[0], **SHORT).images
    outer = pipe("a red cat", generator=models.seeded(0)[0], **SHORT).images
    before, inner = state(pipe), models.pipeline(backbone, **{backbone: pipe.backbone, "vae": pipe.vae})
    seen: list[Any] = []

    def callback(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert state(pipe) == before
        seen.append(inner("a blue dog", generator=models.seeded(1)[0], **SHORT).images)
        assert state(pipe) == before
        return tensors

    images = pipe("a red cat", generator=models.seeded(0)[0], callback_on_step_end=callback, **SHORT).images
    assert apart(images, outer) < 1e-5
    assert len(seen) == 3 and all(apart(one, alone) < 1e-5 for one in seen)


@torch.no_grad()
def test_two_calls_that_interleave_do_not_disturb_each_other() -> None:
    model, inputs = model_and_inputs()
    plain, before = run(model, inputs), state(model)
    with accelerated(model) as first:
        with first.network():
            one = run(model, inputs)
            with accelerated(model) as second, second.network():
                two = run(model, inputs)
            three = run(model, inputs)
        assert state(model) == before
    assert all(relative(found, plain) < 1e-5 for found in (one, two, three))


@pytest.mark.parametrize("backbone", ["unet", "transformer"])
@pytest.mark.slow
def test_threads_that_share_models_draw_what_each_draws_alone(backbone: str) -> None:
    shared = models.pipeline(backbone)
    pipes = [models.pipeline(backbone, **{backbone: shared.backbone, "vae": shared.vae}) for _ in range(4)]
    prompts = ["a red cat", "a blue dog", "a heart", "the small apple"]
    before, faults = state(shared), []

    def draw(number: int) -> Any:
        generator = torch.Generator().manual_seed(number)
        return pipes[number](prompts[number], generator=generator, num_inference_steps=2, output_type="np").images

    expected = [draw(number) for number in range(4)]

    def work(number: int) -> None:
        try:
            for _ in range(50):
                difference = apart(draw(number), expected[number])
                if difference > 1e-5:
                    faults.append(difference)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert state(shared) == before


@torch.no_grad()
def test_copies_that_are_made_while_a_network_runs_are_plain() -> None:
    model, inputs = model_and_inputs("mmdit")
    plain = run(model, inputs)
    with accelerated(model) as fast, fast.network():
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert torch.equal(run(twin, inputs), plain)


# ---- adapters and hooks, whenever they come ----


def adapter(kind: str, targets: list[str]) -> Any:
    peft = pytest.importorskip("peft")
    if kind == "LoHa":
        return peft.LoHaConfig(r=2, alpha=1, target_modules=targets, init_weights=False)
    return peft.LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False, use_dora=kind == "DoRA")


TARGETS = {
    "unet": ["to_q", "to_k", "conv1", "conv2", "conv", "proj", "time_emb_proj", "linear_1"],
    "transformer": ["to_q", "to_k", "add_k_proj", "linear", "linear_1", "proj", "context_embedder"],
}


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "DoRA"])
@pytest.mark.parametrize("backbone", TARGETS)
def test_adapters_count_from_the_moment_they_are_there(backbone: str, kind: str) -> None:
    """Before a call, after one, and from a callback in the middle of one; and are gone when they are taken off."""
    pipe, plain = models.pipeline(backbone), hubgen.restore(models.pipeline(backbone))

    def draw(pipe: Any, callback: Any = None) -> Any:
        generator = models.seeded(0)[0]
        return pipe("a red cat", generator=generator, callback_on_step_end=callback, **SHORT).images

    def attach(pipe: Any, step: int = 0, *_: Any) -> dict[str, Any]:
        if step == 0:
            torch.manual_seed(3)
            pipe.backbone.add_adapter(adapter(kind, TARGETS[backbone]))
        return {}

    def detach(pipe: Any, step: int = 0, *_: Any) -> dict[str, Any]:
        if step == 0:
            pipe.backbone.delete_adapters("default")
            pipe.backbone.disable_adapters()
        return {}

    assert apart(draw(pipe), draw(plain)) < 1e-5
    base = draw(plain)
    assert apart(draw(pipe, attach), draw(plain, attach)) < 1e-5
    assert apart(draw(pipe), draw(plain)) < 1e-5
    assert apart(draw(plain), base) > 1e-3
    for one in (pipe, plain):
        one.backbone.delete_adapters("default")
    for callback in (None, attach, None):
        assert apart(draw(pipe, callback), draw(plain, callback)) < 1e-5


def test_an_adapter_on_an_embedding_counts() -> None:
    pipe, plain = (models.pipeline("unet", unet=models.unet(num_class_embeds=4)) for _ in range(2))
    inputs = {**unet_inputs((8, 8), 2), "class_labels": torch.tensor([1, 3])}
    hubgen.optimize(pipe.unet, packing=5.0)
    run(pipe.unet, inputs)
    for one in (pipe, plain):
        torch.manual_seed(3)
        one.unet.add_adapter(adapter("LoRA", ["class_embedding", "conv_in"]))
    assert relative(run(pipe.unet, inputs), run(plain.unet, inputs)) < 1e-5


@pytest.mark.parametrize("backbone", ["unet", "transformer"])
def test_weights_that_are_merged_in_a_callback_count_in_the_next_step(backbone: str) -> None:
    def merge(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 0:
            generator = torch.Generator().manual_seed(0)
            for weight in pipe.backbone.parameters():
                weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        return {}

    images = [
        pipe("a red cat", generator=models.seeded(0)[0], callback_on_step_end=merge, **SHORT).images
        for pipe in (models.pipeline(backbone), hubgen.restore(models.pipeline(backbone)))
    ]
    assert apart(images[0], images[1]) < 1e-5


@pytest.mark.parametrize("name", ["unet-condition", "mmdit", "autoencoder"])
@torch.no_grad()
def test_a_hook_on_any_layer_is_called_as_often_as_without_acceleration_and_with_the_same(name: str) -> None:
    model, inputs = model_and_inputs(name)
    seen: list[tuple[str, torch.Tensor]] = []
    for path, layer in model.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(
                lambda _, args, out, path=path: seen.append((path, out)) if torch.is_tensor(out) else None
            )
    plain = run(model, inputs)
    expected, seen[:] = list(seen), []
    hubgen.optimize(model, packing=5.0)
    assert relative(run(model, inputs), plain) < 1e-5
    assert [path for path, _ in seen] == [path for path, _ in expected]
    for (_, found), (_, right) in zip(seen, expected, strict=True):
        assert torch.allclose(found, right, atol=1e-4, rtol=1e-4)


# ---- pipelines ----


@pytest.mark.parametrize("backbone", ["unet", "transformer"])
def test_pipelines_optimize_themselves_unless_told_otherwise(backbone: str) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    pipe, plain = models.pipeline(backbone), hubgen.restore(models.pipeline(backbone))
    images = [p("a red cat", generator=models.seeded(0)[0], **arguments).images for p in (pipe, pipe, plain)]
    assert optimized(pipe) and not optimized(plain)
    assert (images[0] == images[1]).all()
    assert abs(images[0] - images[2]).max() < 1e-4


def test_a_model_in_training_is_left_alone() -> None:
    pipe = models.pipeline("unet")
    pipe.unet.train()
    pipe("a red cat", num_inference_steps=1, output_type="np")
    assert not optimized(pipe.unet) and optimized(pipe.vae)


def test_approximations_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="step_cache"):
        hubgen.optimize(models.vae(), step_cache=object())
    with pytest.raises(ValueError, match="packing"):
        hubgen.optimize(models.vae(), packing=-1.0)
    with pytest.raises(TypeError, match="model"):
        hubgen.optimize("model")
