"""IP-Adapters in the one pipeline: the latents of diffusers' pipelines, and what must stay bit-equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from safetensors.torch import save_file
from torch.nn import functional as F

import hubgen
from hubgen.backbones.unet_condition_config import stable_diffusion_1, stable_diffusion_xl
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import BackboneCall
from hubgen.controls.control import Start, opened
from hubgen.controls.image_attention import Adapter, layer_scales, places
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests import models
from tests.controls.test_control import target
from tests.ip_adapter_weights import FACE, HIDDEN, PROJECTED, clip, siglip, tensors
from tests.official_images import mask, picture
from tests.parity import randomize_

Official = Callable[[str], Path]
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
    """Ours and diffusers' pipelines of the same parts; theirs with an adapter in it, so each test has its own."""

    def __init__(self, folder: Path, path: Path):
        self.ours = TextToImagePipeline.from_pretrained(folder)
        self.folder, self.path = folder, path
        self.ours.set_progress_bar_config(disable=True)

    @property
    def flux(self) -> bool:
        return "flux" in self.folder.name or "Flux" in type(self.ours.backbone).__name__

    def theirs(
        self, *layouts: str, encoder: Any = (None, None), paths: list[Path] | None = None, backbone: Any = None
    ) -> Any:
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder)
        if backbone is not None:
            pipe.register_modules(**{"unet" if hasattr(pipe, "unet") else "transformer": backbone})
        pipe.set_progress_bar_config(disable=True)
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


@pytest.fixture
def sides(official: Official, tmp_path: Path) -> Callable[[str], Sides]:
    return lambda name: Sides(official(name), tmp_path)


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
    both.ours.register_modules(image_encoder=encoder, feature_extractor=extractor)
    assert torch.equal(both.drawn([IPAdapter(adapter, picture(3))]), expected)


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
    mixed = both.theirs(layout, encoder=encoder, backbone=both.ours.backbone)
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
def test_acceleration_and_half_precision_take_it_along(name: str, layout: str, sides: Callable[[str], Sides]) -> None:
    both = sides(name)
    control = IPAdapter(tensors(layout, both.ours.backbone), **given(layout, picture(3)), scale=0.7, mask=mask(1))
    plain, without = both.drawn([control]), both.drawn([])
    hubgen.optimize(both.ours)
    for _ in range(2):
        assert (both.drawn([control]) - plain).abs().max() < 1e-5 * plain.std()
    assert (both.drawn([]) - without).abs().max() < 1e-5 * without.std()
    both.ours.to(torch.bfloat16)
    half = both.drawn([control])
    assert half.isfinite().all() and (half.float() - plain).abs().mean() < 0.3 * plain.std()


# ---- fresh ones, training ----


@pytest.mark.parametrize("name", ["SD 1.x", "SDXL", "SD 3.5", "FLUX.1 dev", "DiT"])
def test_a_fresh_one_changes_nothing_and_learns(name: str, tmp_path: Path) -> None:
    network = models.NETWORKS[name]
    backbone, inputs = network.build().requires_grad_(False), network.inputs()
    adapter = IPAdapter.fresh(backbone, PROJECTED)
    embeds = torch.randn(2, PROJECTED, generator=seeded())
    with adapter.attached(backbone, embeds):
        out = backbone(**inputs)[0]
    assert torch.equal(out, backbone(**inputs)[0])
    out.square().mean().backward()
    numbers = adapter.adapter.network.numbers
    for number in numbers:
        layer = adapter.adapter.network.layer(number)
        assert layer.to_v_ip.weight.grad.abs().max() > 0 and not layer.to_k_ip.weight.grad.any()
    assert all(parameter.grad is None for parameter in backbone.parameters())

    randomize_(adapter.network)
    adapter.save(tmp_path / "own.safetensors")
    again = IPAdapter(tmp_path / "own.safetensors")
    with torch.no_grad(), adapter.attached(backbone, embeds):
        first = backbone(**inputs)[0]
    with torch.no_grad(), again.attached(backbone, embeds):
        assert torch.equal(backbone(**inputs)[0], first)
    assert not torch.equal(first, out)


@torch.no_grad()
def test_classes_go_with_pictures_too(official: Official) -> None:
    pipe = ClassToImagePipeline.from_pretrained(official("dit"))
    pipe.set_progress_bar_config(disable=True)
    adapter = IPAdapter.fresh(pipe.backbone, PROJECTED, image_embeds=torch.randn(1, PROJECTED, generator=seeded()))
    call: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 2, "output_type": "latent"}
    plain = pipe(**call, generator=seeded()).images
    assert torch.equal(pipe(**call, generator=seeded(), controls=[adapter]).images, plain)
    randomize_(adapter.network)
    assert not torch.equal(pipe(**call, generator=seeded(), controls=[adapter]).images, plain)


# ---- one attention ----


ONE_ATTENTION = [
    ("SD 1.x", "base"),
    ("SD 3", "sd3"),
    ("FLUX.1 dev", "xlabs"),
    ("FLUX.1 dev", "instantx"),
    ("DiT", "base"),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), ONE_ATTENTION)
def test_half_masks_act_on_their_half_alone_and_a_full_one_is_none(name: str, layout: str) -> None:
    """Of pictures of 64 pixels on 8 x 8 tokens, so that the bicubic reduction is exact where halves are flat."""
    backbone = models.NETWORKS[name].build()
    adapter = Adapter.read(tensors(layout, backbone))
    projection = adapter.network.image_proj
    shape = (1, 3, HIDDEN) if projection.reads_patches else (1, projection.image_features)
    processor = adapter.names(backbone)[adapter.network.numbers[0]]
    attn = backbone.get_submodule(processor.removesuffix(".processor"))
    x = torch.randn(1, 64, attn.query_dim, generator=seeded())
    context = torch.randn(1, 5, attn.cross_attention_dim, generator=seeded())
    texts = () if name == "DiT" else (context,)

    def seen(scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
        embeds = torch.randn(shape, generator=seeded()).repeat(
            1 if mask is None else len(mask), *[1] * (len(shape) - 1)
        )
        control = IPAdapter(adapter, image_embeds=embeds, scale=scale, mask=mask)
        there = target(backbone, batch=1, size=(64, 64), branches=("positive",))
        prepared = control.prepare(there, Start(x))
        prepared.before_call(BackboneCall(x, torch.tensor([500.0]), ("positive",), Condition()))
        with opened(backbone, [prepared]):
            out = attn(x, *texts)
        if layout == "xlabs":  # what goes behind the MLP, apart from the attention
            return out[2] if scale else torch.zeros_like(out[0])
        return out[0] if isinstance(out, tuple) else out

    halves = torch.zeros(2, 1, 64, 64)
    halves[0, :, :32], halves[1, :, 32:] = 1, 1
    none, full, whole = seen(0), seen(0.8), seen(0.8, torch.ones(1, 1, 64, 64))
    top, bottom, both = seen(0.8, halves[:1]), seen(0.8, halves[1:]), seen(0.8, halves)
    assert (full - none).abs().max() > 1e-2
    for found, first, second in [(whole, full, full), (top, full, none), (bottom, none, full), (both, full, full)]:
        assert (found[:, :32] - first[:, :32]).abs().max() < 2e-6
        assert (found[:, 32:] - second[:, 32:]).abs().max() < 2e-6


@torch.no_grad()
def test_instantx_adds_normalised_keys_to_all_tokens_of_a_single_block() -> None:
    backbone = models.NETWORKS["FLUX.1 dev"].build()
    adapter = Adapter.read(tensors("instantx", backbone))
    control, embeds = IPAdapter(adapter, scale=0.7), torch.randn(1, HIDDEN, generator=seeded())
    attn, number = backbone.single_transformer_blocks[0].attn, backbone.config.num_layers
    x = torch.randn(1, 9, attn.query_dim, generator=seeded())  # 5 text tokens in front
    plain = attn(x)
    with control.attached(backbone, embeds):
        found = attn(x, text_tokens=5)
    tokens, layer = adapter.network.image_proj(embeds), adapter.network.layer(number)
    heads = [
        one.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for one in (attn.to_q(x), layer.to_k_ip(tokens), layer.to_v_ip(tokens))
    ]
    query, key = attn.norm_q(heads[0]), F.rms_norm(heads[1], heads[1].shape[-1:], eps=1e-5)
    expected = plain + 0.7 * F.scaled_dot_product_attention(query, key, heads[2]).transpose(1, 2).flatten(2)
    assert (found - expected).abs().max() < 1e-5


# ---- numbers of layers ----


@pytest.mark.parametrize(
    ("config", "count", "first_up", "mid"), [(stable_diffusion_1(), 16, 12, 30), (stable_diffusion_xl(), 70, 48, 120)]
)
def test_layers_are_counted_down_up_and_in_the_middle(config: Any, count: int, first_up: int, mid: int) -> None:
    with torch.device("meta"):
        unet = hubgen.UNet2DConditionModel(**config)
    found = places(unet, "base")
    assert len(found) == count and list(found) == list(range(1, 2 * count, 2))
    assert all(name.endswith("attn2.processor") for name in found.values())
    ways = [name.partition("_")[0] for name in found.values()]
    assert [way for way in ("down", "up", "mid") for _ in range(ways.count(way))] == ways
    assert found[first_up + 1].startswith("up_blocks") and found[first_up - 1].startswith("down_blocks")
    assert found[mid + 1].startswith("mid_block") and found[mid - 1].startswith("up_blocks")


def test_instant_style_names_one_attention_of_sdxl() -> None:
    with torch.device("meta"):
        names = places(hubgen.UNet2DConditionModel(**stable_diffusion_xl()), "base")
    style = layer_scales({"up": {"block_0": [0, 1, 0]}}, names)
    assert [names[n] for n, scale in style.items() if scale] == [
        f"up_blocks.0.attentions.1.transformer_blocks.{i}.attn2.processor" for i in range(10)
    ]


# ---- bad input ----


def test_bad_values_are_refused_by_name(tmp_path: Path) -> None:
    unet = models.unet()
    base, plus, face = (Adapter.read(tensors(layout, unet)) for layout in ("base", "plus", "faceid"))
    embeds = torch.zeros(1, PROJECTED)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (base, {"image": picture(), "image_embeds": embeds}, "`image`, `image_embeds`: got both"),
        (base, {"image": torch.zeros(1, 4, 8, 8)}, "`image`: got shape"),
        (base, {"image_embeds": torch.zeros(1, 3)}, "`image_embeds`: got 3 features, expected 12"),
        (base, {"image_embeds": torch.zeros(PROJECTED)}, r"`image_embeds`: got \(12,\), expected numbers \(n, F\)"),
        (plus, {"image_embeds": torch.zeros(1, HIDDEN)}, r"expected numbers \(n, P, F\)"),
        (base, {"image_embeds": (embeds, torch.zeros(2, PROJECTED))}, "expected one, or a pair of the same shape"),
        (base, {"image_embeds": embeds * torch.nan}, "expected finite"),
        (face, {"image": picture()}, "`image`: got pictures, expected `image_embeds`: IP-Adapter FaceID"),
        (base, {"image": picture(), "mask": [mask(), mask()]}, "`mask`: got 2, expected 1"),
        (base, {"image": picture(), "scale": float("nan")}, "`scale`: got nan"),
        (base, {"image": picture(), "scale": {"middle": 1}}, "`scale`: got the key 'middle'"),
        (base, {"image": picture(), "start": 0.5, "end": 0.5}, "`start`, `end`"),
    ]
    for adapter, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            IPAdapter(adapter, **options)
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        IPAdapter(tmp_path / "none.safetensors")


def test_what_does_not_fit_the_call_is_refused_before_any_network_runs() -> None:
    pipe, calls = models.pipeline("unet"), list[str]()
    for network in (pipe.unet, pipe.text_encoder, pipe.vae):
        network.register_forward_hook(lambda *_: calls.append("run"))
    weights = tensors("base", pipe.unet)
    base, other = Adapter.read(weights), Adapter.fresh(models.transformer(), PROJECTED)
    renamed = {key.replace("ip_adapter.5.", "ip_adapter.4."): value for key, value in weights.items()}
    short = {key: value for key, value in weights.items() if not key.startswith("ip_adapter.1.")}
    embeds = torch.zeros(1, PROJECTED)
    wide = siglip()[0]
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (base, {}, "`image`, `image_embeds`: got neither"),
        (base, {"image": picture()}, "`image_encoder`: got None, and the pipeline has none"),
        (base, {"image": picture(), "image_encoder": wide}, "`image_encoder`: got one of 16 features, expected 12"),
        (base, {"image": picture(), "image_encoder": pipe.vae}, "`image_encoder`: got AutoencoderKL"),
        (base, {"image_embeds": embeds, "scale": [1, 2]}, r"`scale`: got a list of 2, expected 4"),
        (base, {"image_embeds": embeds, "scale": {"up": {"block_7": 1}}}, "`scale`: got the block 'up.block_7'"),
        (base, {"image_embeds": embeds, "scale": {"up": {"block_1": [1, 2, 3]}}}, "expected a number, or a list of 2"),
        (base, {"image_embeds": torch.zeros(3, 1, PROJECTED)}, "`image_embeds`: got 3 sets"),
        (other, {"image_embeds": embeds}, "for another backbone, expected one for this UNet2DConditionModel"),
        (renamed, {"image_embeds": embeds}, r"2 layers differ:\n    ip_adapter.4: unknown\n    ip_adapter.5: missing"),
        (short, {"image_embeds": embeds}, r"1 layers differ:\n    ip_adapter.1: missing"),
    ]
    for adapter, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            pipe("a cat", num_inference_steps=1, controls=[IPAdapter(adapter, **options)])
    assert calls == []
    theirs = models.pipeline("unet", unet=models.NETWORKS["SD 1.x"].build("diffusers"))
    with pytest.raises(ValueError, match="expected processors that take parts"):
        theirs("a cat", num_inference_steps=1, controls=[IPAdapter(base, image_embeds=embeds)])
