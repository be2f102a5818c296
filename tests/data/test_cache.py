"""A cache gives what the encoder gives, and is never read for another encoder, data or transform."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.conditioning.text import TextCondition
from hubgen.data.cache import cache_latents, cache_text_embeddings, module_digest
from hubgen.data.errors import DataError
from tests import models


class Pictures:
    """Three pictures of noise."""

    def __init__(self, fingerprint: str = "three pictures"):
        self.fingerprint, self.reads = fingerprint, 0
        self.pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def __len__(self) -> int:
        return 3

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        self.reads += 1
        return {"pixel_values": self.pixels[row]}


@pytest.fixture
def vae() -> AutoencoderKL:
    return models.vae()


@pytest.fixture
def text(tmp_path: Path) -> TextCondition:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab_file=str(vocabulary), vocab={word: i for i, word in enumerate(words)})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return TextCondition(BertModel(BertConfig(vocab_size=len(words), **sizes)).eval(), tokenizer, max_length=6)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_cached_latents_are_the_posteriors_of_live_encoding(vae: AutoencoderKL, tmp_path: Path) -> None:
    pictures = Pictures()
    cache = cache_latents(vae, pictures, tmp_path / "cache", batch_size=2, show_progress=False)
    with torch.no_grad():
        posterior = vae.encode(pictures.pixels).latent_dist
    torch.testing.assert_close(cache.mean, posterior.mean)
    torch.testing.assert_close(cache.std, posterior.std)
    drawn = cache.sample([2, 0], torch.Generator().manual_seed(5))
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, cache.mean[[2, 0]] + cache.std[[2, 0]] * noise)


def test_latents_are_read_again_only_for_the_same_weights_and_data(vae: AutoencoderKL, tmp_path: Path) -> None:
    pictures, folder = Pictures(), tmp_path / "cache"
    first = cache_latents(vae, pictures, folder, show_progress=False)
    assert pictures.reads == 3
    second = cache_latents(vae, pictures, folder, show_progress=False)
    assert pictures.reads == 3 and torch.equal(first.mean, second.mean)
    cache_latents(vae, Pictures("other pictures"), folder, show_progress=False)
    assert len(files(folder)) == 2
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-3
    assert not torch.equal(cache_latents(vae, pictures, folder, show_progress=False).mean, first.mean)
    assert pictures.reads == 6 and len(files(folder)) == 3


@pytest.mark.parametrize("harm", ["truncate", "flip a bit"])
def test_a_cache_file_that_rotted_is_made_anew(vae: AutoencoderKL, tmp_path: Path, harm: str) -> None:
    pictures, folder = Pictures(), tmp_path / "cache"
    first = cache_latents(vae, pictures, folder, show_progress=False)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content if harm == "flip a bit" else content[:-7])
    assert torch.equal(cache_latents(vae, pictures, folder, show_progress=False).mean, first.mean)
    assert pictures.reads == 6


def test_an_encoder_that_gives_nan_is_refused(vae: AutoencoderKL, tmp_path: Path) -> None:
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(DataError, match="latents.* NaN"):
        cache_latents(vae, Pictures(), tmp_path / "cache", show_progress=False)
    assert not (tmp_path / "cache").exists()


def test_cached_embeddings_are_those_of_live_encoding(text: TextCondition, tmp_path: Path) -> None:
    captions = ["red ball", "a red ball", "a a a a a", "red ball"]
    cache = cache_text_embeddings(text, captions, tmp_path / "cache", batch_size=2, show_progress=False)
    asked = ["a red ball", "", "red ball", "a a a a a", ""]
    cached = cache(asked)
    with torch.no_grad():
        live = text.encode(asked)
    torch.testing.assert_close(cached.tokens, live.tokens)
    torch.testing.assert_close(cached.pooled, live.pooled)
    assert cached.tokens.shape == (5, 6, 16)
    assert cached.tokens[1, 2:].eq(0).all()
    with pytest.raises(DataError, match="caption 'blue' is not among the 4"):
        cache(["blue"])


def test_embeddings_are_read_again_only_for_the_same_encoder_tokenizer_and_captions(
    text: TextCondition, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"

    def count(condition: Any, captions: list[str]) -> int:
        cache_text_embeddings(condition, captions, folder, show_progress=False)
        return len(files(folder))

    assert count(text, ["red ball", "a ball"]) == 1
    assert count(text, ["a ball", "red ball", "red ball"]) == 1  # order and repetition do not matter
    assert count(text, ["a ball"]) == 2
    assert count(TextCondition(text.text_encoder, text.tokenizer, max_length=5), ["a ball"]) == 3
    with torch.no_grad():
        text.text_encoder.embeddings.word_embeddings.weight[5] += 1e-3
    assert count(text, ["a ball"]) == 4


def test_a_digest_changes_with_config_and_weights_and_not_with_the_place(tmp_path: Path, vae: AutoencoderKL) -> None:
    before = module_digest(vae)
    vae.save_pretrained(tmp_path / "vae")
    assert module_digest(AutoencoderKL.from_pretrained(tmp_path / "vae")) == before
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    assert module_digest(vae) != before
