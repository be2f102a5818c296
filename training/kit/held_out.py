"""The loss on pictures that are not trained on, at fixed times and noise, so that only the weights move it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hubgen.data.order import Draw, generator_of
from hubgen.schedulers.objective import Objective
from hubgen.training.kit.conditioned import ask
from hubgen.training.kit.pictures import Pictures
from hubgen.training.kit.run import Run

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)

Load = Callable[[Sequence[Draw]], tuple[Any, ...]]


class HeldOut:
    """What `TIMES` and pictures of a validation split say about a network; the work is shared by all processes.

    Args:
        objective: That is learned.
        pictures: Of the split.
        load: Latents (B, C, h, w), condition and, with a control, what it is shown of pictures, on the run's device;
            always the same for the same.
        most: Pictures that are measured, at most.
        run: The processes.
    """

    def __init__(self, objective: Objective, pictures: Pictures, load: Load, most: int, run: Run) -> None:
        self.objective, self.load, self.run = objective, load, run
        by_size: dict[Any, list[int]] = {}
        for row in range(min(len(pictures), most)):
            by_size.setdefault(pictures.views.buckets[row], []).append(row)
        size = run.options.batch_size
        self.batches = [rows[i : i + size] for rows in by_size.values() for i in range(0, len(rows), size)]

    @torch.no_grad()
    def __call__(self, backbone: Any) -> dict[str, float]:
        """The mean loss at each time, and on average, of a backbone, or of one with a control."""
        sums = torch.zeros(len(TIMES) + 1, dtype=torch.float64)
        # Every process is as often at work, because those of a sharded network move together.
        rounds = -(-len(self.batches) // self.run.world_size)
        for number in range(self.run.rank, rounds * self.run.world_size, self.run.world_size):
            rows = self.batches[number % len(self.batches)]
            losses = self._losses(backbone, rows)
            if number < len(self.batches):
                sums += torch.tensor([*losses, len(rows)], dtype=torch.float64)
        if self.run.world_size > 1:
            sums = self.run.accelerator.reduce(sums.to(self.run.device), "sum").cpu()
        means = (sums[:-1] / sums[-1]).tolist()
        by_time = {f"held_out_loss_t{time:g}": mean for time, mean in zip(TIMES, means, strict=True)}
        return {"held_out_loss": sum(means) / len(means), **by_time}

    def _losses(self, backbone: Any, rows: Sequence[int]) -> list[float]:
        """The sum over pictures at each time."""
        latents, *told = self.load([Draw(row, row) for row in rows])
        found = []
        for number, time in enumerate(TIMES):
            generators = [generator_of(0, row, f"held-out noise {number}") for row in rows]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators])
            t = torch.full((len(rows),), time, device=latents.device)
            sample = self.objective.path.sample(latents, noise.to(latents.device), t)
            with self.run.accelerator.autocast():
                prediction = ask(backbone, sample.x_t, self.objective.timestep(sample), *told)
            found.append(self.objective.loss(prediction, sample).sum().item())
        return found
