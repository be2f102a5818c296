"""The emoji builder, on tiny extracts of the real packages (fixtures/README.md)."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hubgen.data import emoji
from hubgen.data.colours import COLOURS, colour_shares, colour_words
from hubgen.data.emoji import build_emoji_dataset
from hubgen.data.emoji_captions import COLOUR_WORDS, Candidate, choose_held_out, noun_phrase, wordings, words_of
from hubgen.data.errors import DataError
from hubgen.data.image_folder import ImageTextFolder

FIXTURES = Path(__file__).parent / "fixtures"
PICTURES = FIXTURES / "fluent-emoji-3d-reduced.tgz"
NAMES = FIXTURES / "emojibase-data-reduced.tgz"
NOTO_PICTURES = FIXTURES / "emoji-datasource-google-reduced.tgz"
FONT = FIXTURES / "NotoColorEmoji-reduced.ttf"
HELD_OUT = 5


def build(output: Path, **options: object) -> emoji.EmojiBuild:
    given = {"archive": PICTURES, "names_archive": NAMES, "held_out": HELD_OUT, "progress": False} | options
    return build_emoji_dataset("fluent", given.pop("size", 32), output, **given)


def rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text("utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "fluent-32"
    build(folder)
    return folder


def test_every_row_names_a_picture_of_the_size_asked_for(built: Path):
    for split in ("train", "test"):
        named = set()
        for row in rows(built, split):
            with Image.open(built / split / row["file_name"]) as picture:
                assert (picture.size, picture.mode) == ((32, 32), "RGB")
            named.add(row["file_name"])
        assert named | {"metadata.jsonl"} == {path.name for path in (built / split).iterdir()}


def test_train_and_held_out_captions_are_disjoint_and_held_out_words_occur_in_training(built: Path):
    train, test = (rows(built, split) for split in ("train", "test"))
    assert len(test) == HELD_OUT
    texts = [row["text"] for row in train + test]
    assert len(set(texts)) == len(texts)
    wordings_of_all = [wording for row in train + test for wording in row["captions"]]
    assert len(set(wordings_of_all)) == len(wordings_of_all), "no wording belongs to two pictures"
    for split in (lambda text: text.lower().split(), words_of):
        known = [word for row in train for word in set(split(row["text"]))]
        for row in test:
            assert len(row["text"].split()) >= 2
            assert all(known.count(word) >= 2 for word in split(row["text"])), row["text"]
    assert any(words_of(row["text"]) & COLOUR_WORDS for row in test)


def test_every_picture_has_three_to_five_wordings_and_the_first_is_its_text(built: Path):
    for row in rows(built, "train"):
        assert 3 <= len(row["captions"]) <= 5
        assert row["captions"][0] == row["text"]
        assert {"file_name", "text", "captions", "tags", "emoji", "hexcode", "group"} == set(row)


def test_the_background_is_white_and_outlines_are_not_darkened(built: Path):
    """Each scaled picture lies between the darkest and the brightest source pixel composited on white."""
    with Image.open(built / "train" / "white-circle-26aa.png") as picture:
        circle = np.asarray(picture)
    assert (circle[0, 0] == 255).all() and (circle[-1, -1] == 255).all()
    # Were the transparent pixels' black scaled into it, the light circle would get an outline of dark pixels.
    with tarfile.open(PICTURES) as archive:
        source = Image.open(io.BytesIO(archive.extractfile("package/assets/26aa.webp").read())).convert("RGBA")
    values = np.asarray(source).astype(float)
    composited = values[..., :3] * values[..., 3:] / 255 + 255 - values[..., 3:]
    assert circle.min() >= composited.min() - 2


def test_identical_and_retouched_pictures_are_left_out_and_reported(tmp_path: Path):
    report = build(tmp_path / "out")
    assert ("cat face", "grinning cat") in report.same_pictures
    assert ("man astronaut", "astronaut") in report.same_pictures
    assert not any("circle" in left_out or "heart" in left_out for left_out, _ in report.same_pictures)
    assert report.not_in_source == 2  # "lime" and "flag: Chad"
    assert "2 (nearly) identical pictures" in str(report)
    texts = {row["text"] for split in ("train", "test") for row in rows(tmp_path / "out", split)}
    assert {"grinning cat", "astronaut"} <= texts and not {"cat face", "man astronaut", "lime"} & texts


def test_running_twice_equals_running_once(built: Path, tmp_path: Path):
    folder = shutil.copytree(built, tmp_path / "again")
    before = contents(folder)
    report = build(folder)
    assert report.already_built and "already built" in str(report)
    assert contents(folder) == before


def test_the_same_arguments_give_the_same_files_and_another_seed_another_split(built: Path, tmp_path: Path):
    build(tmp_path / "same")
    assert contents(tmp_path / "same") == contents(built)
    build(tmp_path / "other", seed=1)
    assert {row["text"] for row in rows(tmp_path / "other", "test")} != {row["text"] for row in rows(built, "test")}


@pytest.mark.parametrize("renames", [0, 1, 20, 40, 42, 44])
def test_an_interrupted_build_run_again_equals_an_uninterrupted_one(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
):
    done = 0
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        nonlocal done
        if done == renames:
            raise KeyboardInterrupt
        done += 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out")
    assert not json.loads(contents(tmp_path / "out").get("build.json", b"{}")).get("finished")
    assert not build(tmp_path / "out").already_built
    assert contents(tmp_path / "out") == contents(built)


def test_a_killed_build_run_again_equals_an_uninterrupted_one(built: Path, tmp_path: Path):
    out = tmp_path / "out"
    code = (
        "from hubgen.data.emoji import build_emoji_dataset\n"
        f"build_emoji_dataset('fluent', 32, {str(out)!r}, archive={str(PICTURES)!r}, "
        f"names_archive={str(NAMES)!r}, held_out={HELD_OUT}, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while len(list(out.glob("train/*.png"))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    build(out)
    assert contents(out) == contents(built)


def test_a_lost_picture_is_built_again(built: Path, tmp_path: Path):
    folder = shutil.copytree(built, tmp_path / "lossy")
    (folder / "train" / "red-heart-2764.png").unlink()
    assert not build(folder).already_built
    assert contents(folder) == contents(built)


def test_a_folder_of_other_settings_is_refused_with_the_differences(built: Path):
    with pytest.raises(DataError, match=r"size 32 instead of 16"):
        build(built, size=16)
    with pytest.raises(DataError, match=r"seed 0 instead of 3"):
        build(built, seed=3)


def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds other files"):
        build(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"^`size`: got 0, expected an integer from 8 to 1024$"),
        ({"size": 64.0}, r"^`size`: got 64.0"),
        ({"held_out": -1}, r"^`held_out`: got -1"),
        ({"held_out": 40}, r"^held_out: 40 captions asked for, but only \d+ of 39"),
        ({"archive": "/nowhere/emoji.tgz"}, r"^archive: /nowhere/emoji.tgz: no such file"),
        ({"archive": FIXTURES / "README.md"}, r"README.md: not a readable package archive"),
        ({"archive": NAMES}, r"holds no pictures below package/assets/, expected an archive of @lobehub"),
        ({"names_archive": PICTURES}, r"holds no package/LICENSE, expected an archive of emojibase-data"),
        ({"font": FONT, "archive": None}, r"^`font`: got a font with style"),
    ],
)
def test_unusable_options_are_named_on_one_line(tmp_path: Path, options: dict, message: str):
    with pytest.raises(DataError, match=message) as caught:
        build(tmp_path / "out", **options)
    assert "\n" not in str(caught.value)


def test_a_truncated_archive_is_named(tmp_path: Path):
    broken = tmp_path / "broken.tgz"
    broken.write_bytes(PICTURES.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"broken.tgz: not a readable package archive"):
        build(tmp_path / "out", archive=broken)


def test_an_unknown_style_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="`style`: got 'apple', expected one of fluent, noto"):
        build_emoji_dataset("apple", 32, tmp_path / "out")


def test_the_licences_of_pictures_and_names_lie_beside_the_data(built: Path):
    licence = (built / "LICENSE").read_text("utf-8")
    assert "Microsoft Corporation" in licence and "Miles Johnson" in licence
    assert licence.count("Permission is hereby granted, free of charge") == 2
    assert "license: mit" in (built / "README.md").read_text("utf-8")


def test_datasets_imagefolder_loads_both_splits(built: Path, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(built), cache_dir=str(tmp_path))
    assert {split: len(loaded[split]) for split in loaded} == {
        split: len(rows(built, split)) for split in ("train", "test")
    }
    row = loaded["test"][0]
    assert row["image"].size == (32, 32) and row["captions"][0] == row["text"] == rows(built, "test")[0]["text"]


def test_the_trainers_data_set_reads_the_folder(built: Path):
    held_out = ImageTextFolder(built, split="held_out", size=32)
    assert held_out.texts == [row["text"] for row in rows(built, "test")]
    assert held_out[0]["pixel_values"].shape == (3, 32, 32)


def test_noto_pictures_come_from_its_package(tmp_path: Path):
    report = build_emoji_dataset(
        "noto", 64, tmp_path, archive=NOTO_PICTURES, names_archive=NAMES, held_out=1, progress=False
    )
    assert (report.train, report.held_out) == (9, 1)
    assert "Apache License" in (tmp_path / "LICENSE").read_text("utf-8")
    assert "a flat icon of grapes" in [wording for row in rows(tmp_path, "train") for wording in row["captions"]]


def test_noto_pictures_are_drawn_from_a_font(tmp_path: Path):
    report = build_emoji_dataset("noto", 96, tmp_path, font=FONT, names_archive=NAMES, held_out=0, progress=False)
    texts = {row["text"] for row in rows(tmp_path, "train")}
    assert {"grinning face", "grapes", "red heart", "blue heart", "red circle"} <= texts
    assert report.held_out == 0 and not (tmp_path / "test").exists()
    with Image.open(tmp_path / "train" / "red-circle-1f534.png") as picture:
        red, green, blue = picture.getpixel((48, 48))
        assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert red > 150 and green < 100 and blue < 100
    assert "SIL OPEN FONT LICENSE" in (tmp_path / "LICENSE").read_text("utf-8")


def test_a_debian_package_of_the_font_draws_what_the_font_draws(tmp_path: Path):
    """`ar` archive as dpkg writes it: 60-byte headers, members padded to even length."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        tar.add(FONT, arcname="./usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    package = b"!<arch>\n"
    for name, content in members.items():
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        package += b"\n" * (len(content) % 2)
    (tmp_path / "fonts.deb").write_bytes(package)
    options = {"names_archive": NAMES, "held_out": 0, "progress": False}
    build_emoji_dataset("noto", 64, tmp_path / "deb", font=tmp_path / "fonts.deb", **options)
    build_emoji_dataset("noto", 64, tmp_path / "ttf", font=FONT, **options)
    assert contents(tmp_path / "deb" / "train") == contents(tmp_path / "ttf" / "train")


def test_a_file_that_is_no_emoji_font_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"--font: .*README.md: not a font"):
        build_emoji_dataset("noto", 64, tmp_path, font=FIXTURES / "README.md", names_archive=NAMES, progress=False)


def test_noto_above_the_package_size_asks_for_the_font(tmp_path: Path):
    with pytest.raises(DataError, match=r"`size`: got 128, expected at most 64, .*--font"):
        build_emoji_dataset("noto", 128, tmp_path)


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("blue heart", "a blue heart"),
        ("orange book", "an orange book"),
        ("one o'clock", "one o'clock"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass done", "an hourglass done"),
        ("grapes", "grapes"),
        ("glass of milk", "a glass of milk"),
        ("money with wings", "money with wings"),
        ("Pisces", "Pisces"),
        ("flag: Chad", "the flag of Chad"),
        ("man: red hair", "a man with red hair"),
        ("woman: bald", "a bald woman"),
        ("family: man, woman, boy", "a family of man, woman and boy"),
        ("keycap: 7", "a key with 7 on it"),
    ],
)
def test_labels_read_as_english_noun_phrases(label: str, phrase: str):
    assert noun_phrase(label) == phrase


def test_tags_that_repeat_the_label_or_are_slang_are_no_wording():
    assert wordings("grinning face", ["face", "grin", "lol", ":)", "happy", "smile"], "3D icon")[-1] == (
        "grinning face, happy, smile"
    )


def test_no_word_loses_more_than_a_third_of_its_captions():
    colours, shapes = (
        sorted(COLOUR_WORDS),
        ("heart", "circle", "square", "book", "flag", "diamond", "star", "moon", "fish"),
    )
    candidates = [Candidate(f"{colour} {shape}", shape, True) for colour in colours for shape in shapes]
    chosen = {candidates[index].text for index in choose_held_out(candidates, 20, seed=0)}
    for word in (*colours, *shapes):
        containing = [candidate.text for candidate in candidates if word in candidate.text.split()]
        assert len(chosen & set(containing)) <= len(containing) // 3


def test_flags_keys_and_pictures_with_a_twin_are_never_held_out():
    candidates = [Candidate(f"flag: {name} Island", "country-flag", True) for name in "ABCDEFGHI"]
    candidates += [Candidate(f"big {name} cat", "animal-mammal", False) for name in ("old", "old", "old", "old")]
    assert choose_held_out(candidates, 0, seed=0) == []
    with pytest.raises(DataError, match="only 0 of 13 can be held out"):
        choose_held_out(candidates, 1, seed=0)


# ---- variants ----

ANIMATED = FIXTURES / "fluent-emoji-anim-1-reduced.tgz"
FLAT = FIXTURES / "fluent-emoji-flat-reduced.tgz"
ALL = ("mirrored", "recoloured", "frame", "flat")


def package(path: Path, name: str, files: dict[str, bytes] | None = None) -> Path:
    """An npm package."""
    content = {"package/package.json": json.dumps({"name": name}).encode(), **(files or {})}
    with tarfile.open(path, "w:gz") as archive:
        for member, one in content.items():
            header = tarfile.TarInfo(member)
            header.size = len(one)
            archive.addfile(header, io.BytesIO(one))
    return path


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("archives")
    empty = [package(folder / f"{n}.tgz", f"@lobehub/fluent-emoji-anim-{n}") for n in (2, 3, 4)]
    return [ANIMATED, *empty, FLAT]


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory, archives: list[Path]) -> Path:
    pytest.importorskip("resvg_py")
    folder = tmp_path_factory.mktemp("varied") / "fluent-32"
    report = build(folder, variants=ALL, more_archives=archives, validation=2)
    assert report.variants == {kind: len(of_kind(folder, kind)) for kind in ALL} and all(report.variants.values())
    assert "pictures for validation" in str(report) and "of the training pictures are flat" in str(report)
    return folder


def of_kind(folder: Path, kind: str, split: str = "train") -> list[dict]:
    return [row for row in rows(folder, split) if row["variant"] == kind]


def pixels(folder: Path, row: dict, split: str = "train") -> np.ndarray:
    with Image.open(folder / split / row["file_name"]) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")
        return np.asarray(picture).astype(float)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2)))


def test_no_variant_is_of_an_emoji_that_is_held_out_or_says_its_words(varied: Path, built: Path):
    assert [row["text"] for row in of_kind(varied, "", "test")] == [row["text"] for row in rows(built, "test")]
    held = [row for split in ("validation", "test") for row in of_kind(varied, "", split)]
    codes, said = ({row["hexcode"] for row in held}, {one.lower() for row in held for one in row["captions"]})
    assert len(held) == HELD_OUT + 2
    train = rows(varied, "train")
    assert not codes & {row["hexcode"] for row in train}
    assert not said & {one.lower() for row in train for one in row["captions"]}
    far = {
        row["hexcode"]: pixels(varied, row, split)
        for split in ("validation", "test")
        for row in of_kind(varied, "", split)
    }
    for row in train:
        if row["variant"]:
            assert min(apart(pixels(varied, row), one) for one in far.values()) > 4, row["file_name"]


def test_combinations_of_colour_and_thing_that_are_held_out_are_never_trained_on(varied: Path):
    held = [row for split in ("validation", "test") for row in of_kind(varied, "recoloured", split)]
    train = of_kind(varied, "recoloured")
    assert held and not {row["text"] for row in held} & {row["text"] for row in rows(varied, "train")}
    for row in held:
        assert sum(one["hexcode"] == row["hexcode"] for one in train) >= 3
        assert any(one["colour"] == row["colour"] for one in train)


def test_a_recoloured_picture_shows_the_colour_that_its_caption_names(varied: Path):
    labels = {row["text"] for split in ("train", "validation", "test") for row in of_kind(varied, "", split)}
    found = of_kind(varied, "recoloured")
    for row in found:
        assert row["text"].split()[0] == row["colour"] and row["captions"][0] == row["text"]
        assert row["text"] not in labels and colour_words(row["text"]) == [row["colour"]]
        values = torch.from_numpy(pixels(varied, row)).permute(2, 0, 1)[None].float() / 127.5 - 1
        assert colour_shares(values)[0, COLOURS.index(row["colour"])] >= 0.25
    assert any(row["text"].endswith(" dog") for row in found)
    assert not any("flag" in row["text"] or "keycap" in row["text"] for row in found)


def test_mirrored_pictures_are_of_things_without_a_direction(varied: Path):
    original = {row["hexcode"]: row for row in of_kind(varied, "")}
    for row in of_kind(varied, "mirrored"):
        assert np.array_equal(pixels(varied, row)[:, ::-1], pixels(varied, original[row["hexcode"]]))
        assert row["captions"] == original[row["hexcode"]]["captions"]
    texts = {row["text"] for row in of_kind(varied, "mirrored")}
    assert "dog" in texts and not texts & {"flag: Romania", "keycap: 1", "three o'clock"}


def test_frames_are_far_from_each_other_and_flat_pictures_say_so(varied: Path):
    original = {row["hexcode"]: row for row in of_kind(varied, "")}
    by_emoji: dict[str, list[np.ndarray]] = {}
    for row in of_kind(varied, "frame"):
        by_emoji.setdefault(row["text"], [pixels(varied, original[row["hexcode"]])]).append(pixels(varied, row))
    assert by_emoji and "grapes" not in by_emoji
    for some in by_emoji.values():
        assert len(some) <= 5 and min(apart(a, b) for n, a in enumerate(some) for b in some[:n]) >= 11
    for row in of_kind(varied, "flat"):
        assert row["text"].startswith("flat ") and all("flat" in one for one in row["captions"])
    assert "flat grapes" in {row["text"] for row in of_kind(varied, "flat")} | {
        f"flat {row['text']}" for split in ("validation", "test") for row in of_kind(varied, "", split)
    }


def test_the_card_counts_the_variants_and_says_how_they_are_made(varied: Path):
    card = (varied / "README.md").read_text("utf-8")
    for kind in ALL:
        assert f"- {len(of_kind(varied, kind))} {kind}: " in card
    assert "`validation` has " in card
    assert "@lobehub/fluent-emoji-anim-3" in (varied / "LICENSE").read_text("utf-8")


def test_a_build_with_variants_is_the_same_again(varied: Path, archives: list[Path], tmp_path: Path):
    options = {"variants": ALL, "more_archives": archives, "validation": 2}
    build(tmp_path / "again", **options)
    assert contents(tmp_path / "again") == contents(varied)
    assert build(tmp_path / "again", **options).already_built
    with pytest.raises(DataError, match="was built with packages_sha512"):
        build(tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["blurred"]}, "`variants`: got blurred, expected some of mirrored, recoloured, frame, flat"),
        ({"variants": ["flat", "flat"]}, "`variants`: got flat, flat, expected some of .*, each once"),
        ({"variants": ["flat"], "more_archives": ["no.tgz"]}, "more_archives: no.tgz: no such file"),
        ({"variants": ["flat"], "more_archives": [NAMES]}, "got emojibase-data, expected @lobehub/fluent-emoji-flat"),
        ({"more_archives": [FLAT]}, "got @lobehub/fluent-emoji-flat, expected none, for these variants"),
        ({"validation": -1}, "`validation`: got -1, expected an integer from 0"),
    ],
)
def test_variants_that_cannot_be_are_named_on_one_line(tmp_path: Path, options: dict, message: str):
    with pytest.raises(DataError, match=message) as caught:
        build(tmp_path / "out", **options)
    assert "\n" not in str(caught.value)


def test_damaged_pictures_of_variants_are_named(tmp_path: Path):
    broken = {"package/assets/1f347.svg": b"<svg"}
    archive = package(tmp_path / "flat.tgz", "@lobehub/fluent-emoji-flat", broken)
    with pytest.raises(DataError, match=r"flat.tgz: package/assets/1f347.svg: not readable as SVG"):
        build(tmp_path / "out", variants=["flat"], more_archives=[archive], held_out=0)


def test_other_styles_have_no_animations(tmp_path: Path):
    with pytest.raises(DataError, match="`variants`: got frame with style 'noto', expected mirrored or recoloured"):
        build_emoji_dataset("noto", 64, tmp_path, archive=NOTO_PICTURES, names_archive=NAMES, variants=["frame"])
