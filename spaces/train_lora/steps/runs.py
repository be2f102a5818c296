"""Trainings of visitors: scripts of hubgen, each in a process and a folder of its own, one after the other.

    trainings = Trainings(benches, device); trainings.start(bench, wish, folder, settings, learns)
    bench.run.seen()                # what is to be told of it now, read from what the script writes

The script is told by SIGTERM to stop; it saves at the border of a step, and the same command goes on from there.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image

from hubgen.spaces.kit.limits import Limits, Refused
from hubgen.training.kit.grids import cut_grid
from hubgen.training.kit.parse import settings_to_dict
from hubgen.training.kit.script import NON_FINITE_ERROR, UNFINISHED_ERROR
from steps.amounts import lasts, room
from steps.bench import Bench, Benches
from steps.recipe import SCRIPTS, Wish

logger = logging.getLogger("hubgen.spaces.training")

State = Literal["waiting", "running", "stopping", "stopped", "done", "failed"]
TICK = 0.25
"""Seconds between two looks at what runs"""
LOOK_AT_DISK = 5.0
GRACE = 90.0
"""Seconds from being told to stop to being ended"""
SECRETS = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY")
"""Names of variables that no script of a visitor needs"""
PROGRESS = re.compile(r"training: [^\r\n]*?(\d+)/(\d+) \[")
"""Of the script's bars the one of the steps"""
TAIL = 4000


@dataclass(frozen=True)
class Seen:
    """What there is to tell of a training."""

    state: State
    text: str
    """Where it is, in words"""
    step: int
    of: int
    curve: tuple[tuple[int, float], ...] = ()
    """(step, loss)"""
    grids: tuple[tuple[int, tuple[Image.Image, ...]], ...] = ()
    """(step, a picture of each prompt): before, in the middle, the newest"""
    seconds_left: float | None = None
    goes_on: bool = False
    """Whether it can go on"""
    saved: int = 0
    """Steps that can be taken as they are, where it has ended before its time"""


@dataclass
class Run:
    """One training, from its start to its end, with all its stops."""

    bench: Bench
    wish: Wish
    folder: Path
    """Its own, named as the log calls it"""
    settings: Any
    learns: str
    limits: Limits
    state: State = "waiting"
    words: str = ""
    """Why it ended as it did"""
    place: int = 0
    """In the queue, from 1"""
    process: subprocess.Popen[bytes] | None = None
    steps: int = 0
    """That are to be done; fewer than wished where it is to end early"""
    as_it_is: bool = False
    """Whether no step is left to do, and what is saved is to be written"""
    launches: int = 0
    begun: float = 0.0
    told: float = 0.0
    """When it was told to stop"""
    spent: float = 0.0
    """Seconds of the starts before this one"""
    looked: float = 0.0
    size: int = 0
    """Bytes of all files of its visitor, when that was looked at last"""
    _grids: dict[int, tuple[Image.Image, ...]] = field(default_factory=dict, repr=False)

    @property
    def number(self) -> str:
        """By which the log calls it."""
        return self.folder.name

    @property
    def out(self) -> Path:
        """Where the script writes."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """What the script said."""
        return self.folder / "log.txt"

    @property
    def result(self) -> Path | None:
        """The folder of the adapter, once there is one."""
        folder = self.out / "lora"
        return folder if self.state == "done" and (folder / "pytorch_lora_weights.safetensors").is_file() else None

    @property
    def seconds(self) -> float:
        """That it has had."""
        return self.spent + (time.monotonic() - self.begun if self.process is not None else 0.0)

    def excess(self) -> str:
        """What it has used up, found and allowed, in words; none if it may go on."""
        if self.seconds > self.limits.training_seconds:
            return f"It ran for {lasts(self.seconds)}, and a training may take {lasts(self.limits.training_seconds)}."
        if self.size > self.limits.session_bytes:
            return f"Its files take {room(self.size)}, and may take {room(self.limits.session_bytes)}."
        return ""

    def look(self) -> None:
        """Sees what its visitor's files take."""
        self.looked, self.size = time.monotonic(), bytes_below(self.bench.folder)

    # ---- its process ----

    def launch(self, device: str) -> None:
        """Starts the script, which goes on where it stopped."""
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(settings_to_dict(self.settings), sort_keys=False), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not SECRETS.search(name)}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # the page has its model already
        if device == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, "-m", f"hubgen.training.{SCRIPTS[self.wish.kind]}", "--config", str(recipe)]
        command += ["--run.max_train_steps", str(self.steps)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.begun, self.told, self.state, self.launches = time.monotonic(), 0.0, "running", self.launches + 1

    def tell_to_stop(self, words: str) -> None:
        """Asks the script to save and end; ends it if it does not."""
        if self.process is None:
            return
        if not self.told:
            self.told, self.words, self.state = time.monotonic(), words, "stopping"
            self.process.send_signal(signal.SIGTERM)
        elif time.monotonic() - self.told > GRACE:
            self.process.kill()

    def ended(self, code: int) -> None:
        """Notes how the process ended."""
        self.spent, self.process = self.seconds, None
        tail = self.tail()
        if code == 0 or code == UNFINISHED_ERROR:
            self.state, self.words = "done", "" if code == 0 else "Some of the pictures along the way failed."
        elif self.told:
            self.state = "stopped"
        elif code == NON_FINITE_ERROR:
            self.state = "failed"
            self.words = "What it learned ran away, and the loss is no number any more: try a lower learning rate."
        elif code == -signal.SIGKILL:
            self.state, self.words = "failed", "The machine ended it, perhaps for lack of memory: try a smaller rank."
        else:
            self.state, self.words = "failed", f"The training failed. It is noted in the log as {self.number}."
        if self.state == "done" and not (self.out / "lora").is_dir():
            self.state, self.words = "failed", f"Nothing could be saved. It is noted in the log as {self.number}."
        if self.state == "failed":
            logger.error("training %s ended with %d: %s", self.number, code, tail[-800:])

    def tail(self) -> str:
        """The end of what the script said."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(self.log.stat().st_size - TAIL, 0))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    # ---- what is told of it ----

    def seen(self) -> Seen:
        """As it is now."""
        curve, rate = self.curve()
        step, left, halted = self.done_steps(), None, self.state in ("stopped", "failed")
        if self.state == "done":
            step = self.steps
        elif self.state == "stopped":
            step = saved_step(self.out)
        elif curve:
            step = max(step, curve[-1][0])
        if self.state == "running" and rate:
            left = max(self.steps - step, 0) * rate
        return Seen(
            state=self.state,
            text=self.text(step),
            step=step,
            of=self.wish.steps,
            curve=tuple(curve),
            grids=tuple(self.grids()),
            seconds_left=left,
            goes_on=halted and not self.excess(),
            saved=saved_step(self.out) if halted else 0,
        )

    def text(self, step: int) -> str:
        """Where it is, in words."""
        if self.state == "waiting":
            before = self.place - 1
            others = "1 training is" if before == 1 else f"{before} trainings are"
            return "It is about to begin." if before < 1 else f"{others} before yours."
        if self.state == "running":
            if self.as_it_is:
                return "What it has learned so far is being made ready."
            if step == 0:
                return "The script is starting, and draws what the base makes of the words."
            if step >= self.steps:
                return "All steps are done; what was learned is being written."
            return f"Step {step} of {self.wish.steps}"
        if self.state == "stopping":
            return "It stops at the end of this step, and saves."
        if self.state == "stopped":
            saved = f"{step} of {self.wish.steps} steps are saved." if step else "Nothing had been learned by then."
            return f"{self.words} {saved}"
        if self.state == "done":
            return f"Done: {step} steps. {self.words}".strip()
        return self.words

    def rows(self) -> list[dict[str, Any]]:
        """What the run measured."""
        rows = []
        try:
            lines = (self.out / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line may be half written
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
        return rows

    def curve(self) -> tuple[list[tuple[int, float]], float | None]:
        """(step, loss) of each that was noted, and the seconds that a step takes."""
        rows = [row for row in self.rows() if isinstance(row.get("loss"), float)]
        speeds = [row["images_per_second"] for row in rows[-5:] if row.get("images_per_second")]
        rate = self.settings.run.batch_size * len(speeds) / sum(speeds) if speeds else None
        return [(row["step"], row["loss"]) for row in rows], rate

    def done_steps(self) -> int:
        """As the script's progress bar says."""
        found = [match for match in PROGRESS.finditer(self.tail()) if int(match[2]) == self.steps]
        return int(found[-1][1]) if found and self.state != "waiting" else 0

    def grids(self) -> list[tuple[int, tuple[Image.Image, ...]]]:
        """Pictures of the prompts: the first, one in the middle, the newest."""
        files = sorted((self.out / "validation").glob("step-*.png"))
        chosen = files if len(files) <= 3 else [files[0], files[len(files) // 2], files[-1]]
        found = []
        for file in chosen:
            step = int(file.stem.removeprefix("step-"))
            if step not in self._grids:
                with contextlib.suppress(OSError, SyntaxError, ValueError):  # it may be half written
                    self._grids[step] = tuple(cut_grid(file, len(self.wish.prompts)))
            if step in self._grids:
                found.append((step, self._grids[step]))
        return found


@dataclass(frozen=True)
class Took:
    """Seconds of a training that went through at once."""

    a_picture: float
    """Of its steps"""
    rest: float
    """Of all beside the steps"""
    drawn: int
    """Pictures that were drawn in the rest"""


class Trainings:
    """The trainings of a page, one at a time.

    Args:
        benches: Of the visitors.
        device: That scripts are to use.
    """

    def __init__(self, benches: Benches, device: str):
        self.benches, self.limits, self.device = benches, benches.limits, device
        self.lock = threading.RLock()
        self.waiting: deque[Run] = deque()
        self.running: Run | None = None
        self.closed = threading.Event()
        self.figures = {"done": 0, "stopped": 0, "failed": 0}
        self.last: Took | None = None
        threading.Thread(target=self._watch, name="trainings", daemon=True).start()

    # ---- what visitors ask ----

    def start(self, bench: Bench, wish: Wish, folder: Path, settings: Any, learns: str) -> Run:
        """Puts a training into the queue, in place of the one that the visitor had.

        Args:
            bench: Of the visitor.
            wish: What is to be learned.
            folder: Of this training alone.
            settings: Of the script, which have it write there.
            learns: What learns, in words.

        Raises:
            Refused: It is full, or the visitor has one that runs.
        """
        with self.lock:
            self.check_room(bench)
            run, before = Run(bench, wish, folder, settings, learns, self.limits, steps=wish.steps), bench.run
            bench.run = run
            if before is not None:
                shutil.rmtree(before.folder, ignore_errors=True)
            self._wait(run)
        return run

    def check_room(self, bench: Bench) -> None:
        """Raises Refused where a visitor cannot begin one now."""
        if bench.run is not None and bench.run.state in ("waiting", "running", "stopping"):
            raise Refused("Your training is under way; stop it first.")
        if len(self.waiting) >= self.limits.trainings_waiting:
            raise Refused(f"{len(self.waiting)} trainings are waiting already; please try again later.")

    def stop(self, bench: Bench) -> None:
        """Stops a visitor's training, whether it runs or waits."""
        with self.lock:
            run = bench.run
            if run is None or run.state not in ("waiting", "running"):
                raise Refused("Nothing of yours is being trained.")
            if run.state == "waiting":
                self.waiting.remove(run)
                run.state, run.words = "stopped", "It was taken out of the queue."
                self._count()
            else:
                run.tell_to_stop("Stopped.")

    def go_on(self, bench: Bench, as_it_is: bool = False) -> None:
        """Goes on with a training that was stopped, or ends it with what it has learned so far.

        Args:
            bench: Of the visitor.
            as_it_is: Whether it is to end at the step that is saved.
        """
        with self.lock:
            run = bench.run
            if run is None or run.state not in ("stopped", "failed"):
                raise Refused("There is no training of yours that was stopped.")
            self.check_room(bench)
            saved, excess = saved_step(run.out), run.excess()
            if as_it_is and not saved:
                raise Refused("It ended before anything was learned.")
            if excess and not as_it_is:
                raise Refused(f"{excess} {'Take what it has learned so far.' if saved else 'Train anew.'}")
            run.as_it_is, run.steps = as_it_is, saved if as_it_is else run.wish.steps
            self._wait(run)

    def forget(self, bench: Bench) -> None:
        """Ends what a visitor has, and removes their folder."""
        with self.lock:
            run = bench.run
            if run is not None and run in self.waiting:
                self.waiting.remove(run)
                self._count()
            if run is not None and run.process is not None:
                run.process.kill()
                run.process.wait()
                run.process = None
                if self.running is run:
                    self.running = None
        shutil.rmtree(bench.folder, ignore_errors=True)

    def close(self) -> None:
        """Ends all."""
        self.closed.set()
        with self.lock:
            self.waiting.clear()
            if self.running is not None:
                self.forget(self.running.bench)

    # ---- the queue ----

    def _wait(self, run: Run) -> None:
        run.state = "waiting"
        self.waiting.append(run)
        self._count()
        logger.info("training %s: joined, %d waiting", run.number, len(self.waiting))

    def _count(self) -> None:
        for place, run in enumerate(self.waiting, 1 + (self.running is not None)):
            run.place = place

    def _watch(self) -> None:
        while not self.closed.wait(TICK):
            try:
                self.look()
            except Exception:
                logger.exception("the queue of trainings")

    def look(self) -> None:
        """Looks once at what runs, what waits and who has left."""
        for bench in self.benches.gone():
            logger.info("a visitor has left; their files are removed")
            self.forget(bench)
        with self.lock:
            run = self.running
            if run is not None and run.process is not None:
                code = run.process.poll()
                if code is None:
                    self._hold_to_limits(run)
                    return
                self._ended(run, code)
            if self.waiting and self.running is None and not self.closed.is_set():
                run = self.waiting.popleft()
                self.running = run
                self._count()
                run.launch(self.device)

    def _ended(self, run: Run, code: int) -> None:
        run.ended(code)
        self.running = None
        self._count()
        self.figures[run.state] += 1
        _, rate = run.curve()
        if rate and run.state == "done" and run.launches == 1:
            wish, pictures = run.wish, run.settings.run.batch_size * (1 + run.wish.beside)
            self.last = Took(rate / pictures, run.seconds - rate * wish.steps, wish.drawn)
        totals = ", ".join(f"{number} {name}" for name, number in self.figures.items() if number)
        logger.info("training %s: %s after %.0f s; %s in all", run.number, run.state, run.seconds, totals)

    def _hold_to_limits(self, run: Run) -> None:
        if time.monotonic() - run.looked > LOOK_AT_DISK:
            run.look()
        if run.told:
            run.tell_to_stop("")
        elif not run.as_it_is:
            if excess := run.excess():
                run.tell_to_stop(excess)
        elif time.monotonic() - run.begun > self.limits.training_seconds:
            run.tell_to_stop(f"What was saved was not ready after {lasts(self.limits.training_seconds)}.")


def saved_step(out: Path) -> int:
    """The last step that a run has saved; 0 if none."""
    steps = [re.search(r"(\d+)$", path.name) for path in (out / "checkpoints").glob("step-*")]
    return max((int(found[1]) for found in steps if found), default=0)


def bytes_below(folder: Path) -> int:
    """Of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # checkpoints come and go
            total += path.stat().st_size if path.is_file() else 0
    return total
