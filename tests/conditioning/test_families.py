"""One call of a backbone: every family takes its conditions by it, and learns by it."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.families import Doors, family_of
from hubgen.conditioning.families.flux import pack, token_positions, unpack
from hubgen.conditioning.families.unet import guidance_embedding
from hubgen.conditioning.micro import MicroConditioning
from hubgen.conditioning.predict import Predictor, predict
from hubgen.conditioning.text import TextCondition
from hubgen.paths.path import RectifiedFlowPath
from tests import models, official

SIZES = [(4, 4), (2, 6), (8, 2)]
SIZED: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
}


flux, dit = models.NETWORKS["FLUX.1 dev"].build, models.NETWORKS["DiT"].build
BACKBONES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "mmdit": (models.transformer, {"tokens", "pooled"}),
    "unet": (models.unet, {"tokens"}),
    "unet with classes": (lambda: models.unet(num_class_embeds=10), {"tokens", "labels"}),
    "unet with pooled text": (
        lambda: models.unet(class_embed_type="projection", projection_class_embeddings_input_dim=16),
        {"tokens", "pooled"},
    ),
    "sdxl": (lambda: models.unet(**SIZED), {"tokens", "pooled", "micro"}),
    "lcm": (lambda: models.unet(time_cond_proj_dim=8), {"tokens", "guidance_scale"}),
    "flux-dev": (flux, {"tokens", "pooled", "guidance_scale"}),
    "flux-schnell": (lambda: flux(guidance_embeds=False), {"tokens", "pooled"}),
    "dit": (lambda: dit(out_channels=4), {"labels"}),
}
FIELDS = ("tokens", "pooled", "labels", "micro", "guidance_scale")


def whole_condition(batch: int = 2, **changes: Any) -> Condition:
    """With every field, for a picture of 16x16 pixels."""
    values = {
        "tokens": torch.randn(batch, 5, models.TEXT_WIDTH),
        "pooled": torch.randn(batch, models.TEXT_WIDTH),
        "labels": torch.arange(batch),
        "micro": MicroConditioning((16, 16), (0, 0), (16, 16)).rows(batch),
        "guidance_scale": 3.5,
    }
    return Condition(**{**values, **changes})


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_a_backbone_reads_the_fields_that_its_family_takes_and_no_other(name: str) -> None:
    build, takes = BACKBONES[name]
    model, condition = build(), whole_condition()
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    assert family_of(model).takes == takes
    before = predict(model, x_t, t, condition)
    assert before.shape == x_t.shape
    changed: dict[str, Any] = {name: value + 1 for name, value in condition.tensors.items()} | {"guidance_scale": 9.0}
    for field in FIELDS:
        after = predict(model, x_t, t, Condition(**{**vars(condition), field: changed[field]}))
        assert torch.equal(before, after) == (field not in takes), field
        if field in takes:
            with pytest.raises(ValueError, match=f"`(condition.)?{field}`: got None"):
                predict(model, x_t, t, Condition(**{**vars(condition), field: None}))


@pytest.mark.parametrize("name", ["sdxl", "flux-dev", "dit", "mmdit", "unet with classes"])
def test_every_family_overfits_one_batch_by_the_one_call(name: str) -> None:
    build, _ = BACKBONES[name]
    model, condition, path = build().train(), whole_condition(4), RectifiedFlowPath()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    sample = path.sample(torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0.1, 0.4, 0.6, 0.9]))
    losses = []
    for _ in range(100):
        prediction = predict(model, sample.x_t, path.timestep(sample.t), condition)
        loss = (prediction - sample.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.25 * sample.target.square().mean().item()


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_a_call_for_all_branches_is_the_calls_of_each(name: str) -> None:
    build, _ = BACKBONES[name]
    model, x_t, t = build(), torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0])
    sizes = MicroConditioning((20, 30), (1, 2), (40, 50)).rows(2)
    conditions = {"negative": whole_condition(), "positive": whole_condition(micro=sizes, labels=torch.tensor([4, 7]))}
    predictor = Predictor(model, conditions)
    together = predictor(torch.cat([x_t, x_t]), torch.cat([t, t]), ("negative", "positive"), 0).chunk(2)
    for branch, rows in zip(("negative", "positive"), together, strict=True):
        torch.testing.assert_close(rows, predictor(x_t, t, (branch,), 0))
        torch.testing.assert_close(rows, predict(model, x_t, t, conditions[branch]))


@torch.no_grad()
def test_conditions_may_be_replaced_between_two_steps() -> None:
    model, first, second = models.transformer(), whole_condition(), whole_condition()
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0])
    predictor = Predictor(model, {"positive": first})
    assert torch.equal(predictor(x_t, t, ("positive",), 0), predict(model, x_t, t, first))
    predictor.conditions = {"positive": second}
    assert torch.equal(predictor(x_t, t, ("positive",), 1), predict(model, x_t, t, second))


@torch.no_grad()
def test_channels_of_a_control_are_joined_to_x_t() -> None:
    model, condition = models.unet(in_channels=9), whole_condition()
    x_t, extra, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8), torch.tensor([10.0, 500.0])
    expected = model(torch.cat([x_t, extra], 1), t, condition.tokens).sample
    assert torch.equal(predict(model, x_t, t, condition, Doors(channels=[extra])), expected)


@torch.no_grad()
def test_a_wrapped_backbone_is_called_through_its_wrapper() -> None:
    class Wrapper(nn.Module):
        """As data parallelism wraps a model."""

        def __init__(self, module: nn.Module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.module(*args, **kwargs)

    model, x_t, t = models.transformer(), torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    wrapped, condition = Wrapper(Wrapper(model)), whole_condition()
    assert torch.equal(predict(wrapped, x_t, t, condition), predict(model, x_t, t, condition))
    assert wrapped.calls == 1


def test_a_backbone_of_no_family_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="`backbone`: got a AutoencoderKL"):
        predict(models.vae(), torch.randn(1, 4, 8, 8), torch.tensor([1.0]), whole_condition(1))


# ---- conditions ----


def test_conditions_are_joined_repeated_and_counted() -> None:
    one, two = whole_condition(2), whole_condition(3)
    joined = Condition.cat([one, two])
    assert len(joined) == 5 and joined.guidance_scale == 3.5
    assert torch.equal(joined.pooled[2:], two.pooled)
    assert torch.equal(one.repeat(2).labels, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="`conditions`"):
        Condition.cat([one, Condition(tokens=two.tokens)])
    with pytest.raises(ValueError, match="`condition`: got one without a tensor"):
        len(Condition())


def test_more_numbers_than_the_unet_embeds_are_refused() -> None:
    unet, x_t, t = official.sdxl_unet(5), torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0])
    tokens, pooled = torch.randn(2, 5, unet.config.cross_attention_dim), torch.randn(2, models.POOLED)
    six = MicroConditioning((16, 16), (0, 0), (16, 16)).rows(2)
    with pytest.raises(ValueError, match="got 6 numbers.*expected 5.*requires_aesthetics_score"):
        predict(unet, x_t, t, Condition(tokens=tokens, pooled=pooled, micro=six))
    five = MicroConditioning((16, 16), (0, 0), (16, 16), aesthetic_score=6.0).rows(2)
    assert five.tolist() == [[16, 16, 0, 0, 6]] * 2
    assert predict(unet, x_t, t, Condition(tokens=tokens, pooled=pooled, micro=five)).shape == x_t.shape


# ---- FLUX and LCM ----


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_packing_is_undone_by_unpacking_and_is_that_of_flux(height: int, width: int) -> None:
    latents = torch.randn(3, 5, height, width)
    tokens = pack(latents)
    assert tokens.shape == (3, height * width // 4, 20)
    assert torch.equal(unpack(tokens, height, width), latents)
    assert torch.equal(tokens, diffusers.FluxPipeline._pack_latents(latents, 3, 5, height, width))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_positions_are_those_of_flux(height: int, width: int) -> None:
    expected = diffusers.FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    assert torch.equal(token_positions(height, width, torch.device("cpu")), expected)


@pytest.mark.parametrize("dim", [6, 7, 256])
def test_a_guidance_scale_is_embedded_as_in_diffusers(dim: int) -> None:
    scales = torch.tensor([1.0, 2.5, 8.0])
    expected = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=dim)
    torch.testing.assert_close(guidance_embedding(scales, dim), expected, atol=2e-3, rtol=0.0)  # angles to 7000


# ---- text ----


@pytest.mark.parametrize(
    ("encoder", "tokenizer"),
    [(official.clip_text, official.clip_tokenizer), (official.t5_text, official.t5_tokenizer)],
    ids=["clip", "t5"],
)
@torch.no_grad()
def test_clip_and_t5_show_the_states_of_padding(encoder, tokenizer) -> None:
    text = TextCondition(encoder(), tokenizer(), max_length=12)
    ids = text.tokenizer("a red cat", padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    assert torch.equal(text.encode(["a red cat"]).tokens, text.text_encoder(ids).last_hidden_state)
