"""The codes of a VQ autoencoder that nothing is assigned to, brought back to where its encoder's outputs are."""

from collections.abc import Mapping
from typing import Any

import torch

from hubgen.autoencoders.quantizer import VectorQuantizer
from hubgen.data.order import generator_of
from hubgen.training.kit.run import Run


class Codebook:
    """Counts of a run's codes, of all processes; part of its checkpoints.

    Args:
        quantizer: That counts on this process.
        run: The processes.
    """

    def __init__(self, quantizer: VectorQuantizer, run: Run) -> None:
        self.quantizer, self.run = quantizer, run

    def revive(self, z: torch.Tensor, step: int) -> int:
        """Moves codes that no process has used since the last call onto outputs of the encoder; returns how many.

        Args:
            z: Of this process's batch, (B, D, h, w).
            step: Number of the step, which the draw derives from.
        """
        self.quantizer.counts.copy_(self._counts())
        outputs = self.run.accelerator.gather(z.contiguous()) if self.run.world_size > 1 else z
        return self.quantizer.revive_dead_codes_(outputs, generator_of(self.run.options.seed, step, "codes"))

    def _counts(self) -> torch.Tensor:
        counts = self.quantizer.counts.clone()
        return counts if self.run.world_size == 1 else self.run.accelerator.reduce(counts, "sum")

    def state_dict(self) -> dict[str, Any]:
        """The counts of all processes, each of which has to ask."""
        return {"counts": self._counts()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """One process goes on from the counts of all."""
        self.quantizer.counts.copy_(state["counts"] if self.run.writer else torch.zeros_like(state["counts"]))
