"""How a run starts, and what it survives: what the scripts share around their loops."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from hubgen.data.image_folder import ImageTextFolder
from hubgen.errors import one_line
from hubgen.training.checkpoints import Checkpoints
from hubgen.training.finite import NonFiniteError
from hubgen.training.interruption import Interrupted, Interruption
from hubgen.training.settings import SettingsError, UnfinishedError

# How many processes launchers say that there are.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def accelerator_of(settings: Any) -> Accelerator:
    """The accelerator of a run, in the precision that the settings or the launcher say.

    Args:
        settings: With `mixed_precision`, `gradient_accumulation_steps`, `report_to` and `output_dir`.

    Raises:
        SettingsError: Settings and launcher disagree, or this is one of several processes that know nothing of each
            other and would all train the same.
    """
    told, asked = os.environ.get("ACCELERATE_MIXED_PRECISION"), settings.mixed_precision
    if asked is not None and told not in (None, "no", asked):
        raise SettingsError(
            f"setting 'mixed_precision': got '{asked}', expected '{told}' as the launcher has it, or none."
        )
    accelerator = Accelerator(
        mixed_precision=asked,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=str(settings.output_dir),
    )
    for name in SIZES:
        number = os.environ.get(name, "")
        if number.isdecimal() and int(number) > 1 and accelerator.num_processes == 1:
            raise SettingsError(
                f"{name}: got {number} processes that do not know each other, expected one, or a launcher that "
                "connects them: accelerate launch, or torchrun --nproc_per_node N -m SCRIPT."
            )
    return accelerator


def open_split(settings: Any, split: str | None) -> ImageTextFolder:
    """The pictures of a split."""
    return ImageTextFolder(
        settings.data_dir,
        split=split,
        size=settings.size,
        caption_column=settings.caption_column,
        on_error=settings.on_bad_picture,
        max_pixels=settings.max_pixels,
    )


def describe(accelerator: Accelerator, settings: Any, pictures: int, parameters: int, left_out: Sequence[str]) -> None:
    """Prints the first lines of a run: what of the data is not used, and what trains on what."""
    processes, accumulation = accelerator.num_processes, settings.gradient_accumulation_steps
    batch = settings.batch_size * accumulation * processes
    of_what = f"{settings.batch_size} a process" + (f" x {accumulation} batches" if accumulation > 1 else "")
    of_what += f" x {processes} processes" if processes > 1 else ""
    accelerator.print(*left_out, sep="\n", end="\n" if left_out else "")
    accelerator.print(
        f"{parameters:,} parameters learn in precision {accelerator.mixed_precision}, in {processes} "
        f"{'process' if processes == 1 else 'processes'} on {accelerator.device.type}; {batch} pictures a step "
        f"({of_what}); {pictures} pictures, {-(-pictures // batch)} steps an epoch"
    )


def check_steps(first_step: int, max_train_steps: int, checkpoints: Checkpoints) -> None:
    """Raises SettingsError for a run that is to be shorter than it is already."""
    if first_step > max_train_steps:
        raise SettingsError(
            f"setting 'max_train_steps': got {max_train_steps}, expected at least {first_step}: so many steps are done "
            f"({checkpoints.folder})."
        )


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


def ignore_signals(worker: int) -> None:
    """For data workers: the main process decides what a signal to all of them means."""
    for number in Interruption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
