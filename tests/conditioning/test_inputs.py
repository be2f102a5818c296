"""The backbone's door: packing, positions, guidance as an input, and what is refused there."""

import diffusers
import pytest
import torch

from hubgen.conditioning.inputs import (
    BackboneCall,
    PictureNumbers,
    condition_inputs,
    guidance_embedding,
    pack,
    token_positions,
    unpack,
)
from hubgen.conditioning.text import TextCondition, TextEmbeddings
from tests import official, tiny

SIZES = [(4, 4), (2, 6), (8, 2)]


def embeddings(batch: int = 2, width: int = tiny.TEXT_WIDTH, pooled: int = tiny.TEXT_WIDTH) -> TextEmbeddings:
    return TextEmbeddings(torch.randn(batch, 5, width), torch.randn(batch, pooled))


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


@torch.no_grad()
def test_a_guided_call_is_the_two_calls_in_one() -> None:
    """With extra channels, and with other numbers told to each half."""
    unet = official.sdxl_unet(6, in_channels=9, cross_attention_dim=tiny.TEXT_WIDTH)
    positive, negative = embeddings(pooled=official.PROJECTION), embeddings(pooled=official.PROJECTION)
    numbers = PictureNumbers((32, 32), (0, 0), (32, 32)), PictureNumbers((20, 30), (1, 2), (40, 50))
    extra, x_t, t = torch.randn(2, 5, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0])
    call = BackboneCall(unet, positive, negative, numbers, extra_channels=extra)
    uncond, cond = call(torch.cat([x_t, x_t]), torch.cat([t, t]), True).chunk(2)
    torch.testing.assert_close(cond, call(x_t, t, False))
    torch.testing.assert_close(cond, BackboneCall(unet, positive, None, numbers, extra_channels=extra)(x_t, t, False))
    alone = BackboneCall(unet, negative, None, numbers[::-1], extra_channels=extra)(x_t, t, False)
    torch.testing.assert_close(uncond, alone)


@torch.no_grad()
def test_embeddings_may_be_replaced_during_a_walk() -> None:
    model, first, second = tiny.transformer(), embeddings(), embeddings()
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0])
    call = BackboneCall(model, first)
    call.embeddings = (second.tokens, second.pooled, None, None)
    assert torch.equal(call(x_t, t, False), BackboneCall(model, second)(x_t, t, False))


def test_a_backbone_that_takes_guidance_is_not_run_without() -> None:
    with pytest.raises(ValueError, match="`guidance_scale`"):
        condition_inputs(tiny.unet(time_cond_proj_dim=8), embeddings())


def test_more_numbers_than_the_unet_embeds_are_refused() -> None:
    unet, text = official.sdxl_unet(5), embeddings(pooled=official.PROJECTION)
    with pytest.raises(ValueError, match="5 numbers.*got 6.*requires_aesthetics_score"):
        condition_inputs(unet, text, (16, 16))
    numbers = [PictureNumbers((16, 16), (0, 0), (16, 16), aesthetic_score=6.0)]
    assert (
        condition_inputs(unet, text, numbers=numbers)["added_cond_kwargs"]["time_ids"].tolist()
        == [[16, 16, 0, 0, 6]] * 2
    )


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
