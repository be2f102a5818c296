"""The way between pixels and the latents that a backbone has."""

import pytest
import torch

from hubgen.autoencoders.latents import LatentSpace, decode, denormalised, encode, in_safe_precision, normalised
from tests import models

STATISTICS = {"latents_mean": [0.3, -1.0, 0.0, 2.0], "latents_std": [0.5, 4.0, 1.0, 2.0], "scaling_factor": 0.8}


def vae(**config):
    model = models.vae()
    model.register_to_config(**config)
    return model.requires_grad_(False)


@pytest.mark.parametrize("config", [{}, {"shift_factor": None}, STATISTICS], ids=["shift", "scale", "channels"])
def test_encoded_and_decoded_pictures_are_the_autoencoders_own_reconstructions(config) -> None:
    model, pixels = vae(**config), torch.rand(2, 3, 16, 12) * 2 - 1
    own = model.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    latents = encode(model, pixels, torch.Generator().manual_seed(1))
    torch.testing.assert_close(denormalised(latents, model), own)
    torch.testing.assert_close(decode(model, latents), model.decode(own).sample)


def test_each_channel_has_the_mean_and_deviation_that_the_config_says() -> None:
    model = vae(**STATISTICS)
    mean, std = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    unit = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(normalised(mean + std * unit, model), unit * STATISTICS["scaling_factor"])


def test_a_generator_for_each_picture_makes_its_latents_the_same_in_any_batch() -> None:
    model, pixels = vae(), torch.rand(3, 3, 16, 16)
    together = encode(model, pixels, [torch.Generator().manual_seed(seed) for seed in range(3)])
    alone = encode(model, pixels[1:2], torch.Generator().manual_seed(1))
    torch.testing.assert_close(together[1:2], alone)


def test_an_autoencoder_that_was_upcast_is_put_back_also_after_an_error() -> None:
    model = vae(force_upcast=True).half()
    with pytest.raises(MemoryError), in_safe_precision(model):
        assert model.dtype == torch.float32
        raise MemoryError
    assert model.dtype == torch.float16
    latents = encode(model, torch.rand(1, 3, 16, 16))
    assert latents.dtype == torch.float32 and model.dtype == torch.float16
    assert decode(model, latents).dtype == torch.float32 and model.dtype == torch.float16


def test_sizes_are_counted_in_pixels_latents_and_tokens() -> None:
    space = LatentSpace(vae(), {"sample_size": (8, 6), "pos_embed_max_size": 8}, patch=2)
    assert (space.factor, space.multiple, space.largest, space.default_size) == (2, 4, 32, (16, 12))
    assert space.shape(3, (16, 8)) == (3, 4, 8, 4)
    assert space.tokens((16, 8)) == 4 * 2
