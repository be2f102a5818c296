"""IP-Adapters in the one pipeline: the latents of diffusers' pipelines, and what must stay bit-equal."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from safetensors.torch import save_file

import hubgen
from hubgen.controls.image_attention import Adapter
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.controls.seen_pictures import InCall
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests import models
from tests.ip_adapter_weights import FACE, PROJECTED, clip, siglip, tensors
from tests.official_images import mask, picture
from tests.parity import randomize_

Official = Callable[[str], Path]
Pipes = Callable[[str], Any]
CALL: dict[str, Any] = {"prompt": "a red cat", "guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "latent"}
SIZE: dict[str, Any] = {"height": 32, "width": 40}
CELLS = [
    *[("sd1", layout) for layout in ("base", "full", "plus", "faceid")],
    *[("sdxl", layout) for layout in ("base", "plus")],
    *[("sd3", "sd3"), ("sd3.5", "sd3"), ("flux-dev", "xlabs"), ("flux-schnell", "xlabs")],
]
"""What diffusers has a pipeline for"""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class Sides:
    """Ours and diffusers' pipelines of the same parts; theirs with an adapter in it, on a backbone of its own."""

    def __init__(self, ours: Any, folder: Path, path: Path):
        self.ours, self.folder, self.path = ours, folder, path
        self.base = diffusers.DiffusionPipeline.from_pretrained(folder)
        self.base.set_progress_bar_config(disable=True)
        self.part = "unet" if hasattr(self.base, "unet") else "transformer"

    @property
    def flux(self) -> bool:
        return "flux" in self.folder.name or "Flux" in type(self.ours.backbone).__name__

    def theirs(
        self, *layouts: str, encoder: Any = (None, None), paths: list[Path] | None = None, backbone: Any = None
    ) -> Any:
        pipe = copy.copy(self.base)
        own = copy.deepcopy(getattr(self.base, self.part)) if backbone is None else backbone
        pipe.register_modules(**{self.part: own})
        pipe.register_modules(image_encoder=encoder[0], feature_extractor=encoder[1])
        files = [self.path / f"{layout}.safetensors" for layout in layouts] if paths is None else paths
        names = [file.name for file in files]
        parent = str(files[0].parent)
        if self.flux:
            pipe.load_ip_adapter(parent, names, image_encoder_pretrained_model_name_or_path=None)
        elif "SD3" in type(self.ours.backbone).__name__:
            pipe.load_ip_adapter(parent, names[0], "", image_encoder_folder=None)
        else:
            pipe.load_ip_adapter(parent, "", names, image_encoder_folder=None)
        return pipe

    def written(self, layout: str, seed: int = 0, name: str | None = None) -> Path:
        path = self.path / f"{layout if name is None else name}.safetensors"
        save_file(tensors(layout, self.ours.backbone, seed), path)
        return path

    def drawn(self, controls: list[IPAdapter], **call: Any) -> torch.Tensor:
        return self.ours(**{**CALL, **SIZE, **call}, controls=controls, generator=seeded()).images

    def same(self, found: torch.Tensor, pipe: Any, **call: Any) -> None:
        expected = pipe(**{**CALL, **SIZE, **call}, generator=seeded()).images
        if expected.ndim == 3:
            expected = diffusers.FluxPipeline._unpack_latents(expected, *found.shape[-2:], 1)
        assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.fixture(scope="module")
def sides(official: Official, pipes: Pipes, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sides]:
    @functools.cache
    def get(name: str) -> Sides:
        return Sides(pipes(name), official(name), tmp_path_factory.mktemp(name))

    return get


def encoder_of(layout: str) -> tuple[Any, Any]:
    return siglip() if layout in ("sd3", "instantx") else clip()


def guided(name: str) -> dict[str, Any]:
    """Further arguments of a call with two branches."""
    return {"negative_prompt": "a big dog", "true_cfg_scale": 3.0} if name.startswith("flux") else {}


@pytest.mark.parametrize(("name", "layout"), CELLS)
def test_latents_are_those_of_diffusers(name: str, layout: str, sides: Callable[[str], Sides]) -> None:
    both, encoder = sides(name), encoder_of(layout)
    path, call = both.written(layout), guided(name)
    pipe = both.theirs(layout, encoder=encoder)
    pipe.set_ip_adapter_scale(0.7)
    shown: dict[str, Any] = {"image": picture(3), "image_encoder": encoder[0], "feature_extractor": encoder[1]}
    theirs: dict[str, Any] = {"ip_adapter_image": picture(3)}
    if layout == "faceid":
        face = torch.randn(1, FACE, generator=seeded())
        shown = {"image_embeds": face}
        theirs = {"ip_adapter_image_embeds": [torch.stack([torch.zeros_like(face), face])]}
    adapter = IPAdapter(path, scale=0.7, **shown)
    if layout == "faceid":
        both.ours.load_lora_weights(adapter.lora(both.ours.backbone))
    found = both.drawn([adapter], **call)
    if layout == "faceid":
        both.ours.unload_lora_weights()
    plain = both.drawn([], **call)
    assert (found - plain).abs().max() > 0.05 * plain.std(), "the picture changes next to nothing"
    both.same(found, pipe, **call, **theirs)
    if layout != "faceid":
        written = both.path / "ours.safetensors"
        adapter.save(written)
        both.same(found, scaled(both.theirs(paths=[written], encoder=encoder)), **call, **theirs)


def test_a_call_without_the_lora_layers_of_faceid_says_how_to_have_them(
    sides: Callable[[str], Sides], caplog: pytest.LogCaptureFixture
) -> None:
    both = sides("sd1")
    adapter = Adapter.read(both.written("faceid"))
    face = {"image_embeds": torch.randn(1, FACE, generator=seeded())}
    weights = adapter.lora_of(both.ours.unet)

    def said(**options: Any) -> bool:
        caplog.clear()
        both.drawn([IPAdapter(adapter, **face, **options)])
        return "pipe.load_lora_weights(adapter.lora(pipe.unet), adapter_name=" in caplog.text

    assert said() and not said(scale=0)
    both.ours.load_lora_weights({key: -value for key, value in weights.items()}, adapter_name="another")
    assert said()
    both.ours.load_lora_weights(weights, adapter_name="faceid")
    assert not said()
    both.ours.unload_lora_weights()
    assert said()
    assert IPAdapter(Adapter.read(tensors("base", both.ours.unet))).lora(both.ours.unet) == {}


def scaled(pipe: Any, scale: Any = 0.7) -> Any:
    pipe.set_ip_adapter_scale(scale)
    return pipe


# ---- several pictures, adapters, scales, masks, as diffusers has them ----


def given(layout: str, image: Any, **more: Any) -> dict[str, Any]:
    encoder, extractor = encoder_of(layout)
    return {"image": image, "image_encoder": encoder, "feature_extractor": extractor, **more}


@pytest.mark.parametrize(("name", "layout"), [("sd1", "base"), ("sdxl", "plus"), ("flux-dev", "xlabs")])
def test_two_adapters_of_several_pictures_add_up_as_in_diffusers(
    name: str, layout: str, sides: Callable[[str], Sides]
) -> None:
    both, call = sides(name), {**guided(name), "num_images_per_prompt": 2}
    paths = [both.written(layout), both.written(layout, seed=1, name="second")]
    pipe = scaled(both.theirs(paths=paths, encoder=encoder_of(layout)), [0.7, 0.5])
    pictures = [picture(3), picture(4)]
    adapters = [
        IPAdapter(paths[0], **given(layout, pictures), scale=0.7),
        IPAdapter(paths[1], **given(layout, picture(5)), scale=0.5),
    ]
    both.same(both.drawn(adapters, **call), pipe, **call, ip_adapter_image=[pictures, [picture(5)]])


@pytest.mark.parametrize("layout", ["base", "plus"])
def test_masks_are_those_of_diffusers(layout: str, sides: Callable[[str], Sides]) -> None:
    both, masks = sides("sd1"), [mask(1), mask(2)]
    pictures = [picture(3), picture(4)]
    path = both.written(layout)
    pipe = scaled(both.theirs(layout, encoder=encoder_of(layout)))
    shown = IPAdapterMaskProcessor().preprocess(masks, **SIZE).transpose(0, 1)  # (1, n, H, W)
    found = both.drawn([IPAdapter(path, **given(layout, pictures), scale=0.7, mask=masks)])
    assert (found - both.drawn([IPAdapter(path, **given(layout, pictures), scale=0.7)])).abs().max() > 1e-2
    both.same(found, pipe, ip_adapter_image=[pictures], cross_attention_kwargs={"ip_adapter_masks": [shown]})


@pytest.mark.parametrize("layout", ["xlabs", "instantx"])
def test_masks_lie_on_the_result_where_another_picture_stands_beside_it(layout: str, official: Official) -> None:
    pipe = TextToImagePipeline.from_pretrained(official("flux-kontext"), default_side=32)
    pipe.set_progress_bar_config(disable=True)
    adapter = Adapter.read(tensors(layout, pipe.backbone))
    added: list[torch.Tensor] = []
    """To the image tokens of the layers in their order: (1, L, D), x_t's in front of the shown picture's"""

    def drawn(where: torch.Tensor | None) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            look = InCall.look
            added.clear()

            def watched(seen: InCall, *call: Any) -> torch.Tensor | None:
                found = look(seen, *call)
                assert found is not None
                added.append(found[:, -call[-1].query.shape[1] :])
                return found

            patch.setattr(InCall, "look", watched)
            control = IPAdapter(adapter, **given(layout, picture(3)), mask=where)
            return pipe(**CALL, height=32, width=32, image=picture(1), controls=[control], generator=seeded()).images

    half = torch.zeros(1, 1, 32, 32)
    half[..., 16:] = 1  # the right one
    plain = drawn(None)
    everywhere = added.copy()
    assert torch.equal(drawn(torch.ones(1, 1, 32, 32)), plain)
    assert not torch.equal(drawn(half), plain)
    right = half[0, 0, ::8, ::8].flatten().bool()  # (16,), a token has 8 x 8 pixels
    before, after = everywhere[0], added[0]  # of the first layer, whose input is the same
    assert before.shape[1] > len(right) == 16
    assert torch.equal(after[:, :16][:, right], before[:, :16][:, right]) and before.abs().amin() > 0
    assert not after[:, :16][:, ~right].any()
    assert torch.equal(after[:, 16:], 0.5 * before[:, 16:])


SCALES: list[tuple[str, str, Any]] = [
    ("sd1", "base", {"up": {"block_1": [0, 1]}}),
    ("sd1", "base", {"down": {"block_0": [0.3]}, "mid": 0.5}),
    ("sdxl", "base", {"up": 0.6}),
    ("flux-dev", "xlabs", [0.3, 0.9]),
]


@pytest.mark.parametrize(("name", "layout", "scale"), SCALES)
def test_scales_of_single_layers_are_those_of_diffusers(
    name: str, layout: str, scale: Any, sides: Callable[[str], Sides]
) -> None:
    both = sides(name)
    path = both.written(layout)
    pipe = scaled(both.theirs(layout, encoder=encoder_of(layout)), scale)
    both.same(
        both.drawn([IPAdapter(path, **given(layout, picture(3)), scale=scale)]), pipe, ip_adapter_image=picture(3)
    )


def test_embeddings_serve_in_place_of_pictures(sides: Callable[[str], Sides]) -> None:
    both, (encoder, extractor) = sides("sd1"), clip()
    for layout in ("base", "plus"):
        adapter = Adapter.read(both.written(layout))
        shown = IPAdapter(adapter, **given(layout, picture(3)))
        pixels = extractor([picture(3)], return_tensors="pt").pixel_values
        with torch.no_grad():
            out, black = (encoder(x, output_hidden_states=True) for x in (pixels, torch.zeros_like(pixels)))
        embeds: Any = out.image_embeds
        if layout == "plus":
            embeds = out.hidden_states[-2], black.hidden_states[-2]
        assert torch.equal(both.drawn([IPAdapter(adapter, image_embeds=embeds)]), both.drawn([shown]))


def test_every_result_may_be_shown_a_picture_of_its_own() -> None:
    pipe, embeds = models.pipeline(), torch.randn(2, 1, PROJECTED, generator=seeded())
    adapter = Adapter.fresh(pipe.backbone, PROJECTED)
    randomize_(adapter.network)
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    both = pipe(
        ["a cat", "a dog"], generator=models.seeded(1, 2), **call, controls=[IPAdapter(adapter, image_embeds=embeds)]
    )
    for i, prompt in enumerate(["a cat", "a dog"]):
        shown = IPAdapter(adapter, image_embeds=embeds[i])
        alone = pipe(prompt, generator=models.seeded(i + 1), **call, controls=[shown]).images
        assert (both.images[i] - alone[0]).abs().max() < 1e-4


def test_the_encoder_may_be_the_pipelines(sides: Callable[[str], Sides]) -> None:
    both, (encoder, extractor) = sides("sd1"), clip()
    adapter = Adapter.read(both.written("base"))
    expected = both.drawn([IPAdapter(adapter, picture(3), image_encoder=encoder, feature_extractor=extractor)])
    assert torch.equal(both.drawn([IPAdapter(adapter, picture(3), image_encoder=encoder)]), expected)
    ours = copy.copy(both.ours)
    ours.register_modules(image_encoder=encoder, feature_extractor=extractor)
    found = ours(**CALL, **SIZE, controls=[IPAdapter(adapter, picture(3))], generator=seeded()).images
    assert torch.equal(found, expected)


# ---- diffusers' pipelines and loaders with hubgen's backbones ----


@pytest.mark.parametrize(("name", "layout"), CELLS)
def test_diffusers_loads_adapters_into_our_backbones(name: str, layout: str, sides: Callable[[str], Sides]) -> None:
    both, encoder = sides(name), encoder_of(layout)
    both.written(layout)
    theirs: dict[str, Any] = {**guided(name), "ip_adapter_image": picture(3)}
    if layout == "faceid":
        face = torch.randn(1, FACE, generator=seeded())
        theirs = {"ip_adapter_image_embeds": [torch.stack([torch.zeros_like(face), face])]}
    expected = scaled(both.theirs(layout, encoder=encoder))
    own = type(both.ours.backbone).from_pretrained(both.folder, subfolder=both.part)
    mixed = both.theirs(layout, encoder=encoder, backbone=own)
    scaled(mixed)
    found = mixed(**{**CALL, **SIZE, **theirs}, generator=seeded()).images
    reference = expected(**{**CALL, **SIZE, **theirs}, generator=seeded()).images
    assert (found - reference).abs().max() < 1e-4 * reference.std()
    if not name.startswith("sd3"):  # whose pipeline has no way back
        mixed.unload_ip_adapter()
        found = mixed(**{**CALL, **SIZE, **guided(name)}, generator=seeded()).images
        assert (found - reference).abs().max() > 0.02 * reference.std()


# ---- what must stay bit-equal ----

FAMILIES = [("sd1", "plus"), ("sdxl", "base"), ("sd3", "sd3"), ("flux-dev", "xlabs"), ("flux-dev", "instantx")]


@pytest.mark.parametrize(("name", "layout"), FAMILIES)
def test_one_that_is_off_is_not_run_and_changes_nothing(name: str, layout: str, sides: Callable[[str], Sides]) -> None:
    both, calls = sides(name), list[str]()
    adapter = Adapter.read(tensors(layout, both.ours.backbone))
    shown = given(layout, picture(3))
    adapter.network.image_proj.register_forward_hook(lambda *_: calls.append("projected"))
    shown["image_encoder"].register_forward_hook(lambda *_: calls.append("encoded"))
    plain = both.drawn([])
    layers = len(adapter.network.numbers)
    for number in adapter.network.numbers:
        adapter.network.layer(number).register_forward_hook(lambda *_: calls.append("keys and values"))
    for off in ({"scale": 0}, {"scale": [0] * layers}, {"start": 0.4, "end": 0.6}):
        assert torch.equal(both.drawn([IPAdapter(adapter, **shown, **off)]), plain)
    assert calls == []
    processors = dict(both.ours.backbone.attn_processors)
    changed = both.drawn([IPAdapter(adapter, **shown, end=0.7)])
    assert (changed - plain).abs().max() > 0.02 * plain.std()
    # Of both branches, of which FLUX has one here: once, or at each of two steps; keys and values are of both at once.
    once = 2 if layout == "sd3" else 1
    assert calls.count("projected") == once * (1 if name == "flux-dev" else 2)
    assert calls.count("keys and values") == once * layers
    assert dict(both.ours.backbone.attn_processors) == processors
    assert not any(one.parts for one in processors.values())
    assert torch.equal(both.drawn([]), plain)


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_processors_are_those_of_before_after_an_exception(kind: str) -> None:
    pipe = models.pipeline(kind)
    adapter = IPAdapter.fresh(pipe.backbone, PROJECTED, image_embeds=torch.randn(1, PROJECTED))
    before = dict(pipe.backbone.attn_processors)

    def stop(*_: Any) -> dict[str, Any]:
        assert any(one.parts for one in before.values())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a cat", num_inference_steps=2, controls=[adapter], callback_on_step_end=stop)
    assert list(pipe.backbone.attn_processors.items()) == list(before.items())
    assert not any(one.parts for one in before.values())


@pytest.mark.parametrize(("name", "layout"), [("sd1", "base"), ("sd3.5", "sd3"), ("flux-dev", "instantx")])
def test_acceleration_and_half_precision_take_it_along(
    name: str, layout: str, official: Official, tmp_path: Path
) -> None:
    both = Sides(TextToImagePipeline.from_pretrained(official(name)), official(name), tmp_path)
    both.ours.set_progress_bar_config(disable=True)
    control = IPAdapter(tensors(layout, both.ours.backbone), **given(layout, picture(3)), scale=0.7, mask=mask(1))
    plain, without = both.drawn([control]), both.drawn([])
    hubgen.optimize(both.ours)
    for _ in range(2):
        assert (both.drawn([control]) - plain).abs().max() < 1e-5 * plain.std()
    assert (both.drawn([]) - without).abs().max() < 1e-5 * without.std()
    both.ours.to(torch.bfloat16)
    half = both.drawn([control])
    assert half.isfinite().all() and (half.float() - plain).abs().mean() < 0.3 * plain.std()
