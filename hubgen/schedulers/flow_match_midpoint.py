"""The midpoint rule along a learned flow, which goes back and forth with little loss: RF-Solver and FireFlow.

One step from sigma to sigma_next, of length h = sigma_next - sigma, in either direction:

    stage 1    x'     = x + h / 2 velocity(x, sigma)
    stage 2    x_next = x + h velocity(x', sigma + h / 2)

RF-Solver (2411.04746) is written as a Taylor expansion to second order, the velocity's derivative as a difference over
half a step: the same numbers. FireFlow (2412.07517) takes the velocity in the middle of the step before for stage 1, so
that every step but the first calls the model once.
"""

import torch

from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler


class FlowMatchMidpointScheduler(FlowMatchEulerDiscreteScheduler):
    """Midpoint steps, on the grids and with the arguments of `FlowMatchEulerDiscreteScheduler`.

    `self.timesteps` (2 n,) has the beginning and the middle of each of the n steps. `stochastic_sampling` is refused.
    """

    order = 2
    _sample: torch.Tensor | None = None
    """(B, ...), where the step that is under way began"""

    def _lay(self, sigmas: torch.Tensor, timesteps: torch.Tensor) -> None:
        if self.config.stochastic_sampling:
            raise ValueError("`stochastic_sampling`: got True, expected False: a midpoint step adds no noise")
        end = sigmas[-1:].to(timesteps) * self.config.num_train_timesteps
        super()._lay(with_middles(sigmas), with_middles(torch.cat([timesteps, end]))[:-1])
        self._sample = None

    def _advance(
        self,
        index: int,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        if index % 2 == 0:
            self._sample = sample
            return sample + (self.sigmas[index + 1] - self.sigmas[index]) * velocity
        if self._sample is None:
            raise ValueError(
                f"`begin_index`: got {index}, the middle of a step, expected an even number: two calls are one step"
            )
        begin, self._sample = self._sample, None
        return begin + (self.sigmas[index + 1] - self.sigmas[index - 1]) * velocity


class FlowMatchFireFlowScheduler(FlowMatchMidpointScheduler):
    """Midpoint steps that begin with the velocity in the middle of the step before: n + 1 calls for n steps.

    `self.timesteps` (n + 1,) has the beginning of the first step and the middle of each. Between two calls the sample
    is that of a middle, and what is changed about it there is carried on. A run begins with the first step of the grid.
    """

    order = 1

    def _lay(self, sigmas: torch.Tensor, timesteps: torch.Tensor) -> None:
        super()._lay(sigmas, timesteps)
        self._nodes = self.sigmas[::2]  # (n + 1,), the ends of the steps
        self.sigmas = torch.cat([self.sigmas[:1], self.sigmas[1::2], self.sigmas[-1:]])  # (n + 2,)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1::2]])
        self._middle: torch.Tensor | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """As in every flow-matching scheduler; raises ValueError unless 0."""
        if begin_index != 0:
            raise ValueError(
                f"`begin_index`: got {begin_index}, expected 0: FireFlow's steps need the velocity of the one before, "
                "and so the whole way (no `strength` below 1)."
            )
        super().set_begin_index(begin_index)

    def _advance(
        self,
        index: int,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        reached = sample
        if index > 0:
            if self._sample is None or self._middle is None:
                raise ValueError(f"`timestep`: got number {index} of the grid, expected a run to begin with the first")
            begin = self._sample + (sample - self._middle)
            reached = begin + (self._nodes[index] - self._nodes[index - 1]) * velocity
        if index + 1 == len(self._nodes):
            self._sample, self._middle = None, None
            return reached
        self._sample = reached
        middle = reached + (self.sigmas[index + 1] - self._nodes[index]) * velocity
        self._middle = middle.to(velocity.dtype).float()  # as the caller has it
        return middle


def with_middles(nodes: torch.Tensor) -> torch.Tensor:
    """(n + 1,) -> (2 n + 1,): the middle of each two neighbours between them."""
    both = nodes.repeat_interleave(2)[:-1]
    both[1::2] = (nodes[:-1] + nodes[1:]) / 2
    return both
