"""Hints of a run's pictures: a column of the data, or made of each picture as `hubgen data hints` makes them."""

import json
from typing import Any

from PIL import Image

from hubgen.data.hints import COLUMN, check_options, hint_of
from hubgen.training.kit.groups import HintedData, need
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.pictures import Pictures

__all__ = ["COLUMN", "with_hints"]


def with_hints(pictures: Pictures, data: HintedData) -> None:
    """Gives pictures the hints that the settings name, in the column `COLUMN` if they are made.

    Raises:
        SettingsError: Settings that do not go together.
        DataError: What makes the hints is not installed.
    """
    need(
        not data.random_moves, "data.random_moves", data.random_moves, "0: what a hint has beyond its border is unknown"
    )
    if data.hint is None:
        need(not data.hint_options, "data.hint_options", data.hint_options, "none without data.hint")
        return
    kind, options = data.hint, dict(data.hint_options)
    try:
        check_options(kind, options)
    except ValueError as error:
        raise SettingsError(f"setting 'data.hint_options': {error}") from error
    hint_of(Image.new("RGB", (8, 8)), kind, **options)
    pictures.examples.make(COLUMN, Maker(kind, options), f"{kind} {json.dumps(options, sort_keys=True)}")


class Maker:
    """Makes hints of pictures; worker processes can be handed it.

    Args:
        kind: Of the hints.
        options: Of the kind.
    """

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self.kind, self.options = kind, options

    def __call__(self, picture: Image.Image) -> Image.Image:
        return hint_of(picture, self.kind, **self.options)
