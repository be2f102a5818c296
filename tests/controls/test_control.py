"""A control sees a target, opens doors for one call, and leaves nothing behind."""

import pytest
import torch

from hubgen.autoencoders.latents import LatentSpace
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import family_of
from hubgen.conditioning.predict import Predictor, predict
from hubgen.controls.control import Prepared, Start, Target, open_doors
from hubgen.controls.inpaint import Inpaint, KeptOutside, ShownMask
from hubgen.data.images import Canvas
from hubgen.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from hubgen.schedulers.times import noised
from tests import models

BRANCHES = ("negative", "positive")


class Channels(Prepared):
    """Other channels in each branch, as InstructPix2Pix has them (2211.09800)."""

    def __init__(self, by_branch: dict[str, torch.Tensor]):
        self.by_branch = by_branch

    def channels(self, branch: str) -> torch.Tensor:
        return self.by_branch[branch]


def target(backbone, batch: int = 2, steps: int = 4, **changes) -> Target:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    vae, family = models.vae(), family_of(backbone)
    values = {
        "backbone": backbone,
        "family": family,
        "vae": vae,
        "scheduler": scheduler,
        "latents": LatentSpace(vae, backbone.config, family.patch),
        "size": (16, 16),
        "batch": batch,
        "per_prompt": 1,
        "branches": BRANCHES,
        "timesteps": scheduler.timesteps,
        "generator": torch.Generator().manual_seed(0),
    }
    return Target(**{**values, **changes})


@torch.no_grad()
def test_channels_may_differ_by_branch_and_follow_x_t_in_the_order_of_the_controls() -> None:
    unet, t = models.unet(in_channels=4 + 4 + 1), torch.tensor([500.0, 500.0])
    x_t, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 8, 8)
    pictures = {branch: torch.randn(2, 4, 8, 8) for branch in BRANCHES}
    conditions = {branch: Condition(tokens=torch.randn(2, 5, models.TEXT_WIDTH)) for branch in BRANCHES}
    prepared = [Channels(pictures), ShownMask(mask)]
    predictor = Predictor(unet, conditions, doors=open_doors(prepared))
    together = predictor(torch.cat([x_t, x_t]), torch.cat([t, t]), BRANCHES, 0)
    for branch, rows in zip(BRANCHES, together.chunk(2), strict=True):
        joined = torch.cat([x_t, pictures[branch], mask], dim=1)
        expected = unet(joined, t, conditions[branch].tokens).sample
        torch.testing.assert_close(rows, expected)
        assert torch.equal(predictor(x_t, t, (branch,), 0), expected)


@torch.no_grad()
def test_a_control_that_opens_no_door_changes_nothing() -> None:
    model, condition = models.transformer(), Condition(tokens=torch.randn(2, 5, 16), pooled=torch.randn(2, 16))
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    predictor = Predictor(model, {"positive": condition}, doors=open_doors([Prepared(), Prepared()]))
    assert torch.equal(predictor(x_t, t, ("positive",), 0), predict(model, x_t, t, condition))
    assert Prepared().after_step(0, t[0], x_t) is x_t


@pytest.mark.parametrize(
    ("images", "per_prompt", "order"), [(2, 2, [0, 0, 1, 1]), (2, 1, [0, 1, 0, 1]), (4, 1, [0, 1, 2, 3])]
)
def test_an_image_of_its_own_goes_with_its_prompt(images: int, per_prompt: int, order: list[int]) -> None:
    found = target(models.transformer(), batch=4, per_prompt=per_prompt).for_all(torch.arange(images))
    assert found.tolist() == order


def test_outside_the_mask_the_image_stays_and_inside_it_does_not() -> None:
    """After each step the outside is the image, noised to the time of the next one; after the last, the image."""
    call = target(models.transformer())
    data, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    canvas = Canvas((16, 16), 4, 4)
    control = Inpaint(torch.rand(1, 3, 16, 16), mask, canvas)
    control.check(call)
    prepared = control.prepare(call, Start(noise, data, noise))
    assert isinstance(prepared, KeptOutside)
    latents, inside = torch.randn(2, 4, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    last = prepared.after_step(3, call.timesteps[3], latents)
    assert torch.equal(last[..., ~inside], data[..., ~inside]) and torch.equal(last[..., inside], latents[..., inside])
    call.scheduler.step(torch.zeros_like(latents), call.timesteps[0], latents)
    first = prepared.after_step(0, call.timesteps[0], latents)
    expected = noised(call.scheduler, data, noise, call.timesteps[1:2])
    assert torch.equal(first[..., ~inside], expected[..., ~inside])


@torch.no_grad()
def test_a_backbone_with_inputs_for_it_is_shown_the_mask_and_the_masked_image() -> None:
    call, mask = target(models.unet(in_channels=9)), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    control = Inpaint(torch.rand(1, 3, 16, 16), mask, Canvas((16, 16), 2, 4))
    prepared = control.prepare(call, Start(torch.randn(2, 4, 8, 8)))
    shown = prepared.channels("positive")
    assert shown.shape == (2, 5, 8, 8)
    assert shown[:, 0, :, :4].eq(1).all() and shown[:, 0, :, 4:].eq(0).all()


def test_a_number_of_masks_that_does_not_divide_the_pictures_is_refused() -> None:
    control = Inpaint(torch.rand(1, 3, 16, 16), torch.zeros(3, 1, 16, 16), Canvas((16, 16), 4, 4))
    with pytest.raises(ValueError, match="`mask_image`: got 3, expected a number that divides the 2 pictures"):
        control.check(target(models.transformer()))
