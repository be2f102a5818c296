"""An accelerated call under what users do to models while they are in use: the picture is that without acceleration."""

import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import hubgen
from hubgen.acceleration.optimize import accelerated
from hubgen.conditioning.predict import Predictor
from tests import models
from tests.acceleration.test_optimize import (
    BOTH,
    SHORT,
    adapter,
    apart,
    conditions,
    everything_is_worthwhile,  # noqa: F401, which holds for every test here
    mmdit_inputs,
    relative,
    run,
)
from tests.parity import randomize_

# Of each backbone: layers that see the time, that embed it, and that see the text.
TARGETS = {
    "unet": {"time": ["time_emb_proj"], "embedding": ["linear_1"], "text": ["attn2.to_k", "attn2.to_v"]},
    "transformer": {"time": ["linear"], "embedding": ["linear_1"], "text": ["context_embedder"]},
}


def pair(backbone: str, targets: list[str]) -> list[Any]:
    """A pipeline with a strong adapter, and the same without acceleration."""
    pipes = [models.pipeline(backbone), hubgen.restore(models.pipeline(backbone))]
    for pipe in pipes:
        torch.manual_seed(3)
        pipe.backbone.add_adapter(adapter("LoRA", targets))
        for name, weight in pipe.backbone.named_parameters():
            if "lora" in name:
                weight.data.mul_(3)
    return pipes


@pytest.mark.parametrize("where", ["time", "embedding", "text"])
@pytest.mark.parametrize("backbone", TARGETS)
def test_the_scale_of_an_adapter_is_that_of_the_call(backbone: str, where: str) -> None:
    argument = "cross_attention_kwargs" if backbone == "unet" else "joint_attention_kwargs"
    images = {
        scale: [
            pipe("a red cat", generator=models.seeded(0)[0], **SHORT, **{argument: {"scale": scale}}).images
            for pipe in pair(backbone, TARGETS[backbone][where])
        ]
        for scale in (0.1, 1.0)
    }
    assert apart(images[0.1][1], images[1.0][1]) > 1e-4
    for fast, plain in images.values():
        assert apart(fast, plain) < 1e-5


@pytest.mark.parametrize("where", ["time", "embedding", "text"])
@pytest.mark.parametrize("backbone", TARGETS)
def test_the_weight_of_an_adapter_may_change_in_a_callback(backbone: str, where: str) -> None:
    def reweigh(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe.backbone.set_adapters(["default"], [0.1 if step == 0 else 2.0])
        return {}

    images = [
        pipe("a red cat", generator=models.seeded(0)[0], callback_on_step_end=reweigh, **SHORT).images
        for pipe in pair(backbone, TARGETS[backbone][where])
    ]
    assert apart(*images) < 1e-5


def test_hooks_on_all_modules_see_the_same_calls() -> None:
    def seen(pipe: Any) -> list[str]:
        names: list[str] = []
        handle = register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
        pipe("a red cat", generator=models.seeded(0)[0], **SHORT)
        handle.remove()
        return names

    assert seen(models.pipeline("transformer")) == seen(hubgen.restore(models.pipeline("transformer")))


@torch.no_grad()
def test_layers_may_be_called_by_keyword() -> None:
    model = hubgen.optimize(nn.Sequential(nn.Linear(32, 32), nn.Conv2d(4, 4, 3)).eval(), packing=5.0)
    tokens, pixels = torch.randn(4, 32), torch.randn(1, 4, 8, 8)
    expected = model[0](tokens), model[1](pixels)
    with accelerated(model) as fast, fast.network():
        torch.testing.assert_close(model[0](input=tokens), expected[0])
        torch.testing.assert_close(model[1](input=pixels), expected[1])


@torch.no_grad()
def test_a_call_with_another_number_of_rows_does_not_get_the_tables_rows() -> None:
    model, inputs = randomize_(models.transformer()).eval(), mmdit_inputs((8, 8), 3)
    predictor, plain = Predictor(model, conditions(1)), run(model, inputs)
    with accelerated(model) as fast:
        predictor.tabulate(fast, torch.tensor([900, 500]), BOTH)
        with fast.network(0, BOTH):
            assert relative(run(model, inputs), plain) < 1e-5


def test_threads_may_call_shared_models_for_the_first_time_at_once() -> None:
    faults: list[BaseException] = []
    shared = [models.pipeline("unet") for _ in range(4)]

    def work(pipe: Any) -> None:
        try:
            pipe("a red cat", num_inference_steps=1, output_type="np")
        except Exception as error:
            faults.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for first in shared:
            pipes = [models.pipeline("unet", unet=first.unet, vae=first.vae) for _ in range(4)]
            threads = [threading.Thread(target=work, args=(pipe,)) for pipe in pipes]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert faults == []
