"""ControlNets in the one pipeline: the latents of diffusers' pipelines for them, and what must stay bit-equal."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.image_processor import VaeImageProcessor

from hubgen.acceleration.optimize import optimize, restore
from hubgen.adaptation.widening import widen
from hubgen.backbones.controlnet_dit import DiTControlNetModel
from hubgen.controls.attention_maps import AttentionMaps
from hubgen.controls.controlnet import ControlNet
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.official_images import mask, picture
from tests.parity import certain_, quiet_, randomize_

Official = Callable[[str], Path]

NAMES = ["sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev"]
HINT = {"conditioning_embedding_out_channels": (4, 8, 8)}
"""A hint is made four times smaller, as the tiny autoencoders make pictures."""
CALL: dict[str, Any] = {"prompt": "a red cat", "guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "latent"}
SIZE: dict[str, Any] = {"height": 32, "width": 40}
PIPELINES: dict[str, tuple[str, str | None, str]] = {
    "sd": (
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ),
    "sdxl": (
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    "sd3": ("StableDiffusion3ControlNetPipeline", None, "StableDiffusion3ControlNetInpaintingPipeline"),
    "flux": ("FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"),
}


def family(name: str) -> str:
    """Which pipelines of diffusers a layout has."""
    return name if name == "sdxl" else name[:2] if name[:3] in ("sd1", "sd2") else name[:3] if "sd3" in name else "flux"


def net_of(backbone: Any, seed: int = 7, **changes: Any) -> Any:
    """A ControlNet of diffusers for its backbone, all weights random."""
    if isinstance(backbone, diffusers.UNet2DConditionModel):
        net = diffusers.ControlNetModel.from_unet(backbone, load_weights_from_unet=False, **HINT)
        net = rebuilt(net, **changes)
    elif isinstance(backbone, diffusers.SD3Transformer2DModel):
        net = diffusers.SD3ControlNetModel(
            **{**plain(backbone), "num_layers": 2, "dual_attention_layers": (), **changes}
        )
    else:
        net = diffusers.FluxControlNetModel(**{**plain(backbone), "num_layers": 2, "num_single_layers": 1, **changes})
    return randomize_(net, seed).eval()


def plain(model: Any) -> dict[str, Any]:
    """A model's arguments, but for `out_channels`, which networks do not have."""
    return {name: value for name, value in model.config.items() if name[0] != "_" and name != "out_channels"}


def rebuilt(net: Any, **changes: Any) -> Any:
    """The same class with some arguments changed, and fresh weights."""
    return type(net)(**{**plain(net), **changes})


class Sides:
    """Ours and diffusers' pipelines of the same parts."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.family = folder, kind

    @functools.cached_property
    def ours(self) -> Any:
        return self.ready(TextToImagePipeline.from_pretrained(self.folder))

    @functools.cached_property
    def theirs(self) -> Any:
        return self.ready(diffusers.DiffusionPipeline.from_pretrained(self.folder))

    def ready(self, pipe: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        if self.family == "sd3":  # whose pipeline draws from the posterior without a generator
            certain_(pipe.vae)
        return pipe

    @property
    def backbone(self) -> Any:
        return self.theirs.unet if hasattr(self.theirs, "unet") else self.theirs.transformer

    def diffusers(self, nets: Any, task: int = 0) -> Any:
        """The pipeline of a task with these networks."""
        name = PIPELINES[self.family][task]
        assert name is not None
        return self.pipeline(getattr(diffusers, name), controlnet=nets)

    def pipeline(self, cls: Any, **more: Any) -> Any:
        """A pipeline of diffusers with these parts and some more."""
        taken = inspect.signature(cls).parameters
        parts = {key: part for key, part in self.theirs.components.items() if key in taken}
        pipe = cls(**parts, **more)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def assert_same(
        self, controls: list[ControlNet], nets: Any, task: int = 0, ours: Any = None, **theirs: Any
    ) -> None:
        call = {**CALL, **({} if task == 1 and self.family in ("sd", "sdxl") else SIZE)}
        found = self.ours(**{**call, **(ours or {})}, controls=controls, generator=seeded()).images
        expected = self.diffusers(nets, task)(**{**call, **theirs}, generator=seeded()).images
        if expected.ndim == 3:
            expected = diffusers.FluxPipeline._unpack_latents(expected, *found.shape[-2:], 1)
        plain = self.ours(**{**call, **(ours or {})}, generator=seeded()).images
        assert (found - plain).abs().max() > 0.05 * plain.std(), "the network changes next to nothing"
        assert (found - expected).abs().max() < 1e-4 * expected.std()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture(scope="module")
def sides(official: Official) -> Callable[[str], Sides]:
    made: dict[str, Sides] = {}

    def get(name: str) -> Sides:
        if name not in made:
            made[name] = Sides(official(name), family(name))
        return made[name]

    return get


def hint_name(kind: str) -> str:
    """How diffusers' text-to-image pipeline calls the hint."""
    return "image" if kind in ("sd", "sdxl") else "control_image"


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_those_of_diffusers(name: str, sides: Callable[[str], Sides]) -> None:
    both = sides(name)
    net = quiet_(net_of(both.backbone))
    hint = picture(3)
    both.assert_same(
        [ControlNet(net, hint, scale=0.7, start=0.3, end=0.8)],
        net,
        **{hint_name(both.family): hint, "controlnet_conditioning_scale": 0.7},
        control_guidance_start=0.3,
        control_guidance_end=0.8,
    )


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux-dev"])
@pytest.mark.parametrize("task", [1, 2], ids=["image to image", "inpainting"])
def test_an_image_and_a_mask_go_beside_it_as_in_diffusers(name: str, task: int, sides: Callable[[str], Sides]) -> None:
    both = sides(name)
    net, hint = quiet_(net_of(both.backbone)), picture(3)
    given: dict[str, Any] = {"image": picture(1), "strength": 0.9, **({"mask_image": mask(2)} if task == 2 else {})}
    both.assert_same(
        [ControlNet(net, hint)], net, task, given, **given, control_image=hint, controlnet_conditioning_scale=1.0
    )


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux-dev"])
def test_two_networks_and_a_generator_each_are_those_of_diffusers_and_their_order_is_the_same(
    name: str, sides: Callable[[str], Sides]
) -> None:
    both = sides(name)
    nets = [quiet_(net_of(both.backbone, seed)) for seed in (7, 8)]
    hints = [picture(3), picture(4)]
    controls = [ControlNet(net, hint, scale=scale) for net, hint, scale in zip(nets, hints, (0.5, 0.8), strict=True)]
    call = {**CALL, **SIZE, "num_images_per_prompt": 2}
    found = [both.ours(**call, controls=order, generator=several()).images for order in (controls, controls[::-1])]
    if both.family != "flux":  # where each network has a hint of its own, drawn from the posterior
        assert (found[0] - found[1]).abs().max() <= (1e-4 * found[0].std() if both.family == "sd3" else 0)
    options: dict[str, Any] = {hint_name(both.family): hints, "controlnet_conditioning_scale": [0.5, 0.8]}
    expected = both.diffusers(nets)(**call, **options, generator=several()).images
    if expected.ndim == 3:
        expected = diffusers.FluxPipeline._unpack_latents(expected, *found[0].shape[-2:], 1)
    assert (found[0] - expected).abs().max() < 1e-4 * expected.std()


def several() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_guess_mode_is_that_of_diffusers(name: str, pools: bool, sides: Callable[[str], Sides]) -> None:
    both, hint = sides(name), picture(3)
    net = quiet_(net_of(both.backbone, global_pool_conditions=pools))
    ours = ControlNet(net, hint, guess_mode=not pools)
    both.assert_same([ours], net, image=hint, guess_mode=not pools)


def test_flux_guided_by_a_negative_prompt_runs_both_rows_or_reuses_one_as_diffusers(
    sides: Callable[[str], Sides],
) -> None:
    both, hint = sides("flux-dev"), picture(3)
    net = quiet_(net_of(both.backbone))
    call = {"negative_prompt": "the dog", "true_cfg_scale": 3.0}
    both.assert_same([ControlNet(net, hint, reuse=True)], net, 0, call, **call, control_image=hint)
    runs = [
        both.ours(**{**CALL, **SIZE, **call}, controls=[ControlNet(net, hint, reuse=reuse)], generator=seeded()).images
        for reuse in (True, False)
    ]
    assert (runs[0] - runs[1]).abs().max() > 1e-3


def test_sd3_is_shown_a_mask_beside_the_hint_as_in_diffusers(sides: Callable[[str], Sides]) -> None:
    both, hint, where = sides("sd3"), picture(3), mask(2)
    net = quiet_(net_of(both.backbone, extra_conditioning_channels=1))
    hard = where.point(lambda level: 255 if level >= 128 else 0)
    both.assert_same([ControlNet(net, hint, mask=hard)], net, 2, control_image=hint, control_mask=hard)


@pytest.mark.parametrize("zeros", [True, False])
def test_sd3_networks_with_and_without_pooled_text(zeros: bool, sides: Callable[[str], Sides]) -> None:
    both, hint = sides("sd3"), picture(3)
    net = quiet_(net_of(both.backbone, force_zeros_for_pooled_projection=zeros))
    both.assert_same([ControlNet(net, hint)], net, control_image=hint)


def test_networks_for_sd3_5_are_shown_x_t_as_the_base_embeds_it_and_no_text(sides: Callable[[str], Sides]) -> None:
    both, hint = sides("sd3.5"), picture(3)
    net = stabilitys(both, _control_type=2)
    both.assert_same([ControlNet(net, hint)], net, control_image=hint)


STABILITYS: dict[str, Any] = {
    "joint_attention_dim": None,
    "use_pos_embed": False,
    "pos_embed_type": None,
    "force_zeros_for_pooled_projection": False,
}


def stabilitys(both: Sides, **kind: Any) -> Any:
    """A network like Stability's for SD3.5 large, which sees no text."""
    net = quiet_(net_of(both.backbone, **STABILITYS))
    net.register_to_config(**kind)
    return net


class Edges(VaeImageProcessor):
    """As the card of Stability's network for edges has diffusers' pipeline prepare them."""

    def preprocess(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().preprocess(*args, **kwargs) * 255 * 0.5 + 0.5


def test_edges_are_shown_to_stabilitys_network_for_them_as_it_has_seen_them(sides: Callable[[str], Sides]) -> None:
    both, hint = sides("sd3.5"), picture(3)
    nets = [stabilitys(both, _control_type=1), stabilitys(both), stabilitys(both, _control_type=2)]
    pipe = both.diffusers(nets[0])
    pipe.image_processor = Edges(vae_scale_factor=pipe.vae_scale_factor, do_normalize=False)
    expected = pipe(**CALL, **SIZE, control_image=hint, generator=seeded()).images
    found = [
        latents(both.ours, controls=[control])
        for control in (ControlNet(nets[0], hint), ControlNet(nets[1], hint, mode=1), ControlNet(nets[2], hint))
    ]
    assert (found[0] - expected).abs().max() < 1e-4 * expected.std()
    assert torch.equal(found[1], found[0]) and (found[2] - expected).abs().max() > 0.02 * expected.std()
    assert torch.equal(latents(both.ours, controls=[ControlNet(nets[1], hint, mode=2)]), found[2])


def test_a_network_that_does_not_say_what_it_was_made_for_is_told_of(
    sides: Callable[[str], Sides], caplog: pytest.LogCaptureFixture
) -> None:
    net = stabilitys(sides("sd3.5"))
    for options, told in (({}, 1), ({"mode": 0}, 0)):
        caplog.clear()
        ControlNet(net, picture(3), **options)
        assert caplog.text.count("Pass `mode=1` if it was made for edges") == told


def test_modes_of_a_flux_union(sides: Callable[[str], Sides]) -> None:
    both, hint = sides("flux-dev"), picture(3)
    net = quiet_(net_of(both.backbone, num_mode=4))
    both.assert_same([ControlNet(net, hint, mode=2)], net, control_image=hint, control_mode=2)


def test_xlabs_read_pixels_and_repeat_their_residuals(sides: Callable[[str], Sides]) -> None:
    both, hint = sides("flux-dev"), picture(3)
    # The hint block makes a picture eight times smaller: here that is one place a token, and no square of 2x2.
    net = quiet_(net_of(both.backbone, num_layers=1, conditioning_embedding_channels=64, num_single_layers=0))
    both.assert_same([ControlNet(net, hint)], net, control_image=hint)


# ---- unions and T2I-adapters ----


@pytest.mark.parametrize("modes", [[1], [0, 3]])
def test_several_types_of_hints_go_into_one_run_of_a_union(modes: list[int], sides: Callable[[str], Sides]) -> None:
    both = sides("sdxl")
    net = diffusers.ControlNetUnionModel.from_unet(both.backbone, load_weights_from_unet=False)
    sizes = {"num_control_type": 4, "num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}
    net = quiet_(randomize_(rebuilt(net, **HINT, **sizes), 7).eval())
    hints = [picture(3), picture(4)][: len(modes)]
    theirs = both.pipeline(diffusers.StableDiffusionXLControlNetUnionPipeline, controlnet=net)
    expected = theirs(**CALL, **SIZE, control_image=hints, control_mode=modes, generator=seeded()).images
    ours = ControlNet(net, hints if len(hints) > 1 else hints[0], mode=modes)
    found = both.ours(**CALL, **SIZE, controls=[ours], generator=seeded()).images
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_t2i_adapters_are_those_of_diffusers(name: str, sides: Callable[[str], Sides]) -> None:
    both, hint = sides(name), picture(3)
    xl = name == "sdxl"
    widths = list(both.backbone.config.block_out_channels)
    kind = {"adapter_type": "full_adapter_xl" if xl else "full_adapter", "downscale_factor": 8 if xl else 4}
    net = randomize_(diffusers.T2IAdapter(1, widths, num_res_blocks=1, **kind), 7).eval()
    cls = diffusers.StableDiffusionXLAdapterPipeline if xl else diffusers.StableDiffusionAdapterPipeline
    theirs = both.pipeline(cls, adapter=net)
    gray, size = hint.convert("L"), {"height": 32, "width": 32}
    options = {"adapter_conditioning_scale": 0.6, "adapter_conditioning_factor": 0.7} if xl else {}
    expected = theirs(**CALL, **size, image=gray, generator=seeded(), **options).images
    ours = ControlNet(net, gray, **({"scale": 0.6, "end": 0.7} if xl else {}))
    found = both.ours(**CALL, **size, controls=[ours], generator=seeded()).images
    assert (found - both.ours(**CALL, **size, generator=seeded()).images).abs().max() > 0.05 * found.std()
    assert (found - expected).abs().max() < 1e-4 * expected.std()


# ---- what must stay as it was ----

ONE_A_FAMILY = ["sd1", "sdxl", "sd3", "flux-dev"]


class Counted:
    """Counts the calls of a network."""

    def __init__(self, net: Any):
        self.calls = 0
        net.register_forward_pre_hook(lambda *_: setattr(self, "calls", self.calls + 1))


def latents(pipe: TextToImagePipeline, **call: Any) -> torch.Tensor:
    return pipe(**{**CALL, **SIZE, "generator": seeded(), **call}).images


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_network_that_is_off_is_not_run_and_changes_nothing(name: str, sides: Callable[[str], Sides]) -> None:
    both, hint = sides(name), picture(3)
    net = quiet_(net_of(both.backbone))
    counted, expected = Counted(net), latents(both.ours)
    controls = [ControlNet(net, hint, scale=0.0), ControlNet(net, hint, start=0.05, end=0.1)]
    for some in ([], controls[:1], controls[1:], controls):
        assert torch.equal(latents(both.ours, controls=some), expected)
    assert counted.calls == 0
    steps = len(both.ours.scheduler.timesteps)
    latents(both.ours, controls=[ControlNet(net, hint, end=0.5)])
    assert counted.calls == sum((step + 1) / steps <= 0.5 for step in range(steps))


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_fresh_networks_change_nothing(name: str, sides: Callable[[str], Sides]) -> None:
    both = sides(name)
    net = quiet_(net_of(both.backbone), 0.0)
    noise = torch.randn(both.ours.latent_space.shape(1, (32, 40)), generator=seeded())  # FLUX's hint takes some first
    controlled = latents(both.ours, controls=[ControlNet(net, picture(3))], latents=noise)
    assert torch.equal(controlled, latents(both.ours, latents=noise))


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_acceleration_changes_nothing_but_rounding(name: str, sides: Callable[[str], Sides]) -> None:
    both = sides(name)
    controls = [ControlNet(quiet_(net_of(both.backbone)), picture(3))]
    fast = latents(both.ours, controls=controls)
    restore(both.ours)
    restore(controls[0].kind.net)
    plain_latents = latents(both.ours, controls=controls)
    optimize(both.ours)
    assert (fast - plain_latents).abs().max() < 1e-5 * plain_latents.std()


@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux-dev"])
def test_a_step_from_a_cache_keeps_what_a_network_adds(name: str, sides: Callable[[str], Sides]) -> None:
    """Two steps at one noise level: the second sees what the first saw, so that the cached one is the computed one."""
    both = sides(name)
    net, transformer, ran = quiet_(net_of(both.backbone)), both.ours.transformer, list[int]()
    single = getattr(transformer, "single_transformer_blocks", None)
    last = transformer.transformer_blocks[-1].ff if single is None else single[-1].proj_mlp
    call: dict[str, Any] = {"controls": [ControlNet(net, picture(3))], "num_inference_steps": None}
    call |= {"sigmas": [0.6, 0.6], "guidance_scale": 1.0}
    expected = latents(both.ours, **call)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    handle = last.register_forward_hook(lambda *_: ran.append(1))
    try:
        found = latents(both.ours, **call)
        assert len(ran) == 1, "the second step was computed in full"
        without = latents(both.ours, **{**call, "controls": []})
    finally:
        handle.remove()
        transformer.disable_cache()
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert (found - without).abs().max() > 0.01 * expected.std()
    assert torch.equal(latents(both.ours, **call), expected)


def test_a_call_that_fails_inside_leaves_no_trace(sides: Callable[[str], Sides]) -> None:
    both = sides("sd1")
    net, expected = quiet_(net_of(both.backbone)), latents(both.ours)
    processors = list(both.ours.unet.attn_processors.items())

    def broken(*_: Any) -> None:
        raise RuntimeError("a fault inside")

    handle = net.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="a fault inside"):
        latents(both.ours, controls=[AttentionMaps(), ControlNet(net, picture(3))])
    handle.remove()
    assert list(both.ours.unet.attn_processors.items()) == processors
    assert all(not processor.parts for _, processor in processors)
    assert torch.equal(latents(both.ours), expected)


def test_hints_go_with_their_prompts(sides: Callable[[str], Sides]) -> None:
    """n hints serve n prompts, several pictures of each; each picture is that of its own call."""
    both = sides("sd1")
    net, hints = quiet_(net_of(both.backbone)), [picture(3), picture(4)]
    prompts = ["a red cat", "the big blue dog"]
    call = {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(seed) for seed in range(4)]}
    together = latents(both.ours, prompt=prompts, controls=[ControlNet(net, hints)], **call)
    for place in range(4):
        alone = latents(
            both.ours,
            prompt=prompts[place // 2],
            controls=[ControlNet(net, hints[place // 2])],
            generator=torch.Generator().manual_seed(place),
        )
        assert (together[place] - alone[0]).abs().max() < 1e-3


def widened(pipe: Any, control: bool = False) -> Any:
    """A pipeline of the same parts, whose backbone is shown a picture that is to be edited; it has learned nothing.

    FLUX may be shown a hint instead (`control`).
    """
    part = "transformer" if getattr(pipe, "unet", None) is None else "unet"
    kind = {"edit_input": "instruction"} if pipe.family.shown.control and not control else {}
    parts = {**pipe.components, part: widen(pipe.backbone, pipe.latent_space.channels)}
    wide = type(pipe)(**parts, **kind)
    wide.set_progress_bar_config(disable=True)
    return wide


@pytest.mark.parametrize("name", ["sd1", "sd3", "sd3.5", "flux-dev", "dit"])
def test_a_network_for_a_base_steers_the_base_that_was_widened(
    name: str, official: Official, sides: Callable[[str], Sides]
) -> None:
    """It is shown x_t alone. As long as the new inputs have no weights, the call is that of the base."""
    cls = ClassToImagePipeline if name == "dit" else TextToImagePipeline
    pipe = cls.from_pretrained(official(name))
    certain_(pipe.vae, exactly=True)
    if name == "dit":
        net = quiet_(randomize_(DiTControlNetModel.from_transformer(pipe.backbone), 7))
    else:
        net = quiet_(net_of(sides(name).backbone, **(STABILITYS if name == "sd3.5" else {})))
    wide = widened(pipe)
    call: dict[str, Any] = {
        **CALL,
        "height": 32,
        "width": 32,
        "latents": torch.randn(pipe.latent_space.shape(1, (32, 32))),
    }
    if name == "dit":
        call = {**{key: value for key, value in call.items() if key != "prompt"}, "class_labels": [1]}

    def drawn(one: Any, **more: Any) -> torch.Tensor:
        one.set_progress_bar_config(disable=True)
        return one(**call, **more, generator=seeded()).images

    plain, steered = drawn(pipe), drawn(pipe, controls=[ControlNet(net, picture(3))])
    found = drawn(wide, controls=[ControlNet(net, picture(3))], image=picture(4))
    assert (steered - plain).abs().max() > 0.02 * plain.std(), "the network changes next to nothing"
    assert (found - steered).abs().max() < 1e-4 * steered.std()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "net_name", "arguments", "message"),
    [
        ("sd1", "sd3", {}, "`net`: got a SD3ControlNetModel, expected a network for a UNet2DConditionModel"),
        ("sd3", "sd1", {}, "`net`: got a ControlNetModel, expected a network for a SD3Transformer2DModel"),
        ("sdxl", "sd1", {}, r"`net`: got a ControlNetModel with {'cross_attention_dim': 16.*, expected {'cross"),
        ("sd1", "sd1", {"scale": float("nan")}, "`scale`: got nan, expected a finite number"),
        ("sd1", "sd1", {"scale": [1.0, 0.5]}, r"`scale`: got \[1.0, 0.5\], expected a finite number"),
        ("sd1", "sd1", {"start": 0.6, "end": 0.6}, "`start`, `end`: got 0.6 and 0.6"),
        ("sd1", "sd1", {"mode": 1}, r"`mode`: got \[1\], expected none: this ControlNetModel is no union"),
        ("flux-dev", "union", {}, "`mode`: got None, expected a number from 0 to 3 for this union"),
        ("flux-dev", "union", {"mode": 4}, r"`mode`: got \[4\], expected different numbers from 0 to 3"),
        ("flux-dev", "union", {"mode": [0, 1]}, r"`mode`: got \[0, 1\], expected one"),
        ("sd3", "sd3", {"guess_mode": True}, "`guess_mode`: got True, expected False: a SD3ControlNetModel"),
        ("sd1", "sd1", {"guess_mode": True}, "`guess_mode`: got True, expected False without guidance"),
        ("sd3", "sd3", {"mask": mask(1)}, "`mask`: got one, expected None"),
        (
            "sd1",
            "sd1",
            {"image": torch.rand(1, 4, 32, 40)},
            r"`image`: got shape \(1, 4, 32, 40\).*expected 3 channels",
        ),
        ("sd1", "sd1", {"image": [picture(1)] * 3}, "`image`: got 3, expected a number that divides the 1 pictures"),
        ("sd3.5", "edges", {"mode": 2}, r"`mode`: got \[2\], expected 1, which this SD3ControlNetModel was made for"),
        ("sd3.5", "edges", {"mode": 3}, r"`mode`: got \[3\], expected different numbers from 0 to 2"),
        ("sd1", "wide", {}, "`net`: got a ControlNetModel of 9 input channels, expected 4: it is shown x_t alone"),
        ("sd3", "wide", {}, "`net`: got a SD3ControlNetModel of 20 input channels, expected 16: it is shown x_t alone"),
        ("sd1", "backbone", {}, "`net`: got a UNet2DConditionModel, expected a ControlNet or a T2I-adapter"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_network_runs(
    name: str, net_name: str, arguments: dict[str, Any], message: str, sides: Callable[[str], Sides]
) -> None:
    both, ran = sides(name), list[Any]()
    if net_name == "union":
        net = net_of(both.backbone, num_mode=4)
    elif net_name == "edges":
        net = stabilitys(both, _control_type=1)
    elif net_name == "wide":
        net = net_of(both.backbone, in_channels=9 if name == "sd1" else 20)
    else:
        net = both.backbone if net_name == "backbone" else net_of(sides(net_name).backbone)
    handles = [
        part.register_forward_pre_hook(lambda *_: ran.append(1))
        for part in (net, both.ours.vae, both.ours.text_encoder)
    ]
    try:
        with pytest.raises(ValueError, match=message):
            latents(both.ours, controls=[ControlNet(net, **{"image": picture(3), **arguments})], guidance_scale=1.0)
    finally:
        for handle in handles:
            handle.remove()
    assert not ran


# ---- folders ----


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_folder_with_a_network_loads_and_is_saved_again(
    name: str, sides: Callable[[str], Sides], tmp_path: Path
) -> None:
    both, hint = sides(name), picture(3)
    net = quiet_(net_of(both.backbone))
    theirs = both.diffusers(net)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = TextToImagePipeline.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert all(torch.equal(value, again.controlnet.state_dict()[key]) for key, value in net.state_dict().items())
    ours.set_progress_bar_config(disable=True)
    expected = latents(both.ours, controls=[ControlNet(net, hint)])
    found = latents(ours, controls=[ControlNet(ours.controlnet, hint)])
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert torch.equal(latents(ours), latents(both.ours))  # a call that is not told so is not steered
