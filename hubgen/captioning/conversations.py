r"""What is told about pictures: captions of our data, or conversations in the JSON of ShareGPT, LLaVA and ShareGPT4V.

    [{"id": "1", "image": "coco/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red apple."}]}]

Both are `Examples`; `conversation_of` gives one of their rows as turns.
"""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from hubgen.captioning.captioner import IMAGE
from hubgen.captioning.templates import Conversation, Turn
from hubgen.data.errors import DataError
from hubgen.data.examples import CheckedExamples, Examples
from hubgen.data.metadata import LeavesFolderError
from hubgen.data.pictures import MAX_PIXELS, decode_picture, on_white, read_picture

TURNS = "conversations"
"""Column of the turns"""
ROLES = ("human", "gpt")


class Conversations(CheckedExamples):
    """The conversations of a JSON file, all of them checked when it is opened: turns, pictures, all.

    Args:
        path: The file: a list of objects, or an object a line (.jsonl).
        image_root: Folder that the names of pictures are relative to.
        on_error: "fail" at the first row that cannot be used, or "skip" such rows and list them in `skipped`.
        max_pixels: Pixels of a picture at most.

    Raises:
        DataError: The file cannot be read, or a row of it cannot be used.
        LeavesFolderError: The name of a picture leads out of the folder.
    """

    def __init__(self, path: Path, image_root: Path, on_error: str = "fail", max_pixels: int = MAX_PIXELS) -> None:
        if not image_root.is_dir():
            raise DataError(f"{image_root}: no such folder, expected that of the pictures of {path}")
        super().__init__(str(path), [TURNS], "conversations")
        self.root, self.max_pixels = image_root, max_pixels
        rows = _rows_of(path)
        for number, row in enumerate(tqdm(rows, desc=f"check {path.name}", disable=len(rows) < 5000, leave=False)):
            place = f"{path} row {number + 1}"
            try:
                turns = turns_of(row, place)
                name = self._name(row, place)
                content, picture = self._decoded(name, place)
            except LeavesFolderError:
                raise
            except DataError as problem:
                if on_error == "fail":
                    raise
                self.skipped.append(str(problem))
                continue
            answers, size = [turn.answer for turn in turns], (picture.height, picture.width)
            digest = hashlib.sha256(content).hexdigest()
            self._add(name, answers[:1], size, digest, columns={TURNS: [list(turn) for turn in turns]})
        self.check_enough()

    def picture(self, row: int) -> Image.Image:
        """RGB, upright and on white."""
        return on_white(read_picture(self.root / self.file_names[row], self.max_pixels))

    def mask(self, row: int, column: str) -> Image.Image | None:
        """There are none."""
        return None

    def _further(self, row: int, column: str) -> Image.Image:
        raise DataError(f"{self.place}: has no pictures beside its pictures, and {column} was asked for")

    def _name(self, row: dict[str, Any], place: str) -> str:
        name = row.get("image")
        if not isinstance(name, str) or not name:
            raise DataError(f"{place}: got the image {name!r}, expected the name of a file")
        pure = PurePosixPath(name.replace("\\", "/"))
        if pure.is_absolute() or ".." in pure.parts or name[1:2] == ":":
            raise LeavesFolderError(f"{place}: the image {name!r} leaves the folder, expected a path inside it")
        return pure.as_posix()

    def _decoded(self, name: str, place: str) -> tuple[bytes, Image.Image]:
        path = self.root / name
        try:
            content = path.read_bytes()
        except OSError as problem:
            raise DataError(f"{place}: {path}: {problem.strerror}, expected a picture") from problem
        return content, decode_picture(content, f"{place}: {path}", self.max_pixels)


def _rows_of(path: Path) -> list[Any]:
    """The rows of a file, not looked at."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
    except (OSError, ValueError) as problem:
        raise DataError(f"{path}: cannot be read as JSON ({' '.join(str(problem).split())})") from problem
    if not isinstance(rows, list):
        raise DataError(f"{path}: got {type(rows).__name__}, expected a list of conversations")
    return rows


def turns_of(row: Any, place: str) -> list[Turn]:
    """The turns of a row of such a file.

    Args:
        row: From JSON.
        place: Of it, for the message.

    Raises:
        DataError: It is no conversation about one picture: human and gpt in turns, `<image>` in the first question.
    """
    said = row.get(TURNS) if isinstance(row, dict) else None
    if not isinstance(said, list) or not said:
        raise DataError(f"{place}: got no list {TURNS!r}, expected one of objects with from and value")
    texts = []
    for number, one in enumerate(said):
        role = ROLES[number % 2]
        found = one if isinstance(one, dict) else {}
        if found.get("from") != role or not isinstance(found.get("value"), str):
            raise DataError(f"{place}: turn {number + 1}: got {_shown(one)}, expected a text (value) from {role}")
        texts.append(found["value"])
    if len(texts) % 2:
        raise DataError(f"{place}: got {len(texts)} turns, expected an answer to each question")
    counts = [text.count(IMAGE) for text in texts]
    if counts[0] != 1 or sum(counts) != 1:
        raise DataError(
            f"{place}: got {IMAGE} {sum(counts)} times, {counts[0]} in the first question, expected it once there"
        )
    turns = [Turn(question.replace(IMAGE, "").strip(), answer.strip())
             for question, answer in zip(texts[::2], texts[1::2], strict=True)]  # fmt: skip
    for number, turn in enumerate(turns):
        if not turn.answer:
            raise DataError(f"{place}: turn {2 * number + 2}: is empty, expected an answer")
    return turns


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def is_conversations(source: str) -> bool:
    """Whether a source of data names such a file."""
    return os.path.splitext(source)[1].lower() in (".json", ".jsonl")


def conversation_of(examples: Examples, row: int, caption: str, prompt: str) -> Conversation:
    """What is told about the picture in a row.

    Args:
        examples: The data.
        row: Which.
        caption: Its wording, where the data have captions.
        prompt: The question that a caption is the answer to.
    """
    if isinstance(examples, Conversations):
        return [Turn(*turn) for turn in examples.columns[TURNS][row]]
    return [Turn(prompt, caption)]


def check_words(conversation: Conversation, name: str) -> None:
    """Raises DataError where a text holds `<image>`, in whose place the picture would come once more.

    Args:
        conversation: About a picture.
        name: Of the picture.
    """
    for turn in conversation:
        if IMAGE in turn.question or IMAGE in turn.answer:
            raise DataError(f"{name}: got {IMAGE} in {turn.answer[:60]!r}, expected words: a picture stands there")
