"""Both directions: our models and schedulers in diffusers' pipelines, diffusers' schedulers in ours.

Each test makes the same picture twice, from the same weights and the same seed.
"""

import inspect
import io
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import hubgen
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests import official as layouts
from tests.parity import randomize_

PROMPT = ["a red cat", "the big blue heart"]
TOLERANCE = 1e-3


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit() -> diffusers.DiffusionPipeline:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, out_channels=8
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(randomize_(transformer).eval(), layouts.vae(), scheduler)


def ddpm() -> diffusers.DiffusionPipeline:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
    )
    return diffusers.DDPMPipeline(randomize_(unet).eval(), diffusers.DDPMScheduler(variance_type="fixed_large"))


PIPELINES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    **{name: layouts.MAKERS[name] for name in ("sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev", "flux-schnell")},
    "dit": dit,
    "ddpm": ddpm,
}


@pytest.fixture(scope="module")
def made() -> Callable[[str], dict[str, Any]]:
    """The components of each of diffusers' tiny pipelines, made once."""
    pipes: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in pipes:
            pipes[name] = quiet(PIPELINES[name]())
        return pipes[name]

    return make


def pictures(pipe: Any, name: str, steps: int = 5, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if name == "dit":
        condition: dict[str, Any] = {"class_labels": [3, 7], "guidance_scale": 4.0, "output_type": "np"}
    elif name == "ddpm":
        condition = {"batch_size": 2, "output_type": "np"}
    else:
        condition = {"prompt": PROMPT, "guidance_scale": 4.0, "height": 32, "width": 32, "output_type": "latent"}
        condition |= {"max_sequence_length": 16} if name in ("sd3", "sd3.5", "flux-dev", "flux-schnell") else {}
    images = pipe(**{**condition, **options}, num_inference_steps=steps, generator=generator, return_dict=False)[0]
    return torch.as_tensor(images)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.isfinite().all() and theirs.std() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def counterpart(model: Any) -> Any:
    """Ours of the same name, with the same config and weights; the model itself where we have none."""
    if not isinstance(model, diffusers.ModelMixin) or not hasattr(hubgen, type(model).__name__):
        return model
    ours = getattr(hubgen, type(model).__name__).from_config(model.config)
    ours.load_state_dict(model.state_dict())
    return ours.eval()


@pytest.mark.parametrize("name", PIPELINES)
def test_our_models_in_diffusers_pipelines_make_the_same_pictures(name, made, shows):
    shows(name, "model works in diffusers' pipeline")
    pipe = made(name)
    models = {key: counterpart(value) for key, value in pipe.components.items()}
    swapped = {key for key, model in models.items() if type(model).__module__.startswith("hubgen.")}
    assert swapped == {"vae", "unet", "transformer"} & set(pipe.components)
    ours = quiet(type(pipe)(**models))
    options = {} if name == "ddpm" else {"output_type": "np"}
    assert_same(pictures(ours, name, **options), pictures(pipe, name, **options))


OUR_SCHEDULERS = {
    "sd1": ("DDIMScheduler", "DDPMScheduler"),
    "sd2": ("DDIMScheduler", "DDPMScheduler"),
    "sdxl": ("DDIMScheduler",),
    "sd3": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "flux-dev": ("FlowMatchEulerDiscreteScheduler",),
    "dit": ("DDIMScheduler",),
    "ddpm": ("DDPMScheduler",),
}


@pytest.mark.parametrize(
    ("name", "scheduler"), [(name, scheduler) for name, names in OUR_SCHEDULERS.items() for scheduler in names]
)
def test_our_schedulers_in_diffusers_pipelines_make_the_same_pictures(name, scheduler, made):
    pipe = made(name)
    kept, found = pipe.scheduler, {}
    try:
        for library in (hubgen, diffusers):
            pipe.scheduler = getattr(library, scheduler).from_config(kept.config)
            found[library] = pictures(pipe, name)
    finally:
        pipe.scheduler = kept
    assert_same(found[hubgen], found[diffusers])


@pytest.mark.parametrize("name", ["sd1", "sd3", "dit"])
def test_diffusers_pipelines_with_our_parts_load_again_in_diffusers(name, made, tmp_path):
    pipe = made(name)
    parts = {key: counterpart(value) for key, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
    cls = getattr(hubgen, OUR_SCHEDULERS[name][0])
    mixed = quiet(type(pipe)(**{**pipe.components, **parts, "scheduler": cls.from_config(pipe.scheduler.config)}))
    mixed.save_pretrained(tmp_path)
    loaded = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is type(pipe)
    assert type(loaded.scheduler) is cls
    assert_same(pictures(loaded, name), pictures(mixed, name))


def embeddings(pipe: Any, name: str) -> dict[str, torch.Tensor]:
    """What diffusers' pipeline makes of the prompts, so that only the walk from noise to data is compared."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    if name == "sd3":
        found = pipe.encode_prompt(PROMPT, None, None, max_sequence_length=16)
    elif name == "sdxl":
        found = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=True)
    elif name.startswith("flux"):
        return {}  # its pipeline takes no negative embeddings: the prompts themselves, then
    else:
        found = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    return {"prompt": None, **dict(zip(names, found, strict=False))}


def of_the_same_parts(pipe: Any) -> TextToImagePipeline:
    """Our pipeline around diffusers' components, each model in our class."""
    known = inspect.signature(TextToImagePipeline.__init__).parameters
    return quiet(
        TextToImagePipeline(**{key: counterpart(value) for key, value in pipe.components.items() if key in known})
    )


SCHEDULERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{
        name: ("sd1", getattr(diffusers, name).from_config)
        for name in (
            "DDIMScheduler",
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "UniPCMultistepScheduler",
            "PNDMScheduler",
            "LMSDiscreteScheduler",
            "HeunDiscreteScheduler",
            "DEISMultistepScheduler",
            "LCMScheduler",
        )
    },
    "karras DPM-Solver++": (
        "sd1",
        lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
    ),
    "v-prediction Euler": ("sd2", diffusers.EulerDiscreteScheduler.from_config),
    "v-prediction UniPC": ("sd2", diffusers.UniPCMultistepScheduler.from_config),
    "SDXL Euler": ("sdxl", diffusers.EulerDiscreteScheduler.from_config),
    "SDXL DPM-Solver++": ("sdxl", diffusers.DPMSolverMultistepScheduler.from_config),
    "FLUX dev Euler": ("flux-dev", diffusers.FlowMatchEulerDiscreteScheduler.from_config),
    "FLUX schnell Euler": ("flux-schnell", diffusers.FlowMatchEulerDiscreteScheduler.from_config),
    "flow Euler": ("sd3", diffusers.FlowMatchEulerDiscreteScheduler.from_config),
    "flow Heun": ("sd3", diffusers.FlowMatchHeunDiscreteScheduler.from_config),
    "flow UniPC": (
        "sd3",
        lambda config: diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=config.shift, prediction_type="flow_prediction"
        ),
    ),
    "flow DPM-Solver++": (
        "sd3",
        lambda config: diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=config.shift, prediction_type="flow_prediction"
        ),
    ),
}


@pytest.mark.parametrize(("name", "scheduler"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_diffusers_schedulers_in_our_pipeline_make_the_same_pictures(name, scheduler, made, shows):
    shows(name, "diffusers' schedulers")
    theirs = made(name)
    ours, kept = of_the_same_parts(theirs), theirs.scheduler
    inputs = {**embeddings(theirs, name), "output_type": "np"}
    try:
        ours.scheduler, theirs.scheduler = scheduler(kept.config), scheduler(kept.config)
        assert type(ours.scheduler).__module__.startswith("diffusers.")
        found, expected = pictures(ours, name, **inputs), pictures(theirs, name, **inputs)
    finally:
        theirs.scheduler = kept
    assert_same(found, expected)
    assert ours.num_timesteps == theirs.num_timesteps


@pytest.mark.parametrize("library", [hubgen, diffusers], ids=["ours", "theirs"])
def test_two_calls_a_step_are_all_called_back_and_the_progress_bar_ends_full(library, made):
    ours = of_the_same_parts(made("sd3"))
    ours.scheduler = library.FlowMatchHeunDiscreteScheduler(shift=3.0)
    seen: list[tuple[int, float]] = []

    def callback(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, timestep.item()))
        return {}

    bars = []
    make = ours.progress_bar

    def progress_bar(*args: Any, **kwargs: Any) -> Any:
        bars.append(make(*args, **kwargs))
        return bars[-1]

    ours.progress_bar = progress_bar
    ours.set_progress_bar_config(file=io.StringIO())  # shown, or it would not count
    inputs = {**embeddings(made("sd3"), "sd3"), "callback_on_step_end": callback}
    pictures(ours, "sd3", steps=3, **inputs)
    assert seen == list(enumerate(ours.scheduler.timesteps.tolist())) and len(seen) == 5
    assert [bar.n == bar.total for bar in bars] == [True]
