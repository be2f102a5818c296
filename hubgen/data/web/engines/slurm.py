"""The engine of a cluster that Slurm runs: an array of jobs, submitted by datatrove's executor (`hubgen[slurm]`).

The command waits until each shard is done or has failed, and reads that from files that the jobs write (`slurm_tasks`).
Ctrl-C cancels the jobs. If the command ends in another way, as with the connection to the cluster, they go on; started
again when they have ended, it does what is missing.
"""

import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hubgen.data.errors import DataError
from hubgen.data.web.engines.attempts import Result, Results
from hubgen.data.web.engines.slurm_tasks import JOB, LOG, NAME, RESULTS, Share, write_tasks
from hubgen.data.web.stages import Stage, Work

MOST_TASKS = 1000
"""Of an array: Slurm takes 1001 where its administrators said nothing else. More shards share tasks."""

FIRST_PAUSE = 0.2


@dataclass(frozen=True)
class OnSlurm:
    """As an array of Slurm's jobs; all machines see the files by the same paths, and hubgen's Python.

    What else `sbatch` shall know is told by its environment variables, such as SBATCH_ACCOUNT and SBATCH_QOS.
    """

    partition: str | None = None
    """Slurm's own choice where `None`"""
    time: str = "24:00:00"
    """The longest that a task may take, as sbatch has it; a task is one shard, or with more than 1,000 several"""
    cpus: int = 1
    """Of each task"""
    memory: int = 4
    """GB of each task for each of its CPUs"""
    gpus: int = 0
    """Of each task"""
    poll: float = 10.0
    """The most seconds between two looks at the results; the first ones are sooner"""
    patience: float = 60.0
    """Seconds that a result may take to be seen here after its job has ended"""

    def __call__(self, stage: Stage, works: Sequence[Work], folder: Path, workers: int) -> Results:
        """See `Engine`.

        Raises:
            ValueError: datatrove is not installed, this machine does not submit to Slurm, or Slurm refuses the job.
        """
        if not works:
            return
        folder = folder.resolve()
        self.check(folder)
        job, tasks = folder / JOB, min(len(works), MOST_TASKS)
        shutil.rmtree(job, ignore_errors=True)
        write_tasks(stage, works, folder, tasks)
        name = f"hubgen-{stage.name}-{uuid.uuid4().hex[:12]}"
        (job / NAME).write_text(name)
        failed = False
        try:
            self.submit(name, folder, tasks, workers)
            for result in self.results(name, stage, works, folder):
                failed = failed or result.problem is not None
                yield result
        except BaseException:
            self.cancel(name)
            raise
        (job / NAME).unlink()
        if not failed:  # else the log stays
            shutil.rmtree(job)

    def check(self, folder: Path) -> None:
        """Raises ValueError if datatrove or Slurm is not here, or Slurm's scripts cannot name the folder."""
        if find_spec("datatrove") is None:
            raise ValueError("`engine`: got 'slurm', and datatrove is not installed: pip install \"hubgen[slurm]\"")
        for program in ("sbatch", "squeue", "scancel"):
            if shutil.which(program) is None:
                raise ValueError(
                    f"`engine`: got 'slurm', and {program} is not here; expected a machine that submits jobs"
                )
        odd = re.search(r"[^\w./+,:=@-]", str(folder))
        if odd:
            raise ValueError(f"{folder}: got {odd[0]!r} in a path, which Slurm's options do not take")

    def submit(self, name: str, folder: Path, tasks: int, workers: int) -> None:
        """Submits the array, and returns."""
        from loguru import logger

        from hubgen.data.web.engines.slurm_executor import Executor

        executor = Executor(
            [Share(folder)],
            tasks=tasks,
            workers=min(workers, tasks),
            job_name=name,
            partition=self.partition,
            time=self.time,
            cpus_per_task=self.cpus,
            mem_per_cpu_gb=self.memory,
            gpus_per_task=self.gpus,
            qos=None,
            max_array_size=tasks,
            requeue_signals=None,
            with_srun=False,
            logging_dir=str(folder / JOB / LOG),
        )
        logger.disable("datatrove")
        try:
            executor.launch_job()
        except subprocess.CalledProcessError as error:
            raise ValueError(f"sbatch: ended with {error.returncode}; what it said stands above") from None
        finally:
            logger.enable("datatrove")

    def is_running(self, name: str) -> bool:
        """Whether a job waits or runs."""
        return runs(name)

    def cancel(self, name: str) -> None:
        """Ends a job that nobody waits for."""
        subprocess.run(["scancel", f"--name={name}"], check=False)

    def results(self, name: str, stage: Stage, works: Sequence[Work], folder: Path) -> Iterator[Result]:
        """Of each shard, when it is there; to the end of the job."""
        waiting = {work.name: work for work in works}
        ended: float | None = None
        pause = FIRST_PAUSE
        while True:
            for path in list((folder / JOB / RESULTS).iterdir()):
                if path.name in waiting:
                    problem = path.read_text(encoding="utf-8")
                    path.unlink()
                    yield Result(waiting.pop(path.name), problem or None)
            if self.is_running(name):
                ended = None
            elif not waiting or (ended is not None and time.monotonic() - ended >= self.patience):
                break
            else:
                ended = ended or time.monotonic()
            time.sleep(min(pause, self.poll))
            pause *= 1.5
        for work in waiting.values():
            done = stage.is_done(work, folder)
            yield Result(work, None if done else f"its job ended without it; see {folder / JOB / LOG / 'slurm_logs'}")


def runs(name: str) -> bool:
    """Whether Slurm has a job of this name that has not ended; true where it cannot be asked now."""
    asked = subprocess.run(["squeue", "--noheader", f"--name={name}", "--format=%j"], capture_output=True, text=True)
    return asked.returncode != 0 or name in asked.stdout


def refuse_if_jobs_run(folder: Path) -> None:
    """Raises DataError if jobs of an earlier run, whose command has ended, still write to a folder."""
    try:
        name = (folder / JOB / NAME).read_text()
    except FileNotFoundError:
        return
    if shutil.which("squeue") is None:
        raise DataError(
            f"{folder / JOB}: an earlier run left jobs to Slurm, and squeue, which knows whether they have ended, is "
            "not here; expected a machine that submits jobs, or this folder removed"
        )
    if runs(name):
        raise DataError(f"{folder}: jobs of an earlier run write to it; expected their end (scancel --name={name})")
