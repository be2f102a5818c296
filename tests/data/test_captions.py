"""Texts are drawn by place and content, and every one that can be drawn is known beforehand."""

from collections import Counter

from hubgen.data.captions import Captions

WORDINGS = [["cat, red, big, old", "a cat"], ["dog"], ["hen, small, white", "a hen", "chick"]]


def test_whatever_is_drawn_was_announced() -> None:
    captions = Captions(WORDINGS, variants=0.5, dropout=0.2, prefix="sks, ", shuffles=3, kept_tags=1, seed=1)
    known = set(captions.all())
    drawn = [captions.drawn(0, place, place % 3) for place in range(900)]
    assert set(drawn) == known and "" in known
    assert all(text.startswith("sks, ") for text in known - {""})
    assert 0.15 < drawn.count("") / 900 < 0.25
    assert {text.split(", ")[1] for text in known if text.count(",") == 4} == {"cat"}  # the kept tag stays first


def test_wordings_are_taken_as_often_as_asked() -> None:
    captions = Captions(WORDINGS, variants=0.25)
    counts = Counter(captions.drawn(7, place, 2) for place in range(4000))
    assert 0.70 < counts["hen, small, white"] / 4000 < 0.80
    assert abs(counts["a hen"] - counts["chick"]) < 200
    assert Captions(WORDINGS).all() == ["", "cat, red, big, old", "dog", "hen, small, white"]


def test_orders_of_tags_depend_on_the_words_and_not_on_the_row() -> None:
    one, other = (Captions(wordings, shuffles=4, seed=2) for wordings in (WORDINGS, WORDINGS[::-1]))
    assert one.all() == other.all() and len(one.all()) > 5
    assert Captions(WORDINGS, shuffles=4, seed=3).all() != one.all()
