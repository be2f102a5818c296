"""AutoencoderKL: parity with diffusers on the same weights, tiling, the posterior, and its training losses."""

import diffusers
import pytest
import torch

from hubgen.autoencoders.autoencoder_kl import (
    AutoencoderKL,
    DiagonalGaussianDistribution,
    flux,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from hubgen.autoencoders.discriminator import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss

SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 4,
    "sample_size": 16,
}
VARIANTS = {
    "sd": {"layers_per_block": 2, "latent_channels": 4},
    "sd3": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06},
    "no attention": {"latent_channels": 4, "mid_block_add_attention": False},
    "attention at the lowest resolution": {
        "down_block_types": ("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2,
    },
}


def randomised_pair(**config) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    """Our model and diffusers' with the same weights, every parameter drawn anew."""
    theirs = diffusers.AutoencoderKL(**{**SMALL, **config}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    ours = AutoencoderKL(**{**SMALL, **config}).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 0
    assert (ours - theirs).abs().max() < 1e-4 * theirs.std()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_encode_and_decode_agree_with_diffusers_on_random_weights(variant):
    ours, theirs = randomised_pair(**VARIANTS[variant])
    pixels = torch.randn(2, 3, 24, 32)
    assert_agree(ours.encode(pixels).latent_dist.parameters, theirs.encode(pixels).latent_dist.parameters)
    latents = torch.randn(2, ours.config.latent_channels, 6, 8)
    assert_agree(ours.decode(latents).sample, theirs.decode(latents).sample)
    assert_agree(ours(pixels).sample, theirs(pixels).sample)


@torch.no_grad()
def test_tiled_encoding_and_decoding_agree_with_diffusers():
    ours, theirs = randomised_pair(**VARIANTS["sd"])
    ours.enable_tiling()
    theirs.enable_tiling()
    pixels = torch.randn(1, 3, 40, 56)
    assert_agree(ours.encode(pixels).latent_dist.parameters, theirs.encode(pixels).latent_dist.parameters)
    latents = torch.randn(1, 4, 10, 14)
    assert_agree(ours.decode(latents).sample, theirs.decode(latents).sample)


@torch.no_grad()
def test_slicing_leaves_the_result_unchanged():
    ours, _ = randomised_pair(**VARIANTS["sd"])
    latents = torch.randn(3, 4, 4, 4)
    whole = ours.decode(latents).sample
    ours.enable_slicing()
    torch.testing.assert_close(ours.decode(latents).sample, whole, atol=1e-5, rtol=1e-5)


PRESETS = {
    # parameters; what the official configs say beside the architecture
    stable_diffusion: (83_653_863, {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}),
    stable_diffusion_xl: (83_653_863, {"latent_channels": 4, "scaling_factor": 0.13025, "shift_factor": None}),
    stable_diffusion_3: (83_819_683, {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    flux: (83_819_683, {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_presets_have_the_published_parameters_and_factors(preset):
    count, published = PRESETS[preset]
    with torch.device("meta"):
        ours = preset()
        theirs = diffusers.AutoencoderKL(**{k: v for k, v in ours.config.items() if not k.startswith("_")})
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    assert {key: ours.config[key] for key in published} == published
    assert ours.config.force_upcast and (ours.quant_conv is None) == (ours.config.latent_channels == 16)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
@torch.no_grad()
def test_presets_made_small_agree_with_diffusers(preset):
    with torch.device("meta"):
        config = preset(block_out_channels=(32, 32, 32, 32), layers_per_block=1).config
    small = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    ours, theirs = randomised_pair(**{k: v for k, v in config.items() if not k.startswith("_")} | small)
    pixels = torch.randn(1, 3, 16, 24)
    assert_agree(ours.encode(pixels).latent_dist.parameters, theirs.encode(pixels).latent_dist.parameters)
    assert_agree(ours(pixels).sample, theirs(pixels).sample)


def test_kl_divergence_equals_that_of_torch_distributions():
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected.sum(dim=[1, 2, 3]))


def test_sampling_the_posterior_has_its_mean_and_standard_deviation():
    parameters = torch.cat([torch.full((1, 1, 100, 100), 2.0), torch.full((1, 1, 100, 100), -1.0)], dim=1)
    sample = DiagonalGaussianDistribution(parameters).sample(torch.Generator().manual_seed(0))
    assert abs(sample.mean().item() - 2.0) < 0.02
    assert abs(sample.std().item() - torch.tensor(-0.5).exp().item()) < 0.02


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer():
    layer = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    reconstruction, adversarial = (3.0 * layer).sum(), (layer * torch.tensor([0.0, 0.5])).sum()
    expected = (3.0 * 2**0.5) / (0.5 + 1e-4)  # gradients (3, 3) and (0, 0.5)
    assert adaptive_weight(reconstruction, adversarial, layer).item() == pytest.approx(expected, rel=1e-6)


def test_a_discriminator_learns_to_tell_noise_from_a_constant():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8, num_layers=1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    real, fake = torch.randn(4, 3, 16, 16), torch.full((4, 3, 16, 16), 0.1)
    first = None
    for _ in range(30):
        loss = hinge_loss(*discriminator(torch.cat([real, fake])).chunk(2))
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
    assert generator_loss(discriminator(fake)) > generator_loss(discriminator(real))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"down_block_types": ("AttnDownBlock2D",) * 3}, "down_block_types"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
    ],
)
def test_a_config_that_the_architecture_does_not_know_is_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        AutoencoderKL(**{**SMALL, **change})


def test_pixels_of_a_size_that_does_not_fit_are_refused_with_the_size():
    ours, _ = randomised_pair(**VARIANTS["sd"])
    with pytest.raises(ValueError, match=r"got \(1, 3, 18, 16\), .*multiples of 4"):
        ours.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"`z`.*\(1, 3, 4, 4\)"):
        ours.decode(torch.zeros(1, 3, 4, 4))
