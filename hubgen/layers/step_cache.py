"""Step caches of diffusers (`FirstBlockCacheConfig` and the like) on models whose blocks diffusers does not know."""

from typing import Any, ClassVar

from diffusers.models.cache_utils import CacheMixin
from torch import nn


class BlockCacheMixin(CacheMixin):
    """A `CacheMixin` that tells diffusers what the model's transformer blocks return, when a cache is switched on."""

    _cached_blocks: ClassVar[dict[type, tuple[int, int | None]]]
    """Of each class of blocks, where image tokens and text tokens lie in what it returns; `None`: no text."""

    def enable_cache(self, config: Any) -> None:
        """Reuses features between steps, an approximation (diffusers' `FirstBlockCacheConfig` and the like)."""
        # Registered here rather than at import, because the registry imports every transformer of diffusers.
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        for block, (image, text) in self._cached_blocks.items():
            metadata = TransformerBlockMetadata(
                return_hidden_states_index=image, return_encoder_hidden_states_index=text
            )
            TransformerBlockRegistry.register(block, metadata)
        super().enable_cache(config)


def has_step_hooks(model: Any) -> bool:
    """Whether hooks of diffusers are anywhere in a model: step caches, group offloading, casting."""
    return isinstance(model, nn.Module) and any("_diffusers_hook" in module.__dict__ for module in model.modules())
