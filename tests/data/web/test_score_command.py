"""`hubgen data score` as it is called: what it says, what it refuses, and what a killed run leaves."""

import json
import multiprocessing
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hubgen.cli import main
from hubgen.data.web.embedding.embedders import embedder
from hubgen.data.web.engines.engine import run
from hubgen.data.web.scoring.embedding_scores import EmbeddingScores, Live
from hubgen.data.web.scoring.scores import LaionHash, Score
from hubgen.data.web.shards import READY
from hubgen.data.web.stages import open_to_add
from hubgen.formats.digests import file_digest
from tests.data.web.contrastive import save_model
from tests.data.web.pairs import write_pairs


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"clip:{save_model('clip', tmp_path_factory.mktemp('clip'))}"


def test_scores_of_a_clip_are_what_the_recipes_need(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = ["a cat on a red sofa in the garden", "ein Hund läuft durch den großen Garten", None]
    shards = write_pairs(tmp_path / "shards", {"caption": captions}, {"caption": captions[:1]}, failed={(0, 0)})
    assert main(["data", "score", str(shards), "--scorer", clip, "--language", "--hash"]) == 0
    said = capsys.readouterr().out
    assert "4 rows, 3 pictures; with a value:" in said
    for line in ("similarity 2", "nsfw 3", "animal_prompts 3", "language 3", "hash 4"):
        assert f"  {line}\n" in said
    for recipe in ("laion-5b", "laion-400m"):
        assert main(["data", "filter", str(shards), "--recipe", recipe, "--out", str(tmp_path / recipe)]) == 0
    assert main(["data", "score", str(shards), "--scorer", clip]) == 2
    assert "has a column 'similarity' already, expected none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "expected --scorer, --language, --hash or --join; got none of them"),
        (["--scorer", "blip"], "embedder: got 'blip', expected clip:FOLDER"),
        (["--scorer", "clip:openai/clip-not-here"], "clip:openai/clip-not-here: cannot be loaded"),
        (["--scorer", "clip:./none"], "clip:./none: found no folder ./none"),
        (["--scorer", "embeddings:none"], "none: no such folder, expected one of embeddings"),
        (["--scorer", "conse", "--nsfw"], "tags: got the scorer conse, expected a CLIP"),
        (["--scorer", "conse", "--no-similarity"], "expected something to compute"),
        (["--scorer", "conse", "--head", "a=none.pth"], "none.pth: no such file; expected a head's weights"),
        (["--scorer", "conse", "--head", "a-b=none.pth"], "got 'a-b=none.pth', expected NAME=FILE"),
        (["--head", "a=none.pth"], "--head: is for --scorer, which is not given"),
        (["--nsfw"], "--nsfw: is for --scorer, which is not given"),
        (["--hash", "--on", "url"], "--on: is for --join, which is not given"),
        (["--language", "--least-language-score", "1.5"], "--least-language-score: got 1.5, expected 0 to 1"),
        (["--join", "none.parquet"], "none.parquet: not a readable parquet file"),
        (["--hash", "--engine", "ray"], 'pip install "hubgen[ray]"'),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)  # as Python marks what cannot be imported
    write_pairs(tmp_path / "shards", {"score": [1]})
    before = {path.name: file_digest(path) for path in (tmp_path / "shards").iterdir()}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        status = main(["data", "score", "shards", *options])
    except SystemExit as end:  # argparse's own
        status = int(str(end.code))
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and said in lines[0]
    assert {path.name: file_digest(path) for path in (tmp_path / "shards").iterdir()} == before


def score_all(folder: Path, clip: str) -> None:
    """What the command does, in a process that can be killed."""
    shards = open_to_add(folder)
    stage = Score((EmbeddingScores(Live(embedder(clip, "cpu")), tags=True), LaionHash()))
    assert run(stage, stage.works(shards), folder).failed == {}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in folder.glob("0*")}


def scored(folder: Path) -> dict[str, tuple[int, int]]:
    """Of the shards that are committed: what tells whether a file was written anew."""
    done = [path for path in folder.glob("0*_stats.json") if "stages" in json.loads(path.read_text())]
    files = (folder / f"{path.name[:5]}{ending}" for path in done for ending in (".parquet", "_stats.json"))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_what_was_ready_when_a_run_was_killed_is_moved_by_the_same_command(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "shards", {"caption": ["a cat"]}, {"caption": ["a dog"]})
    assert main(["data", "score", str(folder), "--hash"]) == 0
    before = contents(folder)
    (folder / f"{READY}00000").mkdir()
    for ending in (".parquet", "_stats.json"):  # as if it had been killed between two moves
        (folder / f"00000{ending}").rename(folder / f"{READY}00000" / f"00000{ending}")
    assert main(["data", "score", str(folder), "--hash"]) == 0
    assert contents(folder) == before and not list(folder.glob(f"{READY}*"))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(clip: str, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    captions = [{"caption": [f"a red cat {row}" for row in range(10)]} for _ in range(60)]
    whole, out = (write_pairs(tmp_path / name, *captions, failed={(3, 2)}) for name in ("whole", "out"))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])  # so that a killed process costs no imports

    def started(folder: Path) -> Any:
        process = processes.Process(target=score_all, args=(folder, clip))
        process.start()
        return process

    undisturbed = started(whole)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    done: dict[str, tuple[int, int]] = {}
    for _ in range(5):
        process = started(out)
        while process.is_alive() and len(scored(out)) <= len(done):
            time.sleep(0.002)  # up to its first commit
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        now = scored(out)
        assert done.items() <= now.items(), seed  # what was committed is not touched again
        done = now
    assert len(done) < 2 * len(captions), "all was done before the last kill"
    last = started(out)
    last.join()
    assert last.exitcode == 0 and done.items() <= scored(out).items(), seed
    assert contents(out) == contents(whole), seed
    assert not list(out.glob(".tmp*")) and not list(out.glob(".ready*"))
