"""Captions of a model in the tables of shards: what is written, what is not used, and that a killed run is finished."""

import json
import multiprocessing
import pickle
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from hubgen.captioning.generate import Asked, write_captions
from hubgen.captioning.templates import PROMPT, V1
from hubgen.cli import main
from hubgen.data.errors import DataError
from hubgen.data.web.engines.engine import run
from hubgen.data.web.recaption import COLUMNS, Recaption, digest_of
from hubgen.data.web.shards import STATS, TABLE, open_shards, read_stats, write_table
from tests.captioning.taught import NAMED, taught, untaught
from tests.data.web.recaptioning import FAILED, recaption, shards_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner that knows the pictures."""
    folder = tmp_path_factory.mktemp("models") / "knows"
    taught().save(folder)
    return folder


def written(folder: Path, model: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of all shards, after the stage."""
    stage = Recaption.of(str(model), **{"max_new_tokens": 12, "batch_size": 3, **options})
    report = run(stage, stage.works(open_shards(folder)), folder)
    assert report.failed == {}
    return [row for shard in open_shards(folder) for row in shard.read().to_pylist()]


def contents(folder: Path) -> dict[str, Any]:
    """The files of a folder, stats without times."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.glob("[0-9]*.*")}
    for name in found:
        if name.endswith(STATS):
            stats = read_stats(folder / name)
            found[name] = {key: value for key, value in stats.items() if "time" not in key and key != "duration"}
    return found


def test_each_picture_gets_a_caption_beside_its_own_and_the_rest_stays(model: Path, tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "shards", 2, 5, failures=True)
    before = {shard.name: (shard.read(), shard.tar.read_bytes()) for shard in open_shards(folder)}
    rows = written(folder, model)
    for shard in open_shards(folder):
        table, tar = before[shard.name]
        assert shard.read().drop_columns(list(COLUMNS)).equals(table) and shard.tar.read_bytes() == tar
        assert shard.stats["captions"] == {"ok": 4} and shard.stats["successes"] == 4
    name = f"knows@{digest_of(model)[:12]}"
    for place, row in enumerate(rows):
        if place % 5 == FAILED:
            assert [row[column] for column in COLUMNS] == [None] * 4
        else:
            assert row["synthetic_caption"] == row["caption"] and row["caption_status"] == "ok"
            assert row["captioner"] == name and row["prompt"] is None
    assert written(folder, model) == rows
    with pytest.raises(DataError, match="was made with beams 1, and this run has 2"):
        written(folder, model, beams=2)


def test_captions_that_are_no_good_are_marked_and_not_stored(model: Path, tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "shards", 1, 8)
    rows = written(folder, model, max_new_tokens=2)
    assert {row["caption_status"] for row in rows} == {"cut_off"}
    assert {row["synthetic_caption"] for row in rows} == {None} and None not in {row["captioner"] for row in rows}
    other = tmp_path / "babbles"
    untaught().save(other)
    rows = written(shards_of(tmp_path / "more", 1, 8), other)
    expected = write_captions(untaught(), list(NAMED.values())[:3], Asked(max_new_tokens=12))
    assert [row["caption_status"] for row in rows[:3]] == [caption.status for caption in expected]
    assert all((row["synthetic_caption"] is None) == (row["caption_status"] != "ok") for row in rows)


def test_a_picture_that_cannot_be_decoded_is_marked(model: Path, tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "shards", 1, 4)
    (shard,) = open_shards(folder)
    offset = shard.read(["offset"]).column("offset")[2].as_py()
    with shard.tar.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(40))
    assert [row["caption_status"] for row in written(folder, model)] == ["ok", "ok", "unreadable", "ok"]


def test_a_captioner_of_questions_is_asked_and_the_prompt_is_kept(tmp_path: Path) -> None:
    captioner = untaught()
    captioner.processor.chat_template = V1.chat
    captioner.save(tmp_path / "asks")
    rows = written(shards_of(tmp_path / "one", 1, 2), tmp_path / "asks")
    assert {row["prompt"] for row in rows} == {PROMPT}
    rows = written(shards_of(tmp_path / "two", 1, 2), tmp_path / "asks", prompt="What is it?")
    assert {row["prompt"] for row in rows} == {"What is it?"}


def test_columns_of_others_are_not_lost(model: Path, tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "shards", 1, 2)
    (shard,) = open_shards(folder)
    write_table(shard.table, shard.read().append_column("prompt", pa.array(["x", "y"])))
    with pytest.raises(DataError, match="00000.parquet: has a column 'prompt' already, expected none: it would"):
        written(folder, model)


def test_the_digest_of_a_captioner_changes_with_any_of_its_files(model: Path, tmp_path: Path) -> None:
    first = digest_of(model)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json"):
        other = Path(shutil.copytree(model, tmp_path / name))
        (other / name).write_bytes((other / name).read_bytes() + b" ")
        assert digest_of(other) != first
    other = Path(shutil.copytree(model, tmp_path / "card"))
    (other / "README.md").write_text("a card")
    assert digest_of(other) == first


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(model: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.data.web.recaptioning", "hubgen.data.web.recaption", "hubgen.data.web.engines.engine"]
    )
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    whole, killed = (shards_of(tmp_path / name, 10, 6, failures=True) for name in ("whole", "killed"))

    def begun(folder: Path) -> Any:
        process = context.Process(target=recaption, args=(folder, model))
        process.start()
        return process

    recaption(shards_of(tmp_path / "first", 1, 1), model)
    begun(shards_of(tmp_path / "warm", 1, 1)).join()
    begin = time.monotonic()
    process = begun(whole)
    process.join()
    lasted = time.monotonic() - begin
    assert process.exitcode == 0
    done: dict[str, bytes] = {}
    for _ in range(5):
        process = begun(killed)
        process.join(moments.uniform(0.2, 0.9) * lasted)
        process.kill()
        process.join()
        now = {path.name: path.read_bytes() for path in killed.glob(f"*{STATS}") if "recaption" in path.read_text()}
        assert done.items() <= now.items(), seed  # what was whole was not done again
        done = now
    process = begun(killed)
    process.join()
    assert process.exitcode == 0 and contents(killed) == contents(whole), seed
    assert not [path.name for path in killed.iterdir() if path.name.startswith((".tmp", ".ready"))]


@pytest.mark.slow
def test_ray_writes_the_same_bytes_as_a_loop(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    loop, ray = (shards_of(tmp_path / name, 3, 4, failures=True) for name in ("loop", "ray"))
    for folder, engine in ((loop, "local"), (ray, "ray")):
        stage = Recaption.of(str(model), max_new_tokens=12, batch_size=3)
        works, workers = stage.works(open_shards(folder)), 2 if engine == "ray" else 1
        assert run(stage, works, folder, engine=engine, workers=workers).failed == {}
    assert contents(loop) == contents(ray)


def test_a_stage_goes_to_another_process_as_it_is(model: Path) -> None:
    stage = Recaption.of(str(model), beams=2)
    sent = pickle.loads(pickle.dumps(stage))
    assert sent == stage and sent.settings == stage.settings


# ---- the command ----


def test_the_command_says_what_it_wrote(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards_of(tmp_path / "shards", 2, 4, failures=True)
    assert main(["data", "recaption", str(folder), "--model", str(model), "--max-tokens", "12", "--beams", "2"]) == 0
    assert capsys.readouterr().out == f"{folder}: 6 captions by knows@{digest_of(model)[:12]}; not used: none\n"
    assert pa.parquet.read_schema(folder / f"00000{TABLE}").names[-4:] == list(COLUMNS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--model", "nowhere"],
            "--model nowhere: no such folder, expected that of a captioner, or owner/name",
        ),
        (["--model", "KNOWS", "--prompt", "What?"], "--model KNOWS: takes no prompt (it has no chat template)"),
        (["--model", "KNOWS", "--prompt", " "], "--prompt: got ' ', expected words"),
        (["--model", "KNOWS", "--max-tokens", "600"], "--model KNOWS: takes 512 tokens, got 5 of picture and prompt"),
        (["--model", "OTHER"], "got a model of the type 'clip', expected 'llava'"),
        (["--model", "UNFIT"], "patch_size of its processor: got 4, expected 16"),
        (["--model", "KNOWS", "--engine", "slurm", "--gpus-per-worker", "-1"], "--gpus-per-worker: got -1"),
        (["--model", "KNOWS", "--beams", "0"], "--beams: got '0', expected a whole number from 1"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    arguments: list[str], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = shards_of(tmp_path / "shards", 1, 2), tmp_path / "other"
    before = contents(folder)
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "clip"}))
    unfit = Path(shutil.copytree(model, tmp_path / "unfit"))
    settings = json.loads((unfit / "processor_config.json").read_text())
    (unfit / "processor_config.json").write_text(json.dumps({**settings, "patch_size": 4}))
    places = {"KNOWS": str(model), "OTHER": str(other), "UNFIT": str(unfit)}
    assert main(["data", "recaption", str(folder), *(places.get(one, one) for one in arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and words.replace("KNOWS", str(model)) in said[0]
    assert contents(folder) == before
