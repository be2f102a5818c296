"""FlowEdit (Kulikov et al., 2412.08629): from a picture to its edit along a flow, without a way through noise.

    z_source = (1 - sigma) x + sigma noise        the picture x, noised anew at every step
    z_target = z_source + d                       the edit at the same noise; d is 0 at first
    d       += (sigma_next - sigma) (u_target(z_target) - u_source(z_source))

and the edit is x + d. What is walked is the difference d alone, so that equal prompts leave the picture as it is, to
the last bit. The last n_min steps, if any, sample the edit's prompt alone, from z_target as it is there:

    d       += (sigma_next - sigma) u_target(z_source + d)       z_source stays what it was where these steps began

and the edit is z_source + d. That frees details from the picture: where these are all the steps, this is SDEdit
(2108.01073), an image to image call.

Shapes: B pictures, (B, C, h, w) latents and velocities, n steps.
"""

from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from hubgen.conditioning.guidance import ClassifierFreeGuidance
from hubgen.conditioning.predict import Predictor
from hubgen.controls.control import Target
from hubgen.pipelines.defaults import FLUX, SD3, FamilyDefaults
from hubgen.schedulers.times import noised


@dataclass(frozen=True)
class EditDefaults:
    """Defaults of FlowEdit."""

    steps: int
    share: float
    """Of the steps, counted from the end, that are done"""
    source_guidance_scale: float
    guidance_scale: float

    def n_max(self, steps: int) -> int:
        """How many of the steps are done."""
        return max(round(self.share * steps), 1)


# Of the paper's code: 33 of 50 steps for SD3, 24 of 28 for FLUX.
SD3_EDIT, FLUX_EDIT = EditDefaults(50, 33 / 50, 3.5, 13.5), EditDefaults(28, 24 / 28, 1.5, 5.5)


def edit_defaults(family: FamilyDefaults, steps: int, guidance_scale: float) -> EditDefaults:
    """Those of a pipeline.

    Args:
        family: Its own.
        steps: Of its call.
        guidance_scale: Of its call.
    """
    if family is SD3 or family is FLUX:
        return SD3_EDIT if family is SD3 else FLUX_EDIT
    return EditDefaults(steps, SD3_EDIT.share, min(1.5, guidance_scale), guidance_scale)


@dataclass(frozen=True)
class GuidedVelocity:
    """A predictor with its guidance: `(x_t, timestep, step) -> (B, C, h, w)`, in float32."""

    predictor: Predictor
    guidance: ClassifierFreeGuidance

    def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        """At x_t (B, C, h, w) and `timestep` (B,) of the scheduler, in the call's step of this number."""
        branches = self.guidance.all_branches
        rows = self.predictor(x_t.repeat(len(branches), 1, 1, 1), timestep.repeat(len(branches)), branches, step)
        return self.guidance.combine(dict(zip(branches, rows.float().chunk(len(branches)), strict=True)))


class VelocityDifference:
    """What FlowEdit asks of the model at each step, in the place of the loop's `predict`.

    The two prompts are asked one after the other, in batches of the same size, since in one batch equal rows may come
    out unequal in the last bit.

    Args:
        target: Of the call; its scheduler knows how far the loop is.
        data: (B, C, h, w), the picture x.
        source: Of the prompt that describes the picture.
        edited: Of the prompt that describes the edit.
        averages: Draws of noise at each step, over which the difference is averaged.
        sampled: n_min, the last of the call's steps, which sample the edit's prompt alone.
    """

    def __init__(
        self,
        target: Target,
        data: torch.Tensor,
        source: GuidedVelocity,
        edited: GuidedVelocity,
        averages: int,
        sampled: int,
    ):
        self.target, self.source, self.edited, self.averages = target, source, edited, averages
        self.data = self.origin = data
        self.compared = len(target.timesteps) - sampled

    def __call__(
        self, difference: torch.Tensor, timestep: torch.Tensor, branches: tuple[str, ...], step: int
    ) -> torch.Tensor:
        """(B, C, h, w), the velocity of d at d of the same shape and `timestep` (B,)."""
        if step >= self.compared:
            if step == self.compared:
                self.origin = self.noisy(timestep)
            return self.edited(self.origin + difference, timestep, step)
        total = torch.zeros_like(difference)
        for _ in range(self.averages):
            noisy = self.noisy(timestep)
            total += self.edited(noisy + difference, timestep, step) - self.source(noisy, timestep, step)
        return total / self.averages

    def noisy(self, timestep: torch.Tensor) -> torch.Tensor:
        """z_source (B, C, h, w): the picture with fresh noise at `timestep` (B,)."""
        data, target = self.data, self.target
        noise = randn_tensor(data.shape, target.generator, data.device, data.dtype)
        return noised(target.scheduler, data, noise, timestep[:1])

    def edit(self, difference: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w), the latents of the edit, of d after the last step."""
        return self.origin + difference
