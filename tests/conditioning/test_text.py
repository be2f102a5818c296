"""Prompts to embeddings, and embeddings to what each backbone takes."""

import logging

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from hubgen.conditioning.text import TextCondition, TextEmbeddings
from tests import models
from tests.parity import randomize_

PROMPTS = ["", "a red cat", "the big blue dog"]


@pytest.fixture(scope="module")
def condition() -> TextCondition:
    return TextCondition(models.text_encoder(), models.tokenizer())


@torch.no_grad()
def test_padded_positions_are_zero_and_the_others_are_what_the_encoder_gives(condition: TextCondition) -> None:
    tokens = condition.encode(PROMPTS).tokens
    assert tokens.shape == (3, models.MAX_LENGTH, models.TEXT_WIDTH)
    for row, prompt in enumerate(PROMPTS):
        ids = condition.tokenizer(prompt, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        alone = condition.text_encoder(ids).last_hidden_state[0]
        torch.testing.assert_close(tokens[row, :length], alone)
        assert not tokens[row, length:].any()


@torch.no_grad()
def test_bert_is_pooled_by_the_mean_over_its_tokens(condition: TextCondition) -> None:
    embeddings = condition.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        length = len(condition.tokenizer(prompt)["input_ids"])
        torch.testing.assert_close(embeddings.pooled[row], embeddings.tokens[row, :length].mean(0))


@torch.no_grad()
def test_clip_is_pooled_by_its_own_projection() -> None:
    encoder = models.clip_text_encoder()
    embeddings = TextCondition(encoder, models.tokenizer()).encode(["a red cat"])
    batch = models.tokenizer()(["a red cat"], padding="max_length", return_tensors="pt")
    output = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(embeddings.pooled, output.text_embeds)
    assert embeddings.pooled.shape == (1, 12)


@torch.no_grad()
def test_t5_is_pooled_by_the_mean_over_its_tokens() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    embeddings = TextCondition(randomize_(T5EncoderModel(config)).eval(), models.tokenizer()).encode(["a red cat"])
    torch.testing.assert_close(embeddings.pooled[0], embeddings.tokens[0, :5].mean(0))


@torch.no_grad()
def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(condition: TextCondition) -> None:
    together = condition.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = condition.encode([prompt])
        torch.testing.assert_close(together.tokens[row : row + 1], alone.tokens)
        torch.testing.assert_close(together.pooled[row : row + 1], alone.pooled)


def test_a_prompt_that_is_too_long_is_cut_and_the_warning_tells_what(
    condition: TextCondition, caplog: pytest.LogCaptureFixture
) -> None:
    room = models.MAX_LENGTH - 2
    prompt = " ".join(["red"] * room + ["green", "apple"])
    with caplog.at_level(logging.WARNING):
        cut = condition.encode([prompt]).tokens
        assert "green apple" in caplog.text and f"reads {room}" in caplog.text
        caplog.clear()
        fits = condition.encode([" ".join(["red"] * room)]).tokens
        assert not caplog.text
    torch.testing.assert_close(cut, fits)


def test_the_length_comes_from_the_tokenizer_but_is_never_more_than_the_encoder_has_positions_for() -> None:
    assert TextCondition(models.text_encoder(), models.tokenizer(7)).max_length == 7
    assert TextCondition(models.text_encoder(), models.tokenizer(512)).max_length == 32


@pytest.mark.parametrize("max_length", [2, 0, -1, 33, 8.5, "8"])
def test_a_length_that_cannot_be_is_refused(max_length: object) -> None:
    with pytest.raises(ValueError, match="`max_length`"):
        TextCondition(models.text_encoder(), models.tokenizer(), max_length)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [[], "a red cat", [None], ["a", 3]])
def test_prompts_that_are_no_list_of_strings_are_refused(condition: TextCondition, prompts: object) -> None:
    with pytest.raises(ValueError, match="`prompts`"):
        condition.encode(prompts)  # type: ignore[arg-type]


def embeddings(batch: int = 2) -> TextEmbeddings:
    return TextEmbeddings(torch.randn(batch, 8, models.TEXT_WIDTH), torch.randn(batch, models.TEXT_WIDTH))


def test_embeddings_can_be_chosen_repeated_and_joined() -> None:
    two = embeddings()
    torch.testing.assert_close(TextEmbeddings.cat([two[:1], two[1:]]).tokens, two.tokens)
    repeated = two.repeat_interleave(3)
    assert len(repeated) == 6
    torch.testing.assert_close(repeated[torch.tensor([0, 3])].pooled, two.pooled)
    assert two.to(dtype=torch.float16).tokens.dtype == torch.float16
