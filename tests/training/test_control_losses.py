"""One step of a control's training: loss and gradients are those of diffusers' example scripts, written out.

IP-Adapters have no script there. Theirs is the one of the paper's authors (tutorial_train.py), on diffusers' own parts.
Both sides compute in float64, so that what differs is the formula and not the order of additions.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from hubgen.conditioning.condition import Condition
from hubgen.controls.image_attention import places
from hubgen.controls.net_kinds import Hint
from hubgen.schedulers.objective import Objective, objective_of
from hubgen.training.kit.beside import target_of
from hubgen.training.kit.conditioned import Shown, losses_of
from hubgen.training.kit.controlled import (
    Controlled,
    Editing,
    WithControlNet,
    WithPicture,
    adapter_for,
    made_editor,
    net_for,
)
from hubgen.training.kit.groups import Network, PictureAdapter
from tests import models
from tests.ip_adapter_weights import PROJECTED, clip
from tests.parity import plain, quiet_, randomize_
from tests.training.test_train_controlnet import opened, told

Official = Callable[[str], Path]
TOLERANCE = 1e-5
"""Relative: of the loss, and of the largest number of each parameter's gradient"""


def step_of(learner: Controlled, objective: Objective, condition: Condition, beside: Any) -> tuple[Any, dict[str, Any]]:
    """Loss and gradients of two pictures."""
    latents, seeds = latents_of(learner.pipe), models.seeded(1, 2)
    losses, _ = losses_of(learner, objective, Shown(latents, ["", ""], condition, None, seeds, beside))
    losses.mean().backward()
    return losses.mean(), {name: value.grad for name, value in learner.learns.named_parameters()}


def latents_of(pipe: Any) -> torch.Tensor:
    return models.drawn(*pipe.latent_space.shape(2, (32, 32)), seed=6).double()


def noised(pipe: Any, objective: Objective) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, timesteps and target of the scripts, from the random numbers of `step_of`: of each the time, then noise."""
    latents = latents_of(pipe)
    drawn = [
        (objective.density.sample(1, generator=one), torch.randn((1, *latents.shape[1:]), generator=one))
        for one in models.seeded(1, 2)
    ]
    t, noise = (torch.cat(values) for values in zip(*drawn, strict=True))
    timesteps = (objective.path.snap(t) * 1000).round().long() - 1
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if v else noise
    return scheduler.add_noise(latents, noise, timesteps), timesteps, target


def doubled(condition: Condition) -> Condition:
    text = {name: getattr(condition, name) for name in ("tokens", "pooled")}
    return replace(condition, **{name: value.detach().double() for name, value in text.items() if value is not None})


def asked(backbone: Any, x_t: torch.Tensor, timesteps: torch.Tensor, condition: Condition, **more: Any) -> Any:
    """The prediction of one of diffusers' U-Nets or ControlNets."""
    kept = more.pop("added_cond_kwargs", {})
    if condition.pooled is not None and condition.micro is not None:
        kept = {**kept, "text_embeds": condition.pooled, "time_ids": condition.micro}
    return backbone(x_t, timesteps, condition.tokens, added_cond_kwargs=kept, return_dict=False, **more)


def assert_same_step(found: tuple[Any, dict[str, Any]], loss: torch.Tensor, theirs: dict[str, torch.Tensor]) -> None:
    """The loss and the gradient of every parameter; `theirs` are the parameters of diffusers' modules."""
    loss.backward()
    assert abs(found[0].item() - loss.item()) <= TOLERANCE * loss.item()
    assert found[1].keys() == theirs.keys()
    moved = 0
    for name, gradient in found[1].items():
        expected = theirs[name].grad
        if expected is None or not expected.any():
            assert gradient is None or not gradient.any(), name
            continue
        moved += 1
        assert (gradient - expected).abs().max() <= TOLERANCE * expected.abs().max(), name
    assert moved > 0.8 * len(theirs)


def copied(cls: Any, ours: nn.Module, **changes: Any) -> Any:
    """diffusers' network of the same weights."""
    theirs = cls.from_config({**plain(ours.config), **changes})
    theirs.load_state_dict(ours.state_dict())
    return theirs.double()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_an_editor_learns_as_by_train_instruct_pix2pix(official: Official, family: str) -> None:
    """The picture's mode, unscaled, as that script and both pipelines have it (the one for SDXL draws)."""
    pipe = opened(official, family)
    kind, condition = made_editor(pipe), doubled(told(pipe)[2])
    randomize_(pipe.backbone, 5)
    pipe.backbone.double()
    original = 2 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4)) - 1
    with torch.no_grad():
        beside = kind.encoded(pipe.vae, original).double()
    objective = objective_of(pipe.scheduler)
    found = step_of(Editing(pipe), objective, condition, beside)

    folder = official(family)
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = copied(diffusers.UNet2DConditionModel, pipe.backbone)
    x_t, timesteps, target = noised(pipe, objective)
    with torch.no_grad():
        shown = vae.encode(original).latent_dist.mode()
    (predicted,) = asked(unet, torch.cat([x_t, shown.double()], dim=1), timesteps, condition)
    assert_same_step(found, nn.functional.mse_loss(predicted, target.double()), dict(unet.named_parameters()))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_an_ip_adapter_learns_as_by_its_authors_script(official: Official, family: str) -> None:
    pipe = opened(official, family)
    pipe.backbone.double().requires_grad_(False)
    adapter = adapter_for(pipe, None, PictureAdapter(tokens=4, init="zero"), clip()[0])
    randomize_(adapter.network, 7).double()
    embeds, condition = models.drawn(2, PROJECTED, seed=3).double(), doubled(told(pipe)[2])
    embeds[1] = 0  # of a picture that is left out
    objective, learner = objective_of(pipe.scheduler), WithPicture(pipe, adapter)
    with learner.looking():
        found = step_of(learner, objective, condition, embeds)

    unet = copied(diffusers.UNet2DConditionModel, pipe.backbone).requires_grad_(False)
    weights: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in adapter.network.state_dict().items():
        part, _, key = name.partition(".")
        weights[part][key] = value
    unet._load_ip_adapter_weights([weights])
    projection = unet.encoder_hid_proj.image_projection_layers[0].double()
    theirs = {"image_proj.proj": projection.image_embeds, "image_proj.norm": projection.norm}
    names = places(pipe.backbone, adapter.layout)
    for number in {key.partition(".")[0] for key in weights["ip_adapter"]}:
        processor = unet.attn_processors[names[int(number)]].double()
        theirs[f"ip_adapter.{number}.to_k_ip"] = processor.to_k_ip[0]
        theirs[f"ip_adapter.{number}.to_v_ip"] = processor.to_v_ip[0]
    named = {f"{name}.{key}": one for name, layer in theirs.items() for key, one in layer.named_parameters()}
    for one in named.values():
        one.requires_grad_(True)
    x_t, timesteps, target = noised(pipe, objective)
    shown = {"image_embeds": [embeds[:, None]]}
    (predicted,) = asked(unet, x_t, timesteps, condition, added_cond_kwargs=shown)
    assert_same_step(found, nn.functional.mse_loss(predicted, target.double()), named)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_controlnet_learns_as_by_train_controlnet(official: Official, family: str) -> None:
    pipe = opened(official, family)
    pipe.backbone.double().requires_grad_(False)
    net = quiet_(randomize_(net_for(pipe, None, Network()), 7)).double()
    condition, learner = doubled(told(pipe)[2]), WithControlNet(pipe, net)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double()
    beside = learner.kind.shown(Hint([pixels]), target_of(pipe, (32, 32), 2, torch.device("cpu")))
    objective = objective_of(pipe.scheduler)
    found = step_of(learner, objective, condition, beside)

    unet = copied(diffusers.UNet2DConditionModel, pipe.backbone).requires_grad_(False)
    theirs = copied(diffusers.ControlNetModel, net)
    x_t, timesteps, target = noised(pipe, objective)
    down, mid = asked(theirs, x_t, timesteps, condition, controlnet_cond=pixels)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    (predicted,) = asked(unet, x_t, timesteps, condition, **residuals)
    assert_same_step(found, nn.functional.mse_loss(predicted, target.double()), dict(theirs.named_parameters()))
