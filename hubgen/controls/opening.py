"""Controls by the names of their files: which kind of control a folder, file or repository holds.

    open_control("owner/sd-controlnet-canny", edges, pipe, scale=0.8, end=0.6)
    open_control("ip-adapter.safetensors", cat, pipe)          # or the folder or repository that holds it
    open_control("owner/FLUX.1-Redux", cat, pipe)
    open_control("model", edges, pipe)          # the ControlNet that the pipeline itself has

    net = load_control("owner/sd-controlnet-canny", pipe)          # the same for many pictures
    control_of(net, edges, scale=0.8)

The command line and the pages ask here; programs make the controls themselves.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hubgen.conditioning.families.flux import FluxFamily
from hubgen.conditioning.families.mmdit import MMDiTFamily
from hubgen.controls.control import Control
from hubgen.controls.controlnet import ControlNet
from hubgen.controls.image_attention import FILE, Adapter
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.controls.redux import PRIOR, Redux, ReduxNetworks
from hubgen.formats.headers import read_header
from hubgen.hub.classes import require_class
from hubgen.hub.finding import HUB_ID

OWN = "model"
"""The name of the network that the pipeline itself has"""
NO_NETWORK = f"{OWN}: the model has no ControlNet of its own, expected the name of one"
NETWORKS = (
    "ControlNetModel",
    "ControlNetUnionModel",
    "SD3ControlNetModel",
    "FluxControlNetModel",
    "DiTControlNetModel",
    "T2IAdapter",
)
CONFIGS = ("config.json", "model_index.json")
"""Of a network; of Redux' pipeline"""
ADAPTER = "file of an IP-Adapter"
"""Stands for the class of what has no config, but the file of an adapter"""
Loaded = nn.Module | Adapter | ReduxNetworks


def open_control(name: str, image: Any, pipe: Any, revision: str | None = None, **settings: Any) -> Control:
    """The control of a name; arguments and errors are those of `load_control` and `control_of`."""
    return control_of(load_control(name, pipe, revision), image, **settings)


def control_of(loaded: Loaded, image: Any, **settings: Any) -> Control:
    """A control by what was loaded for it, which serves any number of them.

    Args:
        loaded: A network, an IP-Adapter's weights, or what Redux needs.
        image: What it is shown.
        **settings: `scale`, `start`, `end`; of a ControlNet also `mode`.

    Raises:
        ValueError: The settings do not suit it.
    """
    if isinstance(loaded, Adapter):
        return IPAdapter(loaded, image, **settings)
    if isinstance(loaded, ReduxNetworks):
        extractor = loaded.feature_extractor
        return Redux(loaded.embedder, loaded.image_encoder, image, feature_extractor=extractor, **settings)
    return ControlNet(loaded, image, **settings)


def load_control(name: str, pipe: Any, revision: str | None = None) -> Loaded:
    """What a name means: a network, an IP-Adapter's weights, or what Redux needs.

    Args:
        name: A folder with a network's config.json, or with an IP-Adapter's `ip-adapter.safetensors`, or that of FLUX.1
            Redux (a `FluxPriorReduxPipeline`); owner/name of such a repository; a .safetensors file with a network or
            an IP-Adapter (also .bin); or `OWN`.
        pipe: That it is for; the network goes to where its backbone is, and to its type.
        revision: Of a repository.

    Raises:
        ValueError: There is nothing of this name, or it holds no control.
        OSError: The Hub cannot be reached, or has no such repository.
    """
    path = Path(name).expanduser()
    if name == OWN:
        own: nn.Module | None = getattr(pipe, "controlnet", None)
        if own is None:
            raise ValueError(NO_NETWORK)
        return own
    if path.is_file():
        if is_adapter(path):
            return Adapter.read(path)
        net = require_class("hubgen", single_file_class(pipe), where=name).from_single_file(path)  # type: ignore[attr-defined]
    else:
        kind = class_of(name, revision)
        if kind == ADAPTER:
            return Adapter.read(name, revision)
        if kind == PRIOR:
            return ReduxNetworks.from_pretrained(path if path.is_dir() else name, pipe.backbone.dtype, revision)
        net = network(name, revision)
    backbone = pipe.backbone
    placed: nn.Module = net.to(backbone.device, backbone.dtype).eval()
    return placed


def check_name(name: str, index: Mapping[str, Any]) -> None:
    """Raises what `open_control` would for a name, before any weights are read.

    Args:
        name: See `open_control`.
        index: The `model_index.json` of the pipeline that it is for.
    """
    if name == OWN and index.get("controlnet") in (None, [None, None]):
        raise ValueError(NO_NETWORK)
    if name != OWN and not Path(name).expanduser().is_file():
        class_of(name)


def sees_pictures(name: str) -> bool:
    """Whether a control, of a name that `check_name` accepts, is shown pictures as they are, and no hints of them."""
    path = Path(name).expanduser()
    return name != OWN and (is_adapter(path) if path.is_file() else class_of(name) in (PRIOR, ADAPTER))


def network(name: str, revision: str | None = None) -> Any:
    """The network of a folder or repository, of hubgen's class.

    Raises:
        ValueError: It holds none.
    """
    class_name = class_of(name, revision)
    if class_name not in NETWORKS:
        raise ValueError(f"{name}: got a {class_name}, expected one of {', '.join(NETWORKS)}")
    options = {} if Path(name).expanduser().is_dir() else {"revision": revision}
    return require_class("hubgen", class_name, where=name).from_pretrained(name, **options)  # type: ignore[attr-defined]


def class_of(name: str, revision: str | None = None) -> str:
    """The class of the network, or of Redux' pipeline, of a folder or repository, by its config; or `ADAPTER`."""
    path = Path(name).expanduser()
    if path.is_dir():
        config = next((path / file for file in (*CONFIGS, FILE) if (path / file).is_file()), None)
        if config is None:
            raise ValueError(f"{name}: holds no config.json, expected the folder of a network or of an IP-Adapter")
    elif not HUB_ID.fullmatch(name):
        raise ValueError(f"{name}: no such folder or file, expected one, or owner/name on the Hub")
    else:
        config = config_on_hub(name, revision)
    if config.name == FILE:
        return ADAPTER
    class_name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    if class_name not in (*NETWORKS, PRIOR):
        raise ValueError(f"{name}: got a {class_name}, expected one of {', '.join((*NETWORKS, PRIOR))}")
    return str(class_name)


def config_on_hub(name: str, revision: str | None) -> Path:
    """The first of `CONFIGS` that a repository has, or else an adapter's file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in CONFIGS:
        try:
            return Path(hf_hub_download(name, file, revision=revision))
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(name, FILE, revision=revision))


def is_adapter(path: Path) -> bool:
    """Whether a file is an IP-Adapter's, by its keys; a pickled one can be nothing else here."""
    if path.suffix != ".safetensors":
        return True
    return any("ip_adapter" in key or key.startswith("image_proj.") for key in read_header(path))


def single_file_class(pipe: Any) -> str:
    """The class of a bare ControlNet's file, which is that of the model's family."""
    family = pipe.family
    if isinstance(family, FluxFamily):
        return "FluxControlNetModel"
    return "SD3ControlNetModel" if isinstance(family, MMDiTFamily) else "ControlNetModel"
