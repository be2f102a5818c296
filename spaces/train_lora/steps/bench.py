"""A visitor's bench: the pictures that they brought, each as it will be trained on, and what was found in them."""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image, ImageOps

from hubgen.data.pictures import on_white
from hubgen.spaces.kit.limits import Limits, Refused
from hubgen.spaces.kit.uploads import read_upload

VAGUE = re.compile(r"(img|image|picture|photo|pic|screenshot|dsc|scan|untitled|unnamed|download|sent|drawn)\b", re.I)
"""Names of files that say nothing about what is in them"""
LONGEST_NAME = 60


@dataclass(frozen=True)
class Item:
    """One picture that was brought."""

    name: str
    """As the visitor's file is called; shown, and never opened"""
    caption: str = ""
    """Proposed, from words in the name"""
    picture: Image.Image | None = None
    """As it will be trained on; `None`: it is not used"""
    size: tuple[int, int] = (0, 0)
    """As it came"""
    notes: tuple[str, ...] = ()
    """What was found"""
    digest: str = ""

    @property
    def used(self) -> bool:
        """Whether it is trained on."""
        return self.picture is not None


@dataclass
class Bench:
    """Of one visitor.

    Args:
        folder: Theirs alone, which is not served to anybody.
        side: Pixels of a side that the base learns from.
    """

    folder: Path
    side: int
    items: list[Item] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)
    """When their page was last heard of"""
    version: int = 0
    """Counts changes of the pictures"""
    run: Any = None
    """Their training; see runs.py"""

    @property
    def good(self) -> list[Item]:
        """The pictures that are trained on."""
        return [item for item in self.items if item.used]

    def add(self, files: Sequence[tuple[str, bytes]], limits: Limits) -> None:
        """Looks at pictures that were sent.

        Args:
            files: Names and contents.
            limits: Of the page.

        Raises:
            Refused: They are too many.
        """
        many = len(self.items) + len(files)
        if many > limits.training_pictures:
            raise Refused(f"That would be {many} pictures; at most {limits.training_pictures} are taken.")
        for name, content in files:
            self.items.append(self.looked_at(shown(name), content, limits))
        self.version += 1

    def looked_at(self, name: str, content: bytes, limits: Limits) -> Item:
        """One picture, cut to the square in its middle."""
        try:
            picture = on_white(read_upload(content, limits))
        except Refused as problem:
            return Item(name, notes=(f"Not used. {problem}",))
        size, side = picture.size, self.side
        if 2 * min(size) < side:
            least = -(-side // 2)
            note = f"Not used. It is too small: {size[0]} × {size[1]} pixels, and a side needs at least {least}."
            return Item(name, size=size, notes=(note,))
        cut = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
        digest = hashlib.sha256(cut.tobytes()).hexdigest()
        twin = next((item.name for item in self.items if item.used and item.digest == digest), None)
        if twin is not None:
            return Item(name, size=size, notes=(f"Not used. It is the same picture as {twin}.",))
        notes = []
        if min(size) < side:
            notes.append(f"Small: it is enlarged to {side} × {side}, and will look soft.")
        if max(size) > 1.34 * min(size):
            notes.append("Its ends are cut off; see whether what matters is left.")
        low, high = cut.convert("L").getextrema()
        if high - low < 8:  # type: ignore[operator]
            notes.append("It is of one colour, from which nothing can be learned.")
        return Item(name, words_of(name), cut, size, tuple(notes), digest)

    def remove(self, place: int) -> None:
        """Takes a picture away."""
        if 0 <= place < len(self.items):
            del self.items[place]
            self.version += 1

    def write_data(self, folder: Path, texts: Sequence[str]) -> Path:
        """Writes the data folder of a training.

        Args:
            folder: A new one.
            texts: Of each of the good pictures.
        """
        folder.mkdir(parents=True)
        rows = []
        for number, (item, text) in enumerate(zip(self.good, texts, strict=True)):
            assert item.picture is not None
            item.picture.save(folder / f"{number:02}.png")
            rows.append(json.dumps({"file_name": f"{number:02}.png", "text": text}, ensure_ascii=True))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return folder


def shown(name: str) -> str:
    """A file's name as it is shown: the last part of what was sent."""
    last = re.split(r"[\\/]", name)[-1]
    return "".join(letter for letter in last if letter.isprintable())[:LONGEST_NAME].strip() or "a picture"


def words_of(name: str) -> str:
    """A caption from a name of words, such as smiling-cat.png; none from IMG_1234.jpg."""
    stem = name.rsplit(".", 1)[0]
    words = re.sub(r"[-_\s]+", " ", stem).strip()
    return "" if VAGUE.match(words) or not re.fullmatch(r"[^\W\d]+( [^\W\d]+)*", words) or len(words) < 3 else words


class Benches:
    """Of all visitors, each known to their own session alone.

    Args:
        folder: Where they are.
        side: See `Bench`.
        limits: Of the page.
    """

    def __init__(self, folder: Path, side: int, limits: Limits):
        self.folder, self.side, self.limits = folder, side, limits
        self.lock = Lock()
        self.of: dict[str, Bench] = {}

    def find(self, visitor: str | None) -> Bench | None:
        """A visitor's, if they have one; it has been heard of them now."""
        bench = self.of.get(visitor or "")
        if bench is not None:
            bench.seen = time.monotonic()
        return bench

    def get(self, visitor: str | None) -> Bench:
        """A visitor's, new if they have none.

        Raises:
            Refused: There are too many, or this is no session.
        """
        if not isinstance(visitor, str) or not 4 <= len(visitor) <= 100:
            raise Refused("This request belongs to no session.")
        with self.lock:
            if visitor not in self.of:
                if len(self.of) >= self.limits.sessions:
                    raise Refused("Too many people are here at the moment; please try again in some minutes.")
                folder = self.folder / secrets.token_hex(16)
                folder.mkdir(parents=True)
                self.of[visitor] = Bench(folder, self.side)
        bench = self.of[visitor]
        bench.seen = time.monotonic()
        return bench

    def gone(self) -> list[Bench]:
        """Those whose visitors have not been heard of for long; they are nobody's from now on."""
        now = time.monotonic()
        with self.lock:
            away = {name: one for name, one in self.of.items() if now - one.seen > self.limits.away_seconds}
            for name in away:
                del self.of[name]
        return list(away.values())
