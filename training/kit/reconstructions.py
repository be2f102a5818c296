"""What an autoencoder makes of pictures: how well it gives them back, and what its latents are like."""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from hubgen.autoencoders.latents import posterior
from hubgen.autoencoders.perceptual import PerceptualLoss
from hubgen.autoencoders.vq_model import VQModel
from hubgen.training.kit.grids import save_grid
from hubgen.training.kit.pictures import Pictures
from hubgen.training.kit.run import Run


@torch.no_grad()
def measure_latents(autoencoder: Any, pictures: Pictures, batch_size: int) -> dict[str, float]:
    """Scale (1 / standard deviation) and, for a posterior, shift (mean) of the latents of all pictures.

    The samples' variance is the variance of the means plus the mean of the variances.
    """
    means, variances = [], []
    for pixels in pictures.batches(batch_size):
        mean, std = posterior(autoencoder, pixels.to(autoencoder.device))
        means.append(mean.double().cpu().flatten())
        variances.append(std.double().square().cpu().flatten())
    mean, variance = torch.cat(means), torch.cat(variances)
    if isinstance(autoencoder, VQModel):
        return {"scaling_factor": mean.square().mean().rsqrt().item()}
    scale = (mean.var(correction=0) + variance.mean()).rsqrt()
    return {"shift_factor": mean.mean().item(), "scaling_factor": scale.item()}


@torch.no_grad()
def reconstruct(run: Run, autoencoder: Any, pictures: Pictures, perceptual: PerceptualLoss | None, step: int) -> None:
    """Reports PSNR in dB and perceptual distance of the mode's reconstructions, and draws some; processes share it."""
    shown: list[Any] = []
    sums = torch.zeros(3, dtype=torch.float64)  # of PSNR, of the distance, of pictures
    for number, pixels in enumerate(pictures.batches(run.options.batch_size)):
        if number % run.world_size != run.rank:
            continue
        pixels = pixels.to(run.device)
        with run.accelerator.autocast():
            reconstruction = autoencoder(pixels).sample.float().clamp(-1, 1)
        error = ((reconstruction - pixels) / 2).square().mean(dim=[1, 2, 3])
        distance = 0.0 if perceptual is None else perceptual(reconstruction, pixels).sum().item()
        sums += torch.tensor([(-10 * error.log10()).sum().item(), distance, len(pixels)], dtype=torch.float64)
        if not shown:
            shown = VaeImageProcessor().postprocess(torch.cat([pixels[:16], reconstruction[:16]]).cpu())
    if run.world_size > 1:
        sums = run.accelerator.reduce(sums.to(run.device), "sum").cpu()
    psnr, distance, count = sums.tolist()
    values = {"psnr": psnr / count, **({} if perceptual is None else {"perceptual_distance": distance / count})}
    run.report(step, values)
    if run.writer:
        run.progress.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        save_grid(run, shown, step, columns=len(shown) // 2)
