"""One pipeline, the folders of many: reads the `model_index.json` of diffusers' pipelines, and writes it again.

A folder's index names the pipeline and, for each component, a library and a class. Read by hubgen, every
`["diffusers", X]` becomes `["hubgen", X]` where hubgen has X; other schedulers and transformers' text encoders stay as
they are. Written by hubgen, the index names diffusers' pipeline and classes again wherever diffusers has a pipeline for
these components, so that the folder needs no hubgen. What only hubgen takes (default steps and guidance, ...)
goes under a name with an underscore in front, as diffusers itself stores what a pipeline does not take. Where diffusers
has no pipeline for them, the folder brings hubgen's code along (`hubgen.hub.carried_code`).

In memory likewise: `from_pipe` of diffusers' pipelines takes hubgen's models in the place of its own, those with a
ControlNet take hubgen's, and AutoPipeline takes a pipeline of hubgen's for the one that diffusers has for its
components.
"""

import copy
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from hubgen.diffusers_contract import accept_instead, take_networks_instead
from hubgen.formats.atomic import written
from hubgen.formats.folders import check_pipeline_folder, is_component
from hubgen.formats.plain import plain_model
from hubgen.hub.carried_code import PREFIX, as_carried, as_installed, code_of, is_native
from hubgen.hub.classes import require_class
from hubgen.hub.registration import after_import, is_registered

# What a pipeline's folder holds; no pickled weights.
PIPELINE_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
VERSION = "_diffusers_version"
AUTO_PIPELINES = "diffusers.pipelines.auto_pipeline"
# Names that old indices have and today's transformers has not.
RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}


class NativePipeline(DiffusionPipeline):
    """Base of hubgen's pipelines: `from_pretrained` and `save_pretrained` in the layouts of diffusers' pipelines.

    A pipeline says in `reads` whose folders it takes, and in `native_class` whose folder it writes.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    """Classes of diffusers whose `model_index.json` this pipeline takes, beside its own."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Classes whose folders hold no pipeline that could stand alone, and what reads them."""

    def __init__(self) -> None:
        super().__init__()
        after_import(AUTO_PIPELINES, teach_auto_pipelines)

    def native_class(self) -> str | None:
        """The class of diffusers that can be made of these very components; `None` where there is none."""
        return None

    def native_pipeline(self) -> DiffusionPipeline:
        """diffusers' own pipeline of these very components, for what only it can do.

        Raises:
            ValueError: diffusers has none for them.
        """
        index = self.native_index()
        if index is None:
            raise ValueError(f"`pipeline`: got a {type(self).__name__} for whose components diffusers has no pipeline.")
        cls = getattr(diffusers, index.pop("_class_name"))
        slots, options = cls._get_signature_keys(cls)
        parts = {name: part for name, part in self.components.items() if name in slots}
        native: DiffusionPipeline = cls(**parts, **{name: index[name] for name in options if name in index})
        others = {name: value for name, value in index.items() if name.startswith("_") and name != VERSION}
        native.register_to_config(**others)
        return native

    @functools.wraps(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' method, of the plain models: compiled, offloaded or adapted ones are saved as they were before.

        Adapters have files of their own. The pipeline itself stays as it is.
        """
        plain = copy.copy(self)
        for name, component in self.components.items():
            other = plain_model(component)
            if other is not component:
                setattr(plain, name, other)
        folder = inspect.signature(DiffusionPipeline.save_pretrained).bind(self, *args, **kwargs).arguments
        plain.write_code(Path(folder["save_directory"]))
        super(NativePipeline, plain).save_pretrained(*args, **kwargs)

    def write_code(self, folder: Path) -> None:
        """Puts the code that diffusers lacks into a pipeline's folder, and takes away what is there of another."""
        _, files = self.saved_index()
        for old in (*folder.glob(f"{PREFIX}*.py"), *folder.glob(f"*/{PREFIX}*.py")):
            if old.relative_to(folder).as_posix() not in files:
                old.unlink()
        for name, cls in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with written(folder / name) as temporary:
                temporary.write_text(code_of(cls), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        license: str | None = None,
        summary: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> str:
        """Sends the pipeline to the Hub, in one commit of what is new; the repository's or the pull request's address.

        A card that the repository has stays. Otherwise one is written, with the licence if it is given.

        Args:
            repo_id: `owner/name`, or the name alone for one of the token's owner.
            commit_message: What the commit is called.
            private: Whether the repository is private, if it is made.
            token: Of the Hub; that of `hf auth login` if not given.
            create_pr: Propose the change instead of making it.
            safe_serialization: True; pickled weights are not written.
            variant: Of the names of weights, as in `save_pretrained`.
            subfolder: Folder of the repository; sent by diffusers' own method then, which writes no card.
            revision: Branch, made if it is not there.
            license: As the Hub names it.
            summary: First paragraph of the card.
            max_shard_size: See `save_pretrained`.

        Raises:
            PublishError: The name or the licence is none that the Hub knows, there is no token, or the Hub refuses.
        """
        from hubgen.hub.publish import send_pipeline

        if not safe_serialization:
            raise ValueError("`safe_serialization`: got False, expected True: hubgen writes safetensors alone.")
        if subfolder is not None:
            address: str = super().push_to_hub(
                repo_id, commit_message, private, token, create_pr, True, variant, subfolder
            )
            return address
        saving = {"variant": variant, "max_shard_size": max_shard_size}
        return send_pipeline(
            self,
            repo_id,
            {name: value for name, value in saving.items() if value is not None},
            licence=license,
            summary=summary,
            private=bool(private),
            revision=revision,
            create_pr=create_pr,
            message=commit_message or "Sent with hubgen",
            token=token,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """As diffusers' `DiffusionPipeline.from_pretrained`: a pipeline's folder, or a repository on the Hub.

        Raises:
            ValueError: A folder that is no pipeline, or an index with a pipeline, library, class or component that
                is not known, or a pipeline that something else reads; before any weights are read.
            OSError: Neither a folder nor a repository that can be reached.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, cls.config_name)):
            raise ValueError(f"{path} is no pipeline folder: it holds no {cls.config_name}.")
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        cls.check_index(cls.load_config(path, **options), path, passed=kwargs)
        if not os.path.isdir(path) and not is_registered():
            # A diffusers that hubgen cannot register with refuses our classes from the Hub, but not from a folder.
            from huggingface_hub import snapshot_download

            known = inspect.signature(snapshot_download).parameters
            options = {name: value for name, value in kwargs.items() if name in known}
            path = snapshot_download(path, allow_patterns=PIPELINE_FILES, **options)
        if os.path.isdir(path):
            cls.check_components(path, kwargs)
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs: Any) -> str:
        """As diffusers', which `from_pretrained` calls for a repository; what came is checked before it loads."""
        folder: str = super().download(pretrained_model_name, **kwargs)
        cls.check_components(folder, kwargs)
        return folder

    @classmethod
    def check_components(cls, folder: str, options: Mapping[str, Any]) -> None:
        """Checks the files of all components that `from_pretrained` would load with these options, by their headers."""
        classes = {
            name: require_class(*value, where=f"{folder}: `{name}`")
            for name, value in cls.load_config(folder).items()
            if is_component(value) and name not in options
        }
        check_pipeline_folder(Path(folder), classes, variant=options.get("variant"))

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As `ConfigMixin.load_config`, with hubgen's class for every component of diffusers that has one."""
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        index, *others = loaded if isinstance(loaded, tuple) else (loaded,)
        if not isinstance(index, dict):
            raise ValueError(f"{pretrained_model_name_or_path}: got the index {index!r:.100}, expected a JSON object.")
        index = cls.with_our_classes(index)
        return (index, *others) if others else index

    @classmethod
    def with_our_classes(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """An index as hubgen reads it: see this file's head."""
        parameters = inspect.signature(cls).parameters
        ours: dict[str, Any] = {}
        for name, value in as_installed(index).items():
            if is_component(value):
                library, class_name = value
                value = [library, RENAMED.get(class_name, class_name)]
            elif name.startswith("_") and name[1:] in parameters and name[1:] not in index:
                name = name[1:]
            ours[name] = value
        return ours

    @classmethod
    def check_index(cls, index: Mapping[str, Any], path: str, passed: Collection[str] = ()) -> None:
        """Raises ValueError unless every part of an index is known.

        Args:
            index: As read.
            path: The folder or repository, for the message.
            passed: Names of components that the caller brings along; what the index says about them does not count.
        """
        where, known = f"{path}: {cls.config_name}", (cls.__name__, *cls.reads)
        if index.get("_class_name") not in known:
            found = repr(index["_class_name"]) if "_class_name" in index else "none"
            if (other := cls.elsewhere.get(str(index.get("_class_name")))) is not None:
                raise ValueError(f"{where} names {found} as the pipeline: {other}")
            raise ValueError(f"{where} names {found} as the pipeline; {cls.__name__} reads {', '.join(known)}.")
        slots, _ = cls._get_signature_keys(cls)
        for name, value in index.items():
            is_slot = name in slots
            if name == "_class_name" or name in passed or not (is_slot or is_component(value)):
                continue
            if not is_slot:
                raise ValueError(
                    f"{where} has a component `{name}` ({'.'.join(value)}), for which {cls.__name__} has no place; "
                    f"it takes {', '.join(slots)}."
                )
            if is_component(value):
                require_class(*value, where=f"{where}: `{name}`")
            elif value is not None and value != [None, None]:
                raise ValueError(f"{where}: got `{name}` {value!r}, expected [library, class] or [null, null].")

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes the index: that of diffusers' pipeline where there is one for these components, else hubgen's."""
        index, _ = self.saved_index()
        if os.path.exists(index.get("_name_or_path") or ""):
            del index["_name_or_path"]  # where it lay on this machine is nobody's business
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def saved_index(self) -> tuple[dict[str, Any], dict[str, type]]:
        """The index that is written: diffusers' own, or one by which diffusers runs the code of the files beside it."""
        native = self.native_index()
        if native is not None:
            return native, {}
        return as_carried(json.loads(self.to_json_string()), lambda name: getattr(self, name).config)

    def native_index(self) -> dict[str, Any] | None:
        """The index by which diffusers loads these components alone, or `None` where it has no such pipeline."""
        native = self.native_class()
        if native is None:
            return None
        index: dict[str, Any] = json.loads(self.to_json_string())
        native_class = getattr(diffusers, native)
        theirs = inspect.signature(native_class).parameters
        ours = inspect.signature(type(self)).parameters
        written: dict[str, Any] = {"_class_name": native}
        for name, value in index.items():
            if is_component(value):
                library, class_name = value
                if library == "hubgen":
                    part = getattr(self, name)
                    library = "diffusers" if is_native(type(part), part.config) else None
                if library is None or name not in theirs:
                    return None
                # The variant without torchvision reads the same files; older versions know the plain name alone.
                written[name] = [library, class_name.replace("ImageProcessorPil", "ImageProcessor")]
            elif name in theirs:
                written[name] = value
            elif name in ours and value not in (None, [None, None]) and value != ours[name].default:
                written["_" + name] = value
            elif name.startswith("_") and name not in written:
                written[name] = value
        slots, _ = native_class._get_signature_keys(native_class)
        return {**{key: [None, None] for key in slots}, **written}


def stand_in(expected: type) -> type | None:
    """hubgen's class of the same name as a model's class of diffusers, if the program has loaded it."""
    if not getattr(expected, "__module__", "").startswith("diffusers."):
        return None
    home = sys.modules.get(importlib.import_module("hubgen").HOMES.get(expected.__name__, ""))
    return getattr(home, expected.__name__, None)


def teach_auto_pipelines(module: Any) -> None:
    """Has `from_pipe` of diffusers' AutoPipelines look at a pipeline of hubgen's as at diffusers' of its components.

    And has them choose a pipeline by hubgen's ControlNets as by diffusers'.
    """
    teach_networks(module)
    for cls in [value for name, value in vars(module).items() if name.startswith("AutoPipelineFor")]:
        plain = getattr(cls.from_pipe, "__func__", None)
        if plain is None or hasattr(plain, "knows_hubgen"):
            continue

        def from_pipe(cls: type, pipeline: Any, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            native = pipeline.native_pipeline() if isinstance(pipeline, NativePipeline) else pipeline
            return plain(cls, native, *args, **kwargs)

        functools.update_wrapper(from_pipe, plain)
        from_pipe.knows_hubgen = True  # type: ignore[attr-defined]
        cls.from_pipe = classmethod(from_pipe)


accept_instead(stand_in)
teach_networks = take_networks_instead(
    ("ControlNetModel", "ControlNetUnionModel", "SD3ControlNetModel", "FluxControlNetModel"), stand_in
)
