"""Frozen parts of a base in 4 or 8 bits, so that a large model is adapted on a small card (QLoRA, 2305.14314).

The packages that pack the weights are called through the configs of diffusers and transformers. bitsandbytes packs on
GPUs alone; torchao on CPUs too.
"""

from collections.abc import Mapping
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers.quantizers import PipelineQuantizationConfig

from hubgen.adaptation.attach import is_quantised
from hubgen.training.kit.parse import SettingsError

Packing = Literal["bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-8bit"]


def quantization(
    wanted: Mapping[str, Packing], index: Mapping[str, Any], dtype: torch.dtype
) -> PipelineQuantizationConfig | None:
    """How a pipeline's parts are packed while it is loaded.

    Args:
        wanted: Component and how it is packed; none at all gives `None`.
        index: The pipeline's model_index.json: of each component its library and class.
        dtype: That packed weights are computed in.

    Raises:
        SettingsError: The pipeline has no such component, or the package or the machine does not do it.
    """
    if not wanted:
        return None
    models = {name: value[0] for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    for name, packing in wanted.items():
        if name not in models:
            names = ", ".join(sorted(models))
            raise SettingsError(f"setting 'base.quantization': got {name}, expected components of the base: {names}.")
        if packing.startswith("bitsandbytes") and not (torch.cuda.is_available() or torch.xpu.is_available()):
            raise SettingsError(
                f"setting 'base.quantization': got {packing} for {name} on a machine without a GPU, expected "
                "torchao-8bit."
            )
    try:
        return PipelineQuantizationConfig(
            quant_mapping={name: _config(packing, models[name], dtype) for name, packing in wanted.items()}
        )
    except ImportError as error:
        raise SettingsError(f"setting 'base.quantization': {error}; pip install 'hubgen[quantization]'.") from error


def refuse_quantised(name: str, model: Any) -> None:
    """Raises SettingsError where the weights of a model that shall learn are packed."""
    if is_quantised(model):
        raise SettingsError(
            f"settings of 'base': the {name} is quantised, so its weights cannot learn; expected an adapter on it, or "
            "whole weights."
        )


def _config(packing: Packing, library: str, dtype: torch.dtype) -> Any:
    """What diffusers and transformers call the same, in the class of the one that loads the component."""
    classes: Any = transformers if library == "transformers" else diffusers
    if packing == "torchao-8bit":
        from torchao.quantization import Int8WeightOnlyConfig

        return classes.TorchAoConfig(Int8WeightOnlyConfig())
    if packing == "bitsandbytes-8bit":
        return classes.BitsAndBytesConfig(load_in_8bit=True)
    return classes.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
