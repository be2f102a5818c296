"""Controls by the names of their files: what is opened is what a program makes, and asks for nothing more."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file

from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.controls.image_attention import Adapter
from hubgen.controls.image_encoders import PooledLatents, described
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.controls.opening import check_name, control_of, load_control, network, open_control, sees_pictures
from hubgen.controls.redux import Redux
from hubgen.formats.ip_adapter_files import SEEN_BY
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.spaces.kit.controls import find_controls, load_controls
from hubgen.training.kit.controlled import adapter_for
from hubgen.training.kit.groups import PictureAdapter
from tests import models, test_cli
from tests.formats.test_hub import run
from tests.hub.loopback import loopback_hub
from tests.ip_adapter_weights import clip, tensors
from tests.official_images import picture
from tests.parity import randomize_, same
from tests.test_cli import pixels

Official = Callable[[str], Path]
hubgen = test_cli.hubgen
OWN: dict[str, Callable[[Any], Any]] = {
    "latents": lambda vae: PooledLatents(vae, places=2, size=16),
    "efficientnet": lambda vae: EfficientNetLite0.from_pretrained(),
}


def drawn(pipe: Any, *controls: Any) -> torch.Tensor:
    return pipe(
        "a red cat",
        num_inference_steps=2,
        height=32,
        width=32,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        controls=list(controls),
    ).images


@pytest.mark.parametrize("name", OWN)
def test_an_adapter_that_was_trained_with_one_of_hubgens_encoders_needs_no_other(name: str, tmp_path: Path) -> None:
    pipe = models.pipeline("unet")
    pipe.set_progress_bar_config(disable=True)
    encoder = OWN[name](pipe.vae)
    trained = adapter_for(pipe, None, PictureAdapter(tokens=2), encoder)
    randomize_(trained.network, 4)
    file = tmp_path / "ip-adapter.safetensors"
    trained.save(file)
    expected = drawn(pipe, IPAdapter(Adapter.read(load_file(file)), picture(3), image_encoder=encoder))
    assert not torch.equal(expected, drawn(pipe))
    assert torch.equal(drawn(pipe, IPAdapter(file, picture(3))), expected)
    assert torch.equal(drawn(pipe, open_control(str(file), picture(3), pipe)), expected)
    pipe.register_modules(image_encoder=clip()[0], feature_extractor=clip()[1])  # which is for other adapters
    assert torch.equal(drawn(pipe, IPAdapter(file, picture(3))), expected)
    assert torch.equal(drawn(pipe, IPAdapter(tmp_path, picture(3))), expected)  # by its folder
    check_name(str(tmp_path), {})
    assert sees_pictures(str(tmp_path))
    assert torch.equal(drawn(pipe, open_control(str(tmp_path), picture(3), pipe)), expected)
    IPAdapter(file).save(tmp_path / "again.safetensors")
    IPAdapter(load_file(file), image_encoder=encoder).save(tmp_path / "by hand.safetensors")
    for copy in ("again", "by hand"):
        again = Adapter.read(tmp_path / f"{copy}.safetensors")
        assert same(again.network, trained.network) and again.seen_by == trained.seen_by == described(encoder)


def test_the_pipelines_encoders_see_while_their_weights_are_elsewhere(tmp_path: Path) -> None:
    pipe, (encoder, extractor) = models.pipeline("unet"), clip()
    pipe.register_modules(image_encoder=encoder, feature_extractor=extractor)
    pooled = PooledLatents(pipe.vae, places=2, size=16)
    own = IPAdapter.fresh(pipe.backbone, pooled.pooled_features, image_encoder=pooled)
    randomize_(own.network, 4)
    own.save(tmp_path / "own.safetensors")
    adapters = [
        IPAdapter(tmp_path / "own.safetensors", picture(3)),
        IPAdapter(own.adapter, picture(3), image_encoder=pooled),
        IPAdapter(tensors("base", pipe.backbone), picture(3)),
    ]
    expected = [drawn(pipe, adapter) for adapter in adapters]
    for part in (pipe.vae, pipe.image_encoder):
        cpu_offload(part, torch.device("cpu"))
    assert all(part.is_meta for part in pipe.vae.parameters())
    for adapter, latents in zip(adapters, expected, strict=True):
        assert torch.equal(drawn(pipe, adapter), latents)


def test_files_of_others_say_nothing_of_their_encoder(tmp_path: Path) -> None:
    unet, (encoder, _) = models.unet(), clip()
    assert described(encoder) is None
    IPAdapter(tensors("base", unet), image_encoder=encoder).save(tmp_path / "a.safetensors")
    save_file(tensors("base", unet), tmp_path / "b.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert Adapter.read(tmp_path / "a.safetensors").seen_by is None


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        "{}",
        '{"name": "CLIP"}',
        '{"name": ["PooledLatents"]}',
        '{"name": "PooledLatents", "places": 2}',
        '{"name": "PooledLatents", "places": 1.5, "size": 16}',
        '{"name": "PooledLatents", "places": 2, "size": 10000000}',
        '{"name": "EfficientNetLite0", "path": "/tmp/x.pth"}',
    ],
)
def test_an_encoder_that_is_not_known_is_told_and_may_be_given(said: str, tmp_path: Path) -> None:
    pipe = models.pipeline("unet")
    pipe.set_progress_bar_config(disable=True)
    encoder, file = PooledLatents(pipe.vae, places=2, size=16), tmp_path / "a.safetensors"
    adapter = Adapter.fresh(pipe.backbone, encoder.pooled_features)
    save_file(adapter.network.state_dict(), file, metadata={SEEN_BY: said})
    with pytest.raises(ValueError, match="`image_encoder`: got None, and the adapter's file names .*not known here"):
        drawn(pipe, IPAdapter(file, picture(3)))
    assert torch.isfinite(drawn(pipe, IPAdapter(file, picture(3), image_encoder=encoder))).all()


# ---- Redux ----


def test_the_folder_of_redux_is_opened_as_any_other(official: Official) -> None:
    folder = official("flux-redux")
    pipe = TextToImagePipeline.from_pretrained(official("flux-dev"))
    pipe.set_progress_bar_config(disable=True)
    expected = drawn(pipe, Redux.from_pretrained(folder, image=picture(3), scale=0.7))
    assert not torch.equal(expected, drawn(pipe))
    check_name(str(folder), {})
    assert sees_pictures(str(folder))
    assert torch.equal(drawn(pipe, open_control(str(folder), picture(3), pipe, scale=0.7)), expected)
    loaded = load_control(str(folder), pipe)
    assert torch.equal(drawn(pipe, control_of(loaded, picture(3), scale=0.7)), expected)
    assert torch.equal(drawn(pipe, control_of(loaded, picture(3), scale=0.7, end=0.4)), drawn(pipe))
    with pytest.raises(ValueError, match="flux-redux: got a FluxPriorReduxPipeline, expected one of ControlNetModel"):
        network(str(folder))


def test_a_page_offers_redux_beside_what_else_lies_in_a_folder(official: Official, tmp_path: Path) -> None:
    folder = official("flux-redux")
    (tmp_path / "look").symlink_to(folder)
    pipe = TextToImagePipeline.from_pretrained(official("flux-dev"))
    save_file(tensors("xlabs", pipe.backbone), tmp_path / "more.safetensors")
    offered = find_controls([str(tmp_path)], {})
    assert [(one.name, one.sees_pictures) for one in offered] == [("look", True), ("more", True)]
    assert [one.file for one in find_controls([str(folder)], {})] == [str(folder)]
    pipe.set_progress_bar_config(disable=True)
    loaded = load_controls(offered[:1], pipe, (32, 32))
    assert isinstance(control_of(loaded["look"], picture(3)), Redux)
    other = models.pipeline("unet")
    with pytest.raises(ValueError, match="HUBGEN_CONTROLS .*look: `controls`: got a Redux of .* features, expected"):
        load_controls(offered[:1], other, (32, 32))


def test_redux_networks_and_adapters_are_told_apart_on_the_hub(official: Official, tmp_path: Path) -> None:
    models.unet().save_pretrained(tmp_path / "unet")
    (tmp_path / "adapter").mkdir()
    IPAdapter.fresh(models.unet(), 12).save(tmp_path / "adapter" / "ip-adapter.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    with loopback_hub() as hub:
        for name, folder in {
            "redux": official("flux-redux"),
            "unet": tmp_path / "unet",
            "adapter": tmp_path / "adapter",
            "empty": tmp_path / "empty",
        }.items():
            hub.add(f"tester/{name}", folder)
        code = """
from hubgen.controls.image_attention import Adapter
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.controls.opening import class_of, load_control, network, sees_pictures
from tests import models

assert class_of("tester/redux") == "FluxPriorReduxPipeline" and sees_pictures("tester/redux")
loaded = load_control("tester/redux", models.pipeline("unet"))
assert type(loaded.embedder).__name__ == "ReduxImageEncoder"
with pytest.raises(ValueError, match="tester/unet: got a UNet2DConditionModel, expected one of ControlNetModel"):
    class_of("tester/unet")
assert sees_pictures("tester/adapter")
assert load_control("tester/adapter", models.pipeline("unet")).layout == IPAdapter("tester/adapter").adapter.layout
with pytest.raises(ValueError, match="tester/adapter: got a file of an IP-Adapter, expected one of ControlNetModel"):
    network("tester/adapter")
for name in ("empty", "nowhere"):
    with pytest.raises(OSError):
        Adapter.read(f"tester/{name}")
with pytest.raises(FileNotFoundError):
    Adapter.read("tester/adapter.safetensors")
with pytest.raises(OSError):
    class_of("tester/empty")
with pytest.raises(OSError):
    class_of("tester/nowhere")
"""
        run(code, hub, tmp_path / "home")


# ---- the command line ----


def test_the_command_shows_pictures_to_both_by_their_names_alone(
    hubgen: Callable[..., Any], official: Official, tmp_path: Path
) -> None:
    folder = official("flux-dev")
    pipe = TextToImagePipeline.from_pretrained(folder)
    encoder = PooledLatents(pipe.vae, places=2, size=32)
    adapter = IPAdapter.fresh(pipe.backbone, encoder.pooled_features, image_encoder=encoder)
    randomize_(adapter.network, 4)
    adapter.save(tmp_path / "look.safetensors")
    picture(3).save("cat.png")
    draw = ("generate", "a red cat", "--model", folder, "--num-inference-steps", 2, "--seed", 1, "--size", "32x32")
    assert hubgen(*draw, "--out", "plain.png").status == 0
    found = [pixels("plain.png")]
    for i, name in enumerate((tmp_path / "look.safetensors", official("flux-redux"))):
        result = hubgen(*draw, "--control", f"{name}=cat.png", "--out", f"{i}.png")
        assert result.status == 0, result.err
        found.append(pixels(f"{i}.png"))
    assert all((one != other).any() for one, other in itertools.combinations(found, 2))
