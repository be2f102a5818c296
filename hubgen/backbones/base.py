"""What all backbones have in common: strict checkpoints, attention processors by name, adapters, step caches."""

from typing import Any, ClassVar

from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from hubgen.diffusers_contract import register_cached_blocks
from hubgen.formats.loading import StrictModelMixin
from hubgen.layers.checkpointing import Checkpointed


class Backbone(StrictModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, Checkpointed):
    """Predicts from x_t, a timestep and a condition; blocks are run by `run`, which knows gradient checkpointing.

    A subclass says by these attributes, most of them read by diffusers, what can be done with its parts:

    - `_no_split_modules`: Names of classes whose modules `device_map` keeps whole on one device.
    - `_repeated_blocks`: Names of classes that `compile_repeated_blocks` compiles, once each.
    - `_skip_layerwise_casting_patterns`: Parts of the names of layers that `enable_layerwise_casting` leaves in their
      precision.
    - `_cached_blocks`: What step caches need to know, see below.
    """

    _supports_gradient_checkpointing = True
    _cached_blocks: ClassVar[dict[type[nn.Module], tuple[int, int | None]]] = {}
    """Of each class of transformer blocks, where image tokens and text tokens lie in what it returns; `None`: no text.
    None at all for U-Nets, whose attention alone can be cached."""

    def enable_cache(self, config: Any) -> None:
        """Reuses features between steps, an approximation (diffusers' `FirstBlockCacheConfig` and the like)."""
        register_cached_blocks(self._cached_blocks)
        super().enable_cache(config)
