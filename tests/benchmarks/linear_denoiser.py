"""Does a network learn more than the second moments of its data? Both backbones and both paths, on 512 real emoji.

    python -m tests.benchmarks.linear_denoiser [--autoencoder DIR] [--data DIR] [--output DIR] [--work DIR]

For Gaussian data the best denoiser is linear and known in closed form. With mean m and covariance S of the latents,

    E[data | x_t] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t - alpha m)

is the best that any linear function of x_t can do on data with these moments. It is computed from the 512 training
pictures and converted to what the network predicts (velocity or noise); then both are given the same x_t of held-out
pictures at the same times. The training script trains each network (four runs, resumable, in `--work`); the baseline
gets what favours it most: since 512 pictures do not determine 1024 x 1024 covariances, the estimate is shrunk towards a
well-conditioned one, and shrinkage and its target are those that score best on the very held-out pictures.

Stored: linear_denoiser.json and linear_denoiser.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.conditioning.text import TextCondition, TextEmbeddings
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.sampler import step_generator
from hubgen.paths.path import ProbabilityPath
from tests.benchmarks import report

RESULTS = Path(__file__).parent / "results" / "linear_denoiser"
TRAINING_PICTURES = 512
TIMES = tuple((index + 0.5) / 16 for index in range(16))
"""Where both are compared; a path that knows only grid times moves each to its next."""
DRAWS = 2
"""Noise drawn for each held-out picture and time"""
SHRINKAGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)

COMMON_SETTINGS: dict[str, Any] = {
    "train_split": "train",
    "validation_split": "held_out",
    "validation_steps": 200,
    "validation_pictures": 64,
    "max_text_tokens": 16,
    "size": 64,
    "batch_size": 32,
    "max_train_steps": 1200,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 50,
    "lr_schedule": "cosine",
    "ema_decay": 0.99,
    "weight_decay": 0.05,
    "timestep_density": "uniform",
    "mixed_precision": "bf16",
    "checkpoint_steps": 400,
    "report_to": "none",
    "export_dtype": "float32",
    "seed": 0,
}
BACKBONE_SETTINGS: dict[str, dict[str, Any]] = {
    "mmdit": {
        "patch_size": 2,
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 64,
        "pos_embed_max_size": 4,
        "qk_norm": "rms_norm",
    },
    "unet": {
        "block_out_channels": [64, 128],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "attention_head_dim": 4,
    },
}
PATHS = ("rectified_flow", "ddpm")
RUN_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    # Without a convolution's sense of place, 512 pictures are few: more steps, and captions not to be relied on.
    ("mmdit", "rectified_flow"): {"max_train_steps": 1600, "condition_dropout": 0.3},
}
"""What a run has beside the common settings"""


# ---------------------------------------------------------------------------------------------------------------------
# The linear denoiser


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the latents as training sees them: drawn anew from the posterior at each use."""

    mean: torch.Tensor
    """(d,) float64"""
    covariance: torch.Tensor
    """(d, d) float64"""
    shape: tuple[int, int, int]
    """(C, h, w) with C h w = d"""

    @classmethod
    def of_posteriors(cls, means: torch.Tensor, stds: torch.Tensor) -> "Moments":
        """From the posteriors of N pictures, both (N, C, h, w): Cov[mean] + E[std^2], on the diagonal."""
        flat, spread = means.flatten(1).double(), stds.flatten(1).double()
        covariance = torch.cov(flat.T) + torch.diag(spread.square().mean(dim=0))
        return cls(flat.mean(dim=0), covariance, tuple(means.shape[1:]))  # type: ignore[arg-type]

    def diagonal(self) -> torch.Tensor:
        """The covariance (d, d) without correlations."""
        return torch.diag(self.covariance.diagonal())

    def separable(self) -> torch.Tensor:
        """A covariance (d, d) that is one between channels times one between places, of the same total variance.

        Both factors are averages of the full one over the other's indices, so that 512 pictures determine them well.
        """
        channels, height, width = self.shape
        places = height * width
        full = self.covariance.view(channels, places, channels, places)
        of_channels = torch.einsum("ipjp->ij", full)
        of_places = torch.einsum("ipiq->pq", full)
        product = torch.kron(of_channels, of_places)
        return product * (self.covariance.trace() / product.trace())


class LinearDenoiser:
    """E[data | x_t] of Gaussian data; the covariance is diagonalised once.

    Args:
        mean: (d,).
        covariance: (d, d), positive semi-definite.
    """

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor):
        self.mean = mean
        variances, self.basis = torch.linalg.eigh(covariance)  # (d,), (d, d)
        self.variances = variances.clamp(min=0)

    def __call__(self, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The data's expectation (B, d) at x_t (B, d); alpha and sigma (B,)."""
        alpha, sigma = alpha[:, None], sigma[:, None]
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)  # (B, d) in the eigenbasis
        return self.mean + ((x_t - alpha * self.mean) @ self.basis * gain) @ self.basis.T


@dataclass(frozen=True)
class Trial:
    """The common question: x_t of held-out pictures at one time each."""

    x_t: torch.Tensor
    """(M, C, h, w) float64"""
    t: torch.Tensor
    """(M,) float64"""
    target: torch.Tensor
    """(M, C, h, w) float64, what the network of this path should predict"""
    picture: torch.Tensor
    """(M,) row of the held-out picture"""
    time: torch.Tensor
    """(M,) row of `TIMES`"""

    @classmethod
    def draw(cls, latents: torch.Tensor, path: ProbabilityPath, seed: int = 0, draws: int = DRAWS) -> "Trial":
        """Every held-out latent, (N, C, h, w), at every time, `draws` times."""
        count = len(latents)
        picture = torch.arange(count).repeat(len(TIMES) * draws)
        time = torch.arange(len(TIMES)).repeat_interleave(count * draws)
        data = latents.double()[picture]
        # A stream of its own: the same seed elsewhere would give data that is correlated with the noise.
        generator = step_generator(seed, 0, stream="linear denoiser")
        noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
        sample = path.sample(data, noise, torch.tensor(TIMES, dtype=torch.float64)[time])
        return cls(sample.x_t, sample.t.double(), sample.target, picture, time)

    def loss(self, prediction: torch.Tensor) -> torch.Tensor:
        """Mean squared error at each of `TIMES`, (T,)."""
        error = (prediction.double() - self.target).square().mean(dim=(1, 2, 3))
        return torch.stack([error[self.time == row].mean() for row in range(len(TIMES))])


def linear_loss(denoiser: LinearDenoiser, trial: Trial, path: ProbabilityPath) -> torch.Tensor:
    """Loss of the linear denoiser at each time, (T,), in what the path's network predicts."""
    flat = denoiser(trial.x_t.flatten(1), path.alpha(trial.t), path.sigma(trial.t))
    data = flat.view_as(trial.x_t)
    return trial.loss(path.convert(data, trial.x_t, trial.t, "data", path.prediction_type))


def best_linear_loss(moments: Moments, trial: Trial, path: ProbabilityPath) -> tuple[torch.Tensor, str]:
    """The lowest loss, on average over the times, over shrinkages and their targets; and which one it was."""
    best: tuple[torch.Tensor, str] | None = None
    for name, target in (("diagonal", moments.diagonal()), ("separable", moments.separable())):
        for shrinkage in SHRINKAGES:
            covariance = (1 - shrinkage) * moments.covariance + shrinkage * target
            loss = linear_loss(LinearDenoiser(moments.mean, covariance), trial, path)
            if best is None or loss.mean() < best[0].mean():
                best = loss, f"{shrinkage:g} of {name}"
    assert best is not None
    return best


@torch.no_grad()
def network_loss(
    backbone: Any, embeddings: TextEmbeddings, trial: Trial, path: ProbabilityPath, batch_size: int = 128
) -> torch.Tensor:
    """Loss of the network at each time, (T,); it sees the held-out captions, (N, ...)."""
    predictions = []
    for rows in torch.arange(len(trial.t)).split(batch_size):
        condition = Condition.of_text(embeddings[trial.picture[rows]])
        timestep = path.timestep(trial.t[rows].float())
        predictions.append(predict(backbone, trial.x_t[rows].float(), timestep, condition))
    return trial.loss(torch.cat(predictions))


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def prepare_data(data: Path, folder: Path, count: int, seed: int = 0) -> None:
    """Copies `count` training pictures and all held-out ones to `folder`; does nothing where they are."""
    for split in ("train", "held_out"):
        source, target = ImageTextFolder(data, split=split).folder, folder / split
        if (target / "metadata.jsonl").is_file():
            continue
        lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        if split == "train":
            order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
            lines = [lines[row] for row in sorted(order[:count])]
        target.mkdir(parents=True, exist_ok=True)
        for line in lines:
            shutil.copyfile(source / json.loads(line)["file_name"], target / json.loads(line)["file_name"])
        report.write_text(target / "metadata.jsonl", "\n".join(lines) + "\n")


def train(settings: dict[str, Any], folder: Path) -> None:
    """Runs the training script with `settings` as its recipe; goes on where it stopped, does nothing if it is done."""
    recipe = folder / "recipe.yaml"
    content = yaml.safe_dump(settings, sort_keys=True)
    if (folder / "pipeline" / "model_index.json").is_file():
        if recipe.read_text(encoding="utf-8") == content:
            return
        raise ValueError(f"{recipe} is not the recipe of this run; remove {folder} or give another --work")
    report.write_text(recipe, content)
    command = [sys.executable, "-m", "hubgen.training.train_text_to_image", "--config", str(recipe)]
    subprocess.run(command, check=True)


def measure(folder: Path, recipe: Path, data: Path) -> dict[str, Any]:
    """The losses of the trained network in `folder` and of the linear denoisers, at each time."""
    from hubgen.autoencoders.latents import normalised
    from hubgen.data.cache import cache_latents
    from hubgen.pipelines.text_to_image import TextToImagePipeline
    from hubgen.training.kit.parse import parse_settings
    from hubgen.training.train_text_to_image import Settings, build_objective

    settings = parse_settings(Settings, ["--config", str(recipe)])
    path = build_objective(settings).path
    pipeline = TextToImagePipeline.from_pretrained(folder / "pipeline", torch_dtype=torch.float32)
    vae, backbone = pipeline.vae, pipeline.transformer if settings.backbone == "mmdit" else pipeline.unet
    cache = settings.cache_dir or folder / "cache"
    training, held_out = (ImageTextFolder(data, split=split, size=settings.size) for split in ("train", "held_out"))
    posteriors = cache_latents(vae, training, cache, show_progress=False)
    moments = Moments.of_posteriors(normalised(posteriors.mean, vae), posteriors.std * vae.config.scaling_factor)
    latents = cache_latents(vae, held_out, cache, show_progress=False)
    latents = normalised(latents.sample(range(len(held_out)), step_generator(0, 0, stream="held-out")), vae)
    embeddings = TextCondition(pipeline.text_encoder, pipeline.tokenizer).encode(held_out.texts)

    trial = Trial.draw(latents, path)
    network = network_loss(backbone.eval(), embeddings, trial, path)
    full, shrinkage = best_linear_loss(moments, trial, path)
    diagonal = linear_loss(LinearDenoiser(moments.mean, moments.diagonal()), trial, path)
    print(f"network {network.mean():.4f}, linear {full.mean():.4f} ({shrinkage}), diagonal {diagonal.mean():.4f}")
    return {
        "backbone": settings.backbone,
        "path": settings.path,
        "prediction_type": path.prediction_type,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "training_pictures": len(training),
        "held_out_pictures": len(held_out),
        "times": list(TIMES),
        "network": {"mean": network.mean().item(), "by_time": network.tolist()},
        "linear": {"mean": full.mean().item(), "by_time": full.tolist(), "shrinkage": shrinkage},
        "diagonal": {"mean": diagonal.mean().item(), "by_time": diagonal.tolist()},
        "below_linear": bool(network.mean() < full.mean()),
        "times_below_linear": int((network < full).sum()),
    }


def to_markdown(results: Sequence[dict[str, Any]]) -> str:
    """The results as a page."""
    rows = [
        [
            f"{result['backbone']} ({result['parameters'] / 1e6:.1f} M), {result['path'].replace('_', ' ')}",
            result["prediction_type"],
            f"**{result['network']['mean']:.4f}**",
            f"{result['linear']['mean']:.4f} ({result['linear']['shrinkage']})",
            f"{result['diagonal']['mean']:.4f}",
            f"{'yes' if result['below_linear'] else 'no'} ({result['times_below_linear']} of {len(TIMES)} times)",
        ]
        for result in results
    ]
    table = report.markdown_table(
        ["run", "predicts", "network", "linear, full covariance (shrinkage)", "linear, diagonal", "below the linear"],
        rows,
    )
    by_time = report.markdown_table(
        ["t", *(f"{result['backbone']}, {result['path'].replace('_', ' ')}" for result in results)],
        [
            [
                f"{time:.3f}",
                *(f"{r['network']['by_time'][row]:.4f} / {r['linear']['by_time'][row]:.4f}" for r in results),
            ]
            for row, time in enumerate(TIMES)
        ],
    )
    first = results[0]
    return (
        "# Networks against the optimal linear denoiser\n\n"
        "Written by `python -m tests.benchmarks.linear_denoiser`. Mean squared error of the prediction on "
        f"{first['held_out_pictures']} held-out pictures at {len(TIMES)} times, averaged over the times; networks and "
        f"moments from {first['training_pictures']} pictures.\n\n"
        f"{table}\nAt each time, network / linear:\n\n{by_time}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", type=Path, help="AutoencoderKL folder; that of the bundled model if not given")
    parser.add_argument("--text-encoder", default="minilm", help="as in the training script (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of `hubgen data emoji`; built in the cache if not given")
    parser.add_argument("--work", type=Path, default=Path("runs/linear_denoiser"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONE_SETTINGS), default=list(BACKBONE_SETTINGS))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--max-train-steps", type=int, help="of every run (default: the settings in this file)")
    parser.add_argument("--training-pictures", type=int, default=TRAINING_PICTURES)
    arguments = parser.parse_args(argv)

    from tests.benchmarks.bundled_model import default_data, default_model

    data = arguments.work / "data"
    prepare_data(arguments.data or default_data(), data, arguments.training_pictures)
    autoencoder = arguments.autoencoder or default_model() / "vae"
    results = []
    for backbone in arguments.backbones:
        for path in arguments.paths:
            print(f"{backbone}, {path}", flush=True)
            folder = arguments.work / f"{backbone}-{path}"
            settings = {
                **COMMON_SETTINGS,
                **RUN_SETTINGS.get((backbone, path), {}),
                **({} if arguments.max_train_steps is None else {"max_train_steps": arguments.max_train_steps}),
                "data_dir": str(data),
                "autoencoder": str(autoencoder),
                "text_encoder": arguments.text_encoder,
                "output_dir": str(folder),
                "cache_dir": str(arguments.work / "cache"),
                "backbone": backbone,
                "backbone_config": BACKBONE_SETTINGS[backbone],
                "path": path,
            }
            train(settings, folder)
            result = measure(folder, folder / "recipe.yaml", data)
            folders = ("data_dir", "autoencoder", "output_dir", "cache_dir")
            results.append({**result, "settings": {k: v for k, v in settings.items() if k not in folders}})
            # After each run, so that an interrupted benchmark has stored what it found.
            content = {"results": results, "environment": report.environment()}
            report.write_json(arguments.output / "linear_denoiser.json", content)
            report.write_text(arguments.output / "linear_denoiser.md", to_markdown(results))
    print(to_markdown(results))
    print(f"stored in {arguments.output}")


if __name__ == "__main__":
    main()
