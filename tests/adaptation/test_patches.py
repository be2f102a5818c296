"""A transformer that is cut into smaller patches goes on from what it has learnt."""

import pytest
import torch

from hubgen.adaptation.patches import with_patch_size
from hubgen.backbones.sd3 import SD3Transformer2DModel
from tests.models import NETWORKS


@pytest.fixture
def coarse() -> SD3Transformer2DModel:
    """With patches of 4 x 4 latents."""
    return NETWORKS["SD 3"].build(sample_size=16, patch_size=4, pos_embed_max_size=4)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_small_patches_are_read_as_the_large_ones_of_a_repeated_picture(coarse, patch_size):
    ratio = 4 // patch_size
    fine = with_patch_size(coarse, patch_size)
    x = torch.randn(2, 4, 4, 8)
    large = x.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))
    large = large.repeat_interleave(ratio, 3).repeat_interleave(ratio, 5).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(fine.pos_embed.proj(x), coarse.pos_embed.proj(large), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_every_place_keeps_its_position_at_every_size(coarse, patch_size):
    ratio = 4 // patch_size
    fine = with_patch_size(coarse, patch_size)
    for rows, columns in [(4, 4), (2, 4), (2, 2)]:
        old = coarse.pos_embed.cropped_positions(rows, columns).unflatten(1, (rows, columns))
        new = fine.pos_embed.cropped_positions(rows * ratio, columns * ratio)
        new = new.unflatten(1, (rows * ratio, columns * ratio))
        torch.testing.assert_close(new[:, ::ratio, ::ratio], old, rtol=0, atol=1e-6)


def test_the_parts_of_a_large_patch_are_averaged(coarse):
    fine = with_patch_size(coarse, 2)
    token = torch.randn(1, 32)
    large = coarse.proj_out(token).reshape(4, 4, 4)
    mean = large.reshape(2, 2, 2, 2, 4).mean((1, 3))
    torch.testing.assert_close(fine.proj_out(token).reshape(2, 2, 4), mean, rtol=1e-5, atol=1e-6)


def test_the_blocks_and_the_given_transformer_stay(coarse):
    before = {name: value.clone() for name, value in coarse.state_dict().items()}
    fine = with_patch_size(coarse, 1)
    changed = {name for name, value in fine.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"pos_embed.pos_embed", "pos_embed.proj.weight", "proj_out.weight", "proj_out.bias"}
    assert all(torch.equal(value, before[name]) for name, value in coarse.state_dict().items())
    assert (coarse.config.patch_size, fine.config.patch_size, fine.config.pos_embed_max_size) == (4, 1, 16)


def test_saved_it_is_diffusers_own(coarse, tmp_path):
    import diffusers

    fine = with_patch_size(coarse, 1).eval()
    fine.save_pretrained(tmp_path)
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
    inputs = (torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 16), torch.tensor([500.0]))
    with torch.no_grad():
        torch.testing.assert_close(theirs(*inputs)[0], fine(*inputs)[0], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_cut_is_named(coarse):
    with pytest.raises(ValueError, match="`patch_size`: got 3, expected a divisor of the transformer's 4"):
        with_patch_size(coarse, 3)
    with pytest.raises(ValueError, match="`transformer`: got a DiTTransformer2DModel, expected one with a table"):
        with_patch_size(NETWORKS["DiT"].build(), 1)
