"""Captions of pictures, each with a mark that says whether it can be used.

    asked = Asked(prompt=None, max_new_tokens=32, beams=1)
    write_captions(captioner, pictures, asked)         # [Caption("a red apple", "ok"), ...]

Greedy or by beams, never drawn: the same pictures in the same batch get the same captions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from PIL import Image

from hubgen.captioning.captioner import IMAGE, Captioner, image_tokens_of
from hubgen.captioning.templates import PROMPT
from hubgen.checks import whole

Status: TypeAlias = Literal["ok", "empty", "repeating", "cut_off"]
STATUSES: tuple[Status, ...] = ("ok", "empty", "repeating", "cut_off")
ONE_WORD, SEVERAL_WORDS = 5, 3
"""How often in a row a word, or several words, are said by a model that goes round in circles"""
LETTERS = re.compile(r"([^\W\d]{1,8}?)\1{9}")
"""Letters that such a model says ten times inside of a word"""
# Scripts without spaces between words: kana, Han, Thai, Lao, Khmer, Burmese.
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|\w+")


class Caption(NamedTuple):
    """Of a picture."""

    text: str
    status: Status
    """`empty`: no words; `repeating`: goes round in circles, cut off or not; `cut_off`: had not ended at the limit"""


@dataclass(frozen=True)
class Asked:
    """How captions are asked for.

    Raises:
        ValueError: A number is below 1.
    """

    prompt: str | None = None
    """The question; of a captioner that takes questions `PROMPT` if not given"""
    max_new_tokens: int = 256
    beams: int = 1
    """Of the search; 1 is greedy"""

    def __post_init__(self) -> None:
        whole("max_new_tokens", self.max_new_tokens)
        whole("beams", self.beams)


def check_asked(config: Any, processor: Any, asked: Asked, place: str) -> None:
    """Raises ValueError where a captioner cannot be asked so; see `text_of`.

    Args:
        config: Of the model.
        processor: Of the captioner.
        asked: How.
        place: Name of the captioner, for the message.
    """
    try:
        text = text_of(processor, asked.prompt)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    except Exception as error:  # templates of others fail in every way there is
        raise ValueError(f"{place}: its chat template cannot be filled ({' '.join(str(error).split())})") from error
    found = text.count(processor.image_token)
    if found != 1:
        raise ValueError(f"{place}: its chat template gives {IMAGE} {found} times, expected it once")
    tokens = len(processor.tokenizer.encode(text)) + image_tokens_of(config) - 1
    longest = config.text_config.max_position_embeddings
    if tokens + asked.max_new_tokens > longest:
        raise ValueError(
            f"{place}: takes {longest} tokens, got {tokens} of picture and prompt and {asked.max_new_tokens} of the "
            "caption, expected fewer"
        )


def text_of(processor: Any, prompt: str | None) -> str:
    """What a captioner reads before its answer.

    Args:
        processor: Of the captioner.
        prompt: The question; `None`: the usual one, or none of a captioner that was taught without questions.

    Raises:
        ValueError: It takes no questions, and one is given.
    """
    if processor.chat_template is None:
        if prompt is not None:
            raise ValueError(f"takes no prompt (it has no chat template), got {prompt!r}, expected none")
        return IMAGE if processor.image_token == IMAGE else str(processor.image_token)
    content = [{"type": "image"}, {"type": "text", "text": PROMPT if prompt is None else prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.no_grad()
def write_captions(
    captioner: Captioner, pictures: Sequence[Image.Image], asked: Asked, together: bool = False
) -> list[Caption]:
    """Captions of a batch of pictures.

    Args:
        captioner: In evaluation mode.
        pictures: RGB.
        asked: How.
        together: Whether all processes of a run call this at once, and go on until the last is done.
    """
    model, tokenizer = captioner.model, captioner.tokenizer
    text = text_of(captioner.processor, asked.prompt)
    token = captioner.processor.image_token
    told = tokenizer([text.replace(token, token * captioner.image_tokens, 1)], return_tensors="pt",
                     add_special_tokens=not text.startswith(tokenizer.bos_token or "\0"))  # fmt: skip
    ids = told.input_ids.expand(len(pictures), -1).to(model.device)  # (B, T)
    ends = ends_of(captioner)
    padding = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=captioner.pixels(pictures).to(model.device, model.dtype),
        generation_config=_generation(asked, ends, padding, tokenizer.bos_token_id),
        synced_gpus=together,
    )  # (B, T + new)
    return [_caption(tokenizer, row, ends) for row in made[:, ids.shape[1] :].tolist()]


def ends_of(captioner: Captioner) -> list[int]:
    """Tokens at which a captioner's answer ends."""
    known = captioner.model.generation_config.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    return list(dict.fromkeys([*known, captioner.tokenizer.eos_token_id]))


def _generation(asked: Asked, ends: list[int], padding: int, start: int | None) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=asked.beams,
        max_new_tokens=asked.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=padding,
        bos_token_id=start,
    )


def _caption(tokenizer: Any, tokens: list[int], ends: list[int]) -> Caption:
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = text.replace("\0", "").strip()
    return Caption(text, status_of(text, ended=end is not None))


def status_of(text: str, ended: bool) -> Status:
    """The mark of a caption.

    Args:
        text: Of it.
        ended: Whether the model had ended it.
    """
    if not any(letter.isalnum() for letter in text):
        return "empty"
    if repeats(text):
        return "repeating"
    return "ok" if ended else "cut_off"


def repeats(text: str) -> bool:
    """Whether a text goes round in circles: one word five times in a row, several words three times, letters ten."""
    if LETTERS.search(text):
        return True
    words = WORDS.findall(text.lower())
    for length in range(1, len(words) // SEVERAL_WORDS + 1):
        times = ONE_WORD if length == 1 else SEVERAL_WORDS
        same = 0  # words in a row that stand `length` words before too
        for place in range(length, len(words)):
            same = same + 1 if words[place] == words[place - length] else 0
            if same >= (times - 1) * length:
                return True
    return False
