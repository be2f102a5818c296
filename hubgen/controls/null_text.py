"""Null-text inversion: negative embeddings under which guided sampling finds the picture again (2211.09794).

Inversion without guidance leads back to the picture without guidance only. Here the embeddings of the negative branch,
one for each step, are optimised so that the guided way goes through the states of the inversion. Under them the prompt
can be changed and the rest of the picture stays.

Shapes: n steps, B pictures, L text tokens of D features.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from hubgen.checks import is_number, whole
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.guidance import NEGATIVE, POSITIVE, ClassifierFreeGuidance
from hubgen.conditioning.predict import BackboneCall, predict
from hubgen.controls.control import Control, Prepared, Start, Target
from hubgen.diffusers_contract import has_step_caches

# How much larger a loss may be with each step for its optimisation to end, as in the paper's code.
LOOSER = 2e-5


class NullText(Control):
    """Takes the place of the negative prompt, with an embedding of its own at every step.

    Args:
        embeddings: (n, b, L, D), for the n steps of a call; b divides the number of pictures, which they serve in
            turns.

    Raises:
        ValueError: They are no such tensor.
    """

    def __init__(self, embeddings: torch.Tensor):
        if not torch.is_tensor(embeddings) or embeddings.ndim != 4 or not embeddings.is_floating_point():
            found = str(tuple(embeddings.shape)) if torch.is_tensor(embeddings) else f"{embeddings!r:.100}"
            raise ValueError(f"`embeddings`: got {found}, expected a tensor (steps, pictures, tokens, features).")
        self.embeddings = embeddings.detach()

    def check(self, target: Target) -> None:
        """Raises ValueError unless the call guides, reads words, and has as many steps and fitting pictures."""
        steps, pictures = self.embeddings.shape[:2]
        check_guided(target, "NullText")
        if steps != len(target.timesteps) or target.batch % pictures:
            raise ValueError(
                f"`controls`: got NullText of {steps} steps and {pictures} pictures, expected {len(target.timesteps)} "
                f"steps and a number that divides the {target.batch} pictures."
            )

    def prepare(self, target: Target, start: Start) -> Prepared:
        return OwnNegatives(self.embeddings)


class OwnNegatives(Prepared):
    """`NullText` in one call."""

    def __init__(self, embeddings: torch.Tensor):
        self.embeddings = embeddings

    def condition(self, call: BackboneCall) -> Condition | None:
        if NEGATIVE not in call.branches:
            return None
        return with_negative(call, self.embeddings[call.step])


def with_negative(call: BackboneCall, embedding: torch.Tensor) -> Condition:
    """The condition of a call with other tokens, (b, L, D), in its negative branch, for its pictures in turns."""
    tokens, rows = call.condition.tokens, call.rows(NEGATIVE)
    assert tokens is not None
    if tokens.shape[1:] != embedding.shape[1:]:
        raise ValueError(
            f"`controls`: got NullText of {tuple(embedding.shape[1:])} tokens and features, expected those of the "
            f"prompts, {tuple(tokens.shape[1:])}."
        )
    changed = tokens.clone()
    changed[rows] = embedding.to(tokens).repeat((rows.stop - rows.start) // len(embedding), 1, 1)
    return replace(call.condition, tokens=changed)


def part_of(call: BackboneCall, branch: str) -> Condition:
    """The condition of one branch of a call."""
    rows = call.rows(branch)
    return call.condition.map(lambda value: value[rows])


def check_guided(target: Target, name: str) -> None:
    """Raises ValueError unless the backbone reads words and the call guides."""
    if "tokens" not in target.family.takes:
        raise ValueError(f"`controls`: got {name}, expected a model that reads words; this one reads none.")
    if NEGATIVE not in target.branches:
        raise ValueError(
            f"`controls`: got {name}, expected a call with classifier-free guidance: `guidance_scale` above 1, or of "
            "FLUX `true_cfg_scale` and a negative prompt."
        )


class NullTextFit(Control):
    """Optimises while a call runs; `result` tells what it found.

    The call has to go back on the grid of an inversion by Euler's or DDIM's steps, alone, from its last state.

    Args:
        trajectory: n + 1 tensors (B, C, h, w), the states of an inversion, from the picture to noise.
        guidance_scale: Of the call.
        inner_steps: Adam's steps at each step of the call, at most.
        learning_rate: Adam's at the first step; it falls to half of it at the last.
        early_stop: The squared error of every picture's next state below which a step's optimisation ends; it grows by
            2e-5 with each step.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        trajectory: Sequence[torch.Tensor],
        guidance_scale: float,
        inner_steps: int = 10,
        learning_rate: float = 1e-2,
        early_stop: float = 1e-5,
    ):
        self.guidance = ClassifierFreeGuidance(guidance_scale)
        self.inner_steps = whole("inner_steps", inner_steps)
        for name, value in (("learning_rate", learning_rate), ("early_stop", early_stop)):
            if not is_number(value) or value < 0:
                raise ValueError(f"`{name}`: got {value!r}, expected a finite number, at least 0.")
        self.trajectory, self.learning_rate, self.early_stop = tuple(trajectory), learning_rate, early_stop
        self.found: list[torch.Tensor] = []

    @property
    def result(self) -> NullText:
        """What the last call found, in float32; ValueError where it has not come to its end."""
        if len(self.found) + 1 != len(self.trajectory):
            raise ValueError(
                f"`controls`: this NullTextFit has seen {len(self.found)} of {len(self.trajectory) - 1} steps."
            )
        return NullText(torch.stack(self.found))

    def check(self, target: Target) -> None:
        """Raises ValueError unless the call goes back on the trajectory, and can be differentiated."""
        check_guided(target, "NullTextFit")
        pictures = len(self.trajectory[0])
        if len(self.trajectory) != len(target.timesteps) + 1 or pictures != target.batch:
            raise ValueError(
                f"`trajectory`: got {len(self.trajectory)} states of {pictures} pictures, expected "
                f"{len(target.timesteps) + 1} of {target.batch}."
            )
        if has_step_caches(target.backbone):
            raise ValueError("`controls`: got NullTextFit, expected a backbone without a step cache (disable_cache()).")
        if torch.is_inference_mode_enabled():
            raise ValueError("`controls`: got NullTextFit in torch.inference_mode, where nothing has a gradient.")

    def prepare(self, target: Target, start: Start) -> Prepared:
        self.found = []
        return Fitting(self, target)


class Fitting(Prepared):
    """`NullTextFit` in one call: at each step it optimises, and the step is done with what it found."""

    def __init__(self, fit: NullTextFit, target: Target):
        self.fit, self.target = fit, target

    def condition(self, call: BackboneCall) -> Condition | None:
        self.fit.found.append(self.optimised(call))
        return with_negative(call, self.fit.found[-1])

    def optimised(self, call: BackboneCall) -> torch.Tensor:
        """The step's embeddings, (B, L, D) in float32, that lead nearest to the next state of the trajectory."""
        fit, target, step = self.fit, self.target, call.step
        backbone, family = target.backbone, target.family
        rows = call.rows(NEGATIVE)
        x_t, timestep = call.x_t[rows], call.timestep[rows]
        conditions = {branch: part_of(call, branch) for branch in (NEGATIVE, POSITIVE)}
        before = fit.found[-1] if fit.found else conditions[NEGATIVE].tokens
        assert before is not None
        wanted = fit.trajectory[-2 - step].to(x_t)
        positive = predict(backbone, x_t, timestep, conditions[POSITIVE], family=family).float()
        with torch.enable_grad(), frozen(backbone):
            embedding = before.detach().float().clone().requires_grad_()
            rate = fit.learning_rate * (1 - step / (2 * len(target.timesteps)))
            optimizer = torch.optim.Adam([embedding], lr=rate)
            for _ in range(fit.inner_steps):
                condition = replace(conditions[NEGATIVE], tokens=embedding.to(call.condition.tokens))
                negative = predict(backbone, x_t, timestep, condition, family=family).float()
                guided = fit.guidance.combine({NEGATIVE: negative, POSITIVE: positive})
                # a copy, since a step moves a scheduler on
                scheduler = copy.copy(target.scheduler)
                reached = scheduler.step(guided, target.timesteps[step], x_t, return_dict=False)[0]
                losses = (reached - wanted).square().flatten(1).mean(1)  # (B,)
                embedding.grad = torch.autograd.grad(losses.sum(), embedding)[0]
                optimizer.step()
                if losses.max() < fit.early_stop + LOOSER * step:
                    break
        return embedding.detach()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model needs a gradient inside: less is kept for the way back."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
