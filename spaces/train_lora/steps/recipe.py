"""What a visitor wishes to be learned, checked, as settings of one of hubgen's training scripts.

The page has no training of its own: a style is learned by `hubgen.training.train_lora` from pictures with captions, and
a subject by `hubgen.training.train_dreambooth` from pictures that are all told the same words.
"""

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hubgen.hub.finding import BUNDLED
from hubgen.spaces.kit.limits import Limits, Refused
from hubgen.spaces.kit.service import Model
from hubgen.training.kit.parse import settings_of
from hubgen.training.kit.usual import Material, Usual, completed, disk_needed, usual, what_learns
from steps.amounts import room
from steps.bench import Bench

Kind = Literal["style", "subject"]
SCRIPTS = {"style": "train_lora", "subject": "train_dreambooth"}
LONGEST_WORDS = 80
"""Characters of the words that call what was learned"""
MOST_PROMPTS = 3
"""That are drawn along the way"""
PRIOR_PICTURES = 32
"""Of the class of a subject, which the base draws"""
POINTS = 60
"""Of the curve"""
GRIDS = 4
"""Times that pictures are drawn along the way, the first time aside"""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be learned, within the limits."""

    kind: Kind
    words: str
    """That call it"""
    class_words: str = ""
    """What kind of thing a subject is; without, its class is not kept apart"""
    texts: tuple[str, ...]
    """Of each good picture; with the words before"""
    prompts: tuple[str, ...]
    """Drawn along the way"""
    steps: int
    rank: int
    learning_rate: float

    @property
    def beside(self) -> int:
        """Pictures that go beside each in a step: of the class of a subject."""
        return 1 if self.class_words else 0

    @property
    def drawn(self) -> int:
        """Pictures that the base draws for it, before and along the way."""
        return (min(GRIDS, self.steps) + 1) * len(self.prompts) + self.beside * PRIOR_PICTURES


def checked_wish(
    bench: Bench,
    limits: Limits,
    usually: Usual,
    kind: Any,
    words: Any,
    class_words: Any = "",
    captions: Any = (),
    steps: Any = None,
    rank: Any = None,
    learning_rate: Any = None,
    prompts: Any = "",
) -> Wish:
    """A wish of whatever was sent.

    Args:
        bench: With the pictures.
        limits: Of the page.
        usually: What suits these pictures and the base.
        kind: style or subject.
        words: That call it.
        class_words: Of a subject.
        captions: Of each good picture, in order.
        steps: `None` is what suits.
        rank: `None` is what suits.
        learning_rate: `None` is what suits.
        prompts: To draw along the way, one a line; the first captions if empty.

    Raises:
        Refused: Something of it cannot be had.
    """
    good = bench.good
    if len(good) < limits.fewest_pictures:
        raise Refused(f"There are {len(good)} pictures to learn from; at least {limits.fewest_pictures} are needed.")
    if kind not in ("style", "subject"):
        raise Refused("It is a style or a subject that is learned.")
    words = checked_words(limits, words, "The words that call it", kind == "style")
    class_words = checked_words(limits, class_words, "What kind of thing it is", True) if kind == "subject" else ""
    if not isinstance(captions, list | tuple) or len(captions) > limits.training_pictures:
        raise Refused("The captions are no list of as many texts as there are pictures.")
    captions = [limits.checked_prompt(caption, "A caption", empty=True) for caption in captions]
    captions += [""] * (len(good) - len(captions))
    captions = captions[: len(good)]
    if kind == "subject":
        texts = [words] * len(good)
    else:
        bare = next((item.name for item, caption in zip(good, captions, strict=True) if not caption), None)
        if bare is not None and not words:
            raise Refused(f"{bare} has no caption: say what it shows, or give words that call the style.")
        texts = [", ".join(part for part in (words, caption) if part) for caption in captions]
    longest = max(map(len, texts))
    if longest > limits.prompt_characters:
        raise Refused(
            f"A caption has {longest} characters with the words before it; at most {limits.prompt_characters} are read."
        )
    return Wish(
        kind=kind,
        words=words,
        class_words=class_words,
        texts=tuple(texts),
        prompts=checked_prompts(limits, prompts, texts, words, class_words),
        steps=min(usually.steps, limits.training_steps) if steps is None else limits.checked_training_steps(steps),
        rank=min(usually.rank, limits.training_rank) if rank is None else limits.checked_rank(rank),
        learning_rate=usually.learning_rate if learning_rate is None else limits.checked_learning_rate(learning_rate),
    )


def checked_words(limits: Limits, value: Any, name: str, empty: bool) -> str:
    """A few words."""
    words = limits.checked_prompt(value, name, empty=True)
    if not words and not empty:
        raise Refused("Say by which words the subject is called, such as: a zog monster.")
    if len(words) > LONGEST_WORDS:
        raise Refused(f"{name} has {len(words)} characters; at most {LONGEST_WORDS} are taken.")
    if any(not letter.isprintable() for letter in words):
        raise Refused(f"{name} has characters in it that are no text.")
    return words


def checked_prompts(limits: Limits, value: Any, texts: Sequence[str], words: str, class_words: str) -> tuple[str, ...]:
    """What is drawn along the way."""
    if value is None:
        value = ""
    if not isinstance(value, str) or len(value) > MOST_PROMPTS * (limits.prompt_characters + 1):
        raise Refused(f"What to draw meanwhile is no text of at most {MOST_PROMPTS} lines.")
    asked = [limits.checked_prompt(line, "What to draw meanwhile") for line in value.splitlines() if line.strip()]
    if len(asked) > MOST_PROMPTS:
        raise Refused(f"{len(asked)} prompts are too many to draw along the way; give at most {MOST_PROMPTS}.")
    if asked:
        return tuple(asked)
    return tuple(dict.fromkeys([*texts[:MOST_PROMPTS], *([class_words] if class_words else [])]))[:MOST_PROMPTS]


def usual_for(model: Model, pictures: int) -> Usual:
    """What suits so many pictures and the base."""
    return usual(pictures, parameters_of(model))


def parameters_of(model: Model) -> int:
    """Numbers of the base's backbone."""
    return sum(one.numel() for one in model.bare.backbone.parameters())


def settings_for(wish: Wish, bench: Bench, model: Model, limits: Limits, folder: Path) -> tuple[Any, str]:
    """All settings of the script, and what learns in words; writes the pictures.

    Args:
        wish: What is to be learned.
        bench: With the pictures.
        model: The base.
        limits: Of the page.
        folder: Of this training alone.

    Raises:
        Refused: The disk is too small for it.
    """
    from hubgen.data.sources import open_examples

    script: Any = importlib.import_module(f"hubgen.training.{SCRIPTS[wish.kind]}")
    source, out = bench.write_data(folder / "pictures", wish.texts), folder / "run"
    out.mkdir()
    captioned = wish.kind == "style"
    given: dict[str, Any] = {
        "data.source": str(source),
        "data.size": bench.side,
        "run.output_dir": str(out),
        "run.max_train_steps": wish.steps,
        "run.report_to": "none",
        "adapter.rank": wish.rank,
        "optim.learning_rate": wish.learning_rate,
        "validation.prompts": list(wish.prompts),
        "publish.title": title_of(wish),
        "publish.summary": f"A {wish.kind} learned from {len(wish.texts)} pictures, with hubgen's page for training.",
    }
    if model.name != BUNDLED:
        given["base.model"] = str(Path(model.name).expanduser()) if model.folder is not None else model.name
    if not captioned:
        given["instance.prompt"] = wish.words
        given |= (
            {"prior.prompt": wish.class_words, "prior.pictures": PRIOR_PICTURES}
            if wish.class_words
            else {"prior.weight": 0}
        )
    examples = open_examples(str(source), "train", caption_column="text" if captioned else None)
    material = Material(model.name, model.bare, examples, captioned)
    asked = settings_of(script, given, {})
    chosen = completed(asked, given.keys(), material)
    chosen["run.log_steps"] = max(1, wish.steps // POINTS)
    chosen["validation.steps"] = -(-wish.steps // GRIDS)
    settings = settings_of(script, {**chosen, **given}, {})
    learns, numbers = what_learns(settings, model.bare)
    needed, most = disk_needed(settings, material, numbers), min(limits.session_bytes, shutil.disk_usage(out).free)
    if needed > most:
        raise Refused(
            f"Such a training writes about {room(needed)}, and there is room for {room(most)}; "
            "a smaller rank needs less."
        )
    return settings, learns


def title_of(wish: Wish) -> str:
    """Of the card."""
    return f"LoRA: {wish.words or 'a style'}"
