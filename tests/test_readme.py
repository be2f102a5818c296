"""What the README says is true: its commands and snippets run, its links lead somewhere."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from hubgen.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

BLOCKS = re.findall(r"(?:<!-- (?P<mark>.+?) -->\n)?^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
SNIPPETS = [text for _, language, text in BLOCKS if language == "python"]
# Marked blocks install the package; .ci/run runs those two, in a clean virtual environment.
MARKED = {mark: text for mark, _, text in BLOCKS if mark}
COMMANDS = [line for mark, language, text in BLOCKS if language == "bash" and not mark for line in text.splitlines()]
TRAINING = [text.splitlines() for _, language, text in BLOCKS if language == "bash" and "accelerate launch" in text]
"""The blocks that train: models from scratch, and an adapter"""

ON_THE_HUB = '"stable-diffusion-v1-5/stable-diffusion-v1-5", variant="fp16"'

# Enough to go through the whole of each script. The README's own commands train for hours.
SMALL = {
    "hubgen.training.train_autoencoder": "--run.max_train_steps 2 --run.batch_size 4",
    "hubgen.training.train_text_to_image": "--run.max_train_steps 2 --run.batch_size 4",
    "hubgen.training.train_lora": "--run.max_train_steps 2 --run.batch_size 4 --validation.inference_steps 2",
}


def test_every_block_is_one_that_a_test_runs() -> None:
    assert {language for _, language, _ in BLOCKS} == {"bash", "python"}
    assert list(MARKED) == ["first command", "test command"]
    for line in COMMANDS:
        assert line.startswith(("hubgen ", "accelerate launch -m hubgen.training.")), line


def test_the_continuous_integration_runs_the_first_two_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for mark, text in MARKED.items():
        assert f'readme_block "{mark}"' in script
        assert len(text.splitlines()) == 1, "one command, as promised"
    assert "hubgen generate" in MARKED["first command"]
    assert "pytest" in MARKED["test command"]


def test_the_tables_are_those_of_the_stored_results() -> None:
    from tests.readme_tables import written

    assert written() == README


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)|src=\"(?!https?:)([^\"]+)\"", README)
    missing = [link for pair in links for link in pair if link and not (ROOT / link).exists()]
    assert missing == []


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"snippet {number}" for number in range(1, len(SNIPPETS) + 1)])
def test_every_snippet_runs(
    snippet: str, official: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of a model on the Hub, a tiny one of its layout."""
    monkeypatch.chdir(tmp_path)
    if "IPAdapter" in snippet:
        snippet = with_tiny_controls(snippet, official("sd1"))
    snippet = snippet.replace(ON_THE_HUB, repr(str(official("sd1"))))
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def with_tiny_controls(snippet: str, folder: Path) -> str:
    """A snippet whose ControlNet, image encoder and IP-Adapter are tiny ones, saved here."""
    import hubgen

    unet = hubgen.UNet2DConditionModel.from_pretrained(folder / "unet")
    hubgen.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8)).save_pretrained("canny")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained("clip")
    hubgen.IPAdapter.fresh(unet, image_features=8).save("adapter.safetensors")
    for named, tiny in {
        '"lllyasviel/sd-controlnet-canny"': '"canny"',
        '"h94/IP-Adapter", subfolder="models/image_encoder"': '"clip"',
        '"ip-adapter_sd15.safetensors"': '"adapter.safetensors"',
    }.items():
        assert named in snippet
        snippet = snippet.replace(named, tiny)
    return snippet


def test_the_generate_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = [line for block in TRAINING for line in block]
    commands = [line for line in COMMANDS if line.startswith("hubgen generate") and line not in trained]
    assert commands
    for line in commands:
        words = shlex.split(line)
        assert main(words[1:]) == 0, line
        assert Path(words[words.index("--out") + 1]).is_file()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("hubgen data")])
def test_the_data_commands_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the README that need the npm registry, unless the archives are in the cache already."""
    monkeypatch.chdir(tmp_path)
    # Frames are a download of 730 MB, and recolouring takes two minutes; other tests see to both.
    words = [word for word in shlex.split(command) if word not in ("frame", "recoloured")]
    status = main(words[1:])
    error = capsys.readouterr().err
    if status != 0 and "download" in error:
        pytest.skip(f"the npm registry is out of reach: {error.strip().splitlines()[-1]}")
    assert status == 0, error
    assert len(list(Path(words[words.index("--out") + 1], "train").glob("*.png"))) > 1500


@pytest.mark.slow
def test_the_training_commands_make_a_model_that_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's own commands, on 24 pictures and for 2 steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training").mkdir()
    shutil.copytree(ROOT / "training" / "recipes", tmp_path / "training" / "recipes")
    for folder in ("fluent", "noto", "rich"):
        write_coloured_squares(tmp_path / "data" / folder)
    for line in (line for block in TRAINING for line in block):
        words = shlex.split(line)
        if words[:2] == ["hubgen", "data"]:
            assert (tmp_path / words[words.index("--out") + 1]).is_dir()
        elif words[0] == "hubgen":
            assert main(words[1:]) == 0, line
            assert Path(words[words.index("--out") + 1]).is_file()
        else:
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process", "2"]
            run = subprocess.run(
                [*launch, *words[2:], *shlex.split(SMALL[words[3]])],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, f"{line}\n{run.stderr[-3000:]}"


def write_coloured_squares(folder: Path) -> None:
    """A data folder as `hubgen data emoji` lays it out, with squares of plain colours for pictures."""
    colours = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 200), "yellow": (230, 200, 40)}
    for split, count in (("train", 6), ("validation", 1), ("test", 2)):
        (folder / split).mkdir(parents=True)
        rows = []
        for colour, rgb in colours.items():
            for number in range(count):
                name = f"{colour}-{number}.png"
                picture = Image.new("RGB", (64, 64), "white")
                picture.paste(rgb, (8, 8, 40 + 2 * number, 40 + 2 * number))
                picture.save(folder / split / name)
                rows.append(f'{{"file_name": "{name}", "text": "a {colour} square of {number}"}}')
        (folder / split / "metadata.jsonl").write_text("\n".join(rows) + "\n")
