"""An IP-Adapter learns on every family, and nothing else does; its file is one that diffusers loads."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hubgen
from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.conditioning.predict import BackboneCall, predict
from hubgen.controls.control import Start, open_doors, opened
from hubgen.controls.image_attention import Adapter, attention, places
from hubgen.controls.image_encoders import PooledLatents, encode, encoder_of, pixels_of
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.data.order import Draw
from hubgen.training import train_ip_adapter
from hubgen.training.kit.beside import Seen, target_of
from hubgen.training.kit.controlled import WithPicture, adapter_for
from hubgen.training.kit.groups import Data, PictureAdapter
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.pictures import open_pictures
from tests import models
from tests.ip_adapter_weights import PROJECTED, clip, tensors
from tests.official_images import picture
from tests.parity import randomize_
from tests.training.conftest import example_of, quick_runs
from tests.training.test_train_controlnet import FAMILIES, checkpoint, losses, newest, told
from tests.training.test_train_controlnet import opened as base_of

Official = Callable[[str], Path]
Run = Callable[..., Path]
SEEN_WITH = {"latents": PooledLatents, "efficientnet": EfficientNetLite0}


@pytest.fixture
def run(problem: dict[str, str], tmp_path: Path) -> Iterator[Run]:
    encoder, extractor = clip()
    encoder.save_pretrained(tmp_path / "clip")
    extractor.save_pretrained(tmp_path / "clip")
    settings = {"adapter.image_encoder": str(tmp_path / "clip"), "adapter.tokens": 2}
    with quick_runs(train_ip_adapter, tmp_path, {"data.source": problem["data.source"], **settings}) as train:
        yield train


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_learns_on_every_family_and_its_file_is_the_same_one(
    run: Run, official: Official, family: str
) -> None:
    folder = run({"base.model": str(official(family)), "adapter.init": "zero"})
    file = folder / "ip_adapter" / "ip-adapter.safetensors"
    published, learnt = load_file(file), load_file(newest(folder) / "ip_adapter.safetensors")
    assert published.keys() == learnt.keys() == Adapter.read(file).network.state_dict().keys()
    assert all(torch.equal(value, published[key]) for key, value in learnt.items())
    assert any(value.abs().max() > 0 for key, value in learnt.items() if "to_v_ip" in key)
    assert {key.split(".")[0] for key in published} == {"image_proj", "ip_adapter"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_loss"] > 0
    with Image.open(folder / "validation" / "step-00000002.png") as grid:
        assert grid.size == (4 * 16, 2 * 16)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_draws_the_same_with_an_adapter_that_was_trained_here(
    run: Run, official: Official, family: str
) -> None:
    changes = {"base.model": str(official(family)), "run.max_train_steps": 4, "adapter.tokens": 4}
    folder = run(changes) / "ip_adapter"
    ours, theirs = (cls.from_pretrained(official(family)) for cls in (hubgen.TextToImagePipeline,
                                                                     diffusers.DiffusionPipeline))  # fmt: skip
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(str(folder), subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None)
    theirs.set_ip_adapter_scale(0.8)
    embeds = models.drawn(1, PROJECTED)
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}

    def latents(pipe: Any, **more: Any) -> torch.Tensor:
        return pipe("a cat", guidance_scale=3.0, generator=torch.Generator().manual_seed(0), **call, **more).images

    control = IPAdapter(folder / "ip-adapter.safetensors", image_embeds=embeds, scale=0.8)
    both = torch.stack([torch.zeros_like(embeds), embeds])
    expected = latents(theirs, ip_adapter_image_embeds=[both])
    found = latents(ours, controls=[control])
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (found - latents(ours)).abs().max() > 1e-3 * expected.std()


def with_picture(pipe: Any, init: str = "zero") -> WithPicture:
    """The base in evaluation mode, frozen, and an adapter whose weights are random."""
    pipe.backbone.eval().requires_grad_(False)
    adapter = adapter_for(pipe, None, PictureAdapter(tokens=2, init=init), clip()[0])  # type: ignore[arg-type]
    if init == "zero":
        randomize_(adapter.network, 7)
    return WithPicture(pipe, adapter)


@pytest.mark.parametrize("family", [*FAMILIES, "dit"])
@torch.no_grad()
def test_training_asks_base_and_adapter_as_sampling_does(official: Official, family: str) -> None:
    pipe = base_of(official, family)
    learner = with_picture(pipe)
    x_t, timestep, condition, _ = told(pipe)
    embeds = models.drawn(2, PROJECTED, seed=3)
    with learner.looking():
        found = learner(x_t, timestep, condition, embeds)
    target = replace(target_of(pipe, (32, 32), 2, x_t.device), timesteps=timestep[:1])
    adapter = Adapter("base", learner.learns)  # type: ignore[arg-type]
    control = IPAdapter(adapter, image_embeds=embeds[:, None])
    prepared = control.prepare(target, Start(x_t))
    with opened(pipe.backbone, [prepared]):
        call = BackboneCall(x_t, timestep, ("positive",), condition)
        expected = predict(pipe.backbone, x_t, timestep, condition, open_doors([prepared])(call))
    assert torch.equal(found, expected)
    assert (found - predict(pipe.backbone, x_t, timestep, condition)).abs().max() > 1e-3


@pytest.mark.parametrize("family", [*FAMILIES, "dit"])
def test_gradients_lie_in_the_adapter_alone_and_are_the_same_where_blocks_are_computed_again(
    official: Official, family: str
) -> None:
    found = []
    for checkpointing in (False, True):
        pipe = base_of(official, family)
        before = {key: value.clone() for key, value in pipe.backbone.state_dict().items()}
        learner = with_picture(pipe)
        if checkpointing:
            learner.enable_gradient_checkpointing()
        x_t, timestep, condition, _ = told(pipe)
        with learner.looking():
            learner(x_t, timestep, condition, models.drawn(2, PROJECTED, seed=3)).square().mean().backward()
        assert all(value.grad is not None for value in learner.parameters())
        assert all(value.grad is None for value in pipe.backbone.parameters())
        assert all(torch.equal(value, before[key]) for key, value in pipe.backbone.state_dict().items())
        found.append({name: value.grad for name, value in learner.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_keys_and_values_begin_as_those_of_the_text(official: Official) -> None:
    for family, names in (("sd1", ("to_k", "to_v")), ("sd3", ("add_k_proj", "add_v_proj"))):
        pipe = base_of(official, family)
        learner = with_picture(pipe, "text")
        for number, name in places(pipe.backbone, "base").items():
            layer, attn = learner.seen.network.layer(number), attention(pipe.backbone, name)
            assert torch.equal(layer.to_k_ip.weight, getattr(attn, names[0]).weight)
            assert torch.equal(layer.to_v_ip.weight, getattr(attn, names[1]).weight)


def test_a_run_made_longer_equals_one_that_was_that_long_and_caches_change_nothing(run: Run, tmp_path: Path) -> None:
    base = {"base.model": str(models.saved_pipeline(tmp_path / "base")), "data.mirror": True, "validation.samples": 0}
    base |= {"data.condition_dropout": 0.2, "run.gradient_accumulation_steps": 2, "optim.ema_decay": 0.9}
    long = run({**base, "run.max_train_steps": 5, "run.output_dir": str(tmp_path / "long")})
    run({**base, "run.max_train_steps": 3})
    short = run({**base, "run.max_train_steps": 5})
    ours, theirs = checkpoint(short), checkpoint(long)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    live = run({**base, "run.max_train_steps": 5, "run.output_dir": str(tmp_path / "live"), "data.cache": False})
    assert losses(live) == pytest.approx(losses(long), rel=1e-4)
    again = run(
        {**base, "run.max_train_steps": 5, "run.output_dir": str(tmp_path / "less"), "run.gradient_checkpointing": True}
    )
    assert losses(again) == pytest.approx(losses(long), rel=1e-4)


def test_what_is_left_out_is_the_empty_prompt_and_what_stands_for_no_picture(
    run: Run, tmp_path: Path, shown: list[tuple[Any, str, Any]]
) -> None:
    base = str(models.saved_pipeline(tmp_path / "base"))
    run({"base.model": base, "data.condition_dropout": 0.25, "run.max_train_steps": 12, "validation.samples": 0})
    assert len(shown) == 24 and len({out for out, *_ in shown}) == 4
    for out, caption, beside in shown:
        assert (caption == "") == out.text and bool((beside == 0).all()) == out.picture


def test_an_adapter_that_sees_patches_is_trained_further(run: Run, official: Official, tmp_path: Path) -> None:
    unet = hubgen.TextToImagePipeline.from_pretrained(official("sd1")).unet
    Adapter.read(tensors("plus", unet)).save(tmp_path / "plus.safetensors")
    changes = {"base.model": str(official("sd1")), "base.ip_adapter": str(tmp_path / "plus.safetensors")}
    folder = run({**changes, "data.condition_dropout": 0.3, "run.max_train_steps": 3})
    adapter = Adapter.read(folder / "ip_adapter" / "ip-adapter.safetensors")
    before = load_file(tmp_path / "plus.safetensors")
    assert adapter.layout == "plus"
    assert all(not torch.equal(value, before[key]) for key, value in adapter.network.state_dict().items()
               if "to_v_ip" in key)  # fmt: skip


def test_every_image_encoder_says_the_same_in_training_and_in_sampling(problem: dict[str, str]) -> None:
    pictures = open_pictures(Data(source=problem["data.source"], size=16), "train", 0, side=16)
    vae = models.vae()
    for encoder in (clip()[0], randomize_(EfficientNetLite0()), PooledLatents(vae, places=2, size=16)):
        control = IPAdapter(Adapter.fresh(models.unet(), len_of(encoder), 2), [pictures.examples.picture(0)],
                            image_encoder=encoder)  # fmt: skip
        pipe = models.pipeline("unet")
        target = target_of(pipe, (16, 16), 1, torch.device("cpu"))
        control.check(target)
        seen = Seen(pictures, encoder, None, control.adapter)
        seen.sources(0, None)
        draws = [Draw(0, 0), Draw(1, 1)]
        found = seen.shown(seen.read(draws), draws, [True, False], torch.device("cpu"))
        assert torch.allclose(found[:1], control.embeds_of(target)[0][0], atol=1e-5)
        assert found[0].abs().max() > 0 and not found[1].any()


def len_of(encoder: Any) -> int:
    return encode(encoder, pixels_of([Image.new("RGB", (20, 20))], encoder), False).shape[1]


@pytest.mark.parametrize("name", ["latents", "efficientnet", "clip"])
def test_the_example_of_a_card_runs_and_names_an_encoder_only_where_the_file_does_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    encoder = {} if name == "clip" else {"adapter.image_encoder": name}
    base = models.saved_pipeline(tmp_path / "base")
    folder = run({"base.model": str(base), "run.max_train_steps": 6, **encoder}) / "ip_adapter"
    torch.manual_seed(1)
    found = example_of(folder / "README.md", monkeypatch, picture())
    assert ("image_encoder=" in (folder / "README.md").read_text()) == (name == "clip")
    seen_with = {"image_encoder": clip()[0]} if name == "clip" else {}
    control = IPAdapter(folder, image=picture(), **seen_with)
    torch.manual_seed(1)
    pipe = hubgen.TextToImagePipeline.from_pretrained(base)
    expected = pipe("", controls=[control]).images[0]
    assert found.tobytes() == expected.tobytes()
    if name == "clip":
        assert control.features == PROJECTED and control.adapter.seen_by is None
        return
    named = encoder_of(str(control.adapter.seen_by), models.vae(), torch.device("cpu"))  # by the file, for any call
    assert control.features == named.pooled_features and type(named) is SEEN_WITH[name]
    assert name != "latents" or (named.places, named.image_size) == (4, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter.image_encoder": None}, "'adapter.image_encoder': got none, and the base has none"),
        ({"adapter.image_encoder": "/nowhere"}, "'adapter.image_encoder': /nowhere"),
        ({"base.ip_adapter": "/nowhere"}, "'base.ip_adapter': /nowhere"),
        ({"data.condition_dropout": 0.4}, "'data.condition_dropout'"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(run: Run, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base = str(models.saved_pipeline(tmp_path / "base"))
    with pytest.raises(SettingsError, match=message) as error:
        run({"base.model": base, **changes})
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "cache").exists()


def test_the_grid_shows_what_the_adapter_does(run: Run, tmp_path: Path) -> None:
    folder = run({"base.model": str(models.saved_pipeline(tmp_path / "base")), "run.max_train_steps": 6})
    with Image.open(folder / "validation" / "step-00000006.png") as opened_grid:
        grid = np.asarray(opened_grid).astype(int)
    picture, half, whole, without = (grid[:, 16 * i : 16 * (i + 1)] for i in range(4))
    assert (half != without).any() and (whole != half).any() and (picture != without).any()
