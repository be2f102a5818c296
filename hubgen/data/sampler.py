"""Which samples and which random numbers belong to a training step: functions of (seed, step, rank), not of history.

A resumed run asks for step 1234 and gets what an uninterrupted run got there, whatever was saved, however many workers
load, and however often validation drew random numbers in between. There is no sampler state to save.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from hubgen.checks import whole


def step_seed(seed: int, step: int, rank: int = 0, stream: str = "noise") -> int:
    """A 63-bit seed that differs for every (seed, step, rank, stream)."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_generator(
    seed: int, step: int, rank: int = 0, stream: str = "noise", device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator for one use at one step.

    Args:
        seed: Seed of the run.
        step: Step, or micro-step where gradients accumulate.
        rank: Index of the process.
        stream: Name of the use; two uses at the same step have different names ("noise", "timestep", "crop").
        device: Where the numbers are drawn; the same seed draws other numbers on another kind of device.
    """
    return torch.Generator(device).manual_seed(step_seed(seed, step, rank, stream))


class StepBatchSampler(Sampler[list[int]]):
    """Batches of indices; the batch of a step depends on (seed, step) alone.

    The samples stand in an endless row, one permutation of the data after the other, and step s of rank r takes the
    next `batch_size` of it. So batches cross the border of an epoch, no sample is dropped, and between two uses of a
    sample every other one is used within two epochs.

    Args:
        num_samples: Size of the data.
        batch_size: Samples a step and process.
        num_steps: Steps of the whole run; iteration ends before this one.
        seed: Seed of the run.
        start_step: First step that iteration yields (the resumed one).
        rank: Index of the process.
        world_size: Number of processes; together they take `world_size * batch_size` samples a step.

    Raises:
        ValueError: A size below 1, a negative step, or a rank outside [0, world_size).
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_steps: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("batch_size", batch_size, 1),
            ("num_steps", num_steps, 0),
            ("start_step", start_step, 0),
            ("world_size", world_size, 1),
        ):
            whole(name, value, least)
        whole("rank", rank, 0, world_size - 1)
        self.num_samples, self.batch_size, self.num_steps = num_samples, batch_size, num_steps
        self.seed, self.start_step, self.rank, self.world_size = seed, start_step, rank, world_size
        self._permutations: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[int]:
        """Indices of the samples of `step`."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return [self._sample(position) for position in range(first, first + self.batch_size)]

    def _sample(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if epoch not in self._permutations:
            # A batch reads neighbouring epochs in ascending order, so older permutations are not asked for again.
            self._permutations = {e: order for e, order in self._permutations.items() if e >= epoch - 1}
            generator = step_generator(self.seed, epoch, stream="order")
            self._permutations[epoch] = torch.randperm(self.num_samples, generator=generator).tolist()
        return self._permutations[epoch][offset]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.num_steps):
            yield self.batch(step)

    def __len__(self) -> int:
        return max(self.num_steps - self.start_step, 0)
