"""Runs of training scripts in processes of their own, which are forked off one that has imported everything already."""

import faulthandler
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SCRIPTS = ("train_text_to_image", "train_class_to_image", "train_unconditional", "train_autoencoder")
SCRIPTS += ("train_lora", "train_dreambooth", "train_controlnet", "train_ip_adapter")
SCRIPTS += ("train_instruct_pix2pix", "train_captioner")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([f"hubgen.training.{script}" for script in SCRIPTS])


def work(script: str, recipe: str, log: str, environment: dict[str, str]) -> None:
    """One process of a run."""
    import torch

    os.environ.update(environment)
    os.setpgid(0, 0)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    module = importlib.import_module(f"hubgen.training.{script}")
    from hubgen.training.kit.script import run_script

    sys.argv = [script, "--config", recipe]
    run_script(module.main, module.Settings)


class Running:
    """A run on one or several processes, connected over gloo."""

    def __init__(self, script: str, recipe: dict[str, Any], folder: Path, processes: int = 1) -> None:
        self.name = Path(recipe["run.output_dir"]).name
        path, self.log = folder / f"{self.name}.yaml", folder / f"{self.name}.log"
        path.write_text(yaml.safe_dump(recipe))
        self.log.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(processes):
            environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            process = CONTEXT.Process(target=work, args=(script, str(path), str(self.log), environment))
            process.start()
            self.processes.append(process)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if process.is_alive() and (ranks is None or rank in ranks):
                os.kill(process.pid, number)

    def kill(self) -> None:
        """All of it, at once."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit codes."""
        for process in self.processes:
            process.join(timeout)
            if process.exitcode is None:
                self.send(signal.SIGUSR1)  # each says where it is
                time.sleep(1)
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running:\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def finish(self) -> None:
        assert set(self.wait()) == {0}, self.output()

    def output(self) -> str:
        return self.log.read_text()[-3000:]


def stop_at_the_first_checkpoint(running: Running, run: Path) -> None:
    """By SIGTERM to one process, once there is a checkpoint."""
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints").glob("step-*")):
        assert running.alive() and time.monotonic() < deadline, running.output()
        time.sleep(0.002)
    running.send(signal.SIGTERM, ranks=[len(running.processes) - 1])
    assert set(running.wait()) <= {0, 128 + signal.SIGTERM}, running.output()
