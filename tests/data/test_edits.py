"""Edits with instructions: by rule, and drawn by a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from hubgen.cli import main
from hubgen.cli.data import COLOURS, RULES
from hubgen.data.colours import colour_shares
from hubgen.data.edits import (
    EDITS,
    USUAL,
    DirectionalSimilarity,
    Drawing,
    Triple,
    draw_pair,
    edited,
    read_triples,
    write_edits,
    write_pairs,
)
from hubgen.data.errors import DataError
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.views import pixels_of
from tests import models
from tests.official import clip_tokenizer
from tests.parity import randomize_

COLUMNS: dict[str, Any] = {
    "caption_column": "edit_prompt", "beside": ["original_image"], "picture": "edited_image"
}  # fmt: skip
TRIPLES = [Triple("a red cat", "make it a dog", "a red dog"), Triple("a big apple", "make it small", "a small apple")]


def flag() -> Image.Image:
    """Red to the left, blue above right, on white."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[4:28, 2:12], pixels[4:10, 16:30] = (220, 30, 40), (40, 60, 230)
    return Image.fromarray(pixels)


def ball() -> Image.Image:
    """Red alone."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[8:24, 8:24] = (220, 30, 40)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    for split in ("train", "test"):
        (source / split).mkdir(parents=True)
        for name, picture in (("flag", flag()), ("ball", ball())):
            picture.save(source / split / f"{name}.png")
        rows = [{"file_name": f"{name}.png", "text": f"a {name}"} for name in ("flag", "ball")]
        (source / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "LICENSE").write_text("MIT")
    return source


def test_each_edit_does_what_its_words_say() -> None:
    before = np.asarray(flag())
    after = {name: np.asarray(edited(name, flag())) for name in USUAL}
    assert (after["mirror"] == before[:, ::-1]).all() and (after["upside_down"] == before[::-1]).all()
    assert (after["swap_red_and_blue"] == before[..., ::-1]).all()
    assert (np.ptp(after["grey"], axis=-1) == 0).all() and after["grey"][10, 5, 0] not in (0, 255)
    shares = colour_shares(pixels_of(edited("green", ball()) or ball())[None])[0]
    assert shares[3] > 0.9, shares  # green
    assert edited("green", flag()) is None  # of two hues
    assert edited("mirror", ball()) is None  # changes nothing
    assert EDITS["green"][0] == "make it green" and {*RULES, *COLOURS} == set(EDITS) and USUAL == RULES
    with pytest.raises(ValueError, match="`edits`: got 'turn', expected some of mirror"):
        edited("turn", ball())


def test_a_folder_of_edits_is_read_by_datasets_and_by_the_trainers(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "out"
    count = write_edits(folder, out, ("mirror", "grey", "green"))
    assert count == 2 * 4  # the flag mirrored and grey, the ball grey and green; twice
    assert (out / "LICENSE").read_text() == "MIT"
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert {"original_image", "edit_prompt", "edited_image"} <= set(loaded.column_names) and len(loaded) == 4
    read = ImageTextFolder(
        out, "train", caption_column="edit_prompt", beside=["original_image"], picture="edited_image"
    )
    assert read.without_row == 0
    for row, instruction in enumerate(read.texts):
        name = next(name for name, (words, _) in EDITS.items() if words == instruction)
        before, after = read.further(row, "original_image"), read.picture(row)
        assert np.array_equal(np.asarray(edited(name, before)), np.asarray(after))
        assert np.array_equal(np.asarray(loaded[row]["edited_image"]), np.asarray(after))
        assert np.array_equal(np.asarray(loaded[row]["original_image"].convert("RGB")), np.asarray(before))
    table = (out / "train" / "metadata.jsonl").read_bytes()
    assert write_edits(folder, out, ("mirror", "grey", "green")) == count  # again
    assert (out / "train" / "metadata.jsonl").read_bytes() == table
    with pytest.raises(DataError, match=r"was begun with other edits \(edits.json\)"):
        write_edits(folder, out, ("mirror",))


def test_the_command_writes_edits_and_says_what_does_not_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "edits", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "12 edits" in capsys.readouterr().out  # all four of the flag, two of the ball; twice
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "no such folder or .jsonl file"),
        ([str(folder), "--seeds", "3"], "--seeds: is for a .jsonl file of prompts"),
        ([str(folder / "LICENSE")], "no such folder or .jsonl file"),
    ):
        assert main(["data", "edits", *arguments, "--out", str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err


def test_triples_are_read_and_bad_lines_told(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"input": "a cat", "edit": "make it a dog", "output": "a dog"}) + "\n\n")
    assert read_triples(path) == [Triple("a cat", "make it a dog", "a dog")]
    for line in (
        "{}",
        "[]",
        "cat",
        '{"input": "a", "edit": 3, "output": "b"}',
        '{"input": "a", "edit": " ", "output": "b"}',
    ):
        path.write_text(line + "\n")
        with pytest.raises(DataError, match="row 1: got"):
            read_triples(path)


def test_pairs_begin_at_the_same_noise_and_an_interrupted_run_draws_the_rest(tmp_path: Path) -> None:
    pipe = models.pipeline()
    drawing = Drawing(seeds=2, kept=2, steps=2)
    assert write_pairs(pipe, TRIPLES, tmp_path / "out", drawing) == 4
    read = ImageTextFolder(tmp_path / "out", **COLUMNS)
    assert read.texts == [one.edit for one in TRIPLES for _ in range(2)]
    for row in range(4):
        assert not np.array_equal(np.asarray(read.picture(row)), np.asarray(read.further(row, "original_image")))
    again = draw_pair(pipe, TRIPLES[1], drawing, 1, 1)
    assert np.array_equal(np.asarray(again[0]), np.asarray(read.further(3, "original_image")))
    same = draw_pair(pipe, Triple("a cat", "nothing", "a cat"), drawing, 0, 0)
    difference = np.abs(np.asarray(same[0]).astype(int) - np.asarray(same[1]))
    assert difference.max() <= 1
    lost = tmp_path / "out" / "edited" / "000001-0.png"
    before = lost.read_bytes()
    lost.unlink()
    kept = (tmp_path / "out" / "edited" / "000000-0.png").stat().st_mtime_ns
    write_pairs(pipe, TRIPLES, tmp_path / "out", drawing)
    assert lost.read_bytes() == before
    assert (tmp_path / "out" / "edited" / "000000-0.png").stat().st_mtime_ns == kept


def test_a_score_chooses_the_best_and_leaves_out_bad_ones(tmp_path: Path) -> None:
    pipe = models.pipeline()
    values: list[float] = []

    def score(before: Image.Image, after: Image.Image, triple: Triple) -> float | None:
        value = float(np.asarray(after).mean())
        values.append(value)
        return None if triple == TRIPLES[1] else value

    assert write_pairs(pipe, TRIPLES, tmp_path / "out", Drawing(seeds=3, kept=1, steps=2), score) == 1
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert row["score"] == max(values[:3]) and len(values) == 6
    with pytest.raises(DataError, match="none of the pairs of 2 triples is good enough"):
        write_pairs(pipe, TRIPLES, tmp_path / "none", Drawing(seeds=1, steps=2), lambda *_: None)


def test_clips_score_is_the_cosine_of_both_changes() -> None:
    tokenizer = clip_tokenizer()
    half: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={**half, "vocab_size": len(tokenizer), "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},
        vision_config={**half, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model = randomize_(CLIPModel(config)).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    loose = {"least_alike": -1.0, "least_true": -1.0, "least": -1.0}
    score = DirectionalSimilarity(model, tokenizer, processor, **loose)
    value = score(flag(), ball(), TRIPLES[0])
    pixels = processor([flag(), ball()], return_tensors="pt")
    words = tokenizer([TRIPLES[0].input, TRIPLES[0].output], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**words, **pixels)
    image, text = (one[1] / one[1].norm() - one[0] / one[0].norm() for one in (out.image_embeds, out.text_embeds))
    assert value == pytest.approx((image @ text / image.norm() / text.norm()).item(), abs=1e-5)
    assert (
        DirectionalSimilarity(model, tokenizer, processor, **{**loose, "least": value + 0.01})(
            flag(), ball(), TRIPLES[0]
        )
        is None
    )
