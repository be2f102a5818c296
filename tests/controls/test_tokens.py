"""Tokens after those of x_t and after those of the text: what they are to a backbone, and what they leave as it is."""

from typing import Any

import pytest
import torch

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import Doors, FurtherTokens, family_of
from hubgen.conditioning.families.flux import pack, token_positions, unpack
from hubgen.conditioning.predict import BackboneCall, Predictor, predict
from hubgen.controls.control import Prepared, open_doors
from hubgen.layers.residuals import added_to_first
from tests import models
from tests.models import NETWORKS

BRANCHES = ("negative", "positive")
T = torch.tensor([500.0, 500.0])


class Beside(Prepared):
    """Opens both doors."""

    def __init__(self, picture: torch.Tensor | None = None, text: torch.Tensor | None = None):
        self.picture, self.text = picture, text

    def tokens(self, branch: str) -> FurtherTokens | None:
        return None if self.picture is None else FurtherTokens(self.picture)

    def text_tokens(self, branch: str) -> torch.Tensor | None:
        return self.text


def flux(**changes: Any) -> Any:
    return NETWORKS["FLUX.1 schnell"].build(**changes)


def told(rows: int = 2) -> Condition:
    return Condition(tokens=torch.randn(rows, 5, models.TEXT_WIDTH), pooled=torch.randn(rows, models.TEXT_WIDTH))


@torch.no_grad()
def test_a_picture_of_another_size_follows_x_t_under_an_index_of_its_own() -> None:
    backbone, x_t, condition = flux(), torch.randn(2, 4, 8, 6), told()
    pictures = [torch.randn(2, 4, 4, 10), torch.randn(2, 4, 6, 6)]
    further = [FurtherTokens(one, index) for index, one in enumerate(pictures, start=1)]
    found = predict(backbone, x_t, T, condition, Doors(tokens=further))
    positions = [token_positions(*one.shape[2:], x_t.device, index) for index, one in enumerate([x_t, *pictures])]
    expected = backbone(
        torch.cat([pack(one) for one in (x_t, *pictures)], dim=1),
        timestep=T / 1000,
        encoder_hidden_states=condition.tokens,
        pooled_projections=condition.pooled,
        img_ids=torch.cat(positions),
        txt_ids=torch.zeros(5, 3),
    ).sample
    assert torch.equal(found, unpack(expected[:, :12], 8, 6))
    assert torch.equal(positions[2][:, 0], torch.full((9,), 2.0))
    assert not torch.equal(found, predict(backbone, x_t, T, condition))


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD 1.x", "SD 3", "DiT"])
def test_a_backbone_whose_x_t_is_no_sequence_says_so(name: str) -> None:
    backbone = NETWORKS[name].build()
    assert not family_of(backbone).takes_tokens
    further = [FurtherTokens(torch.randn(2, 4, 8, 8))]
    condition = Condition(tokens=told().tokens, pooled=told().pooled, labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="`doors.tokens`: got some, expected none: this backbone takes no tokens"):
        predict(backbone, torch.randn(2, 4, 8, 8), T, condition, Doors(tokens=further))


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD 1.x", "SD 3", "FLUX.1 schnell"])
def test_tokens_after_the_text_are_a_longer_text(name: str) -> None:
    backbone, x_t, condition = NETWORKS[name].build(), torch.randn(2, 4, 8, 8), told(1)
    more = torch.randn(1, 3, models.TEXT_WIDTH)
    conditions = {branch: condition for branch in BRANCHES}
    predictor = Predictor(backbone, conditions, doors=open_doors([Beside(text=more)]))
    found = predictor(x_t, T, BRANCHES, 0)
    assert condition.tokens is not None
    longer = Condition(tokens=torch.cat([condition.tokens, more], dim=1), pooled=condition.pooled)
    assert torch.equal(found, predict(backbone, x_t, T, longer.repeat(2)))
    assert not torch.equal(found, predict(backbone, x_t, T, condition.repeat(2)))


@torch.no_grad()
def test_what_stays_the_same_is_handed_on_as_the_same_tensor() -> None:
    """Answers that last a call, and FLUX' rotary tables, know tensors by identity."""
    backbone, seen = flux(), list[dict[str, Any]]()
    backbone.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    beside = Beside(torch.randn(1, 4, 4, 4), torch.randn(1, 3, models.TEXT_WIDTH))
    condition = told(1)
    predictor = Predictor(backbone, {branch: condition for branch in BRANCHES}, doors=open_doors([beside]))
    for step in range(3):
        predictor(torch.randn(2, 4, 8, 8), T, BRANCHES, step)
        predictor(torch.randn(1, 4, 8, 8), T[:1], ("positive",), step)
    for name in ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"):
        for i in (0, 1):
            assert len({id(kwargs[name]) for kwargs in seen[i::2]}) == 1, name
    beside.text = torch.randn(1, 4, models.TEXT_WIDTH)
    predictor(torch.randn(2, 4, 8, 8), T, BRANCHES, 3)
    assert seen[-1]["encoder_hidden_states"].shape[1] == seen[-1]["txt_ids"].shape[0] == 5 + 4


@torch.no_grad()
def test_every_control_sees_the_text_as_the_backbone_does() -> None:
    """The first one as well: what is in front of the doors is done for all before any network runs."""
    seen: list[Condition] = []

    class Net(Prepared):
        def residuals(self, call: BackboneCall) -> dict[str, Any]:
            seen.append(call.condition)
            return {}

    more, condition = torch.randn(1, 3, models.TEXT_WIDTH), told(1)
    doors = open_doors([Net(), Beside(text=more), Beside(text=more + 1)])
    found = doors(BackboneCall(torch.randn(1, 4, 8, 8), T[:1], ("positive",), condition))
    assert found.condition is seen[0] and found.condition.tokens is not None and condition.tokens is not None
    assert torch.equal(found.condition.tokens, torch.cat([condition.tokens, more, more + 1], dim=1))


@torch.no_grad()
def test_residuals_reach_the_tokens_of_x_t_alone() -> None:
    tokens, residual = torch.randn(2, 9, 8), torch.randn(2, 4, 8)
    found = added_to_first(tokens, residual)
    assert torch.equal(found[:, :4], tokens[:, :4] + residual) and torch.equal(found[:, 4:], tokens[:, 4:])
    assert added_to_first(tokens, None) is tokens
    backbone, x_t, condition = flux(), torch.randn(2, 4, 8, 8), told()
    further = [FurtherTokens(torch.randn(2, 4, 4, 4))]
    width = backbone.inner_dim
    zeros = {"controlnet_block_samples": [torch.zeros(2, 16, width)] * 2, "controlnet_single_block_samples": None}
    plain = predict(backbone, x_t, T, condition, Doors(tokens=further))
    assert torch.equal(predict(backbone, x_t, T, condition, Doors(tokens=further, residuals=zeros)), plain)
    some = {"controlnet_single_block_samples": [torch.randn(2, 16, width)]}
    assert not torch.equal(predict(backbone, x_t, T, condition, Doors(tokens=further, residuals=some)), plain)
