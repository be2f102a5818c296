"""Conversations as text and as tokens: the answers are learned and nothing else; files that do not fit are told."""

import json
from pathlib import Path
from typing import Any

import pytest

from hubgen.captioning.conversations import Conversations, conversation_of, turns_of
from hubgen.captioning.templates import IGNORED, PLAIN, PROMPT, SYSTEM, V1, Turn, encode
from hubgen.data.errors import DataError
from hubgen.data.metadata import LeavesFolderError
from tests.captioning.taught import NAMED, QUESTION, drawn, untaught

TWO = [Turn(QUESTION, "a red ball"), Turn("And now?", "a blue box")]


def test_plain_is_the_picture_and_the_caption_on_a_line() -> None:
    assert PLAIN.write(TWO[:1], "</s>") == ("<image>a red ball\n", [(7, 18)])
    assert PLAIN.write([Turn("", "a red\nball")], "</s>")[0] == "<image>a red ball\n"
    with pytest.raises(ValueError, match="got 2 questions, expected one: the template plain has one answer"):
        PLAIN.write(TWO, "</s>")


def test_v1_is_vicunas_chat() -> None:
    text, spans = V1.write(TWO, "</s>")
    asked = f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: a red ball</s>USER: And now? ASSISTANT: a blue box</s>"
    assert text == asked
    assert [text[start:stop] for start, stop in spans] == [" a red ball</s>", " a blue box</s>"]


@pytest.mark.parametrize("template", [PLAIN, V1])
def test_the_tokens_that_are_learned_are_those_of_the_answers_with_their_ends(template: Any) -> None:
    captioner = untaught()
    tokenizer, several = captioner.tokenizer, TWO if template is V1 else TWO[:1]
    told = encode([several, [Turn("", "a box")]], template, captioner.processor, captioner.image_tokens)
    learned = [tokenizer.decode(row[row != IGNORED]) for row in told.labels]
    assert learned[0] == ("a red ball\n" if template is PLAIN else " a red ball</s> a blue box</s>")
    assert learned[1] == ("a box\n" if template is PLAIN else " a box</s>")
    where = told.labels != IGNORED
    assert (told.labels[where] == told.ids[where]).all()
    assert (told.ids == captioner.model.config.image_token_id).sum(dim=1).tolist() == [captioner.image_tokens] * 2
    assert (told.mask.sum(dim=1) == (told.ids != tokenizer.pad_token_id).sum(dim=1)).all()
    assert told.ids[0, 0] == tokenizer.bos_token_id
    alone = encode([[Turn("", "a box")]], template, captioner.processor, captioner.image_tokens)
    length = alone.ids.shape[1]
    assert (told.ids[1, :length] == alone.ids[0]).all() and (told.labels[1, :length] == alone.labels[0]).all()


# ---- files ----


def row(**changes: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": f"{QUESTION}\n<image>"}, {"from": "gpt", "value": "a red ball"}]
    return {"id": "1", "image": "inner/1.png", "conversations": said, **changes}


def said(*texts: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in texts]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    drawn("red", "ball").save(tmp_path / "inner" / "1.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def written(folder: Path, rows: Any, name: str = "data.json") -> Path:
    path = folder / name
    text = "".join(json.dumps(one) + "\n" for one in rows) if name.endswith("l") else json.dumps(rows)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_sharegpts_json_is_read_as_turns_about_pictures(name: str, folder: Path) -> None:
    more = said(("human", "<image>\nWhat?"), ("gpt", " A ball. "), ("human", "Sure?"), ("gpt", "Yes."))
    examples = Conversations(written(folder, [row(), row(**more)], name), folder)
    assert examples.file_names == ["inner/1.png"] * 2 and examples.sizes == [(32, 32)] * 2
    assert conversation_of(examples, 0, "", PROMPT) == [Turn(QUESTION, "a red ball")]
    assert conversation_of(examples, 1, "", PROMPT) == [Turn("What?", "A ball."), Turn("Sure?", "Yes.")]
    assert examples.picture(0).tobytes() == NAMED["a red ball"].tobytes()
    again = Conversations(written(folder, [row(), row()], name), folder)
    assert again.fingerprint != examples.fingerprint


HUMAN, GPT = ("human", "<image>"), ("gpt", "a ball")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conversations": None}, "row 1: got no list 'conversations', expected one of objects with from and value"),
        ({"conversations": []}, "got no list 'conversations'"),
        (said(GPT, HUMAN), 'turn 1: got {"from": "gpt", "value": "a ball"}, expected a text (value) from human'),
        (said(HUMAN, HUMAN), 'turn 2: got {"from": "human"'),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: got"),
        (said(HUMAN, GPT, ("human", "x")), "got 3 turns, expected an answer to each question"),
        (said(("human", "what?"), GPT), "got <image> 0 times, 0 in the first question, expected it once there"),
        (said(HUMAN, GPT, HUMAN, GPT), "got <image> 2 times, 1 in the first question"),
        (said(HUMAN, ("gpt", "an <image>")), "got <image> 2 times"),
        (said(HUMAN, ("gpt", " ")), "turn 2: is empty, expected an answer"),
        ({"image": None}, "got the image None, expected the name of a file"),
        ({"image": "nowhere.png"}, "nowhere.png: No such file or directory, expected a picture"),
        ({"image": "broken.png"}, "broken.png: got 10 bytes that begin with"),
    ],
)
def test_a_row_that_does_not_fit_is_named_or_left_out(changes: dict[str, Any], words: str, folder: Path) -> None:
    path = written(folder, [row(**changes), row(), row()])
    with pytest.raises(DataError) as refused:
        Conversations(path, folder)
    assert words in str(refused.value) and f"{path} row 1" in str(refused.value)
    skipping = Conversations(path, folder, on_error="skip")
    assert len(skipping) == 2 and words in skipping.left_out()[1]


def test_a_picture_outside_of_the_folder_is_never_skipped(folder: Path) -> None:
    path = written(folder, [row(image="../secret.png"), row()])
    with pytest.raises(LeavesFolderError, match="leaves the folder"):
        Conversations(path, folder, on_error="skip")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "got dict, expected a list of conversations"),
        ("[]", "0 of 0 rows can be used"),
    ],
)
def test_a_file_that_holds_no_conversations_is_named(text: str, words: str, folder: Path) -> None:
    (folder / "data.json").write_text(text)
    with pytest.raises(DataError, match=words):
        Conversations(folder / "data.json", folder)
    with pytest.raises(DataError, match="no such folder, expected that of the pictures"):
        Conversations(folder / "data.json", folder / "nowhere")


def test_what_is_no_object_is_no_conversation() -> None:
    with pytest.raises(DataError, match="x: got no list"):
        turns_of(["a"], "x")
