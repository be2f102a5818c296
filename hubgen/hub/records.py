"""How a component got its weights: the `training.json` that a script leaves beside them."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubgen.formats.atomic import written

RECORD = "training.json"


@dataclass(frozen=True)
class TrainingRecord:
    """How a component got its weights."""

    script: str
    """Module that was run, as in `accelerate launch -m SCRIPT`"""
    settings: dict[str, Any]
    """All of the script's settings, as plain JSON values"""
    data: dict[str, Any]
    """Pictures seen, their fingerprint, and the sources with their licences where the data folder names them"""
    curve: list[dict[str, float]]
    """Measurements in order of "step" """

    def save(self, folder: Path) -> None:
        """Writes `training.json` into the component's folder."""
        with written(folder / RECORD) as temporary:
            text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TrainingRecord | None":
        """The record in a component's folder; None where there is none.

        Raises:
            ValueError: The file is there and is not such a record.
        """
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a record of training ({error}).") from error

    @property
    def base_model(self) -> str | None:
        """The repository of the model that it was made of; `None` if it was none, or lay in a folder."""
        base = self.settings.get("base")
        return repository(base.get("model")) if isinstance(base, dict) else None

    @property
    def dataset(self) -> str | None:
        """The repository of its data; `None` if they lay in a folder."""
        data = self.settings.get("data")
        return repository(data.get("source")) if isinstance(data, dict) else None


def repository(name: object) -> str | None:
    """A setting that names a repository of the Hub, owner/name; `None` for anything else."""
    is_one = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return str(name) if is_one else None


def languages_of(records: Iterable[TrainingRecord | None]) -> list[str]:
    """The languages of captions, as the data say."""
    return sorted({record.data["language"] for record in records if record is not None and "language" in record.data})


def describe_data(folder: Path, pictures: int, fingerprint: str) -> dict[str, Any]:
    """What a record says about a data folder: `build.json` of `hubgen data` names sources and language."""
    described: dict[str, Any] = {"pictures": pictures, "fingerprint": fingerprint}
    if (folder / "build.json").is_file():
        build = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        described["sources"] = [
            {key: source[key] for key in ("from", "license") if key in source} for source in build["sources"]
        ]
        if "language" in build:
            described["language"] = build["language"]
    return described
