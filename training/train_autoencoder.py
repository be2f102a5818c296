"""Train a KL autoencoder on a folder of pictures (latent diffusion, https://arxiv.org/abs/2112.10752, appendix G).

    accelerate launch -m hubgen.training.train_autoencoder --config training/recipes/autoencoder-emoji.yaml \
        --data_dir emoji/fluent --output_dir runs/autoencoder

    batch -> posterior -> latents -> reconstruction -> L1 + perceptual + KL + adversarial loss

The same command goes on where it was stopped. At the end `output_dir/autoencoder` holds the averaged weights with the
latents' scale and shift measured on the training pictures: `AutoencoderKL.from_pretrained` loads it.
"""

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL, DiagonalGaussianDistribution
from hubgen.autoencoders.discriminator import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.autoencoders.perceptual import PerceptualLoss
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.pictures import MAX_PIXELS
from hubgen.data.sampler import StepBatchSampler, step_generator
from hubgen.formats.atomic import sweep, written
from hubgen.hub.card import TrainingRecord, describe_data
from hubgen.training.checkpoints import Checkpoints
from hubgen.training.ema import ExponentialMovingAverage
from hubgen.training.finite import finite_or_stop
from hubgen.training.interruption import Interrupted, Interruption, requested_anywhere
from hubgen.training.metrics import Metrics
from hubgen.training.run import Survived, accelerator_of, check_steps, describe, ignore_signals, open_split
from hubgen.training.schedule import learning_rate_factor
from hubgen.training.settings import Range, SettingsError, run_script, settings_to_dict


@dataclass(frozen=True)
class Settings:
    """Settings of a run: fields of a YAML recipe, and options of the command line."""

    data_dir: Path
    """Folder of pictures with metadata.jsonl, as `hubgen data` writes it."""

    output_dir: Path
    """Where checkpoints, logs, validation grids and the autoencoder go."""

    train_split: str = "train"
    """Split to train on."""

    validation_split: str | None = None
    """Split that is only reconstructed, for PSNR and grids; none if not given."""

    size: Annotated[int, Range(8)] = 64
    """Height and width in pixels."""

    on_bad_picture: Literal["fail", "skip"] = "fail"
    """Whether a row that cannot be used ends the run or is left out and reported."""

    max_pixels: Annotated[int, Range(1)] = MAX_PIXELS
    """Pixels of a picture at most, before it is scaled."""

    caption_column: str = "text"
    """Column of the captions in the folder's table."""

    horizontal_flip: bool = True
    """Mirror half of the pictures."""

    latent_channels: Annotated[int, Range(1)] = 16
    """Channels of the latents."""

    block_out_channels: tuple[int, ...] = (32, 64, 128, 128)
    """Width of each level; one level less than entries halves the size."""

    layers_per_block: Annotated[int, Range(1)] = 1
    """Residual blocks a level of the encoder; the decoder has one more."""

    norm_num_groups: Annotated[int, Range(1)] = 8
    """Groups of the GroupNorms."""

    perceptual_network: Literal["efficientnet_lite0", "none"] = "efficientnet_lite0"
    """Feature network of the perceptual loss."""

    perceptual_weight: Annotated[float, Range(0)] = 0.1
    """Weight of the perceptual loss beside the mean absolute error."""

    kl_weight: Annotated[float, Range(0)] = 1e-3
    """Weight of the KL divergence in nats per pixel value."""

    discriminator_weight: Annotated[float, Range(0)] = 0.0
    """Weight of the adversarial loss on top of the adaptive one; 0 trains without a discriminator."""

    discriminator_start: Annotated[int, Range(0)] = 50_001
    """First step of the adversarial loss."""

    discriminator_width: Annotated[int, Range(1)] = 64
    """Channels of the discriminator's first layer."""

    discriminator_layers: Annotated[int, Range(1)] = 3
    """Halvings of the discriminator."""

    batch_size: Annotated[int, Range(1)] = 32
    """Pictures a process and step."""

    gradient_accumulation_steps: Annotated[int, Range(1)] = 1
    """Batches an optimizer step."""

    max_train_steps: Annotated[int, Range(1)] = 10_000
    """Optimizer steps."""

    learning_rate: Annotated[float, Range(0)] = 1e-4
    """Peak learning rate of both optimizers."""

    lr_warmup_steps: Annotated[int, Range(0)] = 100
    """Steps over which the learning rate rises from 0."""

    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up."""

    weight_decay: Annotated[float, Range(0)] = 0.0
    """AdamW's weight decay."""

    adam_betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates; (0.5, 0.9) is usual with a discriminator from the start."""

    max_grad_norm: Annotated[float, Range(0, open_minimum=True)] = 1.0
    """Gradients are scaled down to this norm."""

    ema_decay: Annotated[float, Range(0, 1)] = 0.999
    """Decay of the averaged weights that are validated and published."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward pass; weights stay in float32. Not given, it is the launcher's."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    seed: int = 0
    """Everything random derives from it and the step."""

    num_workers: Annotated[int, Range(0)] = 0
    """Processes that read pictures."""

    checkpoint_steps: Annotated[int, Range(1)] = 500
    """Steps between checkpoints."""

    keep_checkpoints: Annotated[int, Range(2)] = 2
    """Checkpoints that are kept."""

    validation_steps: Annotated[int, Range(1)] = 500
    """Steps between validations."""

    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Tracker."""

    log_steps: Annotated[int, Range(1)] = 50
    """Steps between log lines."""


class Reconstruction(nn.Module):
    """Pixels and noise -> reconstruction and posterior in one forward pass, so that DDP sees every parameter's use."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns pixels (B, 3, H, W) and the posterior's moments (B, 2C, h, w)."""
        posterior = self.autoencoder.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.autoencoder.decode(latents).sample, posterior.parameters


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    accelerator, survived = accelerator_of(settings), Survived()
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    dataset = open_split(settings, settings.train_split)
    held_out = None if settings.validation_split is None else open_split(settings, settings.validation_split)
    check_size(settings)

    torch.manual_seed(settings.seed)  # initial weights only; all later randomness derives from (seed, step)
    levels = len(settings.block_out_channels)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.norm_num_groups,
        sample_size=settings.size,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    if settings.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    discriminator = PatchDiscriminator(3, settings.discriminator_width, settings.discriminator_layers)
    ema = ExponentialMovingAverage(autoencoder, decay=settings.ema_decay)
    perceptual = None
    if settings.perceptual_network == "efficientnet_lite0":
        perceptual = PerceptualLoss(EfficientNetLite0.from_pretrained()).to(device)

    def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            module.parameters(),
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    optimizer, discriminator_optimizer = optimizer_of(autoencoder), optimizer_of(discriminator)
    model = Reconstruction(autoencoder)
    model, discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        model, discriminator, optimizer, discriminator_optimizer
    )
    ema.to(device)

    checkpoints = Checkpoints(
        settings.output_dir,
        keep=settings.keep_checkpoints,
        identity={
            "settings": identity_of(settings, accelerator),
            "data": dataset.fingerprint,
            "world_size": world_size,
        },
        writer=accelerator.is_main_process,
    )
    state = {
        "modules": {"autoencoder": autoencoder, "discriminator": accelerator.unwrap_model(discriminator), "ema": ema},
        "optimizers": {"autoencoder": optimizer, "discriminator": discriminator_optimizer},
    }
    parameters = sum(parameter.numel() for parameter in autoencoder.parameters())
    describe(accelerator, settings, len(dataset), parameters, dataset.left_out())
    first_step, extra = checkpoints.restore(**state) or (0, {})
    check_steps(first_step, settings.max_train_steps, checkpoints)
    if accelerator.scaler is not None and "scaler" in extra:
        accelerator.scaler.load_state_dict(extra["scaler"])
    if settings.report_to != "none":
        # What a killed run logged beyond its last checkpoint is logged again.
        accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": first_step + 1}})
    metrics = Metrics(settings.output_dir / "metrics.jsonl", first_step, accelerator.is_main_process)

    accumulation = settings.gradient_accumulation_steps
    batches = DataLoader(
        dataset,
        batch_sampler=StepBatchSampler(
            num_samples=len(dataset),
            batch_size=settings.batch_size,
            num_steps=settings.max_train_steps * accumulation,
            seed=settings.seed,
            start_step=first_step * accumulation,
            rank=rank,
            world_size=world_size,
        ),
        collate_fn=collate,
        num_workers=settings.num_workers,
        worker_init_fn=ignore_signals,
    )

    def reconstruction_losses(
        pixels: torch.Tensor, reconstruction: torch.Tensor, moments: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        posterior = DiagonalGaussianDistribution(moments.float())
        losses = {
            "l1": F.l1_loss(reconstruction.float(), pixels),
            "kl": posterior.kl().mean() / pixels[0].numel(),
        }
        if perceptual is not None:
            losses["perceptual"] = perceptual(reconstruction.float(), pixels).mean()
        return losses

    def validate(step: int) -> None:
        if held_out is None:
            return
        with survived(f"the validation of step {step}"):
            with ema.applied(autoencoder):
                report = reconstruct(autoencoder, held_out, perceptual, settings, accelerator, step)
            metrics.write(step, report)
            accelerator.log(report, step=step)
            progress.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in report.items()))

    progress = tqdm(
        total=settings.max_train_steps, initial=first_step, desc="autoencoder", disable=not accelerator.is_main_process
    )
    due = first_step > 0 and (first_step % settings.validation_steps == 0 or first_step == settings.max_train_steps)
    if due and accelerator.is_main_process and not metrics.has(first_step, "psnr"):
        validate(first_step)  # the run was stopped between the checkpoint and this
    with Interruption() as interruption:
        for micro_step, batch in enumerate(batches, start=first_step * accumulation):
            step = micro_step // accumulation  # optimizer steps taken so far
            random = step_generator(settings.seed, micro_step, rank)
            pixels = batch["pixel_values"].to(device)  # (B, 3, H, W) in [-1, 1]
            if settings.horizontal_flip:
                flip = torch.rand(len(pixels), generator=random) < 0.5
                pixels = torch.where(flip.to(device)[:, None, None, None], pixels.flip(-1), pixels)
            ratio = autoencoder.spatial_compression_ratio
            noise = randn_tensor(
                (len(pixels), settings.latent_channels, pixels.shape[2] // ratio, pixels.shape[3] // ratio),
                generator=random,
                device=device,
            )
            adversarial = settings.discriminator_weight > 0 and step >= settings.discriminator_start
            factor = learning_rate_factor(
                step, settings.lr_schedule, settings.lr_warmup_steps, settings.max_train_steps
            )
            for group in [*optimizer.param_groups, *discriminator_optimizer.param_groups]:
                group["lr"] = settings.learning_rate * factor

            with accelerator.accumulate(model, discriminator):
                # the autoencoder's turn; the discriminator's weights get no gradient from it
                discriminator.requires_grad_(False)
                reconstruction, moments = model(pixels, noise)
                losses = reconstruction_losses(pixels, reconstruction, moments)
                loss = losses["l1"] + settings.perceptual_weight * losses.get("perceptual", 0.0)
                if adversarial:
                    with accelerator.autocast():
                        losses["adversarial"] = generator_loss(discriminator(reconstruction).float())
                    weight = adaptive_weight(loss, losses["adversarial"], autoencoder.decoder.conv_out.weight)
                    loss = loss + settings.discriminator_weight * weight * losses["adversarial"]
                loss = loss + settings.kl_weight * losses["kl"]
                accelerator.backward(loss)
                norm = None
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(autoencoder.parameters(), settings.max_grad_norm)
                # With fp16, gradients may overflow now and then: the scaler skips such a step by itself.
                checked = [loss] if accelerator.scaler is not None or norm is None else [loss, norm]
                loss_value = finite_or_stop(checked, step + 1, batch["file_name"], checkpoints)
                optimizer.step()
                optimizer.zero_grad()

                # the discriminator's turn
                if adversarial:
                    discriminator.requires_grad_(True)
                    with accelerator.autocast():
                        logits = discriminator(torch.cat([pixels, reconstruction.detach()])).float()
                    losses["discriminator"] = hinge_loss(*logits.chunk(2))
                    accelerator.backward(losses["discriminator"])
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(discriminator.parameters(), settings.max_grad_norm)
                    discriminator_optimizer.step()
                    discriminator_optimizer.zero_grad()

            if not accelerator.sync_gradients:
                continue
            ema.update(autoencoder)
            step += 1
            progress.update()
            if step % settings.log_steps == 0:
                values = {name: value.item() for name, value in losses.items()} | {"loss": loss_value}
                progress.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
                values["learning_rate"] = settings.learning_rate * factor
                metrics.write(step, values)
                accelerator.log(values, step=step)
            last = step == settings.max_train_steps
            stop = requested_anywhere(interruption, accelerator)
            if step % settings.checkpoint_steps == 0 or last or stop:
                if accelerator.is_main_process:
                    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                    checkpoints.save(step, **state, extra={"scaler": scaler} if scaler else {})
                accelerator.wait_for_everyone()
            # After the checkpoint: whatever happens here, the steps are saved.
            if accelerator.is_main_process and (step % settings.validation_steps == 0 or last):
                validate(step)
            if stop and not last:
                raise Interrupted(
                    interruption.signal_number or signal.SIGTERM,
                    f"step {step} is saved in {checkpoints.folder}; the same command goes on from there.",
                )
    progress.close()

    if accelerator.is_main_process:
        record = TrainingRecord(
            script="hubgen.training.train_autoencoder",
            settings=identity_of(settings, accelerator),
            data=describe_data(settings.data_dir, len(dataset), dataset.fingerprint),
            curve=metrics.curve("psnr", "perceptual_distance"),
        )
        folder = settings.output_dir / "autoencoder"
        with survived(f"writing the autoencoder to {folder}"):
            sweep(settings.output_dir)  # the run has its output folder to itself
            with ema.applied(autoencoder), written(folder) as temporary:
                shift, scale = measure_latents(autoencoder, dataset, settings)
                autoencoder.register_to_config(shift_factor=shift, scaling_factor=scale)
                autoencoder.save_pretrained(temporary)
                record.save(temporary)
            print(f"autoencoder written to {folder} (scale {scale:.5f}, shift {shift:.5f})")
    accelerator.end_training()
    survived.finish()


def check_size(settings: Settings) -> None:
    """Raises SettingsError for pictures that the autoencoder cannot halve so often."""
    levels = len(settings.block_out_channels)
    if levels == 0:
        raise SettingsError("setting 'block_out_channels': got none, expected the width of at least one level.")
    ratio = 2 ** (levels - 1)
    if settings.size % ratio:
        raise SettingsError(
            f"setting 'size': got {settings.size}, expected a multiple of {ratio}, which {levels} levels halve to "
            "latents."
        )
    halved = settings.size // 2**settings.discriminator_layers
    if settings.discriminator_weight > 0 and halved < 3:
        raise SettingsError(
            f"setting 'discriminator_layers': got {settings.discriminator_layers}, which halve {settings.size} pixels "
            f"to {halved}, expected at least 3."
        )
    for width in settings.block_out_channels:
        if width % settings.norm_num_groups:
            raise SettingsError(
                f"setting 'block_out_channels': got {width}, expected a multiple of norm_num_groups, "
                f"{settings.norm_num_groups}."
            )


def identity_of(settings: Settings, accelerator: Accelerator) -> dict:
    """The settings that must not change between a run and its resumption."""
    free = {"data_dir", "output_dir", "num_workers", "checkpoint_steps", "keep_checkpoints", "validation_steps"}
    free |= {"report_to", "log_steps", "validation_split"}
    free |= {"on_bad_picture", "max_pixels", "caption_column"}  # the data's fingerprint tells what they change
    if settings.lr_schedule == "constant":
        free.add("max_train_steps")  # a finished run may then be made longer
    values = settings_to_dict(settings) | {"mixed_precision": accelerator.mixed_precision}
    return {name: value for name, value in values.items() if name not in free}


def collate(rows: list[dict]) -> dict:
    """Stacks the pixels (B, 3, H, W) and lists the file names."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "file_name": [row["file_name"] for row in rows],
    }


def pixel_batches(dataset: ImageTextFolder, settings: Settings, device: torch.device) -> Iterator[torch.Tensor]:
    """All pictures in order, (B, 3, H, W) in [-1, 1]."""
    for start in range(0, len(dataset), settings.batch_size):
        indices = range(start, min(start + settings.batch_size, len(dataset)))
        yield dataset.load_pixels(indices).to(device)


@torch.no_grad()
def measure_latents(autoencoder: AutoencoderKL, dataset: ImageTextFolder, settings: Settings) -> tuple[float, float]:
    """Shift (mean) and scale (1 / standard deviation) of the posterior's samples over all pictures.

    The samples' variance is the variance of the means plus the mean of the variances.
    """
    means, variances = [], []
    for pixels in pixel_batches(dataset, settings, autoencoder.device):
        posterior = autoencoder.encode(pixels).latent_dist
        means.append(posterior.mean.double().cpu())
        variances.append(posterior.var.double().cpu())
    mean, variance = torch.cat(means), torch.cat(variances)
    return mean.mean().item(), (mean.var(correction=0) + variance.mean()).rsqrt().item()


@torch.no_grad()
def reconstruct(
    autoencoder: AutoencoderKL,
    dataset: ImageTextFolder,
    perceptual: PerceptualLoss | None,
    settings: Settings,
    accelerator: Accelerator,
    step: int,
) -> dict[str, float]:
    """PSNR in dB and perceptual distance of the mode's reconstructions; writes a grid of pictures beside them."""
    psnrs: list[torch.Tensor] = []
    distances: list[torch.Tensor] = []
    shown: list[Image.Image] = []
    autocast = torch.autocast(autoencoder.device.type, torch.bfloat16)
    for pixels in pixel_batches(dataset, settings, autoencoder.device):
        with autocast if accelerator.mixed_precision == "bf16" else nullcontext():
            reconstruction = autoencoder(pixels).sample
        reconstruction = reconstruction.float().clamp(-1, 1)
        error = ((reconstruction - pixels) / 2).square().mean(dim=[1, 2, 3])
        psnrs.append(-10 * error.log10())
        if perceptual is not None:
            distances.append(perceptual(reconstruction, pixels))
        if not shown:
            shown = VaeImageProcessor().postprocess(torch.cat([pixels[:16], reconstruction[:16]]).cpu())
    folder = settings.output_dir / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    make_image_grid(shown, rows=2, cols=len(shown) // 2).save(folder / f"step-{step:08d}.png")
    report = {"psnr": torch.cat(psnrs).mean().item()}
    if distances:
        report["perceptual_distance"] = torch.cat(distances).mean().item()
    return report


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
