"""The bundled model's benchmark measures what it says, on pictures and features with known answers."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.benchmarks import bundled_model, compositions, measures, report

# ---------------------------------------------------------------------------------------------------------------------
# Variety and coverage


def unit(*rows: list[float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_the_variety_of_equal_pictures_is_zero_and_of_unrelated_ones_one() -> None:
    same = measures.variety([unit([1, 0, 0], [1, 0, 0]), unit([0, 1, 0], [0, 1, 0], [0, 1, 0])])
    assert (same["within"], same["between"], same["ratio"]) == (pytest.approx(0), pytest.approx(1), pytest.approx(0))
    assert same["interval_95"] == pytest.approx([0, 0])
    assert (same["captions"], same["pictures"]) == (2, 5)
    unrelated = measures.variety(list(torch.eye(6).split(2)))
    assert unrelated["ratio"] == pytest.approx(1) and unrelated["interval_95"] == pytest.approx([1, 1])


def test_the_variety_counts_each_caption_the_same_and_no_picture_against_itself() -> None:
    # One caption's two pictures are orthogonal, the other's four are equal: distances of 1 and of 0.
    found = measures.variety([unit([1, 0, 0], [0, 1, 0]), unit(*[[0, 0, 1]] * 4)])
    assert (found["within"], found["between"]) == (pytest.approx(0.5), pytest.approx(1))
    low, high = found["interval_95"]
    assert low <= found["ratio"] <= high


def test_the_interval_of_the_variety_has_the_ratio_of_random_pictures_inside_and_narrows_with_captions() -> None:
    generator = torch.Generator().manual_seed(0)
    widths = []
    for captions in (10, 160):
        centre = torch.randn(captions, 1, 32, generator=generator)
        spread = torch.rand(captions, 1, 1, generator=generator)
        pictures = centre + spread * torch.randn(captions, 4, 32, generator=generator)
        found = measures.variety(list(torch.nn.functional.normalize(pictures, dim=-1)))
        low, high = found["interval_95"]
        assert low < found["ratio"] < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_variety_needs_two_pictures_of_a_caption() -> None:
    with pytest.raises(ValueError, match="1 pictures, expected at least 2"):
        measures.variety([unit([1, 0], [0, 1]), unit([1, 0])])


def test_pictures_near_to_one_that_is_kept_are_not_clearly_apart() -> None:
    features = unit([1, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 1, 0.1])
    assert measures.clearly_apart(features, 0.5) == [0, 2]
    assert measures.clearly_apart(features[:2], 0.5) == [0]


def test_seeds_cover_the_real_pictures_that_they_are_nearest_to() -> None:
    real = torch.eye(3)
    assert measures.covered(unit([1, 0.1, 0], [1, 0, 0.2]), real) == 1
    assert measures.covered(unit([1, 0.1, 0], [0, 0.2, 1], [0.9, 0, 0.3]), real) == 2
    counted = bundled_model.measure_coverage([real, real[:1].expand(3, 3)], [real, real])
    assert counted["covered_a_caption"] == 2 and counted["real_pictures_a_caption"] == 3
    assert (counted["at_least_two"]["hits"], counted["at_least_two"]["count"]) == (1, 2)


@pytest.mark.parametrize(("pictures", "draws"), [(2, 8), (3, 4), (4, 1)])
def test_chance_of_two_is_what_drawings_give(pictures: int, draws: int) -> None:
    drawn = torch.cartesian_prod(*[torch.arange(pictures)] * draws).view(-1, draws)  # every one there is
    several = (drawn != drawn[:, :1]).any(dim=1).double().mean().item()
    assert measures.chance_of_two(pictures, draws) == pytest.approx(several)


# ---------------------------------------------------------------------------------------------------------------------
# Variants


def folder_of(root: Path, rows: list[dict[str, str]]) -> Path:
    (root / "train").mkdir(parents=True)
    for number, row in enumerate(rows):
        row["file_name"] = f"{number}.png"
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(root / "train" / row["file_name"])
    (root / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_pictures_are_told_by_their_variant(tmp_path: Path) -> None:
    rows = [
        {"text": "crab", "variant": ""},
        {"text": "purple crab", "variant": "recoloured", "colour": "purple"},
        {"text": "crab", "variant": "mirrored"},
    ]
    real = bundled_model.RealPictures.from_folder(folder_of(tmp_path, rows), "train", 16)
    assert real.variants == ["", "recoloured", "mirrored"]
    assert real.only("").texts == ["crab"] and real.only("recoloured").texts == ["purple crab"]
    views = real.only(*bundled_model.ANOTHER_VIEW)
    assert views.texts == ["crab", "crab"] and torch.equal(views.pixels, real.pixels[[0, 2]])
    assert len(real.only("flat")) == 0
    read = bundled_model.RealPictures.from_folder(tmp_path, "train", 16, ("", "mirrored"))
    assert read.variants == ["", "mirrored"] and torch.equal(read.pixels, views.pixels)


def test_a_folder_without_the_column_has_emoji_as_drawn(tmp_path: Path) -> None:
    real = bundled_model.RealPictures.from_folder(folder_of(tmp_path, [{"text": "crab"}, {"text": "cat"}]), "train", 16)
    assert real.variants == ["", ""] and len(real.only("")) == 2 and len(real.only("recoloured")) == 0
    bare = bundled_model.RealPictures(real.pixels, real.captions)
    assert bare.only("").texts == ["crab", "cat"] and len(bare.only("mirrored")) == 0
    assert bare.and_then(real).texts == ["crab", "cat", "crab", "cat"]


def test_a_split_that_is_tuned_on_is_not_stored_with_the_test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--card", "--output", "elsewhere"]):
        with pytest.raises(SystemExit):
            bundled_model.main(["--split", "validation", *more])
        assert "for the split test" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Time


def test_the_time_of_the_command_is_that_of_whole_runs() -> None:
    found = bundled_model.measure_command(runs=1)
    assert found["seconds"] == found["seconds_of_runs"][0] > found["seconds_sampling"] > 0


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="status 2"):
        bundled_model.measure_command(tmp_path / "no-such-model", runs=1)


# ---------------------------------------------------------------------------------------------------------------------
# Compositions


def test_there_are_twelve_compositions_of_things_that_differ() -> None:
    assert len(compositions.COMPOSITIONS) == 12
    assert len({one.subject for one in compositions.COMPOSITIONS}) == 12
    for one in compositions.COMPOSITIONS:
        assert one.subject in compositions.words_of(one.prompt)


@pytest.mark.parametrize("caption", ["a purple cat", "Purple cat", "an emoji of a purple grinning cat"])
def test_a_prompt_that_a_caption_has_is_refused(caption: str) -> None:
    prompts = [compositions.Composition("a purple cat", "cat")]
    with pytest.raises(ValueError, match="'a purple cat': the data have the caption"):
        compositions.check_new(prompts, ["blue cat", caption], [["cat"]])
    compositions.check_new(prompts, ["blue cat", "purple dog", "a cat"], [["grinning cat"]])
    with pytest.raises(ValueError, match="no training caption has the word 'cat'"):
        compositions.check_new(prompts, [], [["caterpillar"]])


def test_a_subject_is_found_by_whole_words_of_the_nearest_pictures() -> None:
    captions = [["grinning cat", "a cat"], ["caterpillar"], ["guide dog"], ["sun"]]
    queries = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.9, 0.5, 0.1]])
    found = compositions.subjects_found(queries, torch.eye(4), captions, ["cat", "dog"], neighbours=2)
    assert found.tolist() == [[True, False], [False, True]]


def test_answers_are_one_for_each_row() -> None:
    rows = [{"prompt": one.prompt, "subject": one.subject} for one in compositions.COMPOSITIONS[:2]]
    judged = compositions.answered({"rows": rows}, {"1": "a mallard?", "2": ""}, "a friend, by telephone")
    assert [row["named"] for row in judged["rows"]] == [True, False]
    assert (judged["named"], judged["judged_by"]) == (1, "a friend, by telephone")
    for wrong in ({"1": "duck"}, {"1": "duck", "2": "", "3": ""}, {"1": "duck", "2": None}):
        with pytest.raises(ValueError, match="each of the rows 1 to 2"):
            compositions.answered({"rows": rows}, wrong, "nobody")


def test_rows_are_drawn_as_they_are(tmp_path: Path) -> None:
    pictures = torch.full((3, 2, 3, 64, 64), -1.0)
    pictures[1] = 1
    compositions.draw_rows(pictures, tmp_path / "rows.png")
    sheet = Image.open(tmp_path / "rows.png")
    cell = compositions.SHOWN_SIZE + report.GAP
    assert sheet.size == (compositions.MARGIN + 2 * cell, 3 * cell)
    middle = compositions.MARGIN + cell + 64
    assert [sheet.getpixel((middle, row * cell + 64)) for row in range(3)] == [(0,) * 3, (255,) * 3, (0,) * 3]
