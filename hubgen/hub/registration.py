"""Makes hubgen's classes known to diffusers' loader.

A pipeline of ours is saved with `"_class_name": "TextToImagePipeline"` and components as `["hubgen", "ClassName"]`.
diffusers loads that, from a folder and from the Hub and without `trust_remote_code`, once it knows that

- `hubgen` is a library with loadable classes (`LOADABLE_CLASSES` of `diffusers.pipelines.pipeline_loading_utils`);
- the pipeline class is an attribute of `diffusers`.

And it reads an index that names the code of its repository (`hubgen.hub.carried_code`) as if it named hubgen's classes.

All is set when diffusers' pipelines are first imported, which is after `import hubgen` more often than before: so
`import hubgen` itself imports nothing heavy. `LOADABLE_CLASSES` is not a public name of diffusers; this was tried
with 0.37 and 0.42. Where it is missing, a warning says so, and hubgen's own pipelines still load from folders and (by
way of a full download) from the Hub.
"""

import importlib.abc
import logging
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

PIPELINES_MODULE = "diffusers.pipelines.pipeline_utils"
SAVE_AND_LOAD = ["save_pretrained", "from_pretrained"]
Pipeline = TypeVar("Pipeline", bound=type)


def register(pipelines: Sequence[str]) -> None:
    """Registers hubgen with diffusers' loader, now if diffusers' pipelines are imported, else when they are.

    Args:
        pipelines: Names of the pipeline classes at the root of hubgen.
    """
    after_import(PIPELINES_MODULE, lambda _: _register_now(pipelines))


def is_registered() -> bool:
    """Whether diffusers' loader knows hubgen (false also while diffusers' pipelines are not imported)."""
    module = sys.modules.get("diffusers.pipelines.pipeline_loading_utils")
    return "hubgen" in getattr(module, "LOADABLE_CLASSES", {})


def loadable(pipeline: Pipeline) -> Pipeline:
    """Class decorator: makes a pipeline an attribute of diffusers, where its loader looks for pipelines by name."""
    diffusers: Any = sys.modules["diffusers"]
    if hasattr(diffusers, pipeline.__name__):
        logger.warning(
            "diffusers has a %s of its own: load hubgen's by hubgen.%s.from_pretrained.",
            pipeline.__name__,
            pipeline.__name__,
        )
    else:
        setattr(diffusers, pipeline.__name__, pipeline)
    return pipeline


def _register_now(pipelines: Sequence[str]) -> None:
    try:
        from hubgen.diffusers_contract import read_configs_through

        loading: Any = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
        loading.LOADABLE_CLASSES["hubgen"] = {
            "ModelMixin": SAVE_AND_LOAD,
            "SchedulerMixin": SAVE_AND_LOAD,
            "DiffusionPipeline": SAVE_AND_LOAD,
        }
        read_configs_through(_without_code)
        for name in pipelines:
            # Where the import of a pipeline's module has led here, its class does not exist yet; it is `loadable` then.
            try:
                getattr(sys.modules["hubgen"], name, None)
            except ModuleNotFoundError as error:
                if not str(error.name).startswith("hubgen."):
                    raise  # else a model has brought along hubgen's code, and needs no such pipeline
    except (ImportError, AttributeError, TypeError) as error:
        # Nothing of this may keep a program from importing diffusers.
        logger.warning(
            "This version of diffusers does not let hubgen register (%s). Load hubgen's pipelines by hubgen's classes.",
            error,
        )


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A config as diffusers reads it; an index that names its repository's code, with hubgen's classes instead."""
    from hubgen.hub.carried_code import as_installed, is_carried

    carried = isinstance(config, dict) and is_carried(config.get("_class_name"))
    return as_installed(config) if carried else config


def after_import(module: str, act: Callable[[Any], None]) -> None:
    """Acts on a module when it will have been imported, or now if it has been."""
    if module in sys.modules:
        act(sys.modules[module])
    elif not any(isinstance(finder, _AfterImport) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(module, act))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; acts on one module when it has been executed."""

    def __init__(self, module: str, act: Callable[[Any], None]):
        self.module, self.act = module, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                self.act(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
