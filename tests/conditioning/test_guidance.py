"""Classifier-free guidance, its rescaling and its interval."""

import math

import pytest
import torch

from hubgen.conditioning.guidance import ClassifierFreeGuidance, GuidedNoise, PictureGuidance


def two_predictions() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)


def both(uncond: torch.Tensor, cond: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"negative": uncond, "positive": cond}


def test_scale_one_is_the_conditional_prediction_and_zero_the_unconditional_one() -> None:
    uncond, cond = two_predictions()
    torch.testing.assert_close(ClassifierFreeGuidance(1.0).combine(both(uncond, cond)), cond)
    torch.testing.assert_close(ClassifierFreeGuidance(0.0).combine(both(uncond, cond)), uncond)


def test_guidance_extrapolates_from_the_unconditional_through_the_conditional_prediction() -> None:
    uncond, cond = two_predictions()
    guided = ClassifierFreeGuidance(7.5).combine(both(uncond, cond))
    torch.testing.assert_close(guided, uncond + 7.5 * (cond - uncond))


def test_full_rescale_gives_back_the_conditional_standard_deviation() -> None:
    uncond, cond = two_predictions()
    guided = ClassifierFreeGuidance(7.5, rescale=1.0).combine(both(uncond, cond))
    torch.testing.assert_close(guided.std((1, 2, 3)), cond.std((1, 2, 3)))


def test_rescale_interpolates_between_guided_and_fully_rescaled() -> None:
    uncond, cond = two_predictions()
    none, half, full = (ClassifierFreeGuidance(5.0, rescale).combine(both(uncond, cond)) for rescale in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + full) / 2)


def test_equal_predictions_need_no_guidance() -> None:
    same, _ = two_predictions()
    for rescale in (0.0, 0.7):
        torch.testing.assert_close(ClassifierFreeGuidance(9.0, rescale).combine(both(same, same)), same)


def test_each_picture_of_a_batch_is_guided_by_itself() -> None:
    uncond, cond = two_predictions()
    guidance = ClassifierFreeGuidance(4.0, rescale=0.7)
    alone = torch.cat([guidance.combine(both(uncond[i : i + 1], cond[i : i + 1])) for i in range(2)])
    torch.testing.assert_close(guidance.combine(both(uncond, cond)), alone)


def test_the_interval_is_open_towards_data_and_closed_towards_noise() -> None:
    guidance = ClassifierFreeGuidance(4.0, interval=(0.2, 0.8))
    guided = ["negative" in guidance.branches(t) for t in (0.1, 0.2, 0.21, 0.8, 0.81)]
    assert guided == [False, False, True, True, False]
    assert ClassifierFreeGuidance(4.0).branches(1.0) == ClassifierFreeGuidance(4.0).branches(1e-6)
    assert ClassifierFreeGuidance(4.0).branches(1.0) == ("negative", "positive") == guidance.all_branches


def test_outside_the_interval_the_positive_prediction_is_left_as_it_is() -> None:
    _, cond = two_predictions()
    assert ClassifierFreeGuidance(7.5, rescale=0.7).combine({"positive": cond}) is cond


def test_a_learned_variance_stays_the_positive_branchs() -> None:
    uncond, cond = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    plain = ClassifierFreeGuidance(4.0)
    guided = GuidedNoise(plain, channels=4).combine(both(uncond, cond))
    assert torch.equal(guided[:, :4], plain.combine(both(uncond[:, :4], cond[:, :4])))
    assert torch.equal(guided[:, 4:], cond[:, 4:])


@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance(1.0), ClassifierFreeGuidance(4.0, interval=(0.0, 0.0))])
def test_at_scale_one_and_in_an_empty_interval_no_time_is_guided(guidance: ClassifierFreeGuidance) -> None:
    assert not guidance.enabled and guidance.all_branches == ("positive",)
    assert {guidance.branches(i / 100) for i in range(101)} == {("positive",)}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("guidance_scale", {"scale": math.nan}),
        ("guidance_scale", {"scale": math.inf}),
        ("guidance_scale", {"scale": -1.0}),
        ("guidance_scale", {"scale": "4"}),
        ("guidance_rescale", {"scale": 4.0, "rescale": math.nan}),
        ("guidance_rescale", {"scale": 4.0, "rescale": 1.5}),
        ("guidance_interval", {"scale": 4.0, "interval": (0.8, 0.2)}),
        ("guidance_interval", {"scale": 4.0, "interval": (0.0, math.nan)}),
        ("guidance_interval", {"scale": 4.0, "interval": (-0.1, 1.0)}),
        ("guidance_interval", {"scale": 4.0, "interval": (0.0, 1.0, 1.0)}),
        ("guidance_interval", {"scale": 4.0, "interval": 0.5}),
    ],
)
def test_a_bad_value_is_named(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        ClassifierFreeGuidance(**arguments)


# ---- guidance by a picture that the model is shown ----


def three() -> dict[str, torch.Tensor]:
    return {branch: torch.randn(2, 4, 8, 8) for branch in ("negative", "picture", "positive")}


def test_guidance_by_a_picture_goes_to_the_picture_and_from_there_to_the_prompt() -> None:
    rows = three()
    neither, picture, both_ = rows.values()
    expected = neither + 2.0 * (picture - neither) + 7.0 * (both_ - picture)
    torch.testing.assert_close(PictureGuidance(7.0, image_scale=2.0).combine(rows), expected)


def test_equal_scales_of_prompt_and_picture_are_classifier_free_guidance() -> None:
    rows = three()
    plain = ClassifierFreeGuidance(3.0).combine({name: rows[name] for name in ("negative", "positive")})
    torch.testing.assert_close(PictureGuidance(3.0, image_scale=3.0).combine(rows), plain, atol=1e-4, rtol=0.0)


def test_guidance_by_a_picture_is_rescaled_as_any_other() -> None:
    rows = three()
    guided = PictureGuidance(7.0, 1.0, image_scale=2.0).combine(rows)
    torch.testing.assert_close(guided.std((1, 2, 3)), rows["positive"].std((1, 2, 3)))


@pytest.mark.parametrize(("scale", "image_scale", "rows"), [(7.0, 1.5, 3), (1.1, 1.0, 3), (1.0, 1.5, 1), (7.0, 0.9, 1)])
def test_guidance_by_a_picture_is_on_with_both_scales(scale: float, image_scale: float, rows: int) -> None:
    guidance = PictureGuidance(scale, interval=(0.2, 1.0), image_scale=image_scale)
    assert len(guidance.all_branches) == len(guidance.branches(0.5)) == rows
    assert guidance.branches(0.1) == ("positive",)
    alone = torch.randn(2, 4, 8, 8)
    assert guidance.combine({"positive": alone}) is alone


@pytest.mark.parametrize("scale", [-0.1, float("nan"), "1"])
def test_a_scale_of_the_picture_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="`image_guidance_scale`: got .*, expected a finite number, at least 0"):
        PictureGuidance(7.0, image_scale=scale)
