"""A cache gives what the encoder gives, is never read for another encoder or content, and is made once."""

import errno
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.autoencoders.latents import normalised
from hubgen.conditioning.prompts import OneEncoder
from hubgen.data import cache as cache_module
from hubgen.data.cache import TensorCache, module_digest
from hubgen.data.encoded import LatentSource, TextSource
from hubgen.data.errors import DataError
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.order import Draw
from hubgen.data.views import Views
from tests import models
from tests.training.conftest import draw_pictures

KEYS = [f"key {number}" for number in range(23)]


class Encoder:
    """Gives each key the numbers that it is spelled with, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for key in keys:
            self.asked.append(key)
            yield (
                key,
                {"letters": torch.tensor([float(ord(letter)) for letter in key]), "length": torch.tensor(len(key))},
            )


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD", 4)


def letters(key: str) -> torch.Tensor:
    return torch.tensor([float(ord(letter)) for letter in key])


@pytest.mark.usefixtures("small_shards")
def test_values_are_found_by_key_and_made_once(tmp_path: Path) -> None:
    encode = Encoder()
    for keys in (KEYS, KEYS[::-1], [*KEYS, *KEYS]):
        cache = TensorCache(tmp_path, {"content": "words"}, keys)
        cache.fill(encode, show_progress=False)
        assert all(torch.equal(cache[key]["letters"], letters(key)) for key in KEYS)
    assert sorted(encode.asked) == sorted(KEYS)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and not list(tmp_path.glob("*.lock"))
    with pytest.raises(DataError, match="'other' is not among the 23"):
        cache["other"]


@pytest.mark.usefixtures("small_shards")
def test_one_more_key_costs_one_shard_and_other_content_costs_all(tmp_path: Path) -> None:
    encode = Encoder()
    TensorCache(tmp_path, {"content": "words"}, KEYS).fill(encode, show_progress=False)
    encode.asked = []
    TensorCache(tmp_path, {"content": "words"}, [*KEYS, "one more"]).fill(encode, show_progress=False)
    assert "one more" in encode.asked and len(encode.asked) <= 8
    encode.asked = []
    TensorCache(tmp_path, {"content": "words", "encoder": "another"}, KEYS).fill(encode, show_progress=False)
    assert len(encode.asked) == len(KEYS)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("harm", ["truncate", "flip a bit", "remove"])
def test_a_shard_that_rotted_is_made_anew_and_no_other(tmp_path: Path, harm: str) -> None:
    encode, cache = Encoder(), TensorCache(tmp_path, {"content": "words"}, KEYS)
    cache.fill(encode, show_progress=False)
    path = cache.path(1)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content if harm == "flip a bit" else content[:-7])
    if harm == "remove":
        path.unlink()
    encode.asked = []
    again = TensorCache(tmp_path, {"content": "words"}, KEYS)
    again.fill(encode, show_progress=False)
    assert 0 < len(encode.asked) < 8
    assert all(torch.equal(again[key]["letters"], letters(key)) for key in KEYS)


@pytest.mark.usefixtures("small_shards")
def test_a_run_that_was_killed_goes_on_behind_the_last_whole_shard(tmp_path: Path) -> None:
    class Killed(Encoder):
        def __call__(self, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
            if len(self.asked) > 10:
                raise KeyboardInterrupt
            yield from super().__call__(keys)

    first, second = Killed(), Encoder()
    with pytest.raises(KeyboardInterrupt):
        TensorCache(tmp_path, {"content": "words"}, KEYS).fill(first, show_progress=False)
    TensorCache(tmp_path, {"content": "words"}, KEYS).fill(second, show_progress=False)
    assert sorted(first.asked + second.asked) == sorted(KEYS)


def fill(folder: Path, rank: int, asked: Any) -> None:
    cache_module.SHARD = 4
    encode = Encoder()
    TensorCache(folder, {"content": "words"}, KEYS).fill(encode, rank, 2, show_progress=False)
    asked.put(encode.asked)


def test_processes_share_the_work(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    asked = context.Queue()
    processes = [context.Process(target=fill, args=(tmp_path, rank, asked)) for rank in range(2)]
    for process in processes:
        process.start()
    shares = [asked.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(shares[0] + shares[1]) == sorted(KEYS)


def test_an_encoder_that_gives_nan_is_refused(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, {"content": "words"}, ["a"])
    with pytest.raises(DataError, match="words: the encoder's x holds NaN or infinite values for 'a'"):
        cache.fill(lambda keys: [("a", {"x": torch.tensor([float("nan")])})], show_progress=False)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_full_disk_is_said_with_what_the_cache_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.raises(DataError, match="disk full; the cache of 23 words needs about .* GB there. What is made stays"):
        TensorCache(tmp_path, {"content": "words"}, KEYS).fill(Encoder(), show_progress=False)


# ---- what training asks ----


@pytest.fixture
def pictures(tmp_path: Path) -> ImageTextFolder:
    draw_pictures(tmp_path / "data", 6)
    return ImageTextFolder(tmp_path / "data")


def views(pictures: ImageTextFolder) -> Views:
    return Views(pictures.sizes, pictures.digests, [(8, 12), (12, 8)], crops=2, mirror=True, seed=1)


def test_cached_and_live_latents_are_the_same_at_every_place(pictures: ImageTextFolder, tmp_path: Path) -> None:
    vae = models.vae(scaling_factor=0.7, shift_factor=0.1)
    cached = LatentSource(vae, pictures, views(pictures), seed=3, cache_dir=tmp_path / "cache", batch_size=4)
    cached.fill(show_progress=False)
    live = LatentSource(vae, pictures, views(pictures), seed=3)
    for first in range(0, 24, 4):
        draws = [Draw(place, 2 * (place // 2) % 6) for place in range(first, first + 4)]
        draws = [draw for draw in draws if live.views.buckets[draw.row] == live.views.buckets[draws[0].row]]
        one, other = (s.latents(s.read(draws), draws, torch.device("cpu")) for s in (cached, live))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_latents_are_drawn_from_the_posterior(pictures: ImageTextFolder) -> None:
    vae = models.vae(scaling_factor=0.7, shift_factor=0.1)
    source = LatentSource(vae, pictures, Views(pictures.sizes, pictures.digests, [(16, 16)]), seed=0)
    draws = [Draw(place, 0) for place in range(2000)]
    latents = source.latents(source.read(draws), draws, torch.device("cpu"))
    with torch.no_grad():
        posterior = vae.encode(pictures.load_pixels([0])).latent_dist
    torch.testing.assert_close(latents.mean(0), normalised(posterior.mean, vae)[0], atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std(0), 0.7 * posterior.std[0], atol=0.05, rtol=0.1)


@pytest.fixture
def text(tmp_path: Path) -> OneEncoder:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab_file=str(vocabulary), vocab={word: i for i, word in enumerate(words)})
    tokenizer.model_max_length = 6
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return OneEncoder((BertModel(BertConfig(vocab_size=len(words), **sizes)).eval(),), (tokenizer,))


def test_cached_and_live_embeddings_are_the_same(text: OneEncoder, tmp_path: Path) -> None:
    captions = ["red ball", "a red ball", "a a a a a", "red ball", ""]
    cached = TextSource(text, captions, tmp_path / "cache", batch_size=2)
    cached.fill(show_progress=False)
    asked = ["a red ball", "", "red ball", "a a a a a", ""]
    one, other = (source(asked, torch.device("cpu")) for source in (cached, TextSource(text, captions)))
    torch.testing.assert_close(one.tokens, other.tokens)
    torch.testing.assert_close(one.pooled, other.pooled)
    assert one.tokens.shape == (5, 6, 16) and one.tokens[1, 2:].eq(0).all()
    assert len(cached.too_long()) == 1 and "Not read" in cached.too_long()[0]
    with pytest.raises(DataError, match="'blue' is not among the 4"):
        cached(["blue"], torch.device("cpu"))


def test_embeddings_are_made_anew_for_another_encoder_or_length(text: OneEncoder, tmp_path: Path) -> None:
    def count() -> int:
        TextSource(text, ["a ball"], tmp_path / "cache").fill(show_progress=False)
        return len(list((tmp_path / "cache").glob("*.safetensors")))

    assert count() == count() == 1
    text.tokenizers[0].model_max_length = 5
    assert count() == 2
    with torch.no_grad():
        text.encoders[0].embeddings.word_embeddings.weight[5] += 1e-3  # type: ignore[union-attr]
    assert count() == 3


def test_a_digest_changes_with_config_and_weights_and_not_with_the_place(tmp_path: Path) -> None:
    vae = models.vae()
    before = module_digest(vae)
    vae.save_pretrained(tmp_path / "vae")
    assert module_digest(AutoencoderKL.from_pretrained(tmp_path / "vae")) == before
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    assert module_digest(vae) != before
