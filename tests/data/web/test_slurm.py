"""Jobs of Slurm write what a loop writes. The cluster is this machine: programs of Slurm's names run its script."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from hubgen.cli import main
from hubgen.data.errors import DataError
from hubgen.data.web.engines import slurm as engine_slurm
from hubgen.data.web.engines.engine import run
from hubgen.data.web.engines.slurm import OnSlurm
from hubgen.data.web.engines.slurm_tasks import JOB, LOG, Share
from hubgen.data.web.shards import open_shards
from hubgen.data.web.stages import Work, works_on
from tests.data.web import cluster
from tests.data.web.example_stages import CaptionLengths
from tests.data.web.site import serving
from tests.data.web.test_engine import answers, candidates, content_of, downloaded

pytest.importorskip("datatrove")
QUICK = OnSlurm(poll=0.1, patience=0.3)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.settings(tmp_path / "cluster", Path(__file__).parents[3]).items():
        monkeypatch.setenv(name, value)


def works(folder: Path, stage: CaptionLengths) -> list[Work]:
    return works_on(open_shards(folder), stage)


def lengths_in(folder: Path) -> list[str]:
    """Shards that the stage was done to."""
    return [shard.name for shard in open_shards(folder) if "length" in shard.read().column_names]


@dataclass(frozen=True)
class Here(OnSlurm):
    """datatrove's executor for one machine in the place of the one for Slurm."""

    poll: float = 0.0
    patience: float = 0.0

    def check(self, folder: Path) -> None:
        pass

    def submit(self, name: str, folder: Path, tasks: int, workers: int) -> None:
        from datatrove.executor.local import LocalPipelineExecutor

        LocalPipelineExecutor([Share(folder)], tasks, workers, logging_dir=str(folder / JOB / LOG)).run()

    def is_running(self, name: str) -> bool:
        return False

    def cancel(self, name: str) -> None:
        pass


def test_datatroves_local_executor_writes_the_same_bytes_and_tells_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_slurm, "MOST_TASKS", 2)  # for four shards
    stage = CaptionLengths(raises=("00001",))
    folders = [downloaded(tmp_path), tmp_path / "tasks"]
    shutil.copytree(*folders)
    for folder, engine in zip(folders, ("local", Here()), strict=True):
        report = run(stage, works(folder, stage), folder, engine=engine, workers=2)
        assert report.done == ["00000", "00002", "00003"]
        assert report.failed == {"00001": "RuntimeError: shard 00001 cannot be done"}
        report = run(CaptionLengths(), works(folder, CaptionLengths()), folder, engine=engine)
        assert (report.done, report.there) == (["00001"], 3)
    first, second = map(content_of, folders)
    assert first == second


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_jobs_write_the_same_bytes_and_a_shard_that_fails_ends_the_command_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cand").mkdir()
    with serving(answers()) as site:
        for number in range(3):
            table = candidates(site, tmp_path / "cand" / f"{number}.parquet")
        whole = table.read_bytes()
        table.write_bytes(whole[:4] + bytes(196) + whole[200:])  # its rows, not its end
        command = ["data", "download", str(tmp_path / "cand"), "--rows", "12", "--size", "8", "--retries", "0"]
        command += ["--allow-host", "127.0.0.1", "--workers", "2", "--out"]
        jobs = ["--engine", "slurm", "--slurm-partition", "cpu", "--slurm-time", "0:10:00", "--slurm-memory", "2"]
        said = []
        for name, options in (("jobs", jobs), ("loop", [])):
            assert main([*command, str(tmp_path / name), *options]) == 3
            said.append([line for line in capsys.readouterr().err.splitlines() if "failed" in line])
        assert said[0] == said[1] and "hubgen: shard 00002 failed: DataError" in said[0][0]
        script = (tmp_path / "jobs" / JOB / LOG / "launch_script.slurm").read_text().splitlines()
        for line in ("partition=cpu", "time=0:10:00", "array=0-2%2", "cpus-per-task=1", "mem-per-cpu=2G"):
            assert f"#SBATCH --{line}" in script
        assert not [line for line in script if "qos" in line or "gpus" in line]
        table.write_bytes(whole)
        for name, options in (("jobs", jobs), ("loop", [])):
            assert main([*command, str(tmp_path / name), *options]) == 0
            assert "2 of 3 shards were there already" in capsys.readouterr().err
    assert content_of(tmp_path / "jobs") == content_of(tmp_path / "loop")


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_a_job_that_dies_is_told_and_its_shards_are_done_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_slurm, "MOST_TASKS", 2)
    folder = downloaded(tmp_path)
    stage = CaptionLengths(dies=("00001",))
    report = run(stage, works(folder, stage), folder, engine=QUICK, workers=2)
    assert report.done == ["00000", "00002"] and list(report.failed) == ["00001", "00003"]  # they share a job
    assert "its job ended without it; see " in report.failed["00001"]
    monkeypatch.setattr(engine_slurm, "MOST_TASKS", 1)
    report = run(CaptionLengths(), works(folder, CaptionLengths()), folder, engine=QUICK)
    assert (report.done, report.there) == (["00001", "00003"], 2) and len(lengths_in(folder)) == 4
    assert not (folder / JOB).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_no_run_begins_while_jobs_go_on_and_a_run_that_is_interrupted_cancels_its_own(tmp_path: Path) -> None:
    folder = downloaded(tmp_path)
    stage = CaptionLengths()
    results = QUICK(stage, works(folder, stage), folder, 1)
    assert next(results).problem is None  # the first of four, one after the other
    with pytest.raises(DataError, match=r"jobs of an earlier run write to it; expected their end \(scancel --name="):
        run(stage, works(folder, stage), folder)
    results.close()
    assert run(stage, works(folder, stage), folder).failed == {}
    assert lengths_in(folder) == ["00000", "00001", "00002", "00003"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "slurm"], "sbatch is not here; expected a machine that submits jobs"),
        (["--slurm-cpus", "4"], "--slurm-cpus: is for --engine slurm, and that is local"),
        (["--engine", "slurm", "--slurm-memory", "0"], "--slurm-memory: got '0'"),
    ],
)
def test_what_slurm_needs_is_said_in_a_line(
    options: Sequence[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as site:
        source = candidates(site, tmp_path / "c.parquet")
    assert main(["data", "download", str(source), "--out", str(tmp_path / "out"), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hubgen")]
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.usefixtures("slurm")
def test_a_folder_that_slurm_cannot_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    folder = downloaded(tmp_path / "a b")
    with pytest.raises(ValueError, match="got ' ' in a path, which Slurm's options do not take"):
        run(CaptionLengths(), works(folder, CaptionLengths()), folder, engine="slurm")
