"""The names of diffusers that are not public and that hubgen needs, all in one place.

What is imported here may move with any release of diffusers; tests/formats/test_diffusers_contract.py says for each
version that is tried whether it is still there.
"""

from typing import Any

from torch import nn


def has_step_hooks(model: Any) -> bool:
    """Whether hooks of diffusers are anywhere in a model: step caches, group offloading, casting."""
    return isinstance(model, nn.Module) and any("_diffusers_hook" in module.__dict__ for module in model.modules())
