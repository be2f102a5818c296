"""Pictures that say how they were made: PNG files with their request, and back to settings."""

import dataclasses
import io
import os
from pathlib import Path

from PIL import Image

from hubgen.hub.provenance import Request, read_request, slug, write_picture
from hubgen.spaces.kit.limits import Refused


def write_recipe(picture: Image.Image, request: Request, folder: Path) -> Path:
    """A PNG with its request, under a name of the prompt's words.

    Args:
        picture: What was drawn.
        request: Of this picture alone.
        folder: Made for it, empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = slug(request.prompts[0] if request.prompts else "picture")[:40].strip("-").encode("ascii", "ignore").decode()
    path = folder / f"{name or 'picture'}-{request.seed}.png"
    write_picture(path, picture, request)
    return path


def read_recipe(path: Path) -> Request:
    """The request of a picture that was dropped in.

    Raises:
        Refused: It carries none, or a damaged one.
    """
    try:
        return read_request(path)[0]
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        if "carries no settings" in reason or "not a picture" in reason:
            raise Refused("This picture says nothing about how it was made; drop a PNG that was drawn here.") from None
        raise Refused("The settings in this picture are damaged; they cannot be read.") from None


def without_paths(request: Request) -> Request:
    """The same for strangers: files of the machine that drew it go by their names alone."""
    loras = [dataclasses.replace(one, file=shown_name(one.file)) for one in request.lora or ()]
    nets = [dataclasses.replace(one, net=shown_name(one.net)) for one in request.control or ()]
    shown = dataclasses.replace(request, model=shown_name(request.model), lora=loras or None, control=nets or None)
    return dataclasses.replace(shown, image=None, mask=None)


def shown_file(number: int) -> str:
    """Under which name a picture that steered is handed out beside the one that was drawn, and stands in its recipe."""
    return f"control-{number + 1}.png"


def shown_name(file: str) -> str:
    """What strangers may know of the name of a model or adapter: of what lies on this machine, only the last part."""
    return Path(file).name if os.path.exists(os.path.expanduser(file)) or os.path.isabs(file) else file


def png(picture: Image.Image) -> bytes:
    """A PNG without a recipe, for frames."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
