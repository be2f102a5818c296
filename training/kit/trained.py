"""What learns: a network, which of its parameters, their optimizers and schedule, their average."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hubgen.training.kit.checkpoints import Stateful, bare
from hubgen.training.kit.ema import ExponentialMovingAverage, restored
from hubgen.training.kit.finite import finite_or_stop
from hubgen.training.kit.groups import Optim, RunOptions
from hubgen.training.kit.optimizers import optimizers_of
from hubgen.training.kit.post_hoc import PowerFunctionAverage
from hubgen.training.kit.schedules import learning_rate_schedule


class Trained:
    """A network that learns; `Run.trains` makes it.

    Args:
        name: Of its files in a checkpoint.
        plain: The network; of its parameters those learn that want a gradient now.
        optim: How.
        options: Of the run.
        accelerator: Of the run.
        forward: A module around `plain` that a training step calls in its place, so that data parallelism sees all that
            the step uses.
    """

    def __init__(
        self,
        name: str,
        plain: Any,
        optim: Optim,
        options: RunOptions,
        accelerator: Accelerator,
        forward: nn.Module | None = None,
    ):
        self.name, self.optim, self.accelerator = name, optim, accelerator
        if options.gradient_checkpointing:
            (plain if forward is None else forward).enable_gradient_checkpointing()  # type: ignore[operator]
        plain.train()
        named = list(plain.named_parameters())
        self._learning = {key: parameter.numel() for key, parameter in named if parameter.requires_grad}
        self._frozen = {key for key, _ in named} - self._learning.keys()
        made = optimizers_of(plain, optim)
        around: nn.Module = plain if forward is None else forward
        self.module, *prepared = accelerator.prepare(around, *made.values())
        """As a step calls it, wrapped by Accelerate"""
        self.plain: Any = plain
        """The network itself"""
        self.optimizers: dict[str, Optimizer] = dict(zip(made, prepared, strict=True))
        for optimizer in prepared:
            if hasattr(bare(optimizer), "train"):  # schedule-free ones want to be told
                bare(optimizer).train()
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in prepared]
        self._schedule = learning_rate_schedule(
            optim.lr_schedule, optim.lr_warmup_steps, options.max_train_steps, optim.lr_schedule_arguments
        )
        self.ema = None if optim.ema_decay is None else ExponentialMovingAverage(plain, optim.ema_decay)
        self.stored = [PowerFunctionAverage(plain, length) for length in optim.ema_lengths]
        """Averages of which the length is chosen after the run"""
        self.learning_rate = 0.0
        self._losses: list[torch.Tensor] = []
        self._names: list[Sequence[str]] = []

    # ---- a step ----

    def begin(self, step: int) -> None:
        """Sets the learning rate of the optimizer step that follows `step` - 1 others."""
        factor = self._schedule(step - 1)
        self.learning_rate = self.optim.learning_rate * factor
        for optimizer, peaks in zip(self.optimizers.values(), self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def backward(self, loss: torch.Tensor, names: Sequence[str]) -> None:
        """Adds a batch's gradient; accumulated batches count alike.

        Args:
            loss: Scalar, the mean over the batch of this process.
            names: Of its pictures, for the message if something is not finite.
        """
        self.accelerator.backward(loss)
        self._losses.append(loss.detach())
        self._names.append(names)

    def update(self, step: int, kept_steps: Callable[[], Sequence[int]]) -> None:
        """Clips the gradient, moves the weights and their average.

        Args:
            step: Number of the step.
            kept_steps: Of the checkpoints that there are, for the message.

        Raises:
            NonFiniteError: A loss or the gradient is not finite; the weights are as they were.
        """
        norm = self.accelerator.clip_grad_norm_(self.plain.parameters(), self.optim.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        overflows = self.accelerator.scaler is not None
        finite_or_stop(self._losses, self._names, None if overflows else norm, step, kept_steps)
        self._losses, self._names = [], []
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        for average in [*([] if self.ema is None else [self.ema]), *self.stored]:
            average.update(self.plain)

    @property
    def has_gradient(self) -> bool:
        """Whether there was a batch since the last update."""
        return bool(self._losses)

    # ---- beside the steps ----

    @contextmanager
    def averaged(self) -> Iterator[Any]:
        """The network in evaluation mode with its averaged weights; as it was, bit for bit, at the end."""
        groups = [group for optimizer in self.optimizers.values() for group in bare(optimizer).param_groups]
        modes = [dict(group) for group in groups]
        try:
            with restored(self.plain, self._learning):
                self._average()
                yield self.plain
        finally:
            for group, mode in zip(groups, modes, strict=True):
                group.update(mode)
            self.plain.train()

    def settle(self) -> Any:
        """Gives the network its averaged weights and evaluation mode, without wrappers, at the end of a run."""
        self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        self._average()
        return self.plain.requires_grad_(False)

    def _average(self) -> None:
        self.plain.eval()
        for optimizer in self.optimizers.values():
            if hasattr(bare(optimizer), "eval"):  # schedule-free ones evaluate elsewhere than they train
                bare(optimizer).eval()
        if self.ema is not None:
            self.ema.copy_to(self.plain)

    @property
    def parameters(self) -> int:
        """How many numbers learn."""
        return sum(self._learning.values())

    @property
    def modules(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        stored = {f"average-{average.length}.{self.name}": average for average in self.stored}
        return {self.name: self, **({} if self.ema is None else {f"ema.{self.name}": self.ema}), **stored}

    @property
    def named_optimizers(self) -> dict[str, Optimizer]:
        """What a checkpoint holds."""
        return {f"{self.name}.{name}": optimizer for name, optimizer in self.optimizers.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The parameters that learn, and all buffers."""
        return {key: value for key, value in self.plain.state_dict().items() if key not in self._frozen}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state_dict` gave."""
        own = self.plain.state_dict()
        for key, value in state.items():
            own[key].copy_(value)


@contextmanager
def without_gradient(module: nn.Module) -> Iterator[None]:
    """Context in which a module's parameters get no gradient; what it is given still does."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
