"""Official layouts, made and saved by diffusers, read by the one pipeline: the same latents as diffusers' pipelines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

import hubgen
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests import official as layouts

Official = Callable[[str], Path]

STEPS = 5
NAMES = ["sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev", "flux-schnell"]
FOLDERS = [*NAMES, "sdxl-refiner", "sd1-inpaint"]
PROMPTS = ["a red cat", "the big blue dog"]


class Both:
    """Ours and diffusers' pipeline of the same parts."""

    def __init__(self, ours: TextToImagePipeline, theirs: Any):
        self.ours, self.theirs = ours, theirs
        for pipe in (ours, theirs):
            pipe.set_progress_bar_config(disable=True)

    def with_parts(self, **parts: Any) -> "Both":
        """The same, some components replaced in both."""
        return Both(*(type(pipe)(**{**pipe.components, **parts}) for pipe in (self.ours, self.theirs)))

    def latents(self, *seeds: int, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, h, w) of both, of the same call at the same seeds: a generator of one seed, a list of several."""
        size = {"height": 32, "width": 40} if type(self.theirs) is diffusers.FluxPipeline else {}
        call = {"prompt": PROMPTS[0], "num_inference_steps": STEPS, "output_type": "latent", **size, **call}
        ours, theirs = (pipe(**call, generator=seeded(*seeds)).images for pipe in (self.ours, self.theirs))
        if theirs.ndim == 3:  # FLUX packs
            theirs = diffusers.FluxPipeline._unpack_latents(theirs, *ours.shape[-2:], 1)
        return ours, theirs

    def assert_same(self, *seeds: int, **call: Any) -> torch.Tensor:
        """To 1e-3 absolute, on latents that are not trivial."""
        ours, theirs = self.latents(*(seeds or (1,)), **call)
        assert ours.shape == theirs.shape and theirs.std() > 0.05
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0.0)
        return ours


def seeded(*seeds: int) -> torch.Generator | list[torch.Generator]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


@pytest.fixture(scope="module")
def both(official: Official) -> Callable[[str], Both]:
    """`both("sdxl")`: loaded once."""
    loaded: dict[str, Both] = {}

    def pair(name: str) -> Both:
        if name not in loaded:
            folder = official(name)
            ours = TextToImagePipeline.from_pretrained(folder)
            loaded[name] = Both(ours, diffusers.DiffusionPipeline.from_pretrained(folder))
        return loaded[name]

    return pair


Pair = Callable[[str], Both]


# ---- the same latents ----


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_those_of_diffusers(name: str, both: Pair, shows: Callable[..., None]) -> None:
    """The family's own guidance scale."""
    shows(name, "text to image")
    both(name).assert_same()


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3"])
def test_several_prompts_and_pictures_with_a_negative_prompt_are_those_of_diffusers(name: str, both: Pair) -> None:
    call = {"prompt": PROMPTS, "negative_prompt": ["the dog", ""], "num_images_per_prompt": 2, "guidance_scale": 3.0}
    both(name).assert_same(1, 2, 3, 4, **call)
    both(name).assert_same(5, **call)


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_flux_guided_by_a_negative_prompt_is_that_of_diffusers(name: str, both: Pair) -> None:
    call = {"prompt": PROMPTS, "num_images_per_prompt": 2, "guidance_scale": 2.0, "max_sequence_length": 32}
    plain = both(name).assert_same(1, 2, 3, 4, **call)
    call |= {"negative_prompt": ["the dog", "a heart"], "true_cfg_scale": 3.0}
    guided = both(name).assert_same(1, 2, 3, 4, **call)
    assert (guided - plain).abs().max() > 0.01


def test_the_guidance_scale_is_an_input_of_flux_dev_and_nothing_to_schnell(both: Pair) -> None:
    for name, matters in (("flux-dev", True), ("flux-schnell", False)):
        found = [both(name).assert_same(guidance_scale=scale, max_sequence_length=32) for scale in (1.0, 7.0)]
        assert torch.equal(*found) is not matters


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("sdxl", {"clip_skip": 1}),
        ("sd3", {"clip_skip": 1}),
        ("sd1", {"guidance_rescale": 0.7}),
        ("sd1", {"guidance_scale": 1.0}),
        ("sdxl", {"prompt_2": "a green apple", "negative_prompt": "the dog", "negative_prompt_2": "a heart"}),
        ("sd3", {"prompt_2": "a green apple", "prompt_3": "a small heart", "negative_prompt_3": "the dog"}),
        ("flux-dev", {"prompt_2": "a green apple"}),
        ("sd3", {"max_sequence_length": 40}),
        ("sd1", {"height": 24, "width": 40}),
        ("sdxl", {"height": 24, "width": 40}),
        ("sd3", {"height": 24, "width": 40}),
        ("sdxl", {"original_size": (20, 30), "crops_coords_top_left": (3, 4), "target_size": (50, 60)}),
        ("sdxl", {"negative_original_size": (20, 30), "negative_target_size": (50, 60)}),
        ("sdxl", {"denoising_end": 0.6, "num_inference_steps": 10}),
        ("sd1", {"cross_attention_kwargs": {}}),
        ("sd3", {"joint_attention_kwargs": {}}),
        ("sd3", {"sigmas": [1.0, 0.7, 0.4], "num_inference_steps": 3}),
        ("flux-dev", {"sigmas": [1.0, 0.7, 0.4], "num_inference_steps": 3}),
        ("sdxl", {"timesteps": [900, 500, 100], "num_inference_steps": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_option_means_what_it_means_to_diffusers(name: str, call: dict[str, Any], both: Pair) -> None:
    pair = both(name)
    if "denoising_end" in call:
        pair.assert_same(**call)
        assert pair.ours.num_timesteps == 6
        return
    found = pair.assert_same(**call)
    if not set(call) & {"height", "cross_attention_kwargs", "joint_attention_kwargs"}:
        plain = pair.latents(1)[0]
        assert (found - plain).abs().max() > 1e-3, "the option changes nothing"


def test_clip_skip_of_stable_diffusion_is_that_of_diffusers(official: Official) -> None:
    folder = official("sd1")
    pair = Both(TextToImagePipeline.from_pretrained(folder), diffusers.StableDiffusionPipeline.from_pretrained(folder))
    encoder = pair.theirs.text_encoder
    encoder.__dict__.setdefault("text_model", encoder)  # diffusers looks there for the norm, as in transformers 4
    plain = pair.assert_same()
    assert (pair.assert_same(clip_skip=1, negative_prompt="the dog") - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_latents_and_embeddings_given_are_used_as_diffusers_uses_them(name: str, both: Pair) -> None:
    pair = both(name)
    noise = torch.randn(2, pair.ours.vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(3))
    made = pair.theirs.encode_prompt(
        **({"prompt_2": None, "prompt_3": None} if name == "sd3" else {}),
        **{"prompt": PROMPTS, "device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True},
    )
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    embeds = dict(zip(names, made, strict=False))
    given = pair.assert_same(prompt=None, latents=noise, **embeds)
    torch.testing.assert_close(given, pair.latents(1, prompt=PROMPTS, latents=noise)[0], atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd1", diffusers.EulerDiscreteScheduler(**layouts.betas())),
        ("sd1", diffusers.EulerAncestralDiscreteScheduler(**layouts.betas())),
        ("sd2", diffusers.DPMSolverMultistepScheduler(**layouts.betas(prediction_type="v_prediction"))),
        ("sdxl", diffusers.UniPCMultistepScheduler(**layouts.betas())),
        ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
        ("sd3", diffusers.FlowMatchHeunDiscreteScheduler()),
        ("flux-dev", diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_schedulers_give_the_same_in_both(name: str, scheduler: Any, both: Pair) -> None:
    both(name).with_parts(scheduler=scheduler).assert_same(1, 2, prompt=PROMPTS)


def test_eta_adds_the_noise_that_it_adds_in_diffusers(both: Pair) -> None:
    pair = both("sd2")
    assert type(pair.ours.scheduler) is hubgen.DDIMScheduler
    pair.assert_same(1, 2, prompt=PROMPTS, eta=0.7)
    with pytest.raises(ValueError, match="`eta`.*PNDMScheduler"):
        both("sd1").ours("a cat", eta=0.5)


def test_sd3_without_its_t5_is_shown_zeros_as_in_diffusers(both: Pair) -> None:
    both("sd3").with_parts(text_encoder_3=None, tokenizer_3=None).assert_same(prompt=PROMPTS)


def test_a_text_encoder_that_wants_its_mask_gets_it(official: Official) -> None:
    folder = official("sd2")
    pipes = TextToImagePipeline.from_pretrained(folder), diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pair = Both(*pipes)
    plain = pair.assert_same()
    for pipe in pipes:
        pipe.text_encoder.config.use_attention_mask = True
    assert (pair.assert_same() - plain).abs().max() > 1e-3


def test_a_distilled_unet_is_told_the_guidance_scale_and_not_guided() -> None:
    parts = layouts.sd1_components(time_cond_proj_dim=6)
    pair = Both(TextToImagePipeline(**parts), diffusers.StableDiffusionPipeline(**parts))
    low, high = (pair.assert_same(guidance_scale=scale) for scale in (2.0, 8.0))
    assert (low - high).abs().max() > 1e-3


def test_pictures_are_those_of_diffusers(both: Pair) -> None:
    for name in ("sd1", "sdxl", "sd3", "flux-schnell"):
        ours, theirs = both(name).latents(1, output_type="np", **{"height": 32, "width": 32})
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_vae_with_means_and_deviations_of_its_latents_decodes_as_in_diffusers() -> None:
    vae = layouts.vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 1.0, 2.0])
    parts = {**layouts.sdxl_components(6, cross_attention_dim=2 * layouts.TEXT_WIDTH), "vae": vae}
    parts.pop("add_watermarker")
    parts |= {"text_encoder": layouts.clip_text(), "tokenizer": layouts.clip_tokenizer()}
    pair = Both(TextToImagePipeline(**parts), diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False))
    ours, theirs = pair.latents(1, output_type="np")
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


# ---- loading ----


@pytest.mark.parametrize("name", FOLDERS)
def test_hubgens_class_is_taken_for_every_component_that_has_one(name: str, official: Official) -> None:
    pipe = TextToImagePipeline.from_pretrained(official(name))
    index = json.loads((official(name) / "model_index.json").read_text())
    found = {part for part, value in index.items() if isinstance(value, list) and value[0] is not None}
    assert found == {part for part, component in pipe.components.items() if component is not None}
    for part in found:
        library, class_name = index[part]
        cls = type(pipe.components[part])
        expected = "hubgen" if library == "diffusers" and class_name in hubgen.HOMES else library
        assert (cls.__module__.split(".")[0], cls.__name__) == (
            expected,
            class_name.replace("T5TokenizerFast", "T5Tokenizer"),
        )


def test_precision_variants_and_components_can_be_chosen_while_loading(official: Official, tmp_path: Path) -> None:
    diffusers.DiffusionPipeline.from_pretrained(official("sdxl")).to(torch.float16).save_pretrained(
        tmp_path, variant="fp16"
    )
    scheduler = diffusers.DDIMScheduler()
    pipe = TextToImagePipeline.from_pretrained(
        tmp_path, variant="fp16", torch_dtype=torch.bfloat16, scheduler=scheduler, text_encoder=None, tokenizer=None
    )
    assert pipe.scheduler is scheduler and pipe.text_encoder is None
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder_2.dtype == torch.bfloat16


def test_a_pipeline_of_diffusers_is_taken_over_part_by_part(both: Pair) -> None:
    for name in ("sd1", "sdxl", "sd3", "flux-dev"):
        theirs = both(name).theirs
        ours = TextToImagePipeline.from_pipe(theirs)
        assert all(getattr(ours, part) is component for part, component in theirs.components.items())
        Both(ours, theirs).assert_same()


def test_calls_do_by_default_what_diffusers_does(both: Pair) -> None:
    expected = {"sd1": (50, 7.5), "sdxl": (50, 5.0), "sd3": (28, 7.0), "flux-dev": (28, 3.5)}
    for name, (steps, scale) in expected.items():
        defaults = both(name).ours.defaults()
        assert (defaults.steps, defaults.guidance_scale) == (steps, scale)


# ---- saving ----


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_by_us_it_is_the_official_layout_again(
    name: str, official: Official, tmp_path: Path, shows: Callable[..., None]
) -> None:
    """And diffusers alone loads it, as its own pipeline of its own classes, to the same latents."""
    shows(name, "saved files load in diffusers")
    ours = TextToImagePipeline.from_pretrained(official(name))
    ours.save_pretrained(tmp_path)
    before, after = (json.loads((folder / "model_index.json").read_text()) for folder in (official(name), tmp_path))
    assert "_name_or_path" not in after
    assert {key: value for key, value in after.items() if key in before} == before
    assert all(value in ([None, None], False) for key, value in after.items() if key not in before)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded).__name__ == before["_class_name"]
    backbone = loaded.unet if hasattr(loaded, "unet") else loaded.transformer
    assert type(backbone).__module__.startswith("diffusers.") and type(loaded.vae).__module__.startswith("diffusers.")
    for part, component in loaded.components.items():
        if isinstance(component, torch.nn.Module):
            mine = ours.components[part].state_dict()
            assert all(torch.equal(mine[key], value) for key, value in component.state_dict().items())
    if name in NAMES:
        Both(ours, loaded).assert_same()


def test_defaults_of_ones_own_survive_in_an_index_that_diffusers_reads(official: Official, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(official("sd1"), default_num_inference_steps=7)
    pipe.register_to_config(default_guidance_scale=2.5)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    defaults = TextToImagePipeline.from_pretrained(tmp_path).defaults()
    assert (defaults.steps, defaults.guidance_scale) == (7, 2.5)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is diffusers.StableDiffusionPipeline


def test_what_diffusers_has_no_pipeline_for_names_our_code(both: Pair, tmp_path: Path) -> None:
    pipe = both("sd1").ours
    flow = TextToImagePipeline(**{**pipe.components, "scheduler": hubgen.FlowMatchEulerDiscreteScheduler()})
    assert flow.native_class() is None
    flow.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["hubgen_text_to_image", "TextToImagePipeline"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is TextToImagePipeline


# ---- the safety checker ----


def safety_checker(sensitive: bool) -> StableDiffusionSafetyChecker:
    """One that objects to everything, or to nothing."""
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 8,
    }
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    threshold = -2.0 if sensitive else 2.0
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    return checker.eval()


def feature_extractor() -> Any:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


@pytest.mark.parametrize("sensitive", [True, False])
def test_a_safety_checker_does_to_pictures_what_it_does_in_diffusers(sensitive: bool, both: Pair) -> None:
    parts = {"safety_checker": safety_checker(sensitive), "feature_extractor": feature_extractor()}
    pair = both("sd1").with_parts(**parts)
    call = {"prompt": PROMPTS, "num_inference_steps": 2, "output_type": "np"}
    ours, theirs = (pipe(**call, generator=seeded(1, 2)) for pipe in (pair.ours, pair.theirs))
    assert ours.nsfw_content_detected == theirs.nsfw_content_detected == [sensitive] * 2
    np.testing.assert_allclose(ours.images, theirs.images, atol=1e-3)
    assert ours.images.any() != sensitive
    assert pair.ours(**call, return_dict=False)[1] == [sensitive] * 2
    assert pair.ours(**{**call, "output_type": "latent"}).nsfw_content_detected is None


def test_a_safety_checker_is_kept_with_the_rest(both: Pair, tmp_path: Path) -> None:
    parts = {"safety_checker": safety_checker(True), "feature_extractor": feature_extractor()}
    both("sd1").with_parts(**parts).ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert index["requires_safety_checker"] is True
    for loader in (TextToImagePipeline, diffusers.StableDiffusionPipeline):
        assert type(loader.from_pretrained(tmp_path).safety_checker) is StableDiffusionSafetyChecker
    # the name in the oldest repositories
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert TextToImagePipeline.from_pretrained(tmp_path).feature_extractor is not None
    assert TextToImagePipeline.from_pretrained(tmp_path, safety_checker=None).safety_checker is None
    with pytest.raises(ValueError, match="feature_extractor"):
        TextToImagePipeline.from_pretrained(tmp_path, feature_extractor=None)


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "KandinskyPipeline"}, "'KandinskyPipeline'.*reads.*StableDiffusionPipeline"),
        ({"_class_name": None}, "None.*FluxPipeline"),
        ({"_class_name": ["custom", "Pipeline"]}, "custom.*TextToImagePipeline reads"),
        (
            {"unet": ["diffusers", "UNet2DConditionalModel"]},
            "`unet`.*no class 'UNet2DConditionalModel'.*UNet2DCondition",
        ),
        ({"text_encoder": ["transfomers", "CLIPTextModel"]}, "`text_encoder`.*'transfomers'.*hubgen, diffusers"),
        ({"prior": ["diffusers", "PriorTransformer"]}, "`prior`.*no place.*text_encoder"),
        ({"vae": "AutoencoderKL"}, "got `vae` .*, expected \\[library, class\\]"),
        ({"vae": ["diffusers", "AutoencoderKL", "x"]}, "got `vae` .*, expected \\[library, class\\]"),
    ],
)
def test_an_index_with_something_unknown_is_refused_before_any_weights_are_read(
    change: dict[str, Any], message: str, official: Official, tmp_path: Path
) -> None:
    """There are none to read: every other file is missing."""
    index = json.loads((official("sd1") / "model_index.json").read_text()) | change
    (tmp_path / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))
    with pytest.raises(ValueError, match=message.replace("None", "none")) as raised:
        TextToImagePipeline.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"index"'])
def test_an_index_that_is_no_json_object_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises((ValueError, OSError), match="model_index.json|JSON object"):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_an_unknown_class_does_not_matter_where_the_component_is_given(official: Official, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(official("sd1"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "safety_checker": ["nowhere", "Checker"]}))
    with pytest.raises(ValueError, match="'nowhere'"):
        TextToImagePipeline.from_pretrained(folder)
    assert TextToImagePipeline.from_pretrained(folder, safety_checker=None).safety_checker is None


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("sd1", {"prompt_2": "a cat"}, "`prompt_2`"),
        ("sdxl", {"prompt_3": "a cat"}, "`prompt_3`"),
        ("sdxl-refiner", {"prompt_2": "a cat"}, "`prompt_2`"),
        ("flux-dev", {"negative_prompt_3": "a cat"}, "`negative_prompt_3`"),
        ("sdxl", {"negative_prompt_2": ["a", "b", "c"]}, "`negative_prompt_2`"),
        ("sd1", {"true_cfg_scale": 2.0}, "`true_cfg_scale`"),
        ("sd1", {"original_size": (1, 2)}, "`original_size`"),
        ("sdxl", {"target_size": 512}, "`target_size`"),
        ("sdxl", {"aesthetic_score": 6.0}, "`aesthetic_score`"),
        ("sd1", {"clip_skip": -1}, "`clip_skip`"),
        ("sd1", {"clip_skip": 12}, "`clip_skip`"),
        ("flux-dev", {"clip_skip": 1}, "`clip_skip`"),
        ("sd1", {"max_sequence_length": 100}, "`max_sequence_length`"),
        ("sd3", {"max_sequence_length": 600}, "`max_sequence_length`"),
        ("sd1", {"joint_attention_kwargs": {"scale": 1.0}}, "`joint_attention_kwargs`.*`cross_attention_kwargs`"),
        ("sd3", {"cross_attention_kwargs": {"scale": 1.0}}, "`cross_attention_kwargs`"),
        ("sdxl", {"denoising_end": 1.5}, "`denoising_end`"),
        ("sd1", {"prompt": None, "prompt_embeds": "a cat"}, "`prompt_embeds`"),
        ("flux-dev", {"height": 36}, "multiple of 8; the nearest: 32 or 40"),
        ("sd1-inpaint", {}, "`image`, `mask_image`"),
    ],
)
def test_a_bad_argument_is_named(name: str, call: dict[str, Any], message: str, both: Pair) -> None:
    with pytest.raises(ValueError, match=message):
        both(name).ours(**{"prompt": "a cat", **call})


def test_a_pipeline_without_text_encoders_asks_for_embeddings(both: Pair) -> None:
    for name, missing in (("sd1", "text_encoder"), ("sdxl", "text_encoder_2"), ("flux-dev", "text_encoder")):
        parts = both(name).ours.components
        gone = [part for part in parts if part.startswith(("text_encoder", "tokenizer"))]
        pipe = TextToImagePipeline(**{**parts, **dict.fromkeys(gone)})
        with pytest.raises(ValueError, match=f"`{missing}`.*`prompt_embeds`"):
            pipe("a cat")
    with pytest.raises(ValueError, match="`negative_prompt_embeds`.*`text_encoder`"):
        both("sd1").with_parts(text_encoder=None, tokenizer=None).ours(prompt_embeds=torch.zeros(1, 77, 16))


def test_a_score_that_the_unet_has_no_place_for_is_told(both: Pair) -> None:
    pipe = both("sdxl").with_parts().ours
    pipe.register_to_config(requires_aesthetics_score=True)
    with pytest.raises(ValueError, match="requires_aesthetics_score"):
        pipe("a cat", num_inference_steps=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_tuple_has_as_many_values_as_that_of_diffusers(name: str, both: Pair) -> None:
    size = {"height": 32, "width": 40} if name.startswith("flux") else {}
    call = {"prompt": PROMPTS[0], "num_inference_steps": 1, "return_dict": False, **size}
    ours, theirs = (pipe(**call) for pipe in (both(name).ours, both(name).theirs))
    assert len(ours) == len(theirs)
    assert ours[1:] == theirs[1:]
