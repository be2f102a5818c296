"""Models as they are saved: whole, under their own names, whatever a user has put around or into them.

Compiled, offloaded and adapted models keep their weights elsewhere or under other names. A file of such a state would
not load again, in diffusers neither. So what is saved is a plain twin, which shares the tensors.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

COMPILED = "_orig_mod"
"""Under which `torch.compile` holds the module that it wraps."""
# Classes of PEFT that hold a layer, beside what they add to it, and the name under which they do.
HOLDERS = {"BaseTunerLayer": "base_layer", "AuxiliaryTrainingWrapper": "original_module"}


def plain_model(model: Any) -> Any:
    """The model itself where its state dict is its own, else a twin of it without what was added; of the same tensors.

    Adapters stay out, which is said in the log, unless they are fused into the weights. Quantised models, whose tensors
    only their library knows, are returned as they are.

    Args:
        model: Of hubgen, diffusers or transformers; anything else is returned as it is.
    """
    while hasattr(model, COMPILED):
        model = getattr(model, COMPILED)
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or getattr(model, "hf_quantizer", None):
        return model
    holders = adapter_holders(model)
    compiled = any(COMPILED in name.split(".") for name, _ in model.named_modules())
    # A model on "meta" that nothing brings weights to, as one whose sizes alone are asked, has none elsewhere.
    elsewhere = any(hasattr(module, "_hf_hook") for module in model.modules())
    offloaded = elsewhere and any(tensor.is_meta for tensor in model.state_dict().values())
    if not holders and not compiled and not offloaded:
        return model
    if holders:
        fused = any(getattr(model.get_submodule(name), "merged", False) for name in holders)
        how = "with its fused adapters" if fused else "without its adapters, which have files of their own"
        logger.warning("%s is saved %s.", type(model).__name__, how)
    return twin(model, plain_tensors(model, holders))


def adapter_holders(model: nn.Module) -> dict[str, str]:
    """Names of the modules that PEFT has put around layers, and where in them the layer is."""
    found = {}
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            inner = HOLDERS.get(base.__name__)
            if inner is not None and isinstance(getattr(module, inner, None), nn.Module):
                found[name] = inner
    return found


def plain_tensors(model: nn.Module, holders: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a model under the names that they have without adapters and compilation."""
    state: Mapping[str, torch.Tensor] = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(model)
    found = {}
    for name, tensor in state.items():
        parts, kept, path = name.split("."), [], ""
        added = False
        for i, part in enumerate(parts):
            inner = holders.get(path)
            if inner is not None and part != inner:
                added = True
                break
            path = ".".join(parts[: i + 1])
            if inner is None and part != COMPILED:
                kept.append(part)
        if not added:
            found[".".join(kept)] = tensor
    return found


def twin(model: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A fresh model of the same class and config, with these tensors."""
    from accelerate import init_empty_weights

    cls = type(model)
    with init_empty_weights(include_buffers=False):
        other = cls.from_config(model.config) if hasattr(cls, "from_config") else cls(model.config)
    other.load_state_dict(dict(tensors), strict=True, assign=True)
    if hasattr(other, "tie_weights"):
        other.tie_weights()  # T5 has its token table under two names
    return other.train(model.training)
