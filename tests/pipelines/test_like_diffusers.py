"""A pipeline of ours where diffusers' is expected: `encode_prompt`, `components`, `from_pipe`, AutoPipeline."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hubgen.hub.native import NativePipeline
from hubgen.hub.registration import after_import
from hubgen.pipelines.prompt_to_embeddings import ONE_PROMPT, SEVERAL_PROMPTS
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests import models

NAMES = ["sd1", "sd2", "sdxl", "sd3", "flux-dev"]
FAMILIES = ["sd1", "sdxl", "sd3", "flux-dev"]
PROMPTS = ["a red cat", "the big blue dog"]

Pair = Callable[[str], tuple[TextToImagePipeline, Any]]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pair(official: Callable[[str], Path]) -> Pair:
    """Ours and diffusers' of the same folder."""
    loaded: dict[str, Any] = {}

    def make(name: str) -> tuple[TextToImagePipeline, Any]:
        if name not in loaded:
            folder = official(name)
            loaded[name] = tuple(
                quiet(cls.from_pretrained(folder)) for cls in (TextToImagePipeline, diffusers.DiffusionPipeline)
            )
        return loaded[name]

    return make


def assert_same(ours: Any, theirs: Any, atol: float) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if other is None:
            assert mine is None
        else:
            torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(other), atol=atol, rtol=0.0)


# ---- encode_prompt ----


@pytest.mark.parametrize("name", [*NAMES, "sdxl-refiner"])
def test_the_arguments_stand_in_the_order_of_diffusers(name: str, pair: Pair) -> None:
    ours, theirs = pair(name)
    expected = list(inspect.signature(type(theirs).encode_prompt).parameters)[1:]
    assert list(SEVERAL_PROMPTS.get(type(ours.condition), ONE_PROMPT)) == expected


# By position, then by name; the first device is where the family's pipeline has it.
BY_POSITION: dict[str, tuple[Any, ...]] = {
    "sd1": (PROMPTS, "cpu", 2, True, ["the dog", ""]),
    "sd2": (PROMPTS[0], "cpu", 1, True),
    "sdxl": (PROMPTS, ["a box", "a ball"], "cpu", 2, True, ["the dog", ""], ["a heart", "a cat"]),
    "sd3": (PROMPTS, ["a box", "a ball"], ["a", "the"], "cpu", 2, True, ["the dog", ""], None, ["apple", "cat"]),
    "flux-dev": (PROMPTS, ["a box", "a ball"], "cpu", 2),
    "sdxl-refiner": (PROMPTS[0], None, "cpu", 1, True, "the dog"),
}
BY_NAME: dict[str, dict[str, Any]] = {
    "sd1": {"do_classifier_free_guidance": False, "num_images_per_prompt": 1},
    "sdxl": {"clip_skip": 1},
    "sd3": {"prompt_2": None, "prompt_3": None, "max_sequence_length": 16, "clip_skip": 1},
    "flux-dev": {"max_sequence_length": 16},
}


@pytest.mark.parametrize("name", BY_POSITION)
def test_prompts_are_encoded_as_by_diffusers(name: str, pair: Pair) -> None:
    ours, theirs = pair(name)
    with torch.no_grad():
        assert_same(*(pipe.encode_prompt(*BY_POSITION[name]) for pipe in (ours, theirs)), atol=1e-5)
        call = {"prompt": PROMPTS[1], "device": torch.device("cpu"), **BY_NAME.get(name, {})}
        if name in BY_NAME:
            assert_same(*(pipe.encode_prompt(**call) for pipe in (ours, theirs)), atol=1e-5)


def test_without_guidance_there_is_no_negative_branch(pair: Pair) -> None:
    for name in ("sd1", "sdxl"):
        _, negative, *_ = pair(name)[0].encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        assert negative is None


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_draw_the_same_picture_when_the_text_encoders_are_gone(
    name: str, official: Callable[[str], Path], pair: Pair
) -> None:
    pipe = quiet(TextToImagePipeline.from_pretrained(official(name)))
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    call |= {"max_sequence_length": 16} if name in ("sd3", "flux-dev") else {}
    flux = name == "flux-dev"
    negative = {} if flux else {"negative_prompt": "the dog"}
    expected = pipe(PROMPTS, **call, **negative, generator=models.seeded(1, 2)).images
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    with torch.no_grad():
        options = {key: value for key, value in call.items() if key == "max_sequence_length"}
        found = pipe.encode_prompt(prompt=PROMPTS, device="cpu", **negative, **options)
    embeds = dict(zip(names[::2] if flux else names, found, strict=False))
    assert_same([pipe(**call, **embeds, generator=models.seeded(1, 2)).images], [expected], atol=1e-5)
    for encoder in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        setattr(pipe, encoder, None)
        setattr(pipe, encoder.replace("text_encoder", "tokenizer"), None)
    assert_same([pipe(**call, **embeds, generator=models.seeded(1, 2)).images], [expected], atol=1e-5)
    given = {**embeds, **({} if flux else {"do_classifier_free_guidance": True})}
    assert_same(pipe.encode_prompt(prompt=None, device="cpu", **given)[: len(embeds)], list(embeds.values()), atol=0.0)
    with pytest.raises(ValueError, match="no `text_encoder"):
        pipe.encode_prompt(PROMPTS, device="cpu")


def test_hubgens_own_models_have_the_signature_of_stable_diffusion() -> None:
    pipe = models.pipeline("transformer")
    with torch.no_grad():
        embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, True, "a heart")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    given = pipe(**call, **dict(zip(names, embeds, strict=True)), generator=models.seeded(1, 2)).images
    plain = pipe(PROMPTS, **call, negative_prompt="a heart", generator=models.seeded(1, 2)).images
    torch.testing.assert_close(given, plain, atol=1e-5, rtol=0.0)
    assert len(models.pipeline("unet").encode_prompt("a cat")) == 2


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        (("a cat", "cpu", 1, True, None, None, None, None, None, None, None, 1), {}, "too many positional"),
        (("a cat",), {"prompt": "a dog"}, "multiple values for argument 'prompt'"),
        (("a cat",), {"max_sequence_length": 16}, "unexpected keyword argument 'max_sequence_length'.*`?clip_skip"),
    ],
    ids=["too many", "twice", "another family's"],
)
def test_wrong_arguments_are_told_with_those_there_are(args: Any, options: Any, words: str, pair: Pair) -> None:
    with pytest.raises(TypeError, match=words):
        pair("sd1")[0].encode_prompt(*args, **options)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_lora_scale_is_that_of_the_text_encoders_adapters(name: str, official: Callable[[str], Path]) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    pipes = [cls.from_pretrained(official(name)) for cls in (TextToImagePipeline, diffusers.DiffusionPipeline)]
    for pipe in pipes:
        torch.manual_seed(3)
        pipe.text_encoder.add_adapter(config, "one")
    ours = pipes[0]
    call = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True, "lora_scale": 0.5}
    with torch.no_grad():
        plain = ours.encode_prompt("a cat")
        assert_same(*(pipe.encode_prompt(prompt="a cat", **call) for pipe in pipes), atol=1e-5)
        assert (ours.encode_prompt("a cat", **call | {"lora_scale": 4.0})[0] - plain[0]).abs().max() > 1e-3
        assert_same(ours.encode_prompt("a cat"), plain, atol=0.0)
    picture = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    scaled = {**picture, "cross_attention_kwargs": {"scale": 0.5}}
    assert_same(*([quiet(pipe)("a cat", **scaled, generator=models.seeded(1)[0]).images] for pipe in pipes), atol=1e-4)


# ---- to diffusers ----

PREFIX = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux-dev": "Flux"}


def draw(pipe: Any, name: str, mask: bool = False) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    shown = Image.new("L", (32, 32), 0)
    shown.paste(255, (8, 8, 24, 24))
    options: dict[str, Any] = {"mask_image": shown} if mask else {}
    options |= {"max_sequence_length": 16} if name in ("sd3", "flux-dev") else {}
    # SD3's and FLUX's inpainting is of 1024 pixels unless told otherwise.
    options |= {"height": 32, "width": 32} if name in ("sd3", "flux-dev") or mask else {}
    call = {"image": Image.fromarray(pixels), "strength": 0.6, "num_inference_steps": 5, "output_type": "np"}
    return quiet(pipe)("a red cat", **call, **options, generator=models.seeded(1)[0]).images


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_pipelines_for_other_tasks_are_made_of_ours(name: str, pair: Pair) -> None:
    ours, theirs = pair(name)
    for task, mask in (("Img2Img", False), ("Inpaint", True)):
        cls = getattr(diffusers, f"{PREFIX[name]}{task}Pipeline")
        auto = {"Img2Img": diffusers.AutoPipelineForImage2Image, "Inpaint": diffusers.AutoPipelineForInpainting}[task]
        made = {
            "from_pipe": cls.from_pipe(ours),
            "components": cls(**ours.components, **ours.parameters),
            "auto": auto.from_pipe(ours),
        }
        expected = draw(cls.from_pipe(theirs), name, mask)
        assert expected.std() > 0.05
        for way, pipe in made.items():
            assert type(pipe) is cls, way
            assert all(getattr(pipe, part) is model for part, model in ours.components.items()), way
        assert_same([draw(made["from_pipe"], name, mask)], [expected], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_components_are_those_of_diffusers(name: str, pair: Pair) -> None:
    ours, theirs = pair(name)
    assert ours.components.keys() == theirs.components.keys()
    again = TextToImagePipeline(**ours.components)
    assert again.components.keys() == ours.components.keys()
    assert ours.native_class() == type(theirs).__name__


def test_components_for_which_diffusers_has_no_pipeline_have_all_places() -> None:
    assert models.pipeline("unet").components.keys() == set(
        TextToImagePipeline._get_signature_keys(TextToImagePipeline)[0]
    )


def test_models_of_ours_go_on_from_one_pipeline_of_diffusers_to_another(pair: Pair) -> None:
    ours = pair("sd1")[0]
    first = diffusers.StableDiffusionPipeline(**ours.components, requires_safety_checker=False)
    assert diffusers.StableDiffusionImg2ImgPipeline.from_pipe(first).unet is ours.unet


def test_what_only_hubgen_takes_comes_back_from_diffusers(pair: Pair, tmp_path: Path) -> None:
    ours = TextToImagePipeline(**pair("sd1")[0].components, default_num_inference_steps=7)
    for there in (
        diffusers.StableDiffusionImg2ImgPipeline.from_pipe(ours),
        diffusers.AutoPipelineForText2Image.from_pipe(ours),
        ours.native_pipeline(),
    ):
        assert TextToImagePipeline.from_pipe(there).defaults().steps == 7
    ours.native_pipeline().save_pretrained(tmp_path)
    assert TextToImagePipeline.from_pretrained(tmp_path).defaults().steps == 7
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is diffusers.StableDiffusionPipeline


def test_a_pipeline_that_diffusers_has_not_says_so() -> None:
    with pytest.raises(ValueError, match="TextToImagePipeline for whose components diffusers has no pipeline"):
        diffusers.AutoPipelineForInpainting.from_pipe(models.pipeline())


def test_auto_pipelines_are_taught_once_and_take_other_pipelines_as_before(pair: Pair) -> None:
    ours, theirs = pair("sd1")
    NativePipeline.__init__(ours)
    assert type(diffusers.AutoPipelineForInpainting.from_pipe(theirs)) is diffusers.StableDiffusionInpaintPipeline
    plain = diffusers.AutoPipelineForInpainting.from_pipe.__func__.__wrapped__
    assert not hasattr(plain, "__wrapped__")


def test_a_module_is_acted_on_when_it_is_imported_or_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_module.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    for _ in range(2):
        after_import("late_module", lambda module: seen.append(module.VALUE))
    assert seen == []
    try:
        importlib.import_module("late_module")
        assert seen == [1]
        after_import("late_module", lambda module: seen.append(module.VALUE + 1))
        assert seen == [1, 2]
    finally:
        sys.modules.pop("late_module", None)
