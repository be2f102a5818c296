"""Configs: those of official repositories load, and every config travels between hubgen's and diffusers' classes."""

import inspect
import json
from typing import Any

import diffusers
import pytest
import torch

import hubgen

STABLE_DIFFUSION = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
FLUX = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
}
LINEAR = {"beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "num_train_timesteps": 1000}

# scheduler_config.json of official repositories, as they are published (the version of diffusers aside)
OFFICIAL: dict[str, dict[str, Any]] = {
    "stable-diffusion-v1-5": {"_class_name": "PNDMScheduler", **STABLE_DIFFUSION},
    "stable-diffusion-2-1": {
        "_class_name": "DDIMScheduler",
        **STABLE_DIFFUSION,
        "prediction_type": "v_prediction",
    },
    "stable-diffusion-xl-base-1.0": {
        "_class_name": "EulerDiscreteScheduler",
        **STABLE_DIFFUSION,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "DiT-XL-2-256": {
        "_class_name": "DDIMScheduler",
        **LINEAR,
        "clip_sample": False,
        "prediction_type": "epsilon",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "trained_betas": None,
    },
    "ddpm-cifar10-32": {
        "_class_name": "DDPMScheduler",
        **LINEAR,
        "clip_sample": True,
        "trained_betas": None,
        "variance_type": "fixed_large",
    },
    "stable-diffusion-3-medium": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    },
    "FLUX.1-dev": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        **FLUX,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    },
    "FLUX.1-schnell": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        **FLUX,
        "shift": 1.0,
        "use_dynamic_shifting": False,
    },
    "ncsnpp-celebahq-256": {
        "_class_name": "ScoreSdeVeScheduler",
        "correct_steps": 1,
        "num_train_timesteps": 2000,
        "sampling_eps": 1e-05,
        "sigma_max": 348,
        "sigma_min": 0.01,
        "snr": 0.075,
    },
}
BETAS = ["DDPMScheduler", "DDIMScheduler"]
FLOWS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]


def public(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def repository(folder, config: dict[str, Any]) -> str:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "_diffusers_version": "0.30.0"}))
    return str(folder)


@pytest.mark.parametrize("name", [name for name, config in OFFICIAL.items() if hasattr(hubgen, config["_class_name"])])
def test_the_scheduler_that_an_official_repository_names_loads_as_in_diffusers(name, tmp_path):
    config = OFFICIAL[name]
    folder = repository(tmp_path, config)
    ours, theirs = (
        getattr(library, config["_class_name"]).from_pretrained(folder, subfolder="scheduler")
        for library in (hubgen, diffusers)
    )
    assert type(ours).__module__.startswith("hubgen.")
    assert public(theirs).items() <= public(ours).items()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(9, **({"mu": 0.9} if scheduler.config.get("use_dynamic_shifting") else {}))
        if hasattr(scheduler, "set_sigmas"):
            scheduler.set_sigmas(9)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    for table in ("alphas_cumprod", "sigmas"):
        assert hasattr(ours, table) == hasattr(theirs, table)
        if hasattr(ours, table):
            torch.testing.assert_close(getattr(ours, table), getattr(theirs, table))


@pytest.mark.parametrize("scheduler", BETAS)
@pytest.mark.parametrize("name", [name for name, config in OFFICIAL.items() if "beta_start" in config])
def test_the_config_of_another_class_loads_and_no_key_of_it_is_lost(scheduler, name, tmp_path):
    config = OFFICIAL[name]
    loaded, _unused = getattr(hubgen, scheduler).from_pretrained(
        repository(tmp_path, config), subfolder="scheduler", return_unused_kwargs=True
    )
    assert {key: value for key, value in config.items() if key != "_class_name"}.items() <= public(loaded).items()
    cls = getattr(diffusers, config["_class_name"])
    expected, back = cls.from_config(config), cls.from_config(loaded.config)
    assert public(expected).items() <= public(back).items()
    for scheduler in (expected, back):
        scheduler.set_timesteps(9)
    assert torch.equal(back.timesteps, expected.timesteps)
    torch.testing.assert_close(loaded.alphas_cumprod, expected.alphas_cumprod)


OTHERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DEISMultistepScheduler",
]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", BETAS)
def test_a_config_goes_to_a_class_of_diffusers_and_comes_back_unchanged(name, other):
    own = {"variance_type": "learned_range"} if name == "DDPMScheduler" else {"set_alpha_to_one": False}
    # Defaults do not travel, in diffusers by intention: each class has its own, HeunDiscreteScheduler those of SD.
    ours = getattr(hubgen, name)(
        beta_start=0.0002,
        beta_end=0.015,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        **own,
    )
    theirs = getattr(diffusers, other).from_config(ours.config)
    torch.testing.assert_close(theirs.alphas_cumprod, ours.alphas_cumprod)
    assert theirs.config.prediction_type == "v_prediction"
    back = getattr(hubgen, name).from_config(theirs.config)
    assert public(ours).items() <= public(back).items()
    # and a config that begins at diffusers' class
    start = getattr(diffusers, other)(beta_schedule="scaled_linear")
    round_trip = getattr(diffusers, other).from_config(getattr(hubgen, name).from_config(start.config).config)
    assert public(start).items() <= public(round_trip).items()


@pytest.mark.parametrize("there", FLOWS)
@pytest.mark.parametrize("here", FLOWS)
def test_a_flow_config_goes_to_a_class_of_diffusers_and_comes_back_unchanged(here, there):
    ours = getattr(hubgen, here).from_config(OFFICIAL["FLUX.1-dev"])
    theirs = getattr(diffusers, there).from_config(ours.config)
    assert theirs.config.shift == 3.0
    back = getattr(hubgen, here).from_config(theirs.config)
    assert public(ours).items() <= public(back).items() and back.config.use_dynamic_shifting


@pytest.mark.parametrize("names", [BETAS, FLOWS], ids=["betas", "flows"])
def test_compatible_are_the_classes_of_both_libraries(names):
    for name in names:
        compatible = getattr(hubgen, name)().compatibles
        assert compatible[0] is getattr(hubgen, name)
        for other in names:
            assert getattr(hubgen, other) in compatible and getattr(diffusers, other) in compatible
        # without those whose packages are missing here, for which diffusers has stand-ins
        theirs = {cls for cls in getattr(diffusers, name)().compatibles if "dummy_" not in cls.__module__}
        assert not any("dummy_" in cls.__module__ for cls in compatible)
        assert theirs <= set(compatible) and len(set(compatible)) == len(compatible)


@pytest.mark.parametrize("name", [*BETAS, *FLOWS])
def test_signatures_begin_with_those_of_diffusers(name):
    for method in ("__init__", "set_timesteps", "step", "scale_model_input", "add_noise", "scale_noise"):
        theirs = getattr(getattr(diffusers, name), method, None)
        if theirs is None:
            continue
        expected = inspect.signature(theirs).parameters
        found = inspect.signature(getattr(getattr(hubgen, name), method)).parameters
        assert list(found)[: len(expected)] == list(expected), method
        for parameter in list(expected.values())[1:]:
            if parameter.default is not parameter.empty:
                assert found[parameter.name].default == parameter.default, (method, parameter.name)


@pytest.mark.parametrize("name", [*BETAS, *FLOWS])
def test_public_members_of_diffusers_class_are_there(name):
    ours, theirs = getattr(hubgen, name)(), getattr(diffusers, name)()
    missing = [member for member in dir(theirs) if not member.startswith("_") and not hasattr(ours, member)]
    assert missing == []
