"""Acceleration that lasts as long as a call and leaves no trace.

    with accelerated(backbone, vae) as fast:        # once a call of a pipeline
        fast.tabulate(backbone, timesteps, ...)     # what depends on the time alone
        with fast.network(step, branches):          # around every call of a network
            prediction = backbone(...)

Models stay as they are. Only while a network runs do its layers carry a `forward` of their own, which looks for the
accelerated call of the thread that it runs in; around it, in a user's callback for instance, every module is plain.
What belongs to a call is in that call's `Acceleration`; packed weights lie in a table beside the model, and are read
whole at the beginning of each call to see whether they still are the weights.

A layer stays plain throughout if it is not exactly of a class that is known, if something else has given it a `forward`
(offloading, casting), or if it lies in a part that is compiled. A single call of a layer stays plain if it needs
gradients, runs under autocast or a functional transform, or has inputs of another type, device or class.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hubgen.acceleration.cpu.layers import ALWAYS, PACKED
from hubgen.acceleration.cpu.packing import Packing, identity
from hubgen.acceleration.tables import StepTables, TextAnswers
from hubgen.diffusers_contract import is_compiled
from hubgen.layers.conditioned import context_layers

# Values of a tensor that are looked at after code of the user's has run in the middle of a call.
SAMPLES = 512

_local = threading.local()
_lock = threading.Lock()


def current() -> "Acceleration | None":
    """The accelerated call whose network runs in this thread, the innermost one."""
    stack = getattr(_local, "stack", None)
    return stack[-1] if stack else None


class LayerForward:
    """The `forward` that a layer carries while a network runs, in any thread."""

    is_ours = True

    def __init__(self, layer: nn.Module):
        self.layer, self.users = layer, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fast = None if torch.compiler.is_compiling() else current()
        answer = None if fast is None else fast.answers.get(self.layer)
        if answer is None:
            return type(self.layer).forward(self.layer, *args, **kwargs)
        return answer(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerForward":
        """A copy of the layer that is made meanwhile has one of its own, which is the plain forward."""
        return LayerForward(memo.get(id(self.layer), self.layer))

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerForward, (self.layer,)


class Acceleration:
    """What one call knows, for its networks.

    Args:
        packings: Models and their packed weights.
    """

    def __init__(self, packings: Mapping[nn.Module, Packing]):
        self.packings = dict(packings)
        self._tables: StepTables | None = None
        self._row: tuple[int | None, tuple[str, ...]] = (None, ())
        self._marks: list[Any] | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Chooses the layers that may be computed otherwise, and looks at all packed weights."""
        self.answers: dict[nn.Module, Callable[..., Any]] = {}
        self._tables, self._texts = None, TextAnswers()
        for model, packing in self.packings.items():
            packing.verify()
            known = ALWAYS | (PACKED if packing.budget > 0 else {})
            layers = list(plain_layers(model))
            for layer in layers:
                if type(layer) in known and on_cpu(layer):
                    self.answers[layer] = partial(known[type(layer)], packing, layer)
            if packing.budget > 0:
                reached = set(layers)
                for layer in context_layers(model):
                    if layer in reached:
                        self.answers[layer] = partial(self._of_text, layer)

    def covers(self, model: nn.Module) -> bool:
        """Whether the call is about a model."""
        return model in self.packings

    def tabulate(
        self,
        backbone: Any,
        timesteps: torch.Tensor,
        keywords: Mapping[str, Any],
        rows: int,
        branches: Sequence[str],
    ) -> None:
        """Computes what depends on the time alone for a whole grid, in one product a layer.

        Nothing is done where gradients are wanted, where somebody listens to the backbone's layers, or for models that
        do not say which layers these are.

        Args:
            backbone: One of the call's models.
            timesteps: (n,), as it takes them.
            keywords: Of one call of it, for the rows of all branches in their order.
            rows: How many rows these are.
            branches: Names of the branches.
        """
        packing = self.packings.get(backbone)
        if packing is None or packing.budget <= 0 or torch.is_grad_enabled() or not hasattr(backbone, "modulations"):
            return
        reached = set(plain_layers(backbone))
        if backbone not in reached or any(has_hooks(layer) for layer in reached):
            return
        read = inspect.signature(backbone.modulations).parameters
        repeated = {name: of_every_step(value, len(timesteps)) for name, value in keywords.items() if name in read}
        answers = backbone.modulations(timestep=timesteps.repeat_interleave(rows), **repeated)
        own = ((layer, out) for layer, out in answers if layer in reached)
        self._tables = StepTables(own, len(timesteps), branches)
        for layer in self._tables.rows:
            self.answers[layer] = partial(self._of_step, layer, self.answers.get(layer))

    @contextmanager
    def network(self, step: int | None = None, branches: Sequence[str] = ()) -> Iterator[None]:
        """While a network of the call runs.

        Args:
            step: Number of the step in the grid that was tabulated; `None`: none of it.
            branches: Those that the rows are of.
        """
        row, self._row = self._row, (step, tuple(branches))
        stack = _local.__dict__.setdefault("stack", [])
        stack.append(self)
        carried = install(self.answers)
        try:
            yield
        finally:
            remove(carried)
            stack.pop()
            self._row = row

    def around(self, predict: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A function of the denoising loop, `(x_t, timestep, branches, step)`, as a call of a network."""

        def accelerated_predict(x_t: Any, timestep: Any, branches: tuple[str, ...], step: int) -> torch.Tensor:
            with self.network(step, branches):
                return predict(x_t, timestep, branches, step)

        return accelerated_predict

    @contextmanager
    def user_code(self) -> Iterator[None]:
        """While code of the user's runs in the middle of the call, which may change the models."""
        if self._marks is None:
            self._marks = self._signature()
        try:
            yield
        finally:
            marks, self._marks = self._marks, self._signature()
            if marks != self._marks:
                self._prepare()

    @property
    def tabulated(self) -> bool:
        """Whether there are tables: a change of the models drops them."""
        return self._tables is not None

    def _signature(self) -> list[Any]:
        marks: list[Any] = []
        for model in self.packings:
            marks += [(id(module), type(module), has_hooks(module)) for module in model.modules()]
            marks += [(identity(value), sampled(value)) for value in model.parameters()]
        return marks

    # ---- answers of layers ----

    def _of_step(self, layer: nn.Module, other: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        step, branches = self._row
        rows = None if self._tables is None or step is None else self._tables.answer(layer, step, branches)
        if rows is not None:
            return rows
        return type(layer).forward(layer, *args, **kwargs) if other is None else other(*args, **kwargs)

    def _of_text(self, layer: nn.Module, text: torch.Tensor) -> Any:
        if torch.is_grad_enabled() or torch.is_autocast_enabled(text.device.type) or text.is_inference():
            return type(layer).forward(layer, text)
        found = self._texts.recall(layer, text)
        return self._texts.keep(layer, text, type(layer).forward(layer, text)) if found is None else found


@contextmanager
def accelerate(packings: Mapping[nn.Module, Packing]) -> Iterator[Acceleration]:
    """An `Acceleration` for the call inside; what it keeps goes with it."""
    fast = Acceleration(packings)
    try:
        yield fast
    finally:
        fast.answers.clear()
        fast._tables, fast._texts = None, TextAnswers()


# ---- layers ----


def plain_layers(model: nn.Module) -> Iterator[nn.Module]:
    """A model's modules, but for those that are compiled, those below them, and those with a foreign `forward`."""
    if is_compiled(model):
        return
    forward = model.__dict__.get("forward")
    if forward is None or getattr(forward, "is_ours", False):
        yield model
    for child in model.children():
        yield from plain_layers(child)


def of_every_step(value: Any, steps: int) -> Any:
    """A condition of one step as that of all, step after step: (B, ...) -> (n * B, ...), inside of a dict as well."""
    if isinstance(value, dict):
        return {name: of_every_step(part, steps) for name, part in value.items()}
    return value.repeat(steps, *[1] * (value.ndim - 1)) if torch.is_tensor(value) else value


def on_cpu(layer: Any) -> bool:
    """Whether a layer's weight, or that of the one layer inside, is on the CPU."""
    weight = next(iter(layer.parameters()), None)
    return weight is not None and weight.device.type == "cpu"


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def sampled(value: torch.Tensor) -> float:
    """A sum over a few values of a tensor on the CPU, which tells an edit of all of them."""
    if value.device.type != "cpu" or not value.numel():
        return 0.0
    flat = value.detach().reshape(-1)
    return float(flat[:: max(1, value.numel() // SAMPLES)].double().sum())


def install(layers: Mapping[nn.Module, Any]) -> list[LayerForward]:
    """Gives layers their `forward` of a network's call; returns those that were given, for `remove`."""
    carried = []
    with _lock:
        for layer in layers:
            forward = layer.__dict__.get("forward")
            if forward is None:
                forward = layer.__dict__["forward"] = LayerForward(layer)
            elif type(forward) is not LayerForward:  # something else has come in between
                continue
            forward.users += 1
            carried.append(forward)
    return carried


def remove(carried: Sequence[LayerForward]) -> None:
    """Takes them out again, where no other thread's network runs on the same layers."""
    with _lock:
        for forward in carried:
            forward.users -= 1
            if forward.users == 0 and forward.layer.__dict__.get("forward") is forward:
                del forward.layer.__dict__["forward"]
