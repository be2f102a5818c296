"""Signals end a training run at a step's border, after a save, not in the middle of one."""

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator


class Interrupted(Exception):
    """A signal asked the run to stop, and it has saved; the exit code is 128 + the signal (143 for SIGTERM)."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number


class Interruption:
    """Context in which SIGTERM, SIGINT and SIGUSR1 are noted instead of obeyed; a second one exits at once.

    The loop asks `requested` once per step, saves, and raises `Interrupted`. `accelerate launch` of a single process
    ends at SIGTERM and tells its child nothing; so the end of that launcher counts as one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._launcher = os.getppid() if is_accelerate(os.getppid()) else None

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived in this process, or its launcher has ended."""
        return self.signal_number is not None or self._launcher not in (None, os.getppid())

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            os._exit(128 + signal_number)
        self.signal_number = signal_number

    def __enter__(self) -> "Interruption":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()


def is_accelerate(process: int) -> bool:
    """Whether a process is `accelerate launch`, where the system tells."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(b"accelerate" in word for word in words) and b"launch" in words


def requested_anywhere(interruption: Interruption, accelerator: Accelerator) -> bool:
    """Whether a signal reached any process: all of them stop at the same step."""
    if accelerator.num_processes == 1:
        return interruption.requested
    requested = torch.tensor(float(interruption.requested), device=accelerator.device)
    return bool(accelerator.reduce(requested) > 0)
