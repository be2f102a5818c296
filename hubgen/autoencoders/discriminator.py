"""The adversarial part of an autoencoder's training: PatchGAN with a hinge loss and an adaptive weight.

Sources: PatchGAN (Isola et al. 2017, https://arxiv.org/abs/1611.07004), hinge loss (Lim & Ye 2017,
https://arxiv.org/abs/1705.02894), adaptive weight (Esser et al. 2021, https://arxiv.org/abs/2012.09841, eq. 7).
"""

import torch
import torch.nn.functional as F
from torch import nn


class PatchDiscriminator(nn.Module):
    """Says of each patch whether it looks real: pixels (B, 3, H, W) -> logits (B, 1, h, w).

    Args:
        in_channels: Channels of the pixels.
        width: Channels of the first layer; each later one doubles them, to at most eight times.
        num_layers: Halvings of the size. A logit sees 70 pixels with 3, 34 with 2, 16 with 1.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"`num_layers`: got {num_layers}, expected at least 1.")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            grown = width * min(2**i, 8)
            layers += [
                nn.Conv2d(channels, grown, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(grown),
                nn.LeakyReLU(0.2),
            ]
            channels = grown
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(self.initialize_weights)

    @staticmethod
    def initialize_weights(module: nn.Module) -> None:
        """Normal weights of standard deviation 0.02, as in pix2pix."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns logits (B, 1, h, w), positive for patches that look real."""
        return self.layers(pixels)


def hinge_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Loss of the discriminator: half of E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))], a scalar."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Loss of the autoencoder: -E[D(fake)], a scalar."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """Weight that gives both losses gradients of one size at the decoder's last layer (2012.09841, eq. 7).

    Args:
        reconstruction_loss: Scalar with a graph.
        adversarial_loss: Scalar with a graph.
        last_layer: The weight of the decoder's last convolution.

    Returns:
        ‖∇ reconstruction‖ / (‖∇ adversarial‖ + 1e-4), clamped to [0, 1e4] and detached: a scalar.
    """
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return ratio.clamp(0.0, 1e4).detach()
