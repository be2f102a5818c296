"""The `hubgen` command does what its manual page says, and answers mistakes in one line."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hubgen.cli import is_expected, main
from hubgen.cli.demo import in_options
from hubgen.cli.generate import default_out
from hubgen.hub.provenance import Request, read_request, write_picture

REQUEST = Request(
    prompts=["a red apple"],
    negative_prompt=None,
    n=1,
    num_inference_steps=2,
    guidance_scale=3.0,
    seed=1,
    width=16,
    height=16,
    model="bundled",
    revision=None,
    device="cpu",
    dtype="float32",
    batch_size=8,
)


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def hubgen(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs the command in an empty folder, on the CPU."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# ---------------------------------------------------------------------------------------------------------------------
# The manual page


PAGES = ("", "generate", "train", "train lora", "train dreambooth", "inspect", "convert", "convert lora", "data")


@pytest.mark.parametrize("page", [*PAGES, "data emoji"])
def test_every_page_of_the_manual_opens(hubgen: Callable[..., Result], page: str) -> None:
    result = hubgen(*page.split(), "--help")
    assert result.status == 0
    assert result.out.startswith("usage: hubgen") and result.err == ""


def test_the_manual_tells_options_examples_and_exit_status(hubgen: Callable[..., Result]) -> None:
    page = hubgen("generate", "--help").out
    options = "--out --from --model --revision --negative-prompt --num-inference-steps --guidance-scale --seed --size"
    for word in [*options.split(), "-n", "--device", "--dtype", "--batch-size", "--lora", "examples:", "exit status:"]:
        assert word in page
    top = hubgen("--help").out
    assert "environment:" in top
    assert all(f"    {name} " in top for name in PAGES if name and " " not in name)
    for name in ("train lora", "train dreambooth", "inspect", "convert lora"):
        page = hubgen(*name.split(), "--help").out
        assert "examples:" in page and f"hubgen {name} " in page and "exit status:" in page


def test_the_version_is_the_packages(hubgen: Callable[..., Result]) -> None:
    from importlib.metadata import version

    assert hubgen("--version") == (0, f"hubgen {version('hubgen')}\n", "")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_a_prompt_becomes_a_picture_with_its_settings(hubgen: Callable[..., Result], tiny_model: Path) -> None:
    result = hubgen(
        *("generate", "a red apple", "--model", tiny_model, "--out", "apple.png", "--seed", 5, "--device", "cpu"),
        *("--num-inference-steps", 2, "--guidance-scale", 2.5, "--negative-prompt", "blue"),
    )
    assert result.status == 0, result.err
    assert "loading" in result.err and "sampling" in result.err
    assert result.out.startswith("wrote apple.png (1 picture of 16x16, seed 5")
    picture = Image.open("apple.png")
    assert (picture.size, picture.mode) == ((16, 16), "RGB")
    request, made_with = read_request(Path("apple.png"))
    assert request == replace(
        REQUEST, seed=5, guidance_scale=2.5, negative_prompt="blue", model=str(tiny_model), dtype="float32"
    )
    assert made_with.keys() == {"hubgen", "torch", "diffusers", "transformers"}
    assert list(Path().iterdir()) == [Path("apple.png")], "something was left behind"


def test_from_repeats_a_picture_exactly(hubgen: Callable[..., Result], tiny_model: Path) -> None:
    """The seed is drawn in the first run, so it can only come from the file."""
    first = hubgen(
        *("generate", "a red apple", "ein lächelndes 猫 😀", "-n", 2, "--model", tiny_model, "--out", "first.png"),
        *("--num-inference-steps", 3, "--guidance-scale", 4, "--size", "16x8", "--batch-size", 3),
    )
    assert first.status == 0, first.err
    second = hubgen("generate", "--from", "first.png")
    assert second.status == 0, second.err
    assert "wrote first-2.png" in second.out
    np.testing.assert_array_equal(pixels("first.png"), pixels("first-2.png"))
    assert read_request(Path("first.png")) == read_request(Path("first-2.png"))
    assert read_request(Path("first.png"))[0].prompts[1] == "ein lächelndes 猫 😀"


def test_options_beside_from_override_what_the_file_says(hubgen: Callable[..., Result], tiny_model: Path) -> None:
    options = ("--model", tiny_model, "--num-inference-steps", 2, "--seed", 1)
    hubgen("generate", "a red apple", *options, "--out", "red.png")
    assert hubgen("generate", "a blue cat", "--from", "red.png", "--seed", 9, "--out", "blue.png").status == 0
    red, blue = (read_request(Path(name))[0] for name in ("red.png", "blue.png"))
    assert blue == replace(red, prompts=["a blue cat"], seed=9)
    assert (pixels("red.png") != pixels("blue.png")).any()


def test_each_cell_of_a_grid_can_be_made_alone(hubgen: Callable[..., Result], tiny_model: Path) -> None:
    """Rows are prompts, columns are seeds. Batches of other sizes round differently: at most one step of 255."""
    options = ("--model", tiny_model, "--num-inference-steps", 2)
    prompts = ("a red apple", "a smiling cat")
    assert hubgen("generate", *prompts, "-n", 3, "--seed", 5, *options, "--out", "grid.png").status == 0
    grid = pixels("grid.png")
    assert grid.shape == (2 * 16, 3 * 16, 3)
    for row, prompt in enumerate(prompts):
        for column in (0, 2):
            assert hubgen("generate", prompt, "--seed", 5 + column, *options, "--out", "one.png").status == 0
            cell = grid[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            assert np.abs(cell - pixels("one.png")).max() <= 1


@pytest.mark.parametrize(("prompts", "n", "shape"), [(1, 4, (2, 2)), (3, 1, (2, 2)), (5, 1, (2, 3)), (1, 2, (1, 2))])
def test_one_row_or_column_is_laid_out_as_a_square(
    hubgen: Callable[..., Result], tiny_model: Path, prompts: int, n: int, shape: tuple[int, int]
) -> None:
    words = ["a red apple"] * prompts
    assert hubgen("generate", *words, "-n", n, "--model", tiny_model, "--num-inference-steps", 1, "--out", "g.png")
    assert Image.open("g.png").size == (shape[1] * 16, shape[0] * 16)


def test_without_out_the_file_is_named_after_the_prompt_and_nothing_is_overwritten(
    hubgen: Callable[..., Result], tiny_model: Path
) -> None:
    for name in ("a-red-apple.png", "a-red-apple-2.png"):
        result = hubgen("generate", "A red apple!", "--model", tiny_model, "--num-inference-steps", 1)
        assert f"wrote {name}" in result.out
    assert default_out("../../猫 & dog", None) == Path("猫-dog.png")
    assert default_out("?!", None) == Path("picture.png")


def test_other_formats_say_that_they_cannot_be_repeated(hubgen: Callable[..., Result], tiny_model: Path) -> None:
    result = hubgen("generate", "a cat", "--model", tiny_model, "--num-inference-steps", 1, "--out", "cat.jpg")
    assert result.status == 0 and "cannot" not in result.out
    assert ".jpg files carry no settings" in result.err
    assert Image.open("cat.jpg").format == "JPEG"


def test_a_prompt_longer_than_the_model_reads_is_told_once(hubgen: Callable[..., Result], tiny_model: Path) -> None:
    words = "a red cat a green cat a blue cat"
    result = hubgen(
        "generate",
        words,
        "-n",
        3,
        "--batch-size",
        1,
        "--model",
        tiny_model,
        "--num-inference-steps",
        1,
        "--out",
        "c.png",
    )
    assert result.status == 0
    assert result.err.count("hubgen: warning:") == 1 and "blue cat" in result.err


def test_a_picture_made_with_other_versions_is_repeated_with_a_remark(
    hubgen: Callable[..., Result], tiny_model: Path
) -> None:
    request = replace(REQUEST, model=str(tiny_model))
    write_chunk(Path("old.png"), json.dumps({"versions": {"hubgen": "0.0.1"}, "request": vars(request)}))
    result = hubgen("generate", "--from", "old.png", "--out", "new.png")
    assert result.status == 0
    assert "old.png was made with hubgen 0.0.1; here: hubgen" in result.err


def test_the_bundled_model_draws_without_a_network(tmp_path: Path) -> None:
    """In a process of its own, where opening any connection is an error."""
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from hubgen.cli import main\n"
        "sys.exit(main(['generate', 'a smiling cat', '--seed', '1', '--out', 'cat.png']))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["HF_HOME"] = str(tmp_path / "empty-cache")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "loading the bundled model" in run.stderr
    assert Image.open(tmp_path / "cat.png").size == (64, 64)
    assert pixels(tmp_path / "cat.png").std() > 20, "a picture of nothing"
    request, _ = read_request(tmp_path / "cat.png")
    assert (request.model, request.seed, request.prompts) == ("bundled", 1, ["a smiling cat"])


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: exit status 2, one line that says what was found and what was expected, nothing written


def refused(result: Result) -> str:
    """The one line of a refusal."""
    lines = [line for line in result.err.splitlines() if not line.startswith(("loading", "loaded"))]
    assert result.status == 2, result
    assert result.out == "" and len(lines) == 1 and lines[0].startswith("hubgen: error: "), result
    assert list(Path().glob(".tmp-*")) == []
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["draw"], "invalid choice: 'draw'"),
        (["generate"], "no prompt"),
        (["generate", " "], "prompt 1 of 1 is empty"),
        (["generate", "a", ""], "prompt 2 of 2 is empty"),
        (["generate", "\udcff"], "not valid UTF-8"),
        (["generate", "a", "--num-inference-steps", "-3"], "--num-inference-steps: got '-3', expected a whole number"),
        (["generate", "a", "--num-inference-steps", "1.5"], "got '1.5'"),
        (["generate", "a", "-n", "0"], "got '0'"),
        (["generate", "a", "-n", "9" * 25], "from 1 to 10000"),
        (["generate", "a", "--size", "0"], "--size: got '0', expected N or WIDTHxHEIGHT"),
        (["generate", "a", "--size", "64x"], "got '64x'"),
        (["generate", "a", "--size", "800000"], "got '800000'"),
        (["generate", "a", "--seed", "-1"], "--seed: got '-1', expected a whole number from 0"),
        (["generate", "a", "--seed", str(2**63)], "2^63 - 1"),
        (["generate", "a", "--guidance-scale", "nan"], "got 'nan', expected a finite number"),
        (["generate", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", "a", "--steps", "3"], "unrecognized arguments: --steps"),
        (["generate", "a", "--out", "cat.txt"], "--out cat.txt: got '.txt', expected a file name ending in .png"),
        (["generate", "a", "--out", "cat"], "got ''"),
        (["generate", "a", "--out", "no/cat.png"], "the folder no does not exist"),
        (["generate", "a", "--out", "."], "is a folder"),
        (["generate", "a", "--model", "nowhere"], "--model nowhere: no such folder"),
        (["generate", "a", "--model", "./no/such"], "--model ./no/such: no such folder"),
        (["generate", "a", "--model", "."], "--model .: not a pipeline folder, it holds no model_index.json"),
        (["generate", "a", "--model", __file__], "is a file, expected a pipeline folder"),
        (["generate", "--from", "cat.png"], "cat.png: No such file or directory"),
        (["generate", "--from", __file__], "not a picture"),
        (["data", "emoji"], "required: --out"),
        (["data", "emoji", "--out", "d", "--style", "apple"], "invalid choice: 'apple'"),
        (["data", "emoji", "--out", "d", "--size", "0"], "--size: got '0', expected a whole number"),
        (["data", "emoji", "--out", "d", "--archive", "no.tgz"], "--archive no.tgz: no such file"),
    ],
)
def test_a_mistake_is_told_in_one_line(hubgen: Callable[..., Result], arguments: list[str], words: str) -> None:
    assert words in refused(hubgen(*arguments))
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "17"], "17"),
        (["--size", "4096"], "4096"),
        (["--device", "toaster"], "--device toaster"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "meta"], "--device meta"),
        (["--revision", "main"], "--revision main"),
        (["--seed", str(2**63 - 1), "-n", "2"], "--seed"),
    ],
)
def test_what_a_model_cannot_do_is_told_in_one_line(
    hubgen: Callable[..., Result], tiny_model: Path, arguments: list[str], words: str
) -> None:
    result = hubgen(
        "generate", "a cat", "--model", tiny_model, "--num-inference-steps", 1, "--out", "c.png", *arguments
    )
    assert words in refused(result)
    assert not Path("c.png").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model_index.json").write_text("{"),
        lambda folder: (folder / "model_index.json").write_text("[]"),
        lambda folder: shutil.rmtree(folder / "transformer"),
        lambda folder: (folder / "vae" / "config.json").unlink(),
        lambda folder: next((folder / "vae").glob("*.safetensors")).write_bytes(b"\0" * 100),
        lambda folder: os.truncate(next((folder / "transformer").glob("*.safetensors")), 2000),
    ],
    ids=["broken index", "no index", "a component missing", "a config missing", "zeros for weights", "cut weights"],
)
def test_a_damaged_model_is_told_in_one_line(
    hubgen: Callable[..., Result], tiny_model: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    assert "--model damaged: " in refused(hubgen("generate", "a", "--model", "damaged", "--out", "a.png"))


def write_chunk(path: Path, text: str) -> None:
    chunks = PngInfo()
    chunks.add_itxt("hubgen", text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=chunks)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"request": {}, "versions": {}}', "lack"),
        ("[" * 100_000, "damaged"),
        (json.dumps({"request": {**vars(REQUEST), "speed": 1}, "versions": {}}), "an unknown speed"),
        *(
            (json.dumps({"request": {**vars(REQUEST), name: value}, "versions": {}}), f"a bad {name}")
            for name, value in {
                "prompts": "a cat",
                "n": True,
                "seed": -1,
                "width": 10**9,
                "guidance_scale": float("inf"),
                "dtype": "int8",
                "num_inference_steps": 2.5,
                "model": None,
            }.items()
        ),
    ],
    ids=lambda value: None if len(value) > 20 else value,
)
def test_damaged_settings_in_a_picture_are_told_in_one_line(
    hubgen: Callable[..., Result], text: str, words: str
) -> None:
    write_chunk(Path("cat.png"), text)
    line = refused(hubgen("generate", "--from", "cat.png", "--out", "new.png"))
    assert "cat.png: its settings" in line and words in line


def test_the_picture_that_a_repeated_one_began_with_is_named_where_it_is_missing(hubgen: Callable[..., Result]) -> None:
    Image.new("RGB", (64, 64), "red").save("start.png")
    steps = ("--num-inference-steps", "2", "--strength", "0.5")
    assert hubgen("generate", "a cat", "--image", "start.png", *steps, "--out", "cat.png").status == 0
    Path("start.png").unlink()
    line = refused(hubgen("generate", "--from", "cat.png"))
    assert "--from cat.png: its --image start.png: No such file or directory, expected a picture" in line


def test_words_without_quotes_get_a_hint(hubgen: Callable[..., Result]) -> None:
    few = ("--num-inference-steps", "1", "--out", "x.png")
    hint = 'one picture, quote them: "a smiling cat"'
    assert hint in hubgen("generate", "a", "smiling", "cat", *few).err
    assert "quote them" not in hubgen("generate", "a cat", "a dog", "a fox", *few).err


@pytest.mark.parametrize("place", ["file.png", "/proc/nowhere"])
def test_where_data_cannot_be_written_is_said_of_out_before_any_download(
    hubgen: Callable[..., Result], place: str
) -> None:
    Path("file.png").write_bytes(b"")
    assert f"--out {place}: " in refused(hubgen("data", "emoji", "--out", place))


def test_a_folder_of_other_files_is_not_built_into(hubgen: Callable[..., Result]) -> None:
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("dear diary")
    assert "--out mine holds other files" in refused(hubgen("data", "emoji", "--out", "mine"))


def test_a_picture_of_another_program_cannot_be_repeated(hubgen: Callable[..., Result]) -> None:
    Image.new("RGB", (2, 2)).save("other.png")
    assert "other.png: carries no settings of hubgen" in refused(hubgen("generate", "--from", "other.png"))


def test_a_full_disk_keeps_the_old_picture(tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    write_picture(out, Image.new("RGB", (8, 8), "red"), REQUEST)
    before = out.read_bytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the limit is an error, as a full disk is
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError):
            write_picture(out, noise, REQUEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_an_interruption_leaves_nothing_and_exits_with_130(tmp_path: Path, tiny_model: Path) -> None:
    command = [sys.executable, "-m", "hubgen.cli", "generate", "a cat", "--model", str(tiny_model), "-n", "10000"]
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore it
    with subprocess.Popen(
        [*command, "--out", "cat.png"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=listening
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if "sampling" in line or "loaded" in line:
                break
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read()
        assert run.wait() == 130
    assert "hubgen: interrupted" in rest and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_faults_of_the_program_keep_their_traceback() -> None:
    assert not is_expected(KeyError("a fault"))
    assert not is_expected(RuntimeError("a fault"))
    assert is_expected(ValueError("bad input"))
    assert is_expected(FileNotFoundError("a file"))


def test_every_error_keeps_its_traceback_on_request(
    hubgen: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBGEN_DEBUG", "1")
    with pytest.raises(ValueError, match="no such folder"):
        hubgen("generate", "a", "--model", "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Every kind of model, and pictures to start from


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux-dev"])
def test_an_official_folder_draws_a_prompt(
    hubgen: Callable[..., Result], official: Callable[[str], Path], name: str
) -> None:
    result = hubgen("generate", "a cat", "--model", official(name), *FEW, "--size", 32, "--out", "cat.png")
    assert result.status == 0, result.err
    request, _ = read_request(Path("cat.png"))
    assert (request.width, request.height) == Image.open("cat.png").size == (32, 32)
    assert hubgen("generate", "--from", "cat.png", "--out", "again.png").status == 0
    assert (pixels("again.png") == pixels("cat.png")).all()


FEW = ("--num-inference-steps", 2, "--seed", 1)


def test_a_class_is_drawn_by_its_name_or_number(hubgen: Callable[..., Result], official: Callable[[str], Path]) -> None:
    folder = Path(shutil.copytree(official("dit"), "dit"))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"3": "tench, Tinca tinca"}}))
    for word, out in (("3", "number.png"), ("tench", "name.png")):
        result = hubgen("generate", word, "--model", folder, *FEW, "--out", out)
        assert result.status == 0, result.err
    assert (pixels("number.png") == pixels("name.png")).all()


def test_a_model_without_prompts_draws_a_grid(hubgen: Callable[..., Result], official: Callable[[str], Path]) -> None:
    result = hubgen("generate", "--model", official("ddpm"), *FEW, "-n", 4, "--out", "samples.png")
    assert result.status == 0, result.err
    request, _ = read_request(Path("samples.png"))
    assert request.prompts == [] and request.width is not None
    assert Image.open("samples.png").size == (2 * request.width, 2 * request.width)


def test_a_single_file_draws_with_what_a_folder_adds(
    hubgen: Callable[..., Result], official: Callable[[str], Path]
) -> None:
    from hubgen import TextToImagePipeline

    folder = official("sd1")
    TextToImagePipeline.from_pretrained(folder).save_single_file("model.safetensors")
    for model, out in ((("model.safetensors", "--config", folder), "file.png"), ((folder,), "folder.png")):
        result = hubgen("generate", "a cat", "--model", *model, *FEW, "--size", 32, "--out", out)
        assert result.status == 0, result.err
    assert np.abs(pixels("file.png") - pixels("folder.png")).max() <= 1


def test_a_picture_is_drawn_over_and_inside_a_mask(
    hubgen: Callable[..., Result], official: Callable[[str], Path]
) -> None:
    start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    start.save("start.png")
    Image.new("L", (32, 32), 255).save("mask.png")
    arguments = ("generate", "a cat", "--model", official("sd1"), *FEW, "--image", "start.png")
    assert hubgen(*arguments, "--out", "over.png").status == 0
    assert hubgen(*arguments, "--mask", "mask.png", "--strength", 1, "--out", "inside.png").status == 0
    assert (pixels("over.png") != pixels("inside.png")).any()
    assert hubgen("generate", "--from", "inside.png", "--out", "again.png").status == 0
    assert (pixels("again.png") == pixels("inside.png")).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a cat", "--mask", "mask.png"), "comes with --image"),
        (("a cat", "--image", "none.png"), "none.png: No such file"),
        (("a cat", "--image", "text.png"), "--image text.png: got 10 bytes that begin with"),
        (("a cat", "--image", "start.png", "--max-pixels", "1000"), "got 32x32 pixels, expected at most 1000"),
        (("a cat", "--size", "72"), "--size 72x72: `height`: got 72, expected at most 64, the largest"),
        (("a cat", "--steps", "3"), "the nearest option is --num-inference-steps (see `hubgen generate --help`)"),
        (("a cat", "--imge=x"), "the nearest option is --image (see `hubgen generate --help`)"),
        (("a cat", "--image", "start.png", "--strength", "-0.5"), "expected a number above 0 and at most 1"),
        (("a cat", "--config", "somewhere"), "for single .safetensors files"),
        (("a cat", "--model", "text.safetensors", "--config", "."), "text.safetensors"),
    ],
)
def test_a_bad_picture_or_file_is_told_in_one_line(
    hubgen: Callable[..., Result], arguments: tuple[str, ...], words: str
) -> None:
    Image.new("RGB", (32, 32)).save("start.png")
    Image.new("L", (16, 32)).save("small.png")
    Image.new("L", (32, 32)).save("mask.png")
    for name in ("text.png", "text.safetensors"):
        Path(name).write_text("no picture")
    result = hubgen("generate", *arguments, "--out", "out.png")
    assert result.status == 2 and words in result.err, result.err
    assert not Path("out.png").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("ddpm", ("a cat",), "draws without prompts"),
        ("ddpm", ("--guidance-scale", "2"), "--guidance-scale"),
        ("dit", (), "no prompt: name a class"),
        ("dit", ("1", "--negative-prompt", "a dog"), "does not take it"),
        ("dit", ("no such class",), "no such class"),
    ],
)
def test_what_a_kind_of_model_does_not_take_is_told(
    hubgen: Callable[..., Result], official: Callable[[str], Path], name: str, arguments: tuple[str, ...], words: str
) -> None:
    Image.new("RGB", (32, 32)).save("start.png")
    result = hubgen("generate", *arguments, "--model", official(name), "--out", "out.png")
    assert result.status == 2 and words in result.err, result.err


def test_what_is_wrong_with_the_settings_of_a_page_is_told_of_the_option_that_gave_them() -> None:
    names = ("MODEL", "SECOND_MODEL", "DEVICE")
    assert in_options("HUBGEN_SECOND_MODEL a/b: not found", names) == "--second-model a/b: not found"
    for text in ("HUBGEN_LIMIT_STEPS: got 'x'", "DEVICE x", "port 1: taken"):
        assert in_options(text, names) == text
