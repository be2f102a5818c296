"""What a single file says beside its weights: how its model predicts, and what its latents are normalised by.

The names are those that trainers write and ComfyUI reads. They are empty tensors or numbers at the top of the file:

    v_pred, ztsnr                       velocity is predicted; the schedule ends at zero signal (2305.08891)
    edm_mean, edm_std                   preconditioned as EDM (2206.00364), with latents normalised by channel:
                                        Playground v2.5 (2402.17245)
    edm_vpred.sigma_max, ...sigma_min   velocity and EDM's noise levels: CosXL
    control_type                        which hints a ControlNet of Stability's for SD3.5 was made for

and, in the header's metadata, `modelspec.prediction_type` (https://github.com/Stability-AI/ModelSpec).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubgen.formats.headers import read_metadata

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
EDM_MEAN, EDM_STD = "edm_mean", "edm_std"
EDM_SIGMA_MAX, EDM_SIGMA_MIN = "edm_vpred.sigma_max", "edm_vpred.sigma_min"
CONTROL_TYPE = "control_type"
NAMES = (V_PREDICTION, ZERO_SNR, EDM_MEAN, EDM_STD, EDM_SIGMA_MAX, EDM_SIGMA_MIN, CONTROL_TYPE)
MODELSPEC = "modelspec.prediction_type"
PLAYGROUND_SCALE = 0.5  # of the latents, after mean and deviation; no tensor says it

Markers = Mapping[str, list[float]]
"""By name, the numbers that a marker holds; none of an empty one"""


def read_markers(path: Path, names: list[str]) -> dict[str, list[float]]:
    """The markers of a file, `names` being those of its tensors that are some."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name).float().flatten().tolist() for name in names}
    if read_metadata(path).get(MODELSPEC, "").lower() in ("v", "v_prediction", "velocity"):
        found.setdefault(V_PREDICTION, [])
    return found


def autoencoder_config(markers: Markers) -> dict[str, Any]:
    """What they change in the config of the autoencoder."""
    if EDM_MEAN not in markers or EDM_STD not in markers:
        return {}
    means: dict[str, Any] = {"latents_mean": markers[EDM_MEAN], "latents_std": markers[EDM_STD]}
    return {**means, "scaling_factor": PLAYGROUND_SCALE}


def controlnet_config(markers: Markers) -> dict[str, Any]:
    """What they add to the config of a ControlNet, under a name that diffusers passes over.

    Raises:
        ValueError: The kind of hints is no number.
    """
    if CONTROL_TYPE not in markers:
        return {}
    found = markers[CONTROL_TYPE]
    if len(found) != 1 or not found[0].is_integer():
        raise ValueError(f"{CONTROL_TYPE}: got {found}, expected one whole number")
    return {f"_{CONTROL_TYPE}": int(found[0])}
