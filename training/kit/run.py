"""The bookkeeping around a training loop: processes, checkpoints, signals, logs. The loop itself stands in the script.

    run = Run(settings.run)
    trained = run.trains("backbone", backbone, settings.optim)
    run.open(identity)                                     # before anything heavy: the folder is this run's
    ...
    run.restore()                                          # where an earlier run of the same command stopped
    batches = run.batches(row, read)
    for step in run.steps(validate, every=1000, measured="held_out_loss"):
        for draws, batch in run.micro_batches(batches):
            ...
            trained.backward(loss.mean(), names)
        run.update(step)
    run.finish()

After the body of a step, `steps` logs, saves, validates, and ends the run where a signal asked for it.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hubgen.data.order import Draw, EndlessRow, seed_of
from hubgen.errors import one_line
from hubgen.training.kit.checkpoints import Checkpoints, Stateful
from hubgen.training.kit.finite import NonFiniteError
from hubgen.training.kit.groups import Optim, RunOptions
from hubgen.training.kit.metrics import Metrics
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.post_hoc import store
from hubgen.training.kit.schedules import ENDLESS
from hubgen.training.kit.script import UnfinishedError
from hubgen.training.kit.signals import Interrupted, Interruption, requested_anywhere
from hubgen.training.kit.trained import Trained
from hubgen.training.kit.window import Window

T = TypeVar("T")
Batch = tuple[list[Draw], T]

# How many processes launchers say that there are.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

SHORT = 30
"""Seconds that are not worth a word"""

PATIENCE = timedelta(hours=4)
"""How long a process waits for the others, while one of them writes or validates"""


class Run:
    """A run of a script, on one or several processes.

    Args:
        options: How long, how much at once, and where to.

    Raises:
        SettingsError: Settings and launcher disagree.
    """

    def __init__(self, options: RunOptions) -> None:
        self.options, self.survived = options, Survived()
        self.accelerator = accelerator_of(options)
        self.device, self.writer = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.window = Window(self.accelerator)
        self._trained: list[Trained] = []
        self._kept: dict[str, Stateful] = {}
        self.first_step = 0
        """Steps that are done already"""
        torch.manual_seed(options.seed)  # initial weights only; all later randomness derives from the seed and places

    @property
    def batch_size(self) -> int:
        """Pictures of a step, of all processes and accumulated batches."""
        return self.options.batch_size * self.options.gradient_accumulation_steps * self.world_size

    def print(self, *lines: str) -> None:
        """Says something, once."""
        for line in lines:
            self.accelerator.print(line)

    # ---- before the loop ----

    def trains(self, name: str, module: nn.Module, optim: Optim, forward: nn.Module | None = None) -> Trained:
        """A network that learns in this run; see `Trained`."""
        trained = Trained(name, module.to(self.device), optim, self.options, self.accelerator, forward)
        self._trained.append(trained)
        return trained

    def keeps(self, name: str, part: Stateful) -> None:
        """Something more that checkpoints have to hold."""
        self._kept[name] = part

    def open(self, identity: Mapping[str, Any], optim: Optim) -> None:
        """Takes the output folder for this run.

        Args:
            identity: What makes the run what it is, as JSON values: settings, digests of models and data. The pictures
                of a step and the precision are added.
            optim: Of what learns: whether its learning rate depends on the length of the run.

        Raises:
            CheckpointError: Another process or another run has the folder.
        """
        identity = {**identity, "batch": self.batch_size, "mixed_precision": self.accelerator.mixed_precision}
        if optim.lr_schedule not in ENDLESS:
            identity["max_train_steps"] = self.options.max_train_steps
        self.checkpoints = Checkpoints(
            self.options.output_dir, self.options.keep_checkpoints, identity=identity, writer=self.writer
        )
        self.checkpoints.check()

    def describe(self, pictures: int, *notes: str) -> None:
        """Prints the first lines: what of the data is not used, and what trains on what."""
        options, processes = self.options, self.world_size
        accumulation = options.gradient_accumulation_steps
        of_what = f"{options.batch_size} a process" + (f" x {accumulation} batches" if accumulation > 1 else "")
        of_what += f" x {processes} processes" if processes > 1 else ""
        learning = ", ".join(f"{one.parameters:,} parameters of the {one.name}" for one in self._trained)
        self.print(
            *notes,
            f"{learning} learn in precision {self.accelerator.mixed_precision}, in {processes} "
            f"{'process' if processes == 1 else 'processes'} on {self.device.type}; {self.batch_size} pictures a step "
            f"({of_what}); {pictures} pictures, {-(-pictures // self.batch_size)} steps an epoch",
        )

    def restore(self) -> None:
        """Goes on where an earlier run of the same command stopped.

        Raises:
            CheckpointError: See `Checkpoints.restore`.
            SettingsError: The run is to be shorter than it is already, or processes see different checkpoints.
        """
        step, extra = self.checkpoints.restore(self._modules, self._optimizers) or (0, {})
        steps = self._of_writer(step)
        if steps != step:
            raise SettingsError(
                f"setting 'run.output_dir': process {self.rank} finds step {step} in it, and the first one {steps}; "
                "expected a folder that all processes share."
            )
        if step > self.options.max_train_steps:
            raise SettingsError(
                f"setting 'run.max_train_steps': got {self.options.max_train_steps}, expected at least {step}: so many "
                f"steps are done ({self.checkpoints.folder})."
            )
        self.first_step = step
        if self.accelerator.scaler is not None and "scaler" in extra:
            self.accelerator.scaler.load_state_dict(extra["scaler"])
        self.window.load(extra.get("window", {}), self.writer)
        self.metrics = Metrics(self.options.output_dir / "metrics.jsonl", step, self.writer)
        if self.options.report_to != "none":
            # What a killed run logged beyond its last checkpoint is logged again.
            more = {"tensorboard": {"purge_step": step + 1}, "wandb": {"name": self.options.output_dir.name}}
            project = "logs" if self.options.report_to == "tensorboard" else "hubgen"
            self.accelerator.init_trackers(project, init_kwargs=more)

    def batches(self, row: EndlessRow, read: Callable[[Sequence[Draw]], T], num_workers: int = 0) -> Iterator[Batch[T]]:
        """The batches of this process from the first step on, with what `read` gives for their pictures.

        Args:
            row: Of the pictures.
            read: Works on the CPU, in worker processes if there are any.
            num_workers: Of them.
        """
        accumulation = self.options.gradient_accumulation_steps
        numbers = range(self.first_step * accumulation, self.options.max_train_steps * accumulation)
        reader = _Reader(row, read, self.options.batch_size, accumulation, self.rank, self.world_size)
        return iter(
            DataLoader(
                reader,
                batch_size=None,
                sampler=numbers,
                num_workers=num_workers,
                # Not sent to them by pickle, whatever Python's default is: `read` knows the whole run.
                multiprocessing_context="fork" if num_workers else None,
                collate_fn=_as_it_is,
                worker_init_fn=ignore_signals,
            )
        )

    # ---- the loop ----

    def steps(self, validate: Callable[[int], None] | None = None, every: int = 1, measured: str = "") -> Iterator[int]:
        """The steps that are left, counted from 1.

        Args:
            validate: Measures after a step; all processes take part. What it raises is said and survived.
            every: Steps between validations; there is one after the last step too.
            measured: A name that it reports: if a killed run has not come to it, it is done before the first step.

        Raises:
            Interrupted: A signal asked for the end, and the step is saved.
            NonFiniteError: See `Trained.update`.
        """
        first, last = self.first_step, self.options.max_train_steps
        self.progress = tqdm(total=last, initial=first, desc="training", disable=not self.writer, mininterval=1)
        due = validate is not None and first > 0 and (first % every == 0 or first == last)
        if due and measured and not self._of_writer(self.writer and self.metrics.has(first, measured)):
            assert validate is not None
            self._validate(validate, first)  # the run was stopped between the checkpoint and this
        self._clock, self._logged = time.perf_counter(), first
        with Interruption() as interruption:
            for step in range(first + 1, last + 1):
                for trained in self._trained:
                    trained.begin(step)
                self._begun = time.perf_counter()
                self._step = step
                yield step
                self.progress.update()
                if step == first + 2:  # the first one also warms up
                    self._say_how_long(last - step)
                if step % self.options.log_steps == 0 or step == last:
                    self._log(step)
                stop = requested_anywhere(interruption, self.accelerator)
                if step % self.options.checkpoint_steps == 0 or step == last or stop:
                    self._save(step)
                # After the checkpoint: whatever happens here, the steps are saved.
                if validate is not None and (step % every == 0 or step == last):
                    self._validate(validate, step)
                    self._clock = time.perf_counter()
                if stop and step < last:
                    self.checkpoints.close()  # the folder is free for the next, also within this process
                    raise Interrupted(
                        interruption.signal_number or signal.SIGTERM,
                        f"step {step} is saved in {self.checkpoints.folder}; the same command goes on from there.",
                    )
        self.progress.close()

    def micro_batches(self, batches: Iterator[Batch[T]]) -> Iterator[Batch[T]]:
        """The batches of one step, whose gradients add up; processes talk to each other in the last one only."""
        modules = [trained.module for trained in self._trained]
        accumulation = self.options.gradient_accumulation_steps
        for number in range(accumulation):
            # Dropout draws from the global generator.
            place = ((self._step - 1) * accumulation + number) * self.world_size + self.rank
            torch.manual_seed(seed_of(self.options.seed, place, "layers"))
            with self.accelerator.accumulate(*modules):
                yield next(batches)

    def update(self, step: int) -> None:
        """Moves the weights of everything that learnt in this step."""
        for trained in self._trained:
            if trained.has_gradient:
                trained.update(step, self.checkpoints.steps)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Notes what was measured at a step, in metrics.jsonl and with the tracker."""
        self.metrics.write(step, dict(values))
        self.accelerator.log(dict(values), step=step)

    # ---- after the loop ----

    def finish(self) -> None:
        """Ends the trackers; raises UnfinishedError if anything beside the training failed."""
        self.accelerator.end_training()
        self.checkpoints.close()
        self.survived.finish()

    # ---- parts ----

    @property
    def _modules(self) -> dict[str, Any]:
        return {name: one for trained in self._trained for name, one in trained.modules.items()} | self._kept

    @property
    def _optimizers(self) -> dict[str, Any]:
        return {name: one for trained in self._trained for name, one in trained.named_optimizers.items()}

    def _of_writer(self, value: T) -> T:
        """The main process's value, in all."""
        if self.world_size == 1:
            return value
        return broadcast_object_list([value])[0]

    def _say_how_long(self, steps: int) -> None:
        """Says what the steps that are left take, by the last one."""
        seconds = steps * (time.perf_counter() - self._begun)
        if seconds > SHORT:
            self.print(f"about {max(seconds / 60, 1):.0f} minutes for {steps} more steps, beside validations")

    def _log(self, step: int) -> None:
        count, self._logged = step - self._logged, step
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        values = self.window.means()
        values["learning_rate"] = self._trained[0].learning_rate
        values["images_per_second"] = count * self.batch_size / seconds
        memory = _memory(self.device)
        self.progress.set_postfix_str(
            f"loss {values.get('loss', float('nan')):.4f}, {values['images_per_second']:.3g} images/s, {memory:.1f} GB"
        )
        self.report(step, values)

    def _save(self, step: int) -> None:
        scaler = self.accelerator.scaler
        extra = {"window": self.window.sums(), **({} if scaler is None else {"scaler": scaler.state_dict()})}
        self.checkpoints.save(step, self._modules, self._optimizers, extra)
        for trained in self._trained:
            if trained.stored:
                store(self.options.output_dir / "averages", step, trained.stored, self.writer)
        self.accelerator.wait_for_everyone()

    def _validate(self, validate: Callable[[int], None], step: int) -> None:
        with self.survived(f"the validation of step {step}"):
            validate(step)


class _Reader(Dataset):
    """What is read for each batch of a process, by its number."""

    def __init__(
        self,
        row: EndlessRow,
        read: Callable[[Sequence[Draw]], Any],
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
    ):
        self.row, self.read, self.batch_size = row, read, batch_size
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size

    def __getitem__(self, number: int) -> Batch[Any]:
        step, inside = divmod(number, self.accumulation)
        draws = self.row.draws(step, (inside * self.world_size + self.rank) * self.batch_size, self.batch_size)
        return draws, self.read(draws)


def _as_it_is(batch: T) -> T:
    """What `read` gave is a batch already."""
    return batch


class Survived:
    """Work beside the training that may fail without ending it: it is said at once, and again at the end.

    with survived("the validation of step 100"):
        ...
    survived.finish()
    """

    def __init__(self) -> None:
        self.failures: list[str] = []

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except (Interrupted, NonFiniteError):
            raise
        except Exception as error:
            self.failures.append(f"{what} failed: {one_line(error)}")
            print(f"error: {self.failures[-1]}. The training itself is not touched by it.", file=sys.stderr)

    def finish(self) -> None:
        """Raises UnfinishedError if anything failed."""
        if self.failures:
            raise UnfinishedError(f"the training is done and saved, but {'; '.join(self.failures)}")


def accelerator_of(options: RunOptions) -> Accelerator:
    """The accelerator of a run, in the precision that the settings or the launcher say.

    Raises:
        SettingsError: Settings and launcher disagree, or this is one of several processes that know nothing of each
            other and would all train the same.
    """
    told, asked = os.environ.get("ACCELERATE_MIXED_PRECISION"), options.mixed_precision
    if asked is not None and told not in (None, "no", asked):
        raise SettingsError(
            f"setting 'run.mixed_precision': got '{asked}', expected '{told}' as the launcher has it, or none."
        )
    accelerator = Accelerator(
        mixed_precision=asked,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=str(options.output_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise SettingsError(
            "the launcher: got DeepSpeed, whose shards of optimizer states cannot be saved so that a run goes on "
            "exactly; expected DDP or FSDP2 (training/accelerate/fsdp2.yaml)."
        )
    for name in SIZES:
        number = os.environ.get(name, "")
        if number.isdecimal() and int(number) > 1 and accelerator.num_processes == 1:
            raise SettingsError(
                f"{name}: got {number} processes that do not know each other, expected one, or a launcher that "
                "connects them: accelerate launch, or torchrun --nproc_per_node N -m SCRIPT."
            )
    return accelerator


def ignore_signals(worker: int) -> None:
    """For data workers: the main process decides what a signal to all of them means."""
    for number in Interruption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _memory(device: torch.device) -> float:
    """GB that were in use at most: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
