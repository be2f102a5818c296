"""Train an autoencoder on pictures (latent diffusion, 2112.10752, appendix G): KL, or with a codebook.

    accelerate launch -m hubgen.training.train_autoencoder --config training/recipes/autoencoder-emoji.yaml \
        --data.source emoji/fluent --run.output_dir runs/autoencoder

    pixels -> posterior or codes -> reconstruction -> L1 + perceptual + KL or codebook + adversarial loss

The same command goes on where it was stopped. At the end `output_dir/autoencoder` holds the averaged weights with the
latents' scale and shift measured on the training pictures: `AutoencoderKL.from_pretrained` or `VQModel.from_pretrained`
loads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL, DiagonalGaussianDistribution
from hubgen.autoencoders.discriminator import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.autoencoders.perceptual import PerceptualLoss
from hubgen.autoencoders.vq_model import VQModel
from hubgen.data.order import Draw, generator_of
from hubgen.formats.atomic import sweep, written
from hubgen.training.kit.codebook import Codebook
from hubgen.training.kit.groups import Data, Optim, Publish, RunOptions, Validation, need
from hubgen.training.kit.parse import FREE, Range, identity_of
from hubgen.training.kit.pictures import Pictures, open_pictures
from hubgen.training.kit.publishing import check_push, push, record_of
from hubgen.training.kit.reconstructions import measure_latents, reconstruct
from hubgen.training.kit.run import Run
from hubgen.training.kit.script import run_script
from hubgen.training.kit.trained import without_gradient


@dataclass(frozen=True, kw_only=True)
class Model:
    """The autoencoder."""

    kind: Literal["kl", "vq"] = "kl"
    """Whether latents come from a posterior, or from a codebook."""

    latent_channels: Annotated[int, Range(1)] = 16
    """Channels of the latents."""

    block_out_channels: tuple[int, ...] = (32, 64, 128, 128)
    """Width of each level; one level less than entries halves the size."""

    layers_per_block: Annotated[int, Range(1)] = 1
    """Residual blocks a level of the encoder; the decoder has one more."""

    norm_num_groups: Annotated[int, Range(1)] = 8
    """Groups of the GroupNorms."""

    num_codes: Annotated[int, Range(2)] = 1024
    """Codes of a vq autoencoder."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What the reconstruction is judged by, beside its mean absolute error."""

    perceptual_network: Literal["efficientnet_lite0", "none"] = "efficientnet_lite0"
    """Feature network of the perceptual loss."""

    perceptual_weight: Annotated[float, Range(0)] = 0.1
    """Weight of the perceptual loss."""

    kl_weight: Annotated[float, Range(0)] = 1e-3
    """Weight of a kl autoencoder's divergence in nats per pixel value."""

    codebook_weight: Annotated[float, Range(0)] = 1.0
    """Weight of a vq autoencoder's codebook loss."""

    revive_steps: Annotated[int, Range(0)] = 0
    """Steps after which codes that were not used are moved to where latents are; 0 leaves them."""


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """A discriminator, from some step on."""

    weight: Annotated[float, Range(0)] = 0.0
    """Weight of its loss on top of the adaptive one; 0 trains without a discriminator."""

    start: Annotated[int, Range(0)] = 50_001
    """First step of its loss."""

    width: Annotated[int, Range(1)] = 64
    """Channels of its first layer."""

    layers: Annotated[int, Range(1)] = 3
    """Its halvings."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderData(Data):
    """Pictures."""

    mirror: bool = True
    """Show half of the pictures mirrored."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: groups of a YAML recipe, and options of the command line."""

    model: Model = Model()
    loss: Loss = Loss()
    adversarial: Adversarial = Adversarial()
    data: AutoencoderData
    optim: Optim = Optim(learning_rate=1e-4, lr_warmup_steps=100, weight_decay=0.0)
    run: RunOptions
    validation: Annotated[Validation, FREE] = Validation()
    publish: Annotated[Publish, FREE] = Publish(dtype="float32")

    def __post_init__(self) -> None:
        model, size = self.model, self.data.size or 64
        need(bool(model.block_out_channels), "model.block_out_channels", (), "the width of at least one level")
        halvings = len(model.block_out_channels) - 1
        need(size % 2**halvings == 0, "data.size", size, f"a multiple of {2**halvings}, which the levels halve")
        halved = size // 2**self.adversarial.layers
        fits = self.adversarial.weight == 0 or halved >= 3
        expected = f"fewer: they halve {size} pixels to {halved}, and 3 are the least"
        need(fits, "adversarial.layers", self.adversarial.layers, expected)
        for width in model.block_out_channels:
            expected = f"a multiple of model.norm_num_groups, {model.norm_num_groups}"
            need(width % model.norm_num_groups == 0, "model.block_out_channels", width, expected)


class Reconstruction(nn.Module):
    """Pixels and noise -> reconstruction and regularisation in one forward pass, which data parallelism needs to see.

    Args:
        autoencoder: Of either kind.
    """

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns pixels (B, 3, H, W), and the divergence per pixel value or the codebook loss, a scalar."""
        if isinstance(self.autoencoder, VQModel):
            return self.autoencoder.decode(self.autoencoder.encode(pixels).latents, return_dict=False)
        moments = self.autoencoder.encode(pixels).latent_dist.parameters.float()
        drawn = DiagonalGaussianDistribution(moments)
        latents = drawn.mean + drawn.std * noise
        return self.autoencoder.decode(latents).sample, drawn.kl().mean() / pixels[0].numel()


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    s, run = settings, Run(settings.run)
    check_push(s.publish)

    def opened(split: str, train: bool) -> Pictures:
        return open_pictures(s.data, split, s.run.seed, side=64, multiple=ratio, train=train)

    ratio = 2 ** (len(s.model.block_out_channels) - 1)
    pictures = opened(s.data.split, train=True)
    held_out = None if s.validation.split is None else opened(s.validation.split, train=False)
    run.open({"settings": identity_of(s), "data": pictures.examples.fingerprint}, s.optim)

    autoencoder = build(s.model, pictures.side)
    trained = run.trains("autoencoder", autoencoder, s.optim, forward=Reconstruction(autoencoder))
    critic = run.trains("discriminator", PatchDiscriminator(3, s.adversarial.width, s.adversarial.layers), s.optim)
    codebook = Codebook(autoencoder.quantize, run) if s.model.kind == "vq" else None
    if codebook is not None:
        run.keeps("codes", codebook)
    perceptual = None
    if s.loss.perceptual_network == "efficientnet_lite0":
        perceptual = PerceptualLoss(EfficientNetLite0.from_pretrained()).to(run.device)
    row = pictures.row(s.data, run.batch_size)
    run.describe(len(row), *pictures.examples.left_out())
    run.restore()

    def read(draws: Sequence[Draw]) -> torch.Tensor:
        return pictures.pixels(draws)

    def validate(step: int) -> None:
        with trained.averaged() as network:
            if held_out is not None:
                reconstruct(run, network, held_out, perceptual, step)

    regularised, weight = ("kl", s.loss.kl_weight) if codebook is None else ("codebook", s.loss.codebook_weight)
    batches = run.batches(row, read, s.data.num_workers)
    for step in run.steps(validate, s.validation.steps, "psnr" if held_out else ""):
        adversarial = s.adversarial.weight > 0 and step > s.adversarial.start
        for draws, pixels in run.micro_batches(batches):
            pixels = pixels.to(run.device)  # (B, 3, H, W) in [-1, 1]
            noise = torch.stack([posterior_noise(s, draw, pixels.shape[-2:], ratio) for draw in draws]).to(run.device)
            reconstruction, regularisation = trained.module(pixels, noise)
            losses = {"l1": F.l1_loss(reconstruction.float(), pixels), regularised: regularisation.float()}
            loss = losses["l1"]
            if perceptual is not None:
                losses["perceptual"] = perceptual(reconstruction.float(), pixels).mean()
                loss = loss + s.loss.perceptual_weight * losses["perceptual"]
            if adversarial:
                # The discriminator judges, and its weights get no gradient from it.
                with without_gradient(critic.plain), run.accelerator.autocast():
                    losses["adversarial"] = generator_loss(critic.plain(reconstruction).float())
                balance = adaptive_weight(loss, losses["adversarial"], autoencoder.decoder.conv_out.weight)
                loss = loss + s.adversarial.weight * balance * losses["adversarial"]
            loss = loss + weight * losses[regularised]
            trained.backward(loss, pictures.names(draws))
            if adversarial:
                logits = critic.module(torch.cat([pixels, reconstruction.detach()])).float()
                losses["discriminator"] = hinge_loss(*logits.chunk(2))
                critic.backward(losses["discriminator"], pictures.names(draws))
            for name, value in {**losses, "loss": loss}.items():
                run.window.note(name, value)
        run.update(step)
        if codebook is not None and s.loss.revive_steps and step % s.loss.revive_steps == 0:
            with torch.no_grad():
                run.window.note("revived_codes", codebook.revive(autoencoder.encode(pixels).latents, step))

    trained.settle()
    record = record_of(run, "hubgen.training.train_autoencoder", s, pictures, s.data.source, "psnr")
    folder = s.run.output_dir / "autoencoder"
    if run.writer:
        with run.survived(f"writing the autoencoder to {folder}"):
            sweep(s.run.output_dir)  # the run has its output folder to itself
            with written(folder) as temporary:
                measured = measure_latents(autoencoder, opened(s.data.split, train=False), s.run.batch_size)
                autoencoder.register_to_config(**measured)
                autoencoder.save_pretrained(temporary)
                record.save(temporary)
            run.print(f"autoencoder written to {folder} ({measured})")
        push(run, folder, s.publish)
    run.finish()


def build(model: Model, side: int) -> Any:
    """The autoencoder with fresh weights, for pictures of a side."""
    levels = len(model.block_out_channels)
    shared: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": model.block_out_channels,
        "layers_per_block": model.layers_per_block,
        "latent_channels": model.latent_channels,
        "norm_num_groups": model.norm_num_groups,
        "sample_size": side,
        "force_upcast": False,
    }
    if model.kind == "vq":
        return VQModel(**shared, num_vq_embeddings=model.num_codes)
    return AutoencoderKL(**shared, use_quant_conv=False, use_post_quant_conv=False)


def posterior_noise(settings: Settings, draw: Draw, size: Sequence[int], ratio: int) -> torch.Tensor:
    """What a picture's latents are drawn with, (C, h, w)."""
    generator = generator_of(settings.run.seed, draw.place, "posterior")
    shape = (settings.model.latent_channels, *(side // ratio for side in size))
    return torch.randn(shape, generator=generator)


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
