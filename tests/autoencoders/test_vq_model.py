"""VQModel: parity with diffusers, where the gradients of quantisation go, how much of the codebook is in use."""

import math

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import VectorQuantizer as TheirQuantizer

from hubgen.autoencoders.quantizer import VectorQuantizer, perplexity
from hubgen.autoencoders.vq_model import VQModel, vq_f4, vq_f8
from tests.parity import randomize_

SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 4,
    "num_vq_embeddings": 32,
}
VARIANTS = {
    "attention at the lowest resolution": {},
    "no attention, other code size": {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "mid_block_add_attention": False,
        "vq_embed_dim": 5,
    },
    "two layers": {"layers_per_block": 2, "latent_channels": 4},
}


def pair(**config) -> tuple[VQModel, diffusers.VQModel]:
    """Our model and diffusers' with the same weights, every parameter drawn anew."""
    theirs = randomize_(diffusers.VQModel(**{**SMALL, **config})).eval()
    ours = VQModel(**{**SMALL, **config}).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 0
    assert (ours - theirs).abs().max() < 1e-4 * theirs.std()


def quantizer(legacy: bool = False, **options) -> VectorQuantizer:
    made = VectorQuantizer(**{"n_e": 8, "vq_embed_dim": 3, "beta": 0.25, "legacy": legacy, **options})
    torch.nn.init.normal_(made.embedding.weight)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_encode_decode_and_forward_agree_with_diffusers(variant):
    ours, theirs = pair(**VARIANTS[variant])
    pixels = torch.randn(2, 3, 16, 24)
    latents = theirs.encode(pixels).latents
    assert_agree(ours.encode(pixels).latents, latents)
    assert_agree(ours.decode(latents).sample, theirs.decode(latents).sample)
    assert_agree(ours.decode(latents, force_not_quantize=True)[0], theirs.decode(latents, force_not_quantize=True)[0])
    assert torch.equal(ours.decode(latents, force_not_quantize=True).commit_loss, torch.zeros(2))
    assert_agree(ours(pixels).sample, theirs(pixels).sample)
    assert_agree(ours(pixels, return_dict=False)[0], theirs(pixels, return_dict=False)[0])

    ours.quantize.legacy = True
    torch.testing.assert_close(ours(pixels).commit_loss, theirs(pixels).commit_loss)
    torch.testing.assert_close(ours(pixels, return_dict=False)[1], theirs(pixels).commit_loss)


@torch.no_grad()
def test_codes_are_looked_up_by_index_as_in_diffusers():
    ours, theirs = pair(lookup_from_codebook=True)
    indices, shape = torch.randint(32, (2, 24)), (2, 4, 6, 3)
    told = {"force_not_quantize": True, "shape": shape}
    assert_agree(ours.decode(indices, **told).sample, theirs.decode(indices, **told).sample)
    with pytest.raises(ValueError, match=r"`shape`: got .*, expected \(B, h, w, 3\)"):
        ours.decode(indices, force_not_quantize=True)
    with pytest.raises(ValueError, match="`h`: got torch.float32, expected indices"):
        ours.decode(indices.float(), **told)


@pytest.mark.parametrize(("preset", "codes", "ratio"), [(vq_f4, (8192, 3), 4), (vq_f8, (16384, 4), 8)])
def test_presets_have_the_papers_codebooks_and_diffusers_parameters(preset, codes, ratio):
    with torch.device("meta"):
        ours = preset()
        theirs = diffusers.VQModel(**{k: v for k, v in ours.config.items() if not k.startswith("_")})
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert (ours.quantize.embedding.weight.shape, ours.spatial_compression_ratio) == (codes, ratio)


def test_every_latent_becomes_its_nearest_code():
    made, z = quantizer(), torch.randn(2, 3, 4, 5)
    z_q, _, codes = made(z)
    distances = (z[:, None] - made.embedding.weight[None, :, :, None, None]).square().sum(2)  # (B, K, h, w)
    assert torch.equal(codes.min_encoding_indices.view(2, 4, 5), distances.argmin(1))
    torch.testing.assert_close(z_q, made.get_codebook_entry(distances.argmin(1), (2, 4, 5, 3)))


def test_quantising_the_codes_themselves_changes_nothing_and_costs_nothing():
    made = quantizer()
    codes = made.embedding.weight.detach().T[None, :, :, None]  # (1, D, K, 1)
    z_q, loss, found = made(codes)
    torch.testing.assert_close(z_q, codes)
    assert loss == 0 and torch.equal(found.min_encoding_indices, torch.arange(8))
    assert found.perplexity.item() == pytest.approx(8.0, rel=1e-5)


def test_the_encoder_gets_the_decoders_gradient_straight_through():
    made, z, target = quantizer(), torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    z_q, _, _ = made(z)
    (z_q * target).sum().backward()
    assert torch.equal(z.grad, target)
    assert made.embedding.weight.grad is None or not made.embedding.weight.grad.any()


@pytest.mark.parametrize("legacy", [False, True])
def test_gradients_of_the_loss_are_those_of_equation_3_with_beta_on_the_commitment(legacy):
    """d/dz beta·mean((z − sg z_q)²) = 2·beta·(z − z_q)/n, and a code gets 2·(code − z)/n of its own latents alone."""
    made, z = quantizer(legacy, beta=0.1), torch.randn(2, 3, 4, 4, requires_grad=True)
    _, loss, codes = made(z)
    loss.backward()
    on_encoder, on_codebook = (1.0, 0.1) if legacy else (0.1, 1.0)
    vectors = z.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    difference = vectors - made.embedding.weight.detach()[codes.min_encoding_indices]  # (N, D)
    n = difference.numel()
    torch.testing.assert_close(loss.detach(), 1.1 * difference.square().mean())
    torch.testing.assert_close(z.grad.permute(0, 2, 3, 1).reshape(-1, 3), 2 * on_encoder * difference / n)
    expected = torch.zeros(8, 3).index_add_(0, codes.min_encoding_indices, -2 * on_codebook * difference / n)
    torch.testing.assert_close(made.embedding.weight.grad, expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_quantizer_agrees_with_that_of_diffusers(legacy):
    ours, theirs = quantizer(legacy), TheirQuantizer(8, 3, beta=0.25, legacy=legacy)
    theirs.load_state_dict(ours.state_dict())
    z = torch.randn(2, 3, 4, 4)
    for actual, expected in zip(ours(z)[:2], theirs(z)[:2], strict=True):
        torch.testing.assert_close(actual, expected)
    assert torch.equal(ours(z)[2][2], theirs(z)[2][2])


def test_the_whole_model_trains_encoder_codebook_and_decoder():
    model = randomize_(VQModel(**SMALL))
    pixels = torch.randn(1, 3, 16, 16)
    out = model(pixels)
    (F.mse_loss(out.sample, pixels) + out.commit_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_training_overfits_one_picture():
    torch.manual_seed(0)
    model, pixels = VQModel(**SMALL), torch.rand(1, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        out = model(pixels)
        loss = F.mse_loss(out.sample, pixels)
        optimizer.zero_grad()
        (loss + out.commit_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_perplexity_is_one_for_one_code_and_k_for_equal_use():
    assert perplexity(torch.tensor([0, 7, 0])).item() == pytest.approx(1.0)
    assert perplexity(torch.full((6,), 3)).item() == pytest.approx(6.0)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert perplexity(torch.tensor([1, 3])).item() == pytest.approx(math.exp(entropy))


def test_usage_is_counted_in_training_and_stays_out_of_the_checkpoint():
    made = quantizer().train()
    near = made.embedding.weight.detach()[[1, 1, 4]].T[None, :, :, None]  # (1, D, 3, 1)
    made(near)
    assert made.counts.tolist() == [0, 2, 0, 0, 1, 0, 0, 0]
    assert made.codebook_usage == 0.25
    assert made.codebook_perplexity == pytest.approx(perplexity(torch.tensor([1, 2])).item())
    made.eval()(near)
    assert made.counts.sum() == 3
    assert list(made.state_dict()) == ["embedding.weight"]
    made.reset_counts()
    assert made.codebook_usage == 0.0


def test_dead_codes_come_back_to_life_on_the_encoders_outputs_by_the_generators_choice():
    made = quantizer().train()
    with torch.no_grad():
        made.embedding.weight[2:] += 100.0  # out of reach of all latents
    z = torch.randn(1, 3, 4, 4)
    made(z)
    before, dead = made.embedding.weight.detach().clone(), made.counts == 0
    assert dead.sum() >= 6

    twin = quantizer().train()
    twin.load_state_dict(made.state_dict())
    twin(z)
    moved = made.revive_dead_codes_(z, torch.Generator().manual_seed(3))
    assert moved == dead.sum() and made.counts.sum() == 0
    after = made.embedding.weight.detach()
    assert torch.equal(after[~dead], before[~dead])
    vectors = {tuple(v) for v in z.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert {tuple(v) for v in after[dead].tolist()} <= vectors and len(
        {tuple(v) for v in after[dead].tolist()}
    ) == moved

    twin.revive_dead_codes_(z, torch.Generator().manual_seed(3))
    assert torch.equal(twin.embedding.weight, after)
    made(z)
    assert (made.counts[dead] > 0).all()


def test_where_codes_outnumber_latents_all_dead_ones_are_revived():
    made = quantizer(n_e=50).train()
    z = torch.randn(1, 3, 2, 2)
    used = made(z)[2].min_encoding_indices.unique()
    assert made.revive_dead_codes_(z) == 50 - len(used)
    revived = made.embedding.weight.detach()[[i for i in range(50) if i not in used]]
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert ((revived[:, None] - vectors).abs().amax(2).amin(1) == 0).all()


def test_where_no_code_is_dead_none_is_moved():
    made = quantizer().train()
    before = made.embedding.weight.detach().clone()
    made(before.T[None, :, :, None])
    assert made.revive_dead_codes_(torch.randn(1, 3, 4, 4)) == 0
    assert torch.equal(made.embedding.weight, before)


def test_reviving_before_anything_was_counted_is_refused():
    with pytest.raises(ValueError, match="No assignments were counted"):
        quantizer().revive_dead_codes_(torch.zeros(1, 3, 2, 2))


@torch.no_grad()
def test_in_bfloat16_the_nearest_code_is_found_in_float32():
    made = quantizer().to(torch.bfloat16)
    z = torch.randn(1, 3, 4, 4).to(torch.bfloat16)
    z_q, loss, codes = made(z)
    assert z_q.dtype == loss.dtype == torch.bfloat16
    assert torch.equal(codes.min_encoding_indices, made.float()(z.float())[2].min_encoding_indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "spatial"}, "`norm_type`: got 'spatial', expected 'group'; MoVQ"),
        ({"act_fn": "relu"}, "act_fn"),
        ({"down_block_types": ("DownEncoderBlock2D",)}, "`down_block_types`.*3 levels"),
        ({"up_block_types": ("UpBlock2D",) * 3}, "`up_block_types`.*UpBlock2D"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"num_vq_embeddings": 0}, "n_e"),
    ],
)
def test_a_config_that_the_architecture_does_not_know_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        VQModel(**{**SMALL, **change})


def test_inputs_that_do_not_fit_are_refused_by_name():
    model, _ = pair()
    with pytest.raises(ValueError, match=r"`x`.*got \(1, 3, 18, 16\), .*multiples of 4"):
        model.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"`h`: got \(1, 4, 4, 4\), expected \(B, 3, h, w\)"):
        model.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="`remap`: got 'used.npy', expected None"):
        VectorQuantizer(8, 3, remap="used.npy")
