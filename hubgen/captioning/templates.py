r"""A conversation as a text, and where in it the answers stand: those are what is learned.

    plain   <image>a red apple\n                                                     the answer and the line's end
    v1      ... USER: <image>\nWhat is it? ASSISTANT: A red apple.</s>USER: ...      each answer and its </s>

As in LLaVA's `conversation.py`; v1 is Vicuna's. In the text that a model reads, `<image>` stands as often as a picture
has vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hubgen.captioning.captioner import IMAGE

IGNORED = -100
"""Label of what is not learned"""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROMPT = "Analyze the image in a comprehensive and detailed manner."
"""What Share-Captioner is asked (2311.12793)"""


class Turn(NamedTuple):
    """A question about a picture, and the answer."""

    question: str
    """Without `<image>`"""
    answer: str


Conversation = Sequence[Turn]


@dataclass(frozen=True)
class Template:
    """How conversations are written."""

    name: str
    chat: str | None
    """The same for transformers' `apply_chat_template`; `None`: it has no questions"""

    def write(self, conversation: Conversation, end: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation with one `<image>`, and where its answers begin and stop, with their ends.

        A plain answer ends with its line, so line breaks within become spaces.

        Args:
            conversation: Of a plain one, only the answer is written.
            end: The tokenizer's token for the end of a text.

        Raises:
            ValueError: There is more than one turn, and the template has room for one.
        """
        if self.chat is None and len(conversation) != 1:
            raise ValueError(
                f"got {len(conversation)} questions, expected one: the template {self.name} has one answer"
            )
        text, spans = "" if self.chat is None else SYSTEM + " ", []
        for number, turn in enumerate(conversation):
            image = IMAGE if number == 0 else ""
            if self.chat is None:
                text += image
                answer = f"{' '.join(turn.answer.splitlines())}\n"
            else:
                text += f"USER: {image}\n{turn.question} ASSISTANT:" if image else f"USER: {turn.question} ASSISTANT:"
                answer = f" {turn.answer}{end}"
            spans.append((len(text), len(text) + len(answer)))
            text += answer
        return text, spans

    def end_tokens(self, tokenizer: Any) -> list[int]:
        """Tokens at which an answer ends.

        Raises:
            ValueError: The tokenizer has no single token for it.
        """
        ends = [tokenizer.eos_token_id]
        if self.chat is None:
            ids = tokenizer.encode("a\n", add_special_tokens=False)
            if tokenizer.decode(ids[-1:]) != "\n":
                raise ValueError(f"the tokenizer: got no token for the end of a line ({ids}), expected one")
            ends.append(ids[-1])
        return ends


PLAIN = Template("plain", None)
V1 = Template(
    "v1",
    SYSTEM + " {% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %} ASSISTANT:{% else %} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}"
    "{% endfor %}",
)


class Encoded(NamedTuple):
    """Texts of B conversations as a model takes them, shorter ones padded on the right to T tokens."""

    ids: torch.Tensor
    """(B, T)"""
    mask: torch.Tensor
    """(B, T), 0 where it is padded"""
    labels: torch.Tensor
    """(B, T), the token itself where it is part of an answer, else `IGNORED`"""


def encode(conversations: Sequence[Conversation], template: Template, processor: Any, image_tokens: int) -> Encoded:
    """Conversations as tokens.

    A token is part of an answer if one of its characters is; so is one that begins with the space before it.

    Args:
        conversations: B of them.
        template: How they are written.
        processor: Of the captioner.
        image_tokens: Vectors of a picture.
    """
    tokenizer = processor.tokenizer
    written = [template.write(one, tokenizer.eos_token) for one in conversations]
    more = len(processor.image_token) * (image_tokens - 1)  # the text grows before every answer
    texts = [text.replace(IMAGE, processor.image_token * image_tokens, 1) for text, _ in written]
    more += len(processor.image_token) - len(IMAGE)
    told = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False)
    length = max(map(len, told.input_ids))
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    shape = (len(texts), length)
    ids, labels = torch.full(shape, padding), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, (_, spans) in enumerate(written):
        tokens, offsets = torch.tensor(told.input_ids[row]), torch.tensor(told.offset_mapping[row])
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        learned = torch.zeros(len(tokens), dtype=torch.bool)
        for start, stop in spans:
            learned |= (offsets[:, 1] > start + more) & (offsets[:, 0] < stop + more)
        labels[row, : len(tokens)][learned] = tokens[learned]
    return Encoded(ids, mask, labels)
