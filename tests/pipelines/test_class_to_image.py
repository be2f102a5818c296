"""ClassToImagePipeline: the same pictures as diffusers' DiTPipeline, its folders both ways, and what calls refuse."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import hubgen
from hubgen.data.images import Canvas, read_masks
from hubgen.pipelines.class_to_image import ClassToImagePipeline
from tests.models import seeded
from tests.official import CLASSES, dit
from tests.official_images import mask, picture
from tests.parity import randomize_


def official_dit(*options: Any, **config: Any) -> diffusers.DiTPipeline:
    pipe = dit(*options, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official folder's layout: the names of the classes in the index, and the transformer under its old class."""
    path = tmp_path_factory.mktemp("dit")
    official_dit().save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    index |= {"id2label": {str(key): value for key, value in CLASSES.items()}}
    index |= {"transformer": ["diffusers", "Transformer2DModel"]}
    (path / "model_index.json").write_text(json.dumps(index))
    config = json.loads((path / "transformer/config.json").read_text())
    config |= {"_class_name": "Transformer2DModel"}
    (path / "transformer/config.json").write_text(json.dumps(config))
    return path


def ours_of(theirs: diffusers.DiTPipeline, **changes: Any) -> ClassToImagePipeline:
    """Our pipeline around the components of theirs."""
    pipe = ClassToImagePipeline(**{**theirs.components, "id2label": CLASSES, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder: Path) -> ClassToImagePipeline:
    pipe = ClassToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder: Path) -> ClassToImagePipeline:
    return load(folder)


def latents(pipe: ClassToImagePipeline, labels: Any = (1, 4), **options: Any) -> torch.Tensor:
    options = {"num_inference_steps": 3, "generator": seeded(7)[0], **options}
    return pipe(list(labels) if isinstance(labels, tuple) else labels, output_type="latent", **options).images


def test_an_official_folder_loads_with_our_classes_and_keeps_its_names(pipe):
    for component, name in (
        (pipe.transformer, "DiTTransformer2DModel"),
        (pipe.vae, "AutoencoderKL"),
        (pipe.scheduler, "DDIMScheduler"),
    ):
        assert type(component) is getattr(hubgen, name)
    assert pipe.labels == {"tench": 0, "Tinca tinca": 0, "goldfish": 1, "white shark": 2, "hen": 3, "ostrich": 4}
    assert pipe.get_label_ids(["white shark", "tench"]) == [2, 0]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_are_those_of_diffusers_at_the_same_seed(folder, pipe, guidance_scale, shows):
    shows("dit", "class to image")
    theirs = diffusers.DiTPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    call = {"guidance_scale": guidance_scale, "num_inference_steps": 5, "output_type": "np"}
    expected = theirs([1, 4], generator=seeded(3)[0], **call).images
    actual = pipe([1, 4], generator=seeded(3)[0], **call).images
    assert expected.std() > 0.01
    assert np.abs(actual - expected).max() < 1e-3


# Not with Euler: diffusers' DiTPipeline goes on from the scaled input, where such schedulers expect the sample itself.
SAME = (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler)


@pytest.mark.parametrize("scheduler", SAME)
@pytest.mark.parametrize("out_channels", [4, 8])
def test_with_deterministic_schedulers_of_diffusers_pictures_are_the_same(scheduler, out_channels):
    theirs = official_dit(scheduler(), out_channels=out_channels)
    call = {"num_inference_steps": 5, "output_type": "np"}
    expected = theirs([1, 4], generator=seeded(3)[0], **call).images
    assert np.abs(ours_of(theirs)([1, 4], generator=seeded(3)[0], **call).images - expected).max() < 1e-3


def test_saved_by_ours_it_is_diffusers_own_pipeline(pipe, tmp_path, shows):
    shows("dit", "saved files load in diffusers")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    assert type(theirs) is diffusers.DiTPipeline
    assert theirs.labels == pipe.labels
    call = {"num_inference_steps": 2, "output_type": "np"}
    expected = pipe([2], generator=seeded(1)[0], **call).images
    assert np.abs(theirs([2], generator=seeded(1)[0], **call).images - expected).max() < 1e-3
    again = load(tmp_path)
    assert np.array_equal(again("white shark", generator=seeded(1)[0], **call).images, expected)


def test_defaults_are_saved_with_the_pipeline(pipe, tmp_path):
    other = ClassToImagePipeline(**pipe.components, default_num_inference_steps=2, default_guidance_scale=1.5)
    other.save_pretrained(tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is diffusers.DiTPipeline
    loaded = load(tmp_path)
    loaded(0, output_type="latent")
    assert (loaded.num_timesteps, loaded.guidance_scale) == (2, 1.5)


def test_a_name_a_number_and_a_tensor_mean_the_same(pipe):
    expected = latents(pipe, [2])
    for labels in (2, "white shark", ["white shark"], torch.tensor([2])):
        assert torch.equal(latents(pipe, labels), expected)


def test_a_picture_with_a_generator_of_its_own_is_the_same_in_any_batch(pipe):
    batch = latents(pipe, (1, 4), generator=seeded(5, 6))
    torch.testing.assert_close(batch[1:], latents(pipe, (4,), generator=seeded(6)), atol=1e-4, rtol=1e-4)


def test_several_pictures_of_a_label_lie_next_to_each_other(pipe):
    seeds = seeded(1, 2, 3, 4)
    expected = latents(pipe, (1, 1, 4, 4), generator=seeded(1, 2, 3, 4))
    assert torch.equal(latents(pipe, (1, 4), generator=seeds, num_images_per_label=2), expected)


def test_given_latents_are_the_noise_that_the_generator_would_draw(pipe):
    noise = torch.randn(2, 4, 8, 8, generator=seeded(7)[0])
    assert torch.equal(latents(pipe, latents=noise, generator=None), latents(pipe))


def test_no_guidance_anywhere_is_guidance_of_one(pipe):
    assert torch.equal(latents(pipe, guidance_interval=(0.0, 0.0)), latents(pipe, guidance_scale=1.0))


def test_the_label_for_no_class_makes_guidance_change_nothing(pipe):
    torch.testing.assert_close(latents(pipe, (1000,)), latents(pipe, (1000,), guidance_scale=1.0))


@pytest.mark.parametrize(("output_type", "shape"), [("np", (1, 32, 32, 3)), ("pt", (1, 3, 32, 32))])
def test_output_types_have_their_shapes_and_range(pipe, output_type, shape):
    images = pipe(1, num_inference_steps=1, output_type=output_type).images
    assert tuple(images.shape) == shape and images.min() >= 0 and images.max() <= 1


def test_pil_pictures_and_tuples_come_back_as_asked_for(pipe):
    (images,) = pipe([1, 2], num_inference_steps=1, return_dict=False, height=16, width=24)
    assert [image.size for image in images] == [(24, 16)] * 2


def test_a_callback_sees_every_step_and_can_change_latents_and_labels(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return {"class_labels": torch.tensor([4])} if step == 0 else {}

    asked = ("latents", "class_labels")
    changed = latents(pipe, (1,), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=asked)
    assert seen == [(step, ["class_labels", "latents"]) for step in range(3)]
    assert not torch.equal(changed, latents(pipe, (1,)))

    zeroed = latents(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(2, 4, 8, 8)})
    assert not zeroed.any()


def test_interrupting_ends_the_call_with_what_it_has(pipe):
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = True

    kept = []
    latents(pipe, callback_on_step_end=lambda p, s, t, tensors: kept.append(tensors["latents"]) or {})
    assert torch.equal(latents(pipe, callback_on_step_end=stop), kept[0])


@pytest.mark.parametrize("library", [diffusers, hubgen])
def test_a_learned_variance_reaches_the_scheduler_that_asks_for_it(library):
    """Steps of the pipeline are the scheduler's own, on both halves of the backbone's prediction."""
    scheduler = library.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipe = ours_of(official_dit(scheduler))
    actual = latents(pipe, (1,), guidance_scale=1.0, num_inference_steps=2)

    generator = seeded(7)[0]
    x = torch.randn(1, 4, 8, 8, generator=generator)
    scheduler.set_timesteps(2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = pipe.transformer(x, t[None], torch.tensor([1])).sample
            x = scheduler.step(out, t, x, generator=generator).prev_sample
    torch.testing.assert_close(actual, x)


def class_unet(**config: Any) -> diffusers.UNet2DModel:
    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "num_class_embeds": 4,
    }
    return randomize_(diffusers.UNet2DModel(**{**defaults, **config})).eval()


def test_a_class_conditional_unet_is_a_backbone_too(tmp_path):
    theirs = official_dit()
    pipe = ours_of(theirs, transformer=None, unet=class_unet(), id2label=None)
    plain = latents(pipe, (1,))
    assert pipe.guidance_scale == 1.0 and not torch.equal(plain, latents(pipe, (2,)))
    with pytest.raises(ValueError, match="`guidance_scale`: got 2.0, expected at most 1"):
        latents(pipe, (1,), guidance_scale=2.0)

    guided = ours_of(theirs, transformer=None, unet=pipe.unet, id2label=None, null_label=3)
    assert torch.equal(latents(guided, (1,), guidance_scale=1.0), plain)
    assert not torch.equal(latents(guided, (1,), guidance_scale=2.0), plain)

    guided.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == [
        "hubgen_class_to_image",
        "ClassToImagePipeline",
    ]
    loaded = load(tmp_path)
    torch.testing.assert_close(latents(loaded, (1,)), latents(guided, (1,)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": []}, "`class_labels`: got none"),
        ({"class_labels": [1001]}, "`class_labels`: got 1001, expected one of 0 ... 1000"),
        ({"class_labels": [-1]}, "`class_labels`: got -1"),
        ({"class_labels": [1.5]}, "`class_labels`: got 1.5"),
        ({"class_labels": [True]}, "`class_labels`: got True"),
        ({"class_labels": "gold fish"}, "no class 'gold fish'; the nearest: goldfish"),
        ({"num_inference_steps": 0}, "`num_inference_steps`: got 0"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"height": 17}, "`height`: got 17, expected a multiple of 8; the nearest: 16 or 24"),
        ({"output_type": "jpg"}, "`output_type`: got 'jpg'"),
        ({"generator": [torch.Generator()] * 3}, "`generator`: got a list of 3, expected one for each of 1"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"`latents`: got \(1, 4, 4, 4\), expected.*\(1, 4, 8, 8\)"),
        ({"num_images_per_label": 0}, "num_images_per_label"),
        ({"sigmas": [1.0, 0.5]}, "`sigmas`: DDIMScheduler takes none"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end`: got 3"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"got \['noise'\], expected names of"),
    ],
)
def test_arguments_that_the_model_cannot_work_with_are_refused_before_any_work(pipe, options, message):
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": 1, **options})
    handle.remove()
    assert calls == []


def test_components_that_do_not_fit_are_refused_by_name():
    theirs = official_dit(out_channels=4)
    with pytest.raises(ValueError, match="`transformer`, `unet`: got neither"):
        ours_of(theirs, transformer=None)
    with pytest.raises(ValueError, match="`unet`: got one without `num_class_embeds`"):
        ours_of(theirs, transformer=None, unet=class_unet(num_class_embeds=None))
    with pytest.raises(ValueError, match="`vae`: got 4 channels, expected the backbone's 3"):
        ours_of(theirs, transformer=None, unet=class_unet(in_channels=3))
    with pytest.raises(ValueError, match="`id2label`: got 1002: 'unicorn'"):
        ours_of(theirs, id2label={1002: "unicorn"})
    with pytest.raises(ValueError, match="`null_label`: got 1001"):
        ours_of(theirs, null_label=1001)
    learned = ours_of(theirs, scheduler=diffusers.DDPMScheduler(variance_type="learned_range"))
    with pytest.raises(ValueError, match="`scheduler`: got `variance_type`='learned_range'.*8 output channels.*has 4"):
        learned(1)


def test_a_class_goes_with_an_image_and_a_mask(folder: Path) -> None:
    pipe = ClassToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "class_labels": [1, 2],
        "num_inference_steps": 4,
        "output_type": "pt",
        "height": 32,
        "width": 32,
    }
    image, where = picture(1), mask(2)
    near = pipe(**call, image=image, strength=0.25, generator=seeded(1, 2)).images
    far = pipe(**call, image=image, strength=1.0, generator=seeded(1, 2)).images
    assert near.shape == far.shape == (2, 3, 32, 32) and not torch.equal(near, far)
    with pytest.raises(ValueError, match="`strength`: got one without `image`"):
        pipe(**call, strength=0.5)
    kept = pipe(
        **{**call, "output_type": "latent"}, image=torch.zeros(1, 4, 8, 8), mask_image=where, generator=seeded(1, 2)
    ).images
    inside = torch.nn.functional.interpolate(
        Canvas((32, 32), 8, 4).mask(read_masks(where), torch.device("cpu")), size=(8, 8)
    ).bool()
    assert (kept[~inside.expand_as(kept)] == 0).all() and (kept[inside.expand_as(kept)] != 0).any()
