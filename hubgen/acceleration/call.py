"""Acceleration that lasts as long as a call and leaves no trace.

    with accelerated(backbone, vae) as fast:        # once a call of a pipeline
        fast.tabulate(backbone, timesteps, ...)     # what depends on the time alone
        with fast.network(step, branches):          # around every call of a network
            prediction = backbone(...)

Models stay as they are. Only while a network runs do its layers carry a `forward` of their own, which looks for the
accelerated call of the thread that it runs in; around it, in a user's callback for instance, every module is plain.
What belongs to a call is in that call's `Acceleration`; packed weights lie in a table beside the model, and are read
whole at the beginning of each call to see whether they still are the weights.

A layer stays plain throughout if it is not exactly of a class that is known (an adapter), if something else has given
it a `forward` (offloading, casting), or if it lies in a part that is compiled. A single call of a layer stays plain if
it needs gradients, runs under autocast or a functional transform, or has inputs of another type, device or class.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hubgen.acceleration.cpu.layers import ALWAYS, PACKED, Answer, has_hooks, plain_tensor
from hubgen.acceleration.cpu.packing import Packing, identity
from hubgen.acceleration.steps import StepTables, TextAnswers
from hubgen.diffusers_contract import is_compiled
from hubgen.layers.conditioned import context_layers

# Values of a tensor that are looked at after code of the user's has run in the middle of a call.
SAMPLES = 512
# Whole numbers by their bytes, to add the bits of values up.
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

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
        self.layer = layer
        self.users: set[object] = set()
        """A mark for each network that runs on it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fast = None if kwargs or torch.compiler.is_compiling() else current()
        answer = None if fast is None else fast.answers.get(self.layer)
        if answer is None:
            return type(self.layer).forward(self.layer, *args, **kwargs)
        return answer(*args)

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
        self._row: tuple[int | None, tuple[str, ...]] = (None, ())
        self._marks: list[Any] | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Chooses the layers that may be computed otherwise, and looks at all packed weights."""
        self.answers: dict[nn.Module, Callable[..., Any]] = {}
        self._tables: StepTables | None = None
        self._watched: list[nn.Module] = []
        self._table_marks: list[Any] = []
        self._texts = TextAnswers()
        for model, packing in self.packings.items():
            packing.verify()
            device = next((parameter.device for parameter in model.parameters()), torch.device("meta"))
            known: Mapping[type, Answer] = {}
            if device.type == "cpu":
                known = ALWAYS | (PACKED if packing.budget > 0 else {})
            layers = plain_layers(model)
            for layer in layers:
                if type(layer) in known:
                    self.answers[layer] = partial(known[type(layer)], packing, layer)
            if packing.budget > 0:
                for layer in context_layers(layers):
                    if layer in layers and type(layer) is nn.Linear:
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

        Nothing is done for models that do not say which layers these are, where gradients are wanted, or where the
        computation is not the model's own: with hooks, compiled or offloaded parts, or adapters on what embeds the
        time. A layer with an adapter is computed step by step.

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
        reached, modules = plain_layers(backbone), list(backbone.modules())
        embedders = [part for embedder in backbone.time_embedders() for part in embedder.modules()]
        foreign = [module for module in modules if module not in reached and not module._modules]
        if foreign or backbone not in reached or any(map(has_hooks, modules)):
            return
        if backbone.training or not all(part in reached and is_native(part) for part in embedders):
            return
        read = inspect.signature(backbone.modulations).parameters
        repeated = {name: of_every_step(value, len(timesteps)) for name, value in keywords.items() if name in read}
        answers = backbone.modulations(timestep=timesteps.repeat_interleave(rows), **repeated)
        known = {*embedders, *(layer for layer in reached if type(layer) is nn.Linear)}
        self._tables = StepTables((pair for pair in answers if pair[0] in known), len(timesteps), branches)
        self._watched = list(dict.fromkeys([*embedders, *self._tables.rows]))
        self._table_marks = marks_of(self._watched)
        for layer in self._tables.rows:
            self.answers[layer] = partial(self._of_step, layer, self.answers.get(layer))

    @contextmanager
    def network(self, step: int | None = None, branches: Sequence[str] = ()) -> Iterator[None]:
        """While a network of the call runs.

        Args:
            step: Number of the step in the grid that was tabulated; `None`: none of it.
            branches: Those that the rows are of.
        """
        if step is not None and self._tables is not None and marks_of(self._watched) != self._table_marks:
            self._tables = None
        row, stack = self._row, _local.__dict__.setdefault("stack", [])
        depth, carried, user = len(stack), list[LayerForward](), object()
        try:  # an interruption may come at any moment
            self._row = step, tuple(branches)
            stack.append(self)
            install(self.answers, carried, user)
            yield
        finally:
            remove(carried, user)
            del stack[depth:]
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
            marks += marks_of(model.modules())
            marks += map(sampled, model.parameters())
        return marks

    # ---- answers of layers ----

    def _of_step(self, layer: nn.Module, other: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        step, branches = self._row
        rows = None if self._tables is None or step is None else self._tables.answer(layer, step, branches)
        if rows is not None and len(rows) == len(args[0]):
            return rows
        return type(layer).forward(layer, *args, **kwargs) if other is None else other(*args, **kwargs)

    def _of_text(self, layer: nn.Module, text: torch.Tensor) -> Any:
        if torch.is_grad_enabled() or not plain_tensor(text) or torch.is_autocast_enabled(text.device.type):
            return type(layer).forward(layer, text)
        if text.is_inference():
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


def plain_layers(model: nn.Module) -> dict[nn.Module, None]:
    """A model's modules, but for those that are compiled, those below them, and those with a foreign `forward`."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in found or is_compiled(module):
            continue
        waiting.extend(reversed(module._modules.values()))
        forward = module.__dict__.get("forward")
        if forward is None or getattr(forward, "is_ours", False):
            found[module] = None
    return found


def of_every_step(value: Any, steps: int) -> Any:
    """A condition of one step as that of all, step after step: (B, ...) -> (n * B, ...), inside of a dict as well."""
    if isinstance(value, dict):
        return {name: of_every_step(part, steps) for name, part in value.items()}
    return value.repeat(steps, *[1] * (value.ndim - 1)) if torch.is_tensor(value) else value


def is_native(module: nn.Module) -> bool:
    """Whether a module is of a class of torch or of hubgen, and no adapter."""
    return type(module).__module__.startswith(("torch.nn.", "hubgen."))


def marks_of(modules: Iterable[nn.Module]) -> list[Any]:
    """What tells that modules were replaced or have got hooks, and any change of parameters that tensors count."""
    marks: list[Any] = []
    for module in modules:
        marks.append((id(module), type(module), has_hooks(module)))
        marks += [identity(value) for value in module._parameters.values() if value is not None]
    return marks


def sampled(value: torch.Tensor) -> int:
    """A sum over the bits of a few values of a tensor on the CPU, which tells an edit of all of them."""
    if not plain_tensor(value) or value.device.type != "cpu" or not value.numel():
        return 0
    bits = value.detach().view(WORDS.get(value.element_size(), torch.uint8)).numpy()
    return int(bits.ravel(order="K")[:: bits.size // SAMPLES | 1].sum(dtype="int64"))


def install(layers: Mapping[nn.Module, Any], carried: list[LayerForward], user: object) -> None:
    """Gives layers their `forward` of a network's call, and writes down which, for `remove`."""
    with _lock:
        for layer in layers:
            forward = layer.__dict__.get("forward")
            if forward is None:
                forward = LayerForward(layer)
            elif type(forward) is not LayerForward:  # something else has come in between
                continue
            carried.append(forward)
            forward.users.add(user)
            layer.__dict__["forward"] = forward


def remove(carried: Sequence[LayerForward], user: object) -> None:
    """Takes them out again, where no other network runs on the same layers."""
    with _lock:
        for forward in carried:
            forward.users.discard(user)
            if not forward.users and forward.layer.__dict__.get("forward") is forward:
                del forward.layer.__dict__["forward"]
