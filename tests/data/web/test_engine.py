import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from hubgen.cli import main
from hubgen.data.errors import DataError
from hubgen.data.web.downloading.download import Download, Manners
from hubgen.data.web.downloading.fetch import Limits
from hubgen.data.web.downloading.resize import Resizing
from hubgen.data.web.engines.engine import ENGINES, Report, run
from hubgen.data.web.engines.local import Local, dealt
from hubgen.data.web.engines.ray import OnRay
from hubgen.data.web.shards import open_shards, read_stats
from hubgen.data.web.stages import works_on
from tests.data.web.example_stages import CaptionLengths, Devices
from tests.data.web.site import Answer, Site, file_of, in_turn, picture, reply, serving

DOWNLOAD = Download(
    resizing=Resizing(8),
    limits=Limits(timeout=2, deadline=5, retries=0),
    manners=Manners(allowed_hosts=("127.0.0.1",), threads=3),
    rows=3,
)
COUNT = 12


def answers(pause: float = 0.0) -> dict[str, Answer]:
    """Twelve pictures, of which the sixth is not there."""

    def later(content: bytes) -> Answer:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            time.sleep(pause)
            reply(content)(handler)

        return answer

    return {f"/{n}": later(file_of(picture(12, 12, seed=n))) for n in range(COUNT) if n != 5}


def candidates(site: Site, path: Path) -> Path:
    urls = [site.url(f"/{n}") for n in range(COUNT)]
    pa.parquet.write_table(pa.table({"url": urls, "text": [f"picture {n}" for n in range(COUNT)]}), path)
    return path


def downloaded(folder: Path) -> Path:
    """Four shards."""
    with serving(answers()) as site:
        source = candidates(site, folder / "c.parquet")
        assert run(DOWNLOAD, DOWNLOAD.works(source), folder / "shards").failed == {}
    return folder / "shards"


def lengths(folder: Path, workers: int = 1, **changes: Any) -> Report:
    stage = CaptionLengths(**changes)
    return run(stage, works_on(open_shards(folder), stage), folder, workers=workers)


def content_of(folder: Path) -> dict[str, Any]:
    """The files of a folder; of stats all but the times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix == ".json":
            found[path.name] = {
                name: value
                for name, value in json.loads(path.read_text()).items()
                if name not in ("duration", "start_time", "end_time")
            }
        else:
            found[path.name] = path.read_bytes()
    return found


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a file was written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("0*")}


# ---- engines ----


def test_a_loop_and_a_pool_write_the_same_bytes(tmp_path: Path) -> None:
    with serving(answers()) as site:
        works = DOWNLOAD.works(candidates(site, tmp_path / "c.parquet"))
        for name, workers in (("loop", 1), ("pool", 2)):
            report = run(DOWNLOAD, works, tmp_path / name, workers=workers)
            assert (report.done, report.there, report.failed) == (["00000", "00001", "00002", "00003"], 0, {})
            lengths(tmp_path / name, workers)
    assert content_of(tmp_path / "loop") == content_of(tmp_path / "pool")


@pytest.mark.slow
def test_a_process_of_ray_that_dies_is_replaced_and_each_has_its_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folder = downloaded(tmp_path)
    stage = Devices(dies=("00001",), once=tmp_path, notes=tmp_path)
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)  # numbers alone: Ray counts them
    try:
        with pytest.raises(ValueError, match="`gpus`: got 3 for each worker, and Ray finds 2 GPUs here"):
            run(stage, works_on(open_shards(folder), stage), folder, engine=OnRay(gpus=3))
        report = run(stage, works_on(open_shards(folder), stage), folder, engine=OnRay(gpus=1), workers=2)
    finally:
        ray.shutdown()
    assert (tmp_path / "00001").exists()
    assert report.failed == {} and report.done == ["00000", "00001", "00002", "00003"]
    assert all("length" in shard.read().column_names for shard in open_shards(folder))
    assert {shard.stats["gpu"] for shard in open_shards(folder)} == {"0", "1"}


@pytest.mark.slow
def test_ray_writes_the_same_bytes_and_tells_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with serving(answers()) as site:
        works = DOWNLOAD.works(candidates(site, tmp_path / "c.parquet"))
        broken = tmp_path / "broken.parquet"
        broken.write_bytes(b"PAR1")
        works[2] = replace(works[2], source=broken)
        for engine in ("local", "ray"):
            report = run(DOWNLOAD, works, tmp_path / engine, engine=engine, workers=2)
            assert report.done == ["00000", "00001", "00003"]
            assert list(report.failed) == ["00002"] and "broken.parquet: cannot be read" in report.failed["00002"]
    assert content_of(tmp_path / "local") == content_of(tmp_path / "ray")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_raises_is_told_and_the_others_are_done(workers: int, tmp_path: Path) -> None:
    folder = downloaded(tmp_path)
    report = lengths(folder, workers, raises=("00001",))
    assert report.done == ["00000", "00002", "00003"]
    assert report.failed == {"00001": "RuntimeError: shard 00001 cannot be done"}
    assert not list(folder.glob(".tmp*")) and not list(folder.glob(".ready*"))
    report = lengths(folder, workers)
    assert report.done == ["00001"] and report.there == 3


def test_a_worker_that_dies_is_replaced_and_each_has_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    folder = downloaded(tmp_path)
    stage = Devices(dies=("00001",), once=tmp_path, notes=tmp_path)
    report = run(stage, works_on(open_shards(folder), stage), folder, engine=Local(gpus=1), workers=2)
    assert report.failed == {} and report.done[-1:] == ["00003"]
    assert all("length" in shard.read().column_names for shard in open_shards(folder))
    assert {path.name for path in tmp_path.glob("gpu-*")} == {"gpu-4", "gpu-5"}


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert dealt(1, 3) == ["0", "1", "2"]
    assert dealt(2, 2) == ["0,1", "2,3"]
    assert dealt(0.5, 4) == ["0", "0", "1", "1"]
    with pytest.raises(ValueError, match="`gpus`: got 2 for each of 3 workers, expected 6 GPUs and found 4"):
        dealt(2, 3)


def test_a_shard_that_kills_each_worker_is_given_up(tmp_path: Path) -> None:
    folder = downloaded(tmp_path)
    report = lengths(folder, 2, dies=("00003",))
    assert list(report.failed) == ["00003"] and "its process ended" in report.failed["00003"]
    assert ["length" in shard.read().column_names for shard in open_shards(folder)] == [True] * 3 + [False]


def test_a_stage_that_cannot_be_set_up_is_told_in_a_line(tmp_path: Path) -> None:
    folder = downloaded(tmp_path)
    with pytest.raises(FileNotFoundError, match="a model that is not there"):
        lengths(folder, 1, needs="a model that is not there")
    report = lengths(folder, 2, needs="a model that is not there")
    assert set(report.failed.values()) == {
        "ValueError: cannot be set up: FileNotFoundError: a model that is not there: No such file or directory"
    }


def test_the_command_ends_with_3_if_a_shard_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cand").mkdir()
    with serving(answers()) as site:
        candidates(site, tmp_path / "cand" / "0.parquet")
        broken = candidates(site, tmp_path / "cand" / "1.parquet")
        content = bytearray(broken.read_bytes())
        content[4:200] = bytes(196)  # its rows, not its end
        broken.write_bytes(content)
        candidates(site, tmp_path / "cand" / "2.parquet")
        command = ["data", "download", str(tmp_path / "cand"), "--out", str(tmp_path / "out"), "--rows", "12"]
        assert main([*command, "--allow-host", "127.0.0.1", "--retries", "0"]) == 3
        said = capsys.readouterr().err
        assert "hubgen: shard 00001 failed: DataError" in said and "1.parquet: cannot be read as parquet" in said
        assert [shard.name for shard in open_shards(tmp_path / "out")] == ["00000", "00002"]


# ---- what is done stays ----


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    with serving(answers()) as site:
        works = DOWNLOAD.works(candidates(site, tmp_path / "c.parquet"))
        run(DOWNLOAD, works, tmp_path / "out")
        asked, before = dict(site.asked), marks(tmp_path / "out")
        report = run(DOWNLOAD, works, tmp_path / "out")
        assert (report.done, report.there) == ([], 4)
        assert dict(site.asked) == asked and marks(tmp_path / "out") == before


def test_another_setting_or_another_input_is_refused(tmp_path: Path) -> None:
    folder = downloaded(tmp_path)
    works = DOWNLOAD.works(tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"00000_stats.json: was made with size 8, and this run has 9; expected"):
        run(replace(DOWNLOAD, resizing=Resizing(9)), works, folder)
    run(replace(DOWNLOAD, limits=Limits(timeout=9), manners=replace(DOWNLOAD.manners, threads=1)), works, folder)
    table = pa.parquet.read_table(tmp_path / "c.parquet")
    pa.parquet.write_table(table.take([1, 0, *range(2, COUNT)]), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="00000_stats.json: was made from other rows"):
        run(DOWNLOAD, DOWNLOAD.works(tmp_path / "c.parquet"), folder)
    pa.parquet.write_table(table.slice(0, 3), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="00001_stats.json: is no shard of this input, which has 1"):
        run(DOWNLOAD, DOWNLOAD.works(tmp_path / "c.parquet"), folder)


def test_a_folder_of_another_program_is_refused(tmp_path: Path) -> None:
    folder = downloaded(tmp_path)
    path = folder / "00000_stats.json"
    stats = json.loads(path.read_text())
    del stats["stages"]
    path.write_text(json.dumps(stats))
    with pytest.raises(DataError, match="was written by another program"):
        run(DOWNLOAD, DOWNLOAD.works(tmp_path / "c.parquet"), folder)
    assert lengths(folder).failed == {}  # but it can be worked on, and that is known again
    assert lengths(folder).there == 4
    again = json.loads(path.read_text())
    assert {name: again[name] for name in stats} == stats


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    folder = downloaded(tmp_path)
    seen: list[str] = []

    class Second(CaptionLengths):
        def setup(self) -> None:
            with pytest.raises(DataError, match="another run writes to it"):
                lengths(folder)
            seen.append("refused")

    stage = Second()
    run(stage, works_on(open_shards(folder), stage), folder)
    assert seen == ["refused"]


# ---- stages one after the other ----


def test_a_stage_adds_columns_and_leaves_the_rest(tmp_path: Path) -> None:
    folder = downloaded(tmp_path)
    before = {shard.name: (shard.read(), shard.tar.read_bytes(), shard.stats) for shard in open_shards(folder)}
    lengths(folder)
    for shard in open_shards(folder):
        table, tar, stats = before[shard.name]
        assert shard.tar.read_bytes() == tar
        assert shard.read().drop_columns(["length"]).equals(table)
        assert {name: shard.stats[name] for name in stats if name != "stages"} | {"stages": stats["stages"]} == stats
        assert [record["stage"] for record in shard.stats["stages"]] == ["download", "caption_lengths"]
    assert lengths(folder).there == 4
    with pytest.raises(DataError, match="was made with factor 1, and this run has 2"):
        lengths(folder, factor=2)


def test_shards_whose_rows_changed_are_worked_on_anew(tmp_path: Path) -> None:
    with serving(answers() | {"/5": in_turn(reply(status=404), reply(file_of(picture(9, 9))))}) as site:
        works = DOWNLOAD.works(candidates(site, tmp_path / "c.parquet"))
        run(DOWNLOAD, works, tmp_path / "out")
        lengths(tmp_path / "out")
        assert run(replace(DOWNLOAD, retry_failed=True), works, tmp_path / "out").done == ["00001"]
    columns = ["length" in shard.read().column_names for shard in open_shards(tmp_path / "out")]
    assert columns == [True, False, True, True]
    assert "longest" not in read_stats(tmp_path / "out" / "00001_stats.json")
    assert lengths(tmp_path / "out").done == ["00001"]


# ---- killed anywhere ----


class Killed(BaseException):
    """Stands for the end of the process: nothing of it is caught."""


@pytest.mark.parametrize("again", [False, True], ids=["first", "rewritten"])
def test_a_run_cut_at_any_rename_is_finished_by_the_next(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(folder: Path) -> list[Callable[[], Report]]:
        first = lambda: run(DOWNLOAD, works, folder)  # noqa: E731
        return [first, lambda: run(replace(DOWNLOAD, retry_failed=True), works, folder)] if again else [first]

    # Each folder sees the picture come at the second request.
    coming: dict[str, int] = {}

    def sixth(handler: BaseHTTPRequestHandler) -> None:
        (reply(file_of(picture(9, 9))) if coming["late"] else reply(status=404))(handler)

    real, calls = os.replace, 0
    with serving(answers() | {"/5": sixth}) as site:
        works = DOWNLOAD.works(candidates(site, tmp_path / "c.parquet"))[1:2]
        works = [replace(works[0], number=0)]

        def go(folder: Path) -> None:
            for number, stage in enumerate(stages(folder)):
                coming["late"] = number
                stage()

        go(tmp_path / "whole")
        expected = content_of(tmp_path / "whole")
        cuts = 0
        while True:
            folder, calls = tmp_path / f"cut-{cuts}", 0

            def counting(source: Any, target: Any) -> None:
                nonlocal calls
                calls += 1
                if calls == cuts + 1:  # noqa: B023
                    raise Killed
                real(source, target)

            coming["late"] = 0
            if again:
                stages(folder)[0]()
            coming["late"] = int(again)
            monkeypatch.setattr(os, "replace", counting)
            with pytest.MonkeyPatch.context():
                try:
                    stages(folder)[-1]()
                    was_cut = False
                except Killed:
                    was_cut = True
            monkeypatch.setattr(os, "replace", real)
            if not was_cut:
                break
            stages(folder)[-1]()
            assert content_of(folder) == expected, cuts
            cuts += 1
    assert cuts == 4  # the folder of the shard, its tar, its table, its stats


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "times"), [(1, 15), (2, 5)])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(workers: int, times: int, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    context = multiprocessing.get_context("forkserver")  # which has imported when the second run begins
    context.set_forkserver_preload(["hubgen.data.web.downloading.download", "hubgen.cli"])
    with serving(answers(pause=0.25)) as site:
        source, out = candidates(site, tmp_path / "c.parquet"), tmp_path / "out"
        command = ["data", "download", str(source), "--rows", "3", "--size", "8", "--threads", "1"]
        command += ["--allow-host", "127.0.0.1", "--retries", "0", "--workers", str(workers), "--out"]

        def start(folder: Path) -> Any:
            process = context.Process(target=main, args=([*command, str(folder)],))
            process.start()
            return process

        start(tmp_path / "whole").join()
        done: dict[str, tuple[int, int]] = {}
        killed = 0
        for _ in range(times):
            begun = sum(site.asked.values())
            process = start(out)
            while process.is_alive() and sum(site.asked.values()) == begun:  # up to its first request
                time.sleep(0.02)
            process.join(moments.uniform(0, 1))
            killed += process.is_alive()
            process.kill()
            process.join()
            now = marks(out) if out.is_dir() else {}
            whole = {path.name[:5] for path in out.glob("*_stats.json")}
            assert done.items() <= now.items(), seed  # what was whole was not touched
            done = {name: mark for name, mark in now.items() if name[:5] in whole}
            time.sleep(0.2)  # workers see that their parent is gone
        start(out).join()
        assert done.items() <= marks(out).items(), seed
        assert content_of(out) == content_of(tmp_path / "whole"), seed
    assert killed >= 3, seed
    assert not list(out.glob(".tmp*"))


def test_all_engines_are_named() -> None:
    with pytest.raises(ValueError, match="`engine`: got 'spark', expected local, ray, slurm"):
        run(CaptionLengths(), [], Path("x"), engine="spark")
    assert "local" in ENGINES
