"""What a network predicts, by hubgen's names and by the strings of diffusers' scheduler configs.

name       quantity                                     diffusers' `prediction_type`
noise      eps                                          epsilon
data       the clean latents                            sample
v          alpha eps - sigma data (2202.00512, app. D)  v_prediction
velocity   dx_t/dt                                      flow_prediction
score      grad log p(x_t) = -eps / sigma               (none)
"""

from typing import Literal, get_args

PredictionType = Literal["noise", "data", "v", "velocity", "score"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)

DIFFUSERS_NAMES: dict[PredictionType, str] = {
    "noise": "epsilon",
    "data": "sample",
    "v": "v_prediction",
    "velocity": "flow_prediction",
}


def check_prediction_type(name: str, argument: str = "prediction_type") -> PredictionType:
    """Returns `name` if it is a prediction type; raises ValueError that names `argument` otherwise."""
    if name not in PREDICTION_TYPES:
        raise ValueError(f"`{argument}`: got {name!r}, expected one of {list(PREDICTION_TYPES)}")
    return name


def to_diffusers(name: str) -> str:
    """The `prediction_type` of a diffusers config that means `name`; ValueError where diffusers has none (score)."""
    kind = check_prediction_type(name)
    if kind not in DIFFUSERS_NAMES:
        raise ValueError(
            f"prediction_type: {kind!r} has no name in diffusers' configs, expected one of {list(DIFFUSERS_NAMES)}"
        )
    return DIFFUSERS_NAMES[kind]


def from_diffusers(name: str) -> PredictionType:
    """The prediction type that diffusers' config string `name` means; ValueError for an unknown string."""
    for kind, theirs in DIFFUSERS_NAMES.items():
        if theirs == name:
            return kind
    raise ValueError(f"`prediction_type`: got {name!r}, expected one of {list(DIFFUSERS_NAMES.values())}")
