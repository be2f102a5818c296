"""The scheduler that the model of a single file was trained for, told by the file's markers, and the way back."""

from typing import Any

import diffusers
import torch

from hubgen.formats.markers import (
    EDM_MEAN,
    EDM_SIGMA_MAX,
    EDM_SIGMA_MIN,
    EDM_STD,
    V_PREDICTION,
    ZERO_SNR,
    Markers,
)
from hubgen.schedulers.ddim import DDIMScheduler


def adjusted_scheduler(scheduler: Any, markers: Markers) -> Any:
    """The scheduler that the file's model was trained for, as near to `scheduler` as there is one."""
    if EDM_MEAN in markers:
        return diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    if EDM_SIGMA_MAX in markers:
        levels = {"sigma_max": markers[EDM_SIGMA_MAX][0], "sigma_min": (markers.get(EDM_SIGMA_MIN) or [0.002])[0]}
        return diffusers.EDMEulerScheduler(
            **levels, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
        )
    if V_PREDICTION not in markers:
        return scheduler
    changes: dict[str, Any] = {"prediction_type": "v_prediction"}
    cls = type(scheduler)
    if ZERO_SNR in markers:
        # The first step has to be the one without signal.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in scheduler.config:
            cls = DDIMScheduler
    return cls.from_config(scheduler.config, **changes)


def markers_of(scheduler: Any, vae: Any) -> dict[str, torch.Tensor]:
    """The markers that a file of these parts is to have, so that what reads it knows them."""
    config = scheduler.config
    found: dict[str, torch.Tensor] = {}
    name = type(scheduler).__name__
    if name.startswith("EDM"):
        if vae.config.get("latents_mean") is not None:
            found |= {EDM_MEAN: torch.tensor(vae.config.latents_mean), EDM_STD: torch.tensor(vae.config.latents_std)}
        elif config.prediction_type == "v_prediction":
            found |= {EDM_SIGMA_MAX: torch.tensor(config.sigma_max), EDM_SIGMA_MIN: torch.tensor(config.sigma_min)}
    elif config.get("prediction_type") == "v_prediction":
        found[V_PREDICTION] = torch.zeros(0)
        if config.get("rescale_betas_zero_snr"):
            found[ZERO_SNR] = torch.zeros(0)
    return found
