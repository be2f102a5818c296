"""What the tests of the page that trains share: pictures, and the page itself."""

import io
import secrets
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tests.spaces.client import Answer, Served, file_data

COLOURS = ("red", "blue", "green", "orange", "purple", "teal")


def ball(colour: str, width: int = 80, height: int = 64) -> bytes:
    """A PNG of a ball."""
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).ellipse((width * 0.2, height * 0.1, width * 0.7, height * 0.8), fill=colour)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def ball_files(folder: Path) -> list[str]:
    """Six of them, under names of words."""
    for colour in COLOURS:
        (folder / f"{colour}-ball.png").write_bytes(ball(colour))
    return [str(folder / f"{colour}-ball.png") for colour in COLOURS]


def holding(words: str, *folders: Path) -> list[Path]:
    """The files below some folders that have these words in them, or in their names."""
    files = [path for folder in folders for path in folder.rglob("*")]
    return [path for path in files if words in path.name or (path.is_file() and words.encode() in path.read_bytes())]


class Visitor:
    """Somebody at the page that trains, over raw HTTP.

    Args:
        served: The page.
    """

    def __init__(self, served: Served):
        self.served, self.session = served, secrets.token_hex(8)

    def call(self, name: str, *data: Any) -> Answer:
        return self.served.call(name, *data, session=self.session)

    def bring(self, number: int = 6) -> Answer:
        """Sends so many balls."""
        files = []
        for place in range(number):
            content = ball(COLOURS[place % len(COLOURS)], 80 + place)
            status, paths = self.served.upload(content, f"{COLOURS[place % len(COLOURS)]}-ball.png")
            assert status == 200, paths
            files.append(file_data(paths[0]))
        return self.call("look", files)

    def train(self, **changes: Any) -> Answer:
        """Begins a tiny training."""
        values: dict[str, Any] = {
            "kind": "style",
            "words": "zog",
            "captions": None,
            "steps": 3,
            "rank": 1,
            "learning_rate": None,
            "prompts": "",
            "class_words": "",
        }
        return self.call("train", *{**values, **changes}.values())

    def until(self, *states: str, seconds: float = 240) -> dict[str, Any]:
        """Waits for a training to be in one of these states."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = self.call("progress")
            assert answer.error is None, answer.error
            if answer.value[0]["state"] in states:
                return answer.value[0]
            time.sleep(0.5)
        raise AssertionError(f"not {states} after {seconds} s: {answer.value}\n{self.served.log.read_text()[-2000:]}")
