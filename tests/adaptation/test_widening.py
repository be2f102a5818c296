"""A widened backbone is its base until it learns, and is saved, loaded and drawn with as any other."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hubgen
from hubgen.adaptation.widening import widen
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import Doors, family_of
from hubgen.conditioning.predict import predict
from tests import models
from tests.models import NETWORKS
from tests.parity import same

NAMES = ["SD 1.x", "SDXL", "SD 3", "FLUX.1 schnell", "DiT", "DDPM"]
T = torch.tensor([10.0, 500.0])


def condition() -> Condition:
    tokens, pooled = torch.randn(2, 5, models.TEXT_WIDTH), torch.randn(2, models.TEXT_WIDTH)
    return Condition(tokens=tokens, pooled=pooled, micro=torch.ones(2, 6), labels=torch.tensor([1, 2]))


def told(name: str) -> Condition:
    known = condition()
    if name == "SDXL":
        return Condition(tokens=known.tokens, pooled=torch.randn(2, models.POOLED), micro=known.micro)
    return known


@torch.no_grad()
@pytest.mark.parametrize("library", ["hubgen", "diffusers"])
@pytest.mark.parametrize("name", NAMES)
def test_the_new_inputs_change_no_bit_at_first(name: str, library: str) -> None:
    base, size = NETWORKS[name].build(library), (2, 16, 16) if name == "DDPM" else (2, 8, 8)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    wide = widen(base, 3)
    channels = family_of(base).channels
    assert family_of(wide).channels == channels + 3 and type(wide) is type(base) and wide.training == base.training
    x_t, known = torch.randn(size[0], channels, *size[1:]), told(name)
    plain = predict(base, x_t, T, known)
    pictures = [scale * torch.randn(size[0], 3, *size[1:]) for scale in (0.0, 1.0, 50.0)]
    found = [predict(wide, x_t, T, known, Doors(channels=[picture])) for picture in pictures]
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0], plain, atol=1e-5 * plain.std().item(), rtol=0.0)
    assert plain.std() > 1e-3
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in state.items()), "the base has changed"


@pytest.mark.parametrize("name", NAMES)
def test_the_new_inputs_learn_and_the_base_stays(name: str) -> None:
    base, size = NETWORKS[name].build(), (16, 16) if name == "DDPM" else (8, 8)
    before, wide = {key: value.clone() for key, value in base.state_dict().items()}, widen(base, 4)
    x_t, picture = torch.randn(2, family_of(base).channels, *size), torch.randn(2, 4, *size)
    loss = predict(wide, x_t, T, told(name), Doors(channels=[picture])).square().mean()
    loss.backward()
    layer = next(key for key, value in wide.state_dict().items() if value.shape != before[key].shape)
    weights = wide.get_parameter(layer)
    assert weights.grad is not None and weights.grad[:, before[layer].shape[1] :].abs().max() > 0
    torch.optim.SGD(wide.parameters(), 1.0).step()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_and_loaded_as_any_other(name: str, tmp_path: Path) -> None:
    wide = widen(NETWORKS[name].build(), 4)
    wide.save_pretrained(tmp_path)
    again = type(wide).from_pretrained(tmp_path)
    assert same(again, wide) and again.config.in_channels == wide.config.in_channels
    assert same(widen(again, 1), widen(wide, 1))


def test_no_channels_or_no_backbone_are_refused() -> None:
    with pytest.raises(ValueError, match="`channels`: got 0, expected"):
        widen(models.unet(), 0)
    with pytest.raises(ValueError, match="`backbone`: got a AutoencoderKL"):
        widen(models.vae(), 4)


# ---- pipelines of widened backbones ----


def drawn(pipe: Any, seed: int = 1, **call: Any) -> torch.Tensor:
    return pipe(
        **{"num_inference_steps": 2, "output_type": "latent", **call}, generator=torch.Generator().manual_seed(seed)
    ).images


@torch.no_grad()
def taught_(layer: Any, inputs: int) -> None:
    """Gives the new inputs of a layer, those after the first ones, weights."""
    layer.weight[:, inputs:] = torch.randn_like(layer.weight[:, inputs:])


@pytest.mark.parametrize("backbone", ["transformer", "unet"])
def test_a_widened_model_edits_at_once_and_survives_a_folder(backbone: str, tmp_path: Path) -> None:
    pipe = models.pipeline(backbone)
    plain = drawn(pipe, prompt="a red cat", guidance_scale=3.0)
    wide = hubgen.TextToImagePipeline(**{**pipe.components, backbone: widen(pipe.backbone, 4)})
    wide.set_progress_bar_config(disable=True)
    call = {"prompt": "a red cat", "guidance_scale": 3.0, "image": torch.rand(1, 3, 16, 16)}
    found = drawn(wide, **call)
    torch.testing.assert_close(found, plain, atol=1e-3, rtol=0.0)  # e(0, 0) is e(I, 0), for it has learned nothing yet
    taught_(wide.backbone.conv_in if backbone == "unet" else wide.backbone.pos_embed.proj, 4)
    edited = drawn(wide, **call)
    assert (edited - found).abs().max() > 1e-3
    wide.save_pretrained(tmp_path)
    again = hubgen.TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again, **call), edited)


def test_flux_may_be_taught_instructions(tmp_path: Path) -> None:
    """Its own further channels are a control's; `edit_input` says that they are a picture to be edited."""
    flux = widen(NETWORKS["FLUX.1 schnell"].build(seed=3), 4)
    taught_(flux.x_embedder, 16)
    parts = {**models.pipeline().components, "transformer": flux}
    pipe = hubgen.TextToImagePipeline(**parts, edit_input="instruction", default_side=16)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red cat", "image": torch.rand(1, 3, 16, 16)}
    found = drawn(pipe, **call)
    guided = drawn(pipe, **call, true_cfg_scale=3.0, negative_prompt="a dog", image_guidance_scale=2.0)
    assert torch.isfinite(found).all() and (guided - found).abs().max() > 1e-3
    pipe.save_pretrained(tmp_path)
    again = hubgen.TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again, **call), found)
    control = hubgen.TextToImagePipeline(**parts, default_side=16)
    with pytest.raises(ValueError, match="`control_image`: got None, expected a picture"):
        control(**call)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_a_widened_dit_edits_by_classes(variance: str, tmp_path: Path) -> None:
    dit = widen(NETWORKS["DiT"].build(seed=2), 4)
    taught_(dit.pos_embed.proj, 4)
    scheduler = hubgen.DDPMScheduler(variance_type=variance)
    pipe = hubgen.ClassToImagePipeline(vae=models.vae(), scheduler=scheduler, transformer=dit)
    pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [3], "image": torch.rand(1, 3, 16, 16), "guidance_scale": 3.0}
    found = drawn(pipe, **call)
    for changed in ({"image_guidance_scale": 4.0}, {"image": torch.rand(1, 3, 16, 16)}, {"guidance_scale": 1.0}):
        assert (drawn(pipe, **{**call, **changed}) - found).abs().max() > 1e-3
    pipe.save_pretrained(tmp_path)
    again = hubgen.ClassToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again, **call), found)
    with pytest.raises(ValueError, match="`image`: got None, expected a picture"):
        pipe([3])
