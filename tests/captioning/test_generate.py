"""Captions and their marks."""

import pytest
import torch

from hubgen.captioning.captioner import Captioner
from hubgen.captioning.generate import Asked, Caption, check_asked, status_of, write_captions
from hubgen.captioning.templates import PROMPT, V1
from tests.captioning.taught import NAMED, QUESTION, taught, untaught

PICTURES = list(NAMED.values())


@pytest.mark.parametrize("beams", [1, 3])
def test_a_taught_captioner_says_what_it_was_taught(beams: int) -> None:
    found = write_captions(taught(), PICTURES, Asked(max_new_tokens=16, beams=beams))
    assert found == [Caption(text, "ok") for text in NAMED]


def test_captions_do_not_depend_on_the_random_generator() -> None:
    torch.manual_seed(1)
    first = write_captions(untaught(), PICTURES, Asked(max_new_tokens=16, beams=2))
    torch.manual_seed(2)
    assert write_captions(untaught(), PICTURES, Asked(max_new_tokens=16, beams=2)) == first


def test_greedy_captions_are_those_of_the_most_likely_token_each_time() -> None:
    captioner = taught()
    ids = torch.tensor(captioner.tokenizer("<image>" * captioner.image_tokens).input_ids)[None]
    pixels, end = captioner.pixels(PICTURES[3:4]), captioner.model.generation_config.eos_token_id[-1]
    said: list[int] = []
    with torch.no_grad():
        while not said or said[-1] != end:
            text = torch.cat([ids, torch.tensor([said], dtype=torch.long)], dim=1)
            said.append(int(captioner.model(input_ids=text, pixel_values=pixels).logits[0, -1].argmax()))
    assert captioner.tokenizer.decode(said) == "a green box\n"


def test_a_caption_without_an_end_within_the_limit_is_cut_off() -> None:
    found = write_captions(taught(), PICTURES[:1], Asked(max_new_tokens=2))
    assert found[0].status == "cut_off" and "a red ball".startswith(found[0].text)


@pytest.mark.parametrize(
    ("text", "ended", "status"),
    [
        ("a red ball", True, "ok"),
        ("a red ball", False, "cut_off"),
        ("", True, "empty"),
        ("", False, "empty"),
        (". . - ,", True, "empty"),
        ("\ufffd\ufffd", False, "empty"),
        ("12", True, "ok"),
        ("ein Bär", True, "ok"),
        ("熊", True, "ok"),
        ("a very, very, very, very big dog", True, "ok"),
        ("a very very very very very big dog", True, "repeating"),
        ("a dog and a dog and a cat", True, "ok"),
        ("a dog and a dog and a dog and", False, "repeating"),
        ("There is a dog. There is a dog. there is A dog", True, "repeating"),
        ("There is a dog. There is a cat. There is a cow.", True, "ok"),
        ("赤い箱赤い箱赤い箱", True, "repeating"),
        ("赤い箱と赤い玉", True, "ok"),
        ("aaaaaaaaaaaa", True, "repeating"),
        ("a number of 1000000000000", True, "ok"),
        ("hahahahahahahahahahaha", True, "repeating"),
    ],
)
def test_the_mark_of_a_caption(text: str, ended: bool, status: str) -> None:
    assert status_of(text, ended) == status


def test_a_captioner_of_questions_answers_them_and_one_without_refuses_them() -> None:
    asking = taught("instruct")
    found = write_captions(asking, PICTURES, Asked(QUESTION, 16))
    assert sum(caption.text == text for caption, text in zip(found, NAMED, strict=True)) >= 6
    with pytest.raises(ValueError, match=r"takes no prompt \(it has no chat template\), got 'Why\?', expected none"):
        write_captions(taught(), PICTURES, Asked("Why?"))


def test_what_cannot_be_asked_is_told_before_any_work() -> None:
    def refused(captioner: Captioner, asked: Asked) -> str:
        with pytest.raises(ValueError) as error:
            check_asked(captioner.model.config, captioner.processor, asked, "place")
        return str(error.value)

    plain, asking = untaught(), untaught()
    check_asked(plain.model.config, plain.processor, Asked(max_new_tokens=512 - 5), "place")
    assert "place: takes 512 tokens, got 5 of picture and prompt and 508" in refused(plain, Asked(max_new_tokens=508))
    assert "place: takes no prompt" in refused(plain, Asked("Why?"))
    asking.processor.chat_template = V1.chat
    check_asked(asking.model.config, asking.processor, Asked(PROMPT), "place")
    asking.processor.chat_template = "{{ no_such_thing.inner }}"
    assert "its chat template cannot be filled" in refused(asking, Asked(PROMPT))
    asking.processor.chat_template = "only words"
    assert "its chat template gives <image> 0 times, expected it once" in refused(asking, Asked(PROMPT))
    for name in ("beams", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"`{name}`: got 0, expected a whole number"):
            Asked(**{name: 0})
