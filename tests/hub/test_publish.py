"""Folders of every kind go to a Hub by the real client, whole or not at all, however the Hub behaves."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hubgen.hub.publish import PublishError, prepare
from tests import models
from tests.hub.loopback import Hub, Trouble, environment_of, loopback_hub

CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback_hub() as hub:
        hub.token = "hf_test"
        yield hub


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")


def published(hub: Hub, *arguments: object, token: str | None = "hf_test") -> subprocess.CompletedProcess[str]:
    """`hubgen publish` in a process of its own: the client reads the Hub's address when it is imported."""
    environment = environment_of(hub, "home", token)
    command = [sys.executable, "-m", "hubgen.cli", "publish", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def adapter(folder: Path) -> Path:
    folder.mkdir()
    save_file({"unet.x.lora_A.weight": torch.ones(2, 3)}, folder / "pytorch_lora_weights.safetensors")
    (folder / "README.md").write_text(CARD)
    return folder


def sent(hub: Hub, repo: str) -> set[str]:
    return set(hub.repos[repo]) - {".gitattributes"}


def test_a_pipeline_is_sent_without_what_else_lies_there_and_not_again(
    hub: Hub, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "README.md").write_text(CARD)
    whole = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in ("secret.env", "notes.txt", "optimizer.bin", ".git/config", "unet.ckpt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    (tmp_path / "key.json").write_text("mine")
    (folder / "key.json").symlink_to(tmp_path / "key.json")

    dry = published(hub, folder, "tester/model", "--dry-run", token=None)
    assert dry.returncode == 0 and not hub.requests, dry.stderr
    assert "(pipeline) to the model repository tester/model" in dry.stderr
    assert "stays here: notes.txt, optimizer.bin, secret.env, unet.ckpt" in dry.stderr

    done = published(hub, folder, "tester/model", "--private", "--message", "First")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/tester/model"
    assert sent(hub, "tester/model") == whole
    assert hub.created["tester/model"].get("visibility", hub.created["tester/model"].get("private")) in (
        "private",
        True,
    )
    assert [one["message"] for one in hub.commits] == ["First"]

    again = published(hub, folder, "tester/model")
    assert again.returncode == 0 and len(hub.commits) == 1, "nothing changed, so nothing is sent"
    (folder / "README.md").write_text(CARD + "More.\n")
    assert published(hub, folder, "tester/model", "--message", "Second").returncode == 0
    assert hub.commits[-1]["paths"] == ["README.md"]


def test_adapters_data_sets_and_spaces_go_to_repositories_of_their_type(hub: Hub, tmp_path: Path) -> None:
    assert published(hub, adapter(tmp_path / "lora"), "tester/lora").returncode == 0
    assert sent(hub, "tester/lora") == {"README.md", "pytorch_lora_weights.safetensors"}

    models.NETWORKS["ControlNet, SD 1.x"].build().save_pretrained(tmp_path / "net")
    (tmp_path / "net" / "README.md").write_text(CARD)
    assert published(hub, tmp_path / "net", "tester/net").returncode == 0
    assert sent(hub, "tester/net") == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}

    (tmp_path / "seen").mkdir()
    save_file({"image_proj.proj.weight": torch.ones(2, 3)}, tmp_path / "seen" / "ip-adapter_tiny.safetensors")
    (tmp_path / "seen" / "README.md").write_text(CARD)
    assert published(hub, tmp_path / "seen", "tester/seen").returncode == 0
    assert sent(hub, "tester/seen") == {"README.md", "ip-adapter_tiny.safetensors"}

    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(data / "train" / "a.png")
    (data / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    (data / "README.md").write_text(CARD)
    (data / "LICENSE").write_text("whose")
    assert published(hub, data, "tester/data").returncode == 0
    assert sent(hub, "datasets/tester/data") == {"README.md", "LICENSE", "train/a.png", "train/metadata.jsonl"}

    space = tmp_path / "space"
    space.mkdir()
    (space / "app.py").write_text("print()")
    (space / "requirements.txt").write_text("hubgen")
    (space / "README.md").write_text("---\nlicense: mit\nsdk: gradio\n---\n")
    assert published(hub, space, "tester/space").returncode == 0
    assert sent(hub, "spaces/tester/space") == {"README.md", "app.py", "requirements.txt"}
    assert hub.created["spaces/tester/space"]["sdk"] == "gradio"


def test_a_data_folder_is_read_by_datasets_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split, colour in (("train", "red"), ("test", "blue")):
        (data / split).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(data / split / "a.png")
        row = {"file_name": "a.png", "text": f"a {colour} square", "texts": [colour]}
        (data / split / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (data / "README.md").write_text(CARD)
    assert published(hub, data, "tester/data").returncode == 0
    code = """
from datasets import load_dataset
data = load_dataset("tester/data")
assert {name: len(split) for name, split in data.items()} == {"train": 1, "test": 1}, data
assert data["test"][0]["text"] == "a blue square" and data["test"][0]["image"].size == (8, 8)
"""
    environment = environment_of(hub, tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_branch_and_a_pull_request_are_what_was_asked_for(hub: Hub, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora")
    for _ in range(2):
        assert published(hub, folder, "tester/lora", "--branch", "new").returncode == 0
    assert hub.branches["tester/lora"] == ["new"] and hub.commits[0]["branch"] == "new"
    (folder / "README.md").write_text(CARD + "More.\n")
    done = published(hub, folder, "tester/lora", "--pull-request")
    assert done.stdout.strip() == f"{hub.url}/tester/lora/discussions/1"
    assert hub.commits[-1]["pull_request"] and b"More" not in hub.repos["tester/lora"]["README.md"]


@pytest.mark.parametrize(
    "trouble",
    [
        Trouble("POST /api/repos/create", 2, status=429, retry_after="0"),
        Trouble("POST .*/commit/", 2, status=500),
        Trouble("PUT /lfs/", 1, status=503),
        Trouble("PUT /lfs/", 1),
        Trouble("POST .*/preupload/", 1, stall=2.0),
    ],
    ids=["429", "500", "503 of a large file", "a cut connection", "a stall"],
)
def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path, trouble: Trouble) -> None:
    hub.trouble.append(trouble)
    done = published(hub, adapter(tmp_path / "lora"), "tester/lora")
    assert done.returncode == 0, done.stderr
    assert trouble.times == 0 and "pytorch_lora_weights.safetensors" in hub.repos["tester/lora"]


def test_what_does_not_pass_is_said_in_one_line_and_the_next_call_goes_on(hub: Hub, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora")
    hub.trouble.append(Trouble("POST .*/commit/", 100, status=503))
    done = published(hub, folder, "tester/lora", "--patience", "2")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("hubgen: error: tester/lora: the Hub did not take it: ") and "503" in last
    assert not sent(hub, "tester/lora") and len(hub.uploads) == 1
    hub.trouble.clear()
    before = len([one for one in hub.requests if one.startswith("PUT /lfs/")])
    assert published(hub, folder, "tester/lora").returncode == 0
    assert len([one for one in hub.requests if one.startswith("PUT /lfs/")]) == before, "what arrived is not sent again"


def test_a_large_file_that_arrives_as_another_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.trouble.append(Trouble("PUT /lfs/", 100, wrong=True))
    done = published(hub, adapter(tmp_path / "lora"), "tester/lora", "--patience", "2")
    assert done.returncode == 2 and "the Hub did not take it" in done.stderr
    assert not hub.uploads and not sent(hub, "tester/lora")


def test_a_token_that_may_not_write_is_told(hub: Hub, tmp_path: Path) -> None:
    done = published(hub, adapter(tmp_path / "lora"), "tester/lora", token="hf_other")
    assert done.returncode == 2 and "the Hub did not take it: " in done.stderr and "401" in done.stderr
    done = published(hub, tmp_path / "lora", "tester/lora", token=None)
    assert done.returncode == 2 and not any(one.startswith("PUT") for one in hub.requests)
    assert "repository tester/lora: no token of the Hub here; `hf auth login`, or HF_TOKEN, gives one." in done.stderr


@pytest.mark.parametrize(
    ("card", "repo", "message"),
    [
        (CARD, "lora", "repository 'lora': expected owner/name"),
        (CARD, "tester/lo ra", "repository 'tester/lo ra': "),
        (CARD, "tester/..", "repository 'tester/..': "),
        (None, "tester/lora", "holds no README.md, expected a card with its licence"),
        ("# Mine\n", "tester/lora", "names no licence, expected `license: apache-2.0`"),
        ("---\nlicense: apache\n---\n", "tester/lora", "got the licence 'apache', expected one that the Hub knows"),
        ("---\nlicense: other\n---\n", "tester/lora", "got the licence other without `license_name`"),
        ("---\nlicense: [\n---\n", "tester/lora", "its metadata are not YAML"),
    ],
)
def test_what_cannot_be_sent_is_said_before_anything_is(
    tmp_path: Path, card: str | None, repo: str, message: str
) -> None:
    folder = adapter(tmp_path / "lora")
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card)
    with pytest.raises(PublishError) as error:
        prepare(folder, repo)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_nothing_or_has_no_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="nowhere: no such folder, expected pipeline"):
        prepare(tmp_path / "nowhere", "tester/x")
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(PublishError, match="is none of pipeline, adapter, .*, IP-Adapter, learned word, network"):
        prepare(tmp_path, "tester/x")
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    with pytest.raises(PublishError, match=r"a pipeline without weights, expected .safetensors files"):
        prepare(tmp_path, "tester/x")
