"""Texts are mended in the order that a recipe says, and their language is told, or not where nobody can be sure."""

import sys

import pytest

from hubgen.data.errors import DataError
from hubgen.data.web.crawling.text import CLEANING, Detector, clean, needed


def test_each_step_does_one_thing() -> None:
    assert clean("a\ncat\r\non\ra sofa", ["spaces"]) == "a cat on a sofa"
    assert clean("cafÃ© &amp; bar", ["mojibake"]) == "café & bar"
    assert clean(" a cat\u00a0", ["strip"]) == "a cat"
    assert clean("a\u200b\x00\tcat", ["printable"]) == "acat"
    assert clean("a|cat\tsat", ["bars"]) == "a cat sat"
    assert clean(" a|b ", []) == " a|b "


def test_steps_are_done_in_their_order() -> None:
    assert clean("a\tcat ", ["bars", "printable", "strip"]) == "a cat"
    assert clean("a\tcat ", ["printable", "bars", "strip"]) == "acat"
    for step in CLEANING:  # what is clean stays
        assert clean("a cat on a sofa", [step, step]) == "a cat on a sofa"


@pytest.mark.parametrize("name", ["cld3", "fasttext"])
def test_a_sentence_is_told_by_both_detectors(name: str) -> None:
    detector = Detector(name)
    for text, expected in (
        ("a cat on a red sofa in the garden", "en"),
        ("Eine graue Katze sitzt auf dem Sofa im Garten", "de"),
        ("Un chat gris est assis sur le canapé du jardin", "fr"),
        ("新しい猫の写真です", "ja"),
    ):
        language, score = detector(text)
        assert language == expected and 0.5 < score <= 1 + 1e-6


def test_scripts_are_cut_from_codes_and_what_is_not_sure_is_none() -> None:
    assert Detector("cld3")("logo ABC")[0] == "el"  # which CLD3 calls el-Latn, and is wrong
    assert Detector("cld3")("Sunset over hills")[0] == "" == Detector("cld3")("")[0]
    language, score = Detector("fasttext")("Sunset over hills")
    assert language == "en"
    assert Detector("fasttext", score + 0.01)("Sunset over hills") == ("", score)
    assert Detector("fasttext", score)("Sunset over hills") == ("en", score)


def test_a_package_that_is_missing_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(DataError, match=r'ftfy: found no such package, expected .*pip install "hubgen\[web\]"'):
        needed("ftfy")
