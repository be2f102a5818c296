"""What a captioner is told about pictures, and what it learns of that: the answers.

    told = Told(examples, captioner, template, s.data, s.run.seed)
    batches = run.batches(told.row(run.batch_size), told.read)
    ...
    total = answers(*batch)                             # summed over the tokens of the answers

A step's loss is the mean over the tokens of all of its answers, however its pictures are dealt to processes and
batches: `read` counts those of the others too.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hubgen.captioning.captioner import Captioner
from hubgen.captioning.conversations import Conversations, check_texts, conversation_of
from hubgen.captioning.generate import Asked, captions_of
from hubgen.captioning.templates import IGNORED, Conversation, Encoded, Template, encode
from hubgen.data.captions import Captions
from hubgen.data.examples import Examples, counted
from hubgen.data.order import Draw, EndlessRow
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.run import Run


class Answers(nn.Module):
    """A captioner's loss in one forward pass, which data parallelism needs to see.

    Args:
        model: `LlavaForConditionalGeneration`.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

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
        examples: The pictures, with captions or conversations.
        captioner: That reads them.
        template: How conversations are written.
        prompt: The question that a caption is the answer to.
        variants: How often another wording than the first is taken, where there is one.
        seed: Of the run.
    """

    def __init__(
        self,
        examples: Examples,
        captioner: Captioner,
        template: Template,
        prompt: str,
        variants: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.examples, self.captioner, self.template, self.prompt = examples, captioner, template, prompt
        self.captions = Captions(examples.captions, variants=variants)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.examples)

    def row(self, batch_size: int, repeats: int) -> EndlessRow:
        """The endless row that a run takes them from."""
        size = [repeats * number for number in self.examples.repeats]
        self._row = EndlessRow([0] * len(self.examples), batch_size, self.seed, size)
        return self._row

    def names(self, draws: Sequence[Draw]) -> list[str]:
        """Of pictures, for messages."""
        return [self.examples.file_names[draw.row] for draw in draws]

    def read(self, draws: Sequence[Draw]) -> Batch:
        """What a step is told about pictures, on the CPU."""
        step = self._row.draws(draws[0].place // self._row.batch_size)
        mine = {draw.place for draw in draws}
        others = [draw for draw in step if draw.place not in mine]
        text = self._encoded([self._drawn(draw) for draw in draws])
        count = learned(text) + (learned(self._encoded([self._drawn(draw) for draw in others])) if others else 0)
        return Batch(text, self.pixels([draw.row for draw in draws]), count)

    def plain(self, rows: Sequence[int]) -> Batch:
        """The same of some rows, each with its first wording."""
        text = self._encoded([self._first(row) for row in rows])
        return Batch(text, self.pixels(rows), learned(text))

    def pixels(self, rows: Sequence[int]) -> torch.Tensor:
        """Pictures as the vision tower takes them, (B, 3, H, W)."""
        return self.captioner.pixels([self.examples.picture(row) for row in rows])

    def check(self, longest: int, skip: bool) -> None:
        """Checks every text that may be told.

        Args:
            longest: Tokens that a text may have, those of the picture among them.
            skip: Whether pictures with longer ones are left out.

        Raises:
            DataError: A text holds `<image>`.
            SettingsError: A conversation does not suit the template, or is too long and not to be skipped.
        """
        long: dict[int, str] = {}
        for row, name in enumerate(self.examples.file_names):
            told = self._all(row)
            check_texts(told, [name] * len(told))
            try:
                length = self._encoded(told).ids.shape[1]
            except ValueError as error:
                raise SettingsError(f"setting 'stage': {name}: {error}.") from error
            if length > longest:
                long[row] = f"{name}: got {length} tokens, expected at most {longest} (data.max_tokens)"
        if long and not skip:
            more = f"; {counted(len(long), 'picture')} in all" if len(long) > 1 else ""
            raise SettingsError(f"setting 'data.max_tokens': {next(iter(long.values()))}{more}.")
        if long:
            self.examples.drop(long)

    def answers(self, row: int) -> list[str]:
        """Every first answer that is right for a picture."""
        return [conversation[0].answer for conversation in self._all(row)]

    def question(self, row: int) -> str | None:
        """The first question about a picture; `None` for a template without questions."""
        return None if self.template.chat is None else self._first(row)[0].question

    def _all(self, row: int) -> list[Conversation]:
        wordings = self.examples.captions[row]
        chosen = wordings if self.captions.variants and not isinstance(self.examples, Conversations) else wordings[:1]
        return [conversation_of(self.examples, row, wording, self.prompt) for wording in chosen]

    def _first(self, row: int) -> Conversation:
        return conversation_of(self.examples, row, self.captions.first(row), self.prompt)

    def _drawn(self, draw: Draw) -> Conversation:
        caption = self.captions.drawn(self.seed, draw.place, draw.row)
        return conversation_of(self.examples, draw.row, caption, self.prompt)

    def _encoded(self, conversations: Sequence[Conversation]) -> Encoded:
        return encode(conversations, self.template, self.captioner.processor, self._image_tokens)

    @cached_property
    def _image_tokens(self) -> int:
        return self.captioner.image_tokens


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
    for row in range(min(most, len(told.examples))):
        by_question.setdefault(told.question(row), []).append(row)
    batches = [(question, rows[first : first + size]) for question, rows in by_question.items()
               for first in range(0, len(rows), size)]  # fmt: skip
    for question, rows in batches[run.rank :: run.world_size]:
        batch = told.plain(rows)
        with run.accelerator.autocast():
            loss = answers(*batch.to(run.device))
            pictures = [told.examples.picture(row) for row in rows]
            captions = captions_of(told.captioner, pictures, Asked(question, max_new_tokens))
        exact = [plain_words(caption.text) in map(plain_words, told.answers(row))
                 for caption, row in zip(captions, rows, strict=True)]  # fmt: skip
        usable = sum(caption.status == "ok" for caption in captions)
        sums += torch.tensor([loss.item(), batch.of_step, sum(exact), usable, len(rows)], dtype=torch.float64)
    if run.world_size > 1:
        sums = run.accelerator.reduce(sums.to(run.device), "sum").cpu()
    loss, tokens, exact, usable, count = sums.tolist()
    return {"held_out_loss": loss / tokens, "held_out_exact": exact / count, "held_out_usable": usable / count}


def plain_words(text: str) -> str:
    """A text of which white space does not count."""
    return " ".join(text.split())
