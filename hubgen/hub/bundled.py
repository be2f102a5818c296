"""The model that comes with the package."""

from pathlib import Path

NAME = "emoji-64"


def bundled_model() -> Path:
    """The folder of the bundled text-to-image pipeline: 64x64 pixels, trained on emoji (see its README.md).

    Raises:
        FileNotFoundError: This installation came without the model's files.
    """
    folder = Path(__file__).parent.parent / "bundled" / NAME
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The bundled model is not in this installation: found no {folder / 'model_index.json'}. "
            "Install hubgen from a full clone or wheel, or name another model."
        )
    return folder
