"""What a captioner is told about pictures, and what it learns of that: the answers.

    told = Told(pictures, captioner, template, s.data, longest)
    batches = run.batches(told.row(run.batch_size), told.read)
    ...
    total = answers(*batch.to(device))                  # summed over the tokens of the answers

A step's loss is the mean over the tokens of all of its answers, however its pictures are dealt to processes and
batches: `read` counts those of the others too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from hubgen.captioning.captioner import Captioner
from hubgen.captioning.conversations import Conversations, check_words, conversation_of, is_conversations
from hubgen.captioning.generate import Asked, write_captions
from hubgen.captioning.templates import IGNORED, PROMPT, Conversation, Encoded, Template, encode
from hubgen.data.errors import DataError
from hubgen.data.examples import Examples
from hubgen.data.lazy import Lazy
from hubgen.data.order import Draw, EndlessRow
from hubgen.data.views import Views
from hubgen.training.kit.groups import CaptionedData, need
from hubgen.training.kit.parse import FREE, Range
from hubgen.training.kit.pictures import Pictures, captions_of, open_pictures
from hubgen.training.kit.run import Run


@dataclass(frozen=True, kw_only=True)
class AskedData(CaptionedData):
    """Pictures with captions or conversations. Of `CaptionedData`, what changes pictures is not for captioners."""

    image_root: Annotated[Path | None, FREE] = None
    """Of a file of conversations (source x.json): the folder of its pictures; that of the file if not given."""

    prompt: str = PROMPT
    """In the stage instruct: the question that captions are the answers to."""

    max_tokens: Annotated[int, Range(1)] = 2048
    """Tokens of a text at most, those of its picture among them; the model may take fewer."""

    caption_variants: Annotated[float, Range(0, 1)] = 0.0
    """How often a picture is told with another of its wordings than the first."""

    caption_dropout: Annotated[float, Range(0, 1)] = 0.0
    """Not for captioners."""

    cache: Annotated[bool, FREE] = False
    """Not for captioners: none of their inputs are kept."""

    def __post_init__(self) -> None:
        plain = CaptionedData(source="", caption_dropout=0.0, cache=False)
        for name in UNUSED:
            found = getattr(self, name)
            need(found == getattr(plain, name), f"data.{name}", found, "nothing: it is not for captioners")
        need(self.image_root is None or is_conversations(self.source), "data.image_root", str(self.image_root),
             "nothing: it is for files of conversations (.json, .jsonl)")  # fmt: skip


UNUSED = ("size", "buckets", "random_crops", "random_moves", "mirror", "upscale", "mask_column", "caption_dropout",
          "tag_orders", "kept_tags", "cache")  # fmt: skip
"""Settings that have no sense here: the captioner's processor sizes pictures, and words must stay true to them"""


def open_told(data: AskedData, split: str, seed: int, train: bool = True) -> Pictures:
    """The pictures of a split, or of a file of conversations.

    Args:
        data: The settings.
        split: Which; of a file, all.
        seed: Of the run.
        train: Whether captions are drawn.

    Raises:
        DataError: A picture or row cannot be used.
    """
    if not is_conversations(data.source):
        return open_pictures(data, split, seed, side=1, caption_column=data.caption_column, train=train)
    path = Path(data.source).expanduser()
    examples = Conversations(path, data.image_root or path.parent, data.on_bad_picture, data.max_pixels)
    return Pictures(examples, whole_views(examples), 1, seed)


def whole_views(examples: Examples) -> Views:
    """Views that tell no picture from another: all are of one bucket."""
    return Views(examples.sizes, examples.digests, [(1, 1)])


class Answers(nn.Module):
    """A captioner's loss in one forward pass, which data parallelism needs to see.

    Args:
        model: `LlavaForConditionalGeneration`.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what FSDP shards one by one

    def forward(self, text: Encoded, pixels: torch.Tensor) -> torch.Tensor:
        """The sum over the answers' tokens of -log p(token | picture, text before), for pixels (B, 3, H, W)."""
        logits = self.model(
            input_ids=text.ids, attention_mask=text.mask, pixel_values=pixels, use_cache=False
        ).logits  # (B, T, V)
        return F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), text.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def enable_gradient_checkpointing(self) -> None:
        """Has the blocks compute their activations again in the backward pass."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})


class Batch(NamedTuple):
    """Of B pictures."""

    text: Encoded
    pixels: torch.Tensor
    """(B, 3, H, W), as the vision tower takes them"""
    of_step: int
    """Tokens of all answers of the step, those of other processes and batches too"""

    @property
    def tokens(self) -> int:
        """Of the answers of these B."""
        return learned(self.text)

    def to(self, device: torch.device) -> tuple[Encoded, torch.Tensor]:
        """Text and pixels on a device."""
        return Encoded(*(one.to(device) for one in self.text)), self.pixels.to(device)


class Told:
    """Pictures with conversations, as the steps of a run take them.

    Args:
        pictures: With captions or conversations; they are shown whole, and the captioner's processor sizes them.
        captioner: That reads them.
        template: How conversations are written.
        data: The settings.
        longest: Tokens that a text may have, those of the picture among them.
    """

    def __init__(
        self, pictures: Pictures, captioner: Captioner, template: Template, data: AskedData, longest: int
    ) -> None:
        self.pictures, self.captioner, self.template = pictures, captioner, template
        self.data, self.longest = data, longest
        self.captions = captions_of(pictures, data)
        self._image_tokens = captioner.image_tokens

    def row(self, batch_size: int) -> EndlessRow:
        """The endless row that a run takes them from."""
        self._row = self.pictures.row(self.data, batch_size)
        return self._row

    def read(self, draws: Sequence[Draw]) -> Batch:
        """What a step is told about pictures, on the CPU."""
        step = self._row.draws(draws[0].place // self._row.batch_size)
        mine = {draw.place for draw in draws}
        others = [draw for draw in step if draw.place not in mine]
        text = self._encoded([draw.row for draw in draws], [self._drawn(draw) for draw in draws])
        count = learned(text)
        if others:
            count += learned(self._encoded([draw.row for draw in others], [self._drawn(draw) for draw in others]))
        return Batch(text, self.pixels([draw.row for draw in draws]), count)

    def plain(self, rows: Sequence[int]) -> Batch:
        """The same of some rows, each with its first wording."""
        text = self._encoded(rows, [self.first(row) for row in rows])
        return Batch(text, self.pixels(rows), learned(text))

    def pixels(self, rows: Sequence[int]) -> torch.Tensor:
        """Pictures as the vision tower takes them, (B, 3, H, W)."""
        return self.captioner.pixels(self.shown(rows))

    def shown(self, rows: Sequence[int]) -> list[Image.Image]:
        """Pictures, RGB."""
        return [self.pictures.examples.picture(row) for row in rows]

    def check(self) -> None:
        """Checks every text that may be told, and leaves out those that do not fit, if the settings say so.

        Texts of shards with counts are checked when they are read.

        Raises:
            DataError: A text does not suit the template, or is too long.
        """
        examples, bad = self.pictures.examples, dict[int, str]()
        if isinstance(examples.sizes, Lazy):
            return
        for row in range(len(examples)):
            try:
                for conversation in self._all(row):
                    self._encoded([row], [conversation])
            except DataError as problem:
                if self.data.on_bad_picture == "fail":
                    raise
                bad[row] = str(problem)
        if bad:
            examples.drop(bad)
            self.pictures = replace(self.pictures, views=whole_views(examples))

    def answers(self, row: int) -> list[str]:
        """Every first answer that is right for a picture."""
        if isinstance(self.pictures.examples, Conversations):
            return [self.first(row)[0].answer]
        return list(self.captions.wordings[row])

    def question(self, row: int) -> str | None:
        """The first question about a picture; `None` for a template without questions."""
        return None if self.template.chat is None else self.first(row)[0].question

    def first(self, row: int) -> Conversation:
        """What is told about a picture that is only looked at."""
        return self._of(row, self.captions.first(row))

    def _all(self, row: int) -> list[Conversation]:
        if isinstance(self.pictures.examples, Conversations):
            return [self.first(row)]
        return [self._of(row, text) for text in self.captions.all([row]) if text]

    def _drawn(self, draw: Draw) -> Conversation:
        return self._of(draw.row, self.captions.drawn(self.pictures.seed, draw.place, draw.row))

    def _of(self, row: int, caption: str) -> Conversation:
        return conversation_of(self.pictures.examples, row, caption, self.data.prompt)

    def _encoded(self, rows: Sequence[int], conversations: Sequence[Conversation]) -> Encoded:
        """Raises DataError where one does not fit."""
        names = [self.pictures.examples.file_names[row] for row in rows]
        for name, conversation in zip(names, conversations, strict=True):
            check_words(conversation, name)
        try:
            text = encode(conversations, self.template, self.captioner.processor, self._image_tokens)
        except ValueError as problem:
            raise DataError(f"{names[0]}: {problem}") from problem
        lengths = text.mask.sum(dim=1).tolist()
        if max(lengths) > self.longest:
            name = names[lengths.index(max(lengths))]
            raise DataError(f"{name}: got a text of {max(lengths)} tokens, expected at most {self.longest}")
        return text


def learned(text: Encoded) -> int:
    """How many tokens are part of an answer."""
    return int((text.labels != IGNORED).sum())


@torch.no_grad()
def measure(run: Run, answers: Answers, told: Told, most: int, max_new_tokens: int) -> dict[str, float]:
    """What a captioner makes of pictures; the processes share the work.

    Args:
        run: The processes.
        answers: The captioner, in evaluation mode.
        told: The pictures.
        most: Of them that are measured, at most.
        max_new_tokens: Of a caption, at most.

    Returns:
        `held_out_loss`, the mean over the answers' tokens; `held_out_exact`, the share of captions that are an answer
        word for word; `held_out_usable`, the share of those that are marked `ok`.
    """
    sums, size = torch.zeros(5, dtype=torch.float64), run.options.batch_size
    by_question: dict[str | None, list[int]] = {}
    for row in range(min(most, len(told.pictures))):
        by_question.setdefault(told.question(row), []).append(row)
    batches = [(question, rows[first : first + size]) for question, rows in by_question.items()
               for first in range(0, len(rows), size)]  # fmt: skip
    # Every process is as often at work, because those of a sharded network move together.
    rounds = -(-len(batches) // run.world_size)
    for number in range(run.rank, rounds * run.world_size, run.world_size):
        question, rows = batches[number % len(batches)]
        batch = told.plain(rows)
        with run.accelerator.autocast():
            loss = answers(*batch.to(run.device))
            asked = Asked(question, max_new_tokens)
            captions = write_captions(told.captioner, told.shown(rows), asked, together=run.world_size > 1)
        exact = [plain_words(caption.text) in map(plain_words, told.answers(row))
                 for caption, row in zip(captions, rows, strict=True)]  # fmt: skip
        usable = sum(caption.status == "ok" for caption in captions)
        if number < len(batches):
            sums += torch.tensor([loss.item(), batch.of_step, sum(exact), usable, len(rows)], dtype=torch.float64)
    if run.world_size > 1:
        sums = run.accelerator.reduce(sums.to(run.device), "sum").cpu()
    loss, tokens, exact, usable, count = sums.tolist()
    return {"held_out_loss": loss / tokens, "held_out_exact": exact / count, "held_out_usable": usable / count}


def plain_words(text: str) -> str:
    """A text of which white space does not count."""
    return " ".join(text.split())
