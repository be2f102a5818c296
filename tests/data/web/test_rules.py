"""Rules keep what is equal to their threshold; recipes with a mistake are refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hubgen.data.errors import DataError
from hubgen.data.web.downloading.robots import robots_words
from hubgen.data.web.rules import (
    RULES,
    Sieve,
    animals,
    known_recipes,
    load_recipe,
    nsfw_tag,
    recipe_of,
    similarity,
    under_age,
)

LAION_400M, LAION_5B, DATACOMP = map(load_recipe, ("laion-400m", "laion-5b", "datacomp-basic"))


def cosine_of(cosine: float) -> Any:
    """The product of two embeddings in single precision that have this cosine."""
    picture = np.array([1, 0, 0], np.float32)
    text = np.array([cosine, 0, np.sqrt(1 - cosine**2)], np.float32)
    return picture @ text


@pytest.mark.parametrize(
    ("recipe", "language", "threshold"),
    [
        (LAION_5B, "en", 0.28),
        (LAION_5B, "de", 0.26),
        (LAION_5B, "", 0.26),
        (LAION_400M, "en", 0.3),
    ],
)
def test_a_similarity_at_the_threshold_stays_and_one_below_goes(recipe: Any, language: str, threshold: float) -> None:
    sieve = Sieve(
        [step for step in recipe.steps["filter"] if step.rule.name == "similarity"], ["similarity", "language"]
    )
    kept = [
        sieve({"similarity": value, "language": language})
        for value in (cosine_of(threshold - 1e-4), cosine_of(threshold), threshold, cosine_of(threshold + 1e-4), None)
    ]
    assert kept == [False, True, True, True, False]
    assert sieve.dropped == {"similarity": 2}


def test_equality_stays_in_single_and_in_double_precision() -> None:
    for least in (0.26, 0.28, 0.3, 0.1, 0.7, -0.3):
        assert similarity(least, "en", least=least, least_other=1)
        assert similarity(float(np.float32(least)), "en", least=least, least_other=1)
        assert similarity(np.float32(least), "en", least=least, least_other=1)
        assert not similarity(least - 1e-7, "en", least=least, least_other=1)


def test_the_tag_follows_from_the_two_nearest_prompts_and_prompt_18_is_unsafe() -> None:
    assert [nsfw_tag(nearest) for nearest in ((3, 17), (3, 20), (20, 3), (20, 34))] == [
        "UNLIKELY", "UNSURE", "UNSURE", "NSFW"
    ]  # fmt: skip
    assert nsfw_tag((18, 0)) == "UNSURE" and nsfw_tag((18, 18)) == "NSFW" and nsfw_tag((17, 0)) == "UNLIKELY"


def test_under_age_and_animal_rules_touch_no_picture_that_is_unlikely() -> None:
    assert under_age("UNLIKELY", "a child and a teen", (0, 1))
    assert not under_age("UNSURE", "a child", (5, 6))
    assert not under_age("NSFW", "a kidney", (5, 6))  # a part of a word, as LAION has it
    assert under_age("UNSURE", "a Child", (5, 6))  # upper case differs
    assert not under_age("UNSURE", "a beach", (5, 3)) and under_age("UNSURE", "a beach", (5, 4))
    assert not under_age("UNSURE", "a beach", None) and not under_age(None, "a beach", None)
    assert animals("UNLIKELY", (22, 23))
    assert not animals("UNSURE", (21, 0)) and animals("UNSURE", (20, 0))
    assert not animals("UNSURE", (0, 21), nearest=2) and animals("UNSURE", (0, 21), nearest=1)


def test_a_recipes_filter_is_the_sum_of_its_rules() -> None:
    row = {"similarity": 0.31, "language": "en", "nsfw": "UNSURE", "text": "a beach", "under_age_prompts": [5, 6],
           "animal_prompts": [3, 22]}  # fmt: skip
    five, four = Sieve(LAION_5B.steps["filter"], row), Sieve(LAION_400M.steps["filter"], row)
    assert five(row) and not four(row)  # the code of LAION-5B looks at one animal prompt, LAION-400M's report at two
    assert four.dropped == {"similarity": 0, "under_age": 0, "animals": 1}
    child = {**row, "text": "a child"}
    assert not five(child) and five({**child, "nsfw": "UNLIKELY"})
    assert five.dropped == {"similarity": 0, "under_age": 1, "animals": 0}


def downloaded(**changed: Any) -> dict[str, Any]:
    return {"byte_count": 5000, "original_width": 300, "original_height": 200, "format": "JPEG"} | changed


@pytest.mark.parametrize(
    ("row", "laion", "datacomp"),
    [
        (downloaded(), "kept", "kept"),
        (downloaded(byte_count=4999), "file_size", "kept"),
        (downloaded(byte_count=None), "file_size", "kept"),
        (downloaded(format="WEBP"), "kept", "kept"),
        (downloaded(format="GIF"), "picture_format", "kept"),
        (downloaded(original_height=199), "kept", "smaller_side"),
        (downloaded(original_width=600), "kept", "kept"),
        (downloaded(original_width=601), "kept", "aspect_ratio"),
        (downloaded(original_width=200, original_height=601), "kept", "aspect_ratio"),
        (downloaded(original_width=89_478_484 // 12, original_height=12), "kept", "smaller_side"),
        (downloaded(original_width=89_478_485, original_height=1), "pixel_count", "smaller_side"),
    ],
)
def test_downloaded_pictures_at_the_thresholds_stay(row: dict[str, Any], laion: str, datacomp: str) -> None:
    for recipe, fate in ((LAION_400M, laion), (LAION_5B, laion), (DATACOMP, datacomp)):
        sieve = Sieve(recipe.steps["download"], row)
        kept = sieve(row)
        dropped = [name for name, count in sieve.dropped.items() if count]
        assert (["kept"] if kept else dropped) == [fate], recipe.name


def test_a_sieve_refuses_rows_without_a_column() -> None:
    with pytest.raises(DataError, match=r"rule similarity: found the columns language, expected similarity among them"):
        Sieve(LAION_5B.steps["filter"], ["language"])


def test_words_for_another_robot_are_not_for_us() -> None:
    assert robots_words(["otherbot: noai, noindex"]) == set()
    assert robots_words(["otherbot: noai, us: noml, noindex"], "us") == {"noml", "noindex"}
    assert robots_words(["otherbot: noai", "NOML"]) == {"noml"}
    assert robots_words(["hubgen: noai, otherbot: noml"]) == {"noai"}
    assert robots_words(["*: noai"]) == {"noai"}
    assert robots_words(["none"]) >= {"noindex"}
    assert "noai" in robots_words(["unavailable_after: Fri, 25 Jun 2100 15:00:00 GMT, noai"])


def test_recipes_name_every_threshold_that_their_rules_have() -> None:
    import yaml

    assert known_recipes() == ["datacomp-basic", "laion-400m", "laion-5b"]
    folder = Path(load_recipe.__globals__["RECIPES"])
    for name in known_recipes():
        content = yaml.safe_load((folder / f"{name}.yaml").read_text())
        for stage in ("crawl", "download", "filter"):
            for item in content.get(stage, []):
                rule, given = next(iter(item.items())) if isinstance(item, dict) else (item, {})
                assert set(given) == set(RULES[rule].thresholds), rule


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"mine: found list, expected a mapping"),
        ({"crawls": []}, r"mine: found crawls, expected one of crawl, download, filter"),
        ({"crawl": {"has_alt": {}}}, r"mine: crawl: found .*, expected a list of rules"),
        ({"crawl": ["has_alts"]}, r"mine: crawl: found the rule 'has_alts', expected one of page_opt_out, has_alt"),
        ({"crawl": ["similarity"]}, r"mine: crawl: found the rule 'similarity', expected one of page_opt_out"),
        ({"crawl": [["has_alt"]]}, r"mine: crawl: found the rule \['has_alt'\]"),
        ({"crawl": ["has_alt", "has_alt"]}, r"mine: crawl: found has_alt twice"),
        ({"crawl": [{"has_alt": {"least": 1}}]}, r"has_alt: found the threshold 'least', expected one of none"),
        ({"crawl": [{"text_length": 5}]}, r"text_length: found 5, expected thresholds by name: least"),
        ({"crawl": [{"text_length": {"least": -1}}]}, r"least: found -1, expected a whole number from 0 to 100000"),
        ({"crawl": [{"text_length": {"least": 5.5}}]}, r"least: found 5.5, expected a whole number"),
        ({"crawl": [{"text_length": {"least": "5"}}]}, r"least: found '5', expected a whole number"),
        ({"filter": [{"similarity": {"least": 1.01}}]}, r"least: found 1.01, expected a number from -1 to 1"),
        ({"filter": [{"similarity": {"least": float("nan")}}]}, r"least: found nan, expected a number"),
        ({"crawl": [{"languages": {"allowed": "en"}}]}, r"allowed: found 'en', expected a list of words"),
        ({"unique": ["urls"]}, r"mine: unique: found 'urls', expected some of url, text"),
        ({"unique": []}, r"mine: unique: found \[\], expected columns among url"),
        ({"clean": ["strips"]}, r"mine: clean: found 'strips', expected some of spaces, mojibake"),
        ({"detector": "cld2"}, r"mine: detector: found 'cld2', expected cld3 or fasttext"),
        ({"least_score": 2}, r"mine: least_score: found 2, expected a number from 0 to 1"),
        ({"longest_url": 0}, r"mine: longest_url: found 0, expected a whole number from 1"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_by_name(content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recipe_of(content, "mine", "mine")


def test_a_file_that_is_no_yaml_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("crawl: [")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(DataError, match=rf"{name}: found no YAML") as error:
            load_recipe(str(tmp_path / name))
        assert "\n" not in str(error.value)
