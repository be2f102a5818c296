"""Adapters on a pipeline: LoRA and its kin, loaded from files, weighted, fused, swapped and saved, by diffusers' names.

pipe.load_lora_weights("style.safetensors", adapter_name="style")
pipe.set_adapters(["style", "subject"], [0.8, 1.0])
pipe.save_adapter("both.safetensors", "style")
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import nn

from hubgen.formats.atomic import written
from hubgen.formats.loading import HUB_ARGUMENTS

logger = logging.getLogger(__name__)

IGNORED = ("low_cpu_mem_usage", "use_safetensors", "mirror")
"""Arguments of diffusers' `load_lora_weights` that have no meaning here"""


class AdapterMixin(LoraBaseMixin):
    """Adds adapters to a pipeline; which one is active, and how much, is diffusers' own part."""

    _lora_loadable_modules: ClassVar[list[str]] = [
        *("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    ]

    def adaptable_models(self) -> dict[str, Any]:
        """The components that adapters may be put on."""
        found = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        return {name: model for name, model in found.items() if isinstance(model, nn.Module)}

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Puts an adapter on the pipeline's models and makes it the active one.

        The file may be diffusers', PEFT's, kohya's, ComfyUI's, XLabs', OneTrainer's or SimpleTuner's; LoRA, DoRA, LoHa,
        LoKr or full differences.

        Args:
            pretrained_model_name_or_path_or_dict: A safetensors file, a folder or repository with one, or its tensors.
            adapter_name: By which the other methods know it; a fresh one if not given.
            hotswap: Put it in the place of the adapter of that name, whose weight stays; what was compiled remains so.
            strict: Refuse a file with tensors that are for none of the models; else they are left out and said.
            **kwargs: `weight_name` and `subfolder` of the file; `revision`, `token`, `cache_dir` and the like for the
                Hub; `metadata` of tensors that are given.

        Returns:
            What was read (`hubgen.adaptation.lora_files.AdapterFile`); printed, it says how many tensors went where.

        Raises:
            ValueError: The file is damaged or for other models, or the name is taken; nothing is attached then.
            OSError: There is no such file or repository.
        """
        from hubgen.adaptation.attach import attach, check_swap, detach, swap
        from hubgen.adaptation.locate import find_adapter, load_adapter
        from hubgen.adaptation.lora_files import AdapterError, read_adapter

        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        weight_name, subfolder = kwargs.pop("weight_name", None), kwargs.pop("subfolder", None)
        header = kwargs.pop("metadata", None) or {}
        unknown = sorted(kwargs.keys() - set(IGNORED))
        if unknown:
            raise TypeError(f"load_lora_weights: got the unknown arguments {', '.join(unknown)}.")
        name = self._fresh_name() if adapter_name is None else adapter_name
        self._check_name(name, hotswap)
        if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            where, tensors = "the state dict", dict(pretrained_model_name_or_path_or_dict)
        else:
            path = find_adapter(pretrained_model_name_or_path_or_dict, weight_name, subfolder, hub)
            where, (tensors, header) = str(path), load_adapter(path)
        models = self.adaptable_models()
        offloaded = self._optionally_disable_offloading(self)  # some files are read with the weights they are for
        try:
            found = read_adapter(tensors, header, models, strict)
            if hotswap:
                for component, layers in found.layers.items():
                    check_swap(models[component], name, layers, component)
                for component in [part for part, names in self.get_list_adapters().items() if name in names]:
                    swap(models[component], name, found.layers.get(component, {}))
            else:
                for component, layers in found.layers.items():
                    attach(models[component], name, layers)
        except BaseException as error:
            if not hotswap:
                for model in models.values():
                    detach(model, name)
            if isinstance(error, AdapterError):
                raise AdapterError(f"{where}: {error}") from error
            raise
        finally:
            self._offload_again(*offloaded)
        logger.info("%s: %s", where, found)
        if found.left:
            logger.warning("%s: left out %d tensors:\n%s", where, len(found.left), "\n".join(found.left))
        return found

    def save_adapter(
        self,
        path: str | os.PathLike[str],
        adapter_name: str | None = None,
        layout: Literal["diffusers", "kohya", "comfyui"] = "diffusers",
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Writes an adapter as a file.

        Args:
            path: Of the file; it is written beside and renamed.
            adapter_name: The only one there is if not given.
            layout: Whose names and conventions.
            dtype: Of the numbers; by default they stay as they are.
            metadata: More for the file's header.

        Raises:
            ValueError: There is no such adapter, or several and no name.
        """
        from safetensors.torch import save_file

        from hubgen.adaptation.lora_files import as_comfyui, as_diffusers, as_kohya

        if layout not in ("diffusers", "kohya", "comfyui"):
            raise ValueError(f"`layout`: got {layout!r}, expected 'diffusers', 'kohya' or 'comfyui'.")
        layers, models = self.adapter_layers(adapter_name), self.adaptable_models()
        if layout == "diffusers":
            tensors, header = as_diffusers(layers, metadata)
        else:
            tensors, header = (as_kohya if layout == "kohya" else as_comfyui)(layers, models, metadata)
        if dtype is not None:
            tensors = {key: value.to(dtype) for key, value in tensors.items()}
        with written(Path(path)) as temporary:
            save_file(tensors, temporary, header)

    def adapter_layers(self, adapter_name: str | None = None) -> Any:
        """What an adapter adds, by component and layer (`hubgen.adaptation.low_rank.LowRank`).

        Args:
            adapter_name: The only one there is if not given.

        Raises:
            ValueError: There is no such adapter, or several and no name.
        """
        from hubgen.adaptation.attach import layers_of

        known = self.get_list_adapters()
        names = sorted({name for some in known.values() for name in some})
        if adapter_name is None and len(names) != 1:
            raise ValueError(f"`adapter_name`: got None, expected one of {names}.")
        name = names[0] if adapter_name is None else adapter_name
        if name not in names:
            raise ValueError(f"`adapter_name`: got {name!r}, expected one of {names}.")
        return {part: layers_of(getattr(self, part), name) for part, some in known.items() if name in some}

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        **layers: Any,
    ) -> None:
        """Writes state dicts of adapters as diffusers' pipelines do; `save_adapter` writes one that is loaded.

        Args:
            save_directory: Folder of the file; made if missing.
            is_main_process: Whether this process writes.
            weight_name: Of the file.
            save_function: Writes in the place of safetensors.
            safe_serialization: As diffusers has it; only True.
            **layers: `unet_lora_layers`, `transformer_lora_layers`, `text_encoder_lora_layers`, ...: state dicts of
                PEFT; and with `..._lora_adapter_metadata` their configs as dicts.

        Raises:
            ValueError: Nothing was given, or a pickle was asked for.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization`: got False, expected True; pickles are not written.")
        tensors: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        for key, value in layers.items():
            kind = next((one for one in ("_lora_layers", "_lora_adapter_metadata") if key.endswith(one)), None)
            component = key.removesuffix(kind or "")
            if kind is None or component not in cls._lora_loadable_modules:
                raise TypeError(f"save_lora_weights: got the unknown argument {key}.")
            if value is not None:
                (tensors if kind == "_lora_layers" else metadata)[component] = value
        if not tensors:
            raise ValueError("save_lora_weights: got no layers, expected those of one component at least.")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers=tensors,
            lora_metadata=metadata,
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=True,
        )

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds adapters to the weights themselves, as diffusers' method; to all models that have any by default."""
        chosen = list(components) if components is not None else list(self.get_list_adapters())
        if chosen:
            super().fuse_lora(chosen, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """Undoes `fuse_lora`, up to rounding."""
        chosen = list(components) if components is not None else list(self.get_list_adapters())
        if chosen:
            super().unfuse_lora(chosen, **kwargs)

    def _fresh_name(self) -> str:
        taken = {name for names in self.get_list_adapters().values() for name in names}
        return next(name for number in range(len(taken) + 1) if (name := f"default_{number}") not in taken)

    def _check_name(self, name: str, hotswap: bool) -> None:
        taken = sorted({known for names in self.get_list_adapters().values() for known in names})
        if not hotswap and name in taken:
            raise ValueError(f"`adapter_name`: got {name!r}, expected a name that is not taken; taken are {taken}.")
        if hotswap and name not in taken:
            raise ValueError(f"`hotswap`: got True for {name!r}, expected the name of an adapter; there are {taken}.")
        if not name or "." in name:
            raise ValueError(f"`adapter_name`: got {name!r}, expected a name without dots.")

    def _offload_again(self: Any, model: bool, sequential: bool, group: bool) -> None:
        if model:
            self.enable_model_cpu_offload()
        elif sequential:
            self.enable_sequential_cpu_offload()
        elif group:
            from hubgen.diffusers_contract import offload_groups_again

            offload_groups_again(self)
