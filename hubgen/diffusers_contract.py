"""What hubgen needs of diffusers and torch that they do not promise: every such name in one place.

A release may move any of these. tests/test_diffusers_contract.py asks the installed versions for each of them, and sees
that no other file imports a private name.
"""

import json
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

__all__ = [
    "ATTRIBUTES",
    "accept_instead",
    "dispatch_attention_fn",
    "forget_tokens",
    "has_step_caches",
    "has_step_hooks",
    "is_compiled",
    "no_init_weights",
    "offload_groups_again",
    "prepare_hotswap",
    "read_configs_through",
    "register_cached_blocks",
    "reset_step_hooks",
    "take_networks_instead",
]

# Private attributes by the class of diffusers that has them: methods that hubgen calls or overrides.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "diffusers.DiffusionPipeline": ("_get_signature_keys", "_execution_device", "_get_signature_types"),
    "diffusers.ModelMixin": ("_fix_state_dict_keys_on_load", "_keys_to_ignore_on_load_unexpected"),
    "transformers.PreTrainedModel": ("_keep_in_fp32_modules",),
    "transformers.PreTrainedTokenizer": ("_update_trie", "_update_total_vocab_size"),
    "diffusers.ConfigMixin": ("_get_init_keys", "_dict_from_json_file"),
    "diffusers.SchedulerMixin": ("_get_compatibles",),
    "diffusers.loaders.lora_base.LoraBaseMixin": ("_optionally_disable_offloading", "_save_lora_weights"),
    "diffusers.UNet2DConditionModel": ("_prepare_lora_hotswap_kwargs",),
    "diffusers.hooks.group_offloading": ("_maybe_remove_and_reapply_group_offloading",),
    "diffusers.CacheMixin": ("_reset_stateful_cache",),
    "diffusers.hooks.ModelHook": ("_is_stateful",),
    "diffusers.SD3ControlNetModel": ("_get_pos_embed_from_transformer",),
    "diffusers.pipelines.pipeline_loading_utils": ("LOADABLE_CLASSES",),
    "diffusers.hooks._helpers": ("TransformerBlockMetadata", "TransformerBlockRegistry"),
    "diffusers.models.transformers.transformer_flux.FluxAttnProcessor": ("_attention_backend", "_parallel_config"),
}


PIPELINES = "diffusers.pipelines."


def has_step_hooks(model: Any) -> bool:
    """Whether hooks of diffusers are anywhere in a model: step caches, group offloading, casting."""
    return isinstance(model, nn.Module) and any("_diffusers_hook" in module.__dict__ for module in model.modules())


def has_step_caches(model: Any) -> bool:
    """Whether some of a model's hooks keep what a step has computed for the next ones."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    registries = [module.__dict__["_diffusers_hook"] for module in modules if "_diffusers_hook" in module.__dict__]
    return any(hook._is_stateful for registry in registries for hook in registry.hooks.values())


def reset_step_hooks(model: Any) -> None:
    """Has the step caches of a model forget what they keep; a model without hooks stays without."""
    if has_step_hooks(model) and hasattr(model, "_reset_stateful_cache"):
        model._reset_stateful_cache()


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run code that torch has compiled."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def register_cached_blocks(blocks: Mapping[type[nn.Module], tuple[int, int | None]]) -> None:
    """Tells diffusers' step caches where, in what a block returns, its image and its text tokens lie."""
    # Imported here, because the registry imports every transformer of diffusers.
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    for block, (image, text) in blocks.items():
        metadata = TransformerBlockMetadata(return_hidden_states_index=image, return_encoder_hidden_states_index=text)
        TransformerBlockRegistry.register(block, metadata)


def offload_groups_again(pipeline: Any) -> None:
    """Has group offloading see the layers that were added to the models of a pipeline."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            _maybe_remove_and_reapply_group_offloading(component)


def prepare_hotswap(model: Any) -> None:
    """Pads the adapters of a model to the rank that `enable_lora_hotswap` was told, if it was, so that others fit."""
    wanted = getattr(model, "_prepare_lora_hotswap_kwargs", None)
    if wanted is None:
        return
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    prepare_model_for_compiled_hotswap(model, **wanted)
    model._prepare_lora_hotswap_kwargs = None


def accept_instead(stand_in: Callable[[type], type | None]) -> None:
    """Has `DiffusionPipeline.from_pipe` hand over models of other classes than those that a signature names.

    Args:
        stand_in: The class that is as good as one of diffusers', if there is one.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    plain = getattr(DiffusionPipeline._get_signature_types, "__func__", None)
    if plain is None:
        return

    def _get_signature_types(cls: type) -> dict[str, tuple[Any, ...]]:
        expected = plain(cls)
        return {
            name: (*found, *(other for one in found if (other := stand_in(one)) is not None))
            for name, found in expected.items()
        }

    DiffusionPipeline._get_signature_types = classmethod(_get_signature_types)


def take_networks_instead(names: Collection[str], stand_in: Callable[[type], type | None]) -> Callable[[Any], None]:
    """Has diffusers' pipelines take networks of other classes for those that they ask for by `isinstance`.

    In their modules these names then mean classes that `isinstance` knows both by; nothing else changes. Modules that
    are imported later follow when they are.

    Args:
        names: Of classes of diffusers.
        stand_in: The class that is as good as one of them, if there is one by now.

    Returns:
        Does the same in any other module, once it is imported.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    class Either(type):
        """Metaclass of a class that means its base and what stands in for that."""

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, Either.of(cls))

        def __subclasscheck__(cls, other: type) -> bool:
            return issubclass(other, Either.of(cls))

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return cls.__bases__[0](*args, **kwargs)

        def of(cls) -> tuple[type, ...]:
            theirs = cls.__bases__[0]
            return tuple(one for one in (theirs, stand_in(theirs)) if one is not None)

    def teach(module: Any) -> None:
        for name in names:
            theirs = vars(module).get(name)
            if isinstance(theirs, type) and not isinstance(theirs, Either):
                setattr(module, name, Either(name, (theirs,), {"__module__": theirs.__module__}))

    def teach_new(cls: type, **kwargs: Any) -> None:
        super(DiffusionPipeline, cls).__init_subclass__(**kwargs)
        if cls.__module__.startswith(PIPELINES):
            teach(sys.modules[cls.__module__])

    DiffusionPipeline.__init_subclass__ = classmethod(teach_new)  # type: ignore[assignment]
    for module in [module for name, module in sys.modules.items() if name.startswith(PIPELINES)]:
        if any(isinstance(value, type) and issubclass(value, DiffusionPipeline) for value in vars(module).values()):
            teach(module)
    return teach


def read_configs_through(convert: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Has diffusers read every config and index as `convert` gives it."""
    from diffusers import ConfigMixin

    plain = getattr(ConfigMixin._dict_from_json_file, "__func__", None)
    if plain is None or hasattr(plain, "converts"):
        return

    def _dict_from_json_file(cls: type, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return convert(plain(cls, *args, **kwargs))

    _dict_from_json_file.converts = convert  # type: ignore[attr-defined]
    ConfigMixin._dict_from_json_file = classmethod(_dict_from_json_file)


def forget_tokens(tokenizer: Any, tokens: Collection[str]) -> None:
    """Takes added tokens from a tokenizer of transformers, which itself can only add some; later ones move up."""
    gone = [index for index, token in tokenizer.added_tokens_decoder.items() if token.content in tokens]

    def moved(index: int) -> int:
        return index - sum(other < index for other in gone)

    if hasattr(tokenizer, "backend_tokenizer"):
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = [token for token in state["added_tokens"] if token["content"] not in tokens]
        state["added_tokens"] = [{**token, "id": moved(token["id"])} for token in kept]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        return
    left = {moved(index): token for index, token in tokenizer.added_tokens_decoder.items() if index not in gone}
    tokenizer._added_tokens_decoder = left
    tokenizer._added_tokens_encoder = {token.content: index for index, token in left.items()}
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
    tokenizer._update_total_vocab_size()
