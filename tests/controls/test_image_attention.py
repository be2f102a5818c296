"""IP-Adapters in one attention: masks, numbers of layers, training, and what is refused before a network runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hubgen
from hubgen.backbones.unet_condition_config import stable_diffusion_1, stable_diffusion_xl
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import BackboneCall
from hubgen.controls.control import Start, opened
from hubgen.controls.image_attention import Adapter, layer_scales, places
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from tests import models
from tests.controls.test_control import target
from tests.ip_adapter_weights import HIDDEN, PROJECTED, siglip, tensors
from tests.official_images import mask, picture
from tests.parity import randomize_

Official = Callable[[str], Path]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


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
    """Masks of 64 pixels on 8 x 8 tokens, so that the bicubic reduction is exact where halves are flat.

    With a mask each, pictures are 1 or 0 times what they are without, to the last bit. Of two in one call, tokens, keys
    and values are products of other sizes, which round otherwise.
    """
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
        there = target(backbone, batch=1, size=(32, 32), branches=("positive",))  # FLUX: 8 x 8 tokens
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
    assert torch.equal(whole, full)
    assert torch.equal(top[:, :32], full[:, :32]) and torch.equal(top[:, 32:], none[:, 32:])
    assert torch.equal(bottom[:, :32], none[:, :32]) and torch.equal(bottom[:, 32:], full[:, 32:])
    assert (both - full).abs().max() < 1e-6


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
