"""Does a network learn more than the second moments of its data? Every backbone and path, on real emoji.

    python -m tests.benchmarks.linear_denoiser [--runs NAME ...] [--data DIR] [--output DIR] [--work DIR]

For Gaussian data the best denoiser is linear and known in closed form. With mean m and covariance S of the data,

    E[data | x_t] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t - alpha m)

is the best that any linear function of x_t can do on data with these moments. It is computed from the training pictures
and converted to what the network predicts; then both are given the same x_t of pictures that neither has seen, at the
same times. The training scripts train each network (resumable, in `--work`). What was chosen for a run was chosen by
its loss on a validation split that is taken out of the training pictures; the test pictures are looked at once, here.
The baseline gets what favours it most: its estimate is shrunk towards a well-conditioned one, and shrinkage and its
target are those that score best on the very test pictures.

Latents are those of the bundled model's autoencoder, 8x8x16; pixels are 16x16. Classes are the groups of emoji.

Stored: linear_denoiser.json and linear_denoiser.md.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hubgen.autoencoders.latents import normalised
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.data.encoded import LatentSource, TextSource
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.order import Draw, generator_of
from hubgen.data.views import pixels_of
from hubgen.paths.path import ProbabilityPath
from hubgen.paths.weighting import Weighting, uniform_weighting
from tests.benchmarks import report

RESULTS = Path(__file__).parent / "results" / "linear_denoiser"
VALIDATION_PICTURES = 128
TIMES = tuple((index + 0.5) / 16 for index in range(16))
"""Where both are compared; a path that knows only grid times moves each to its next."""
DRAWS = 2
"""Noise drawn for each held-out picture and time"""
SHRINKAGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)

COMMON: dict[str, Any] = {
    "data.split": "train",
    "data.mirror": True,
    "validation.split": "validation",
    "validation.steps": 250,
    "validation.pictures": VALIDATION_PICTURES,
    "objective.density": "uniform",
    "optim.learning_rate": 1e-3,
    "optim.lr_warmup_steps": 50,
    "optim.weight_decay": 0.05,
    "optim.ema_decay": 0.99,
    "run.batch_size": 32,
    "run.max_train_steps": 900,
    "run.checkpoint_steps": 250,
    "run.report_to": "none",
    "publish.dtype": "float32",
}
TEXT = {**COMMON, "data.size": 64, "base.text_encoder": "minilm", "base.max_text_tokens": 16}
TEXT |= {"run.max_train_steps": 1800}
CLASSES = {**COMMON, "data.size": 64, "data.label_column": "group", "validation.samples": 0}
PIXELS = {**COMMON, "data.size": 16, "validation.samples": 0, "validation.inference_steps": 10}
MMDIT = {
    "patch_size": 2,
    "num_layers": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "pos_embed_max_size": 4,
    "qk_norm": "rms_norm",
}
UNET = {
    "block_out_channels": [64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 4,
}
SDXL = {
    **UNET,
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
}
FLUX = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 48,
    "num_attention_heads": 4,
    "axes_dims_rope": [8, 20, 20],
}
DIT = {"num_attention_heads": 4, "attention_head_dim": 48, "num_layers": 6, "patch_size": 2}
DDPM = {
    "block_out_channels": [48, 96],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 16,
    "attention_head_dim": 24,
}
NCSNPP = {
    **DDPM,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 1.4142,
    "norm_num_groups": None,
    "attention_head_dim": None,
}
VE = {"objective.path": "variance_exploding", "objective.sigma_max": 20.0}


@dataclass(frozen=True)
class Planned:
    """A training of this benchmark."""

    script: str
    """Of hubgen.training"""
    settings: Mapping[str, Any]
    """By dotted name"""


def planned(script: str, common: Mapping[str, Any], config: Mapping[str, Any], **more: Any) -> Planned:
    """Settings of a run; of `more`, `a__b` is the setting `a.b`."""
    own = {name.replace("__", "."): value for name, value in more.items()}
    return Planned(script, {**common, "base.backbone_config": dict(config), **own})


RUNS: dict[str, Planned] = {
    "mmdit, rectified flow": planned("train_text_to_image", TEXT, MMDIT, objective__path="rectified_flow"),
    "mmdit, ddpm": planned("train_text_to_image", TEXT, MMDIT, objective__path="ddpm"),
    "unet, rectified flow": planned(
        "train_text_to_image", TEXT, UNET, base__backbone="unet", objective__path="rectified_flow"
    ),
    "unet, ddpm": planned("train_text_to_image", TEXT, UNET, base__backbone="unet", objective__path="ddpm"),
    "unet, edm": planned("train_text_to_image", TEXT, UNET, base__backbone="unet", objective__path="edm"),
    "unet, cosine": planned("train_text_to_image", TEXT, UNET, base__backbone="unet", objective__path="cosine"),
    "sdxl, ddpm": planned("train_text_to_image", TEXT, SDXL, base__backbone="unet", objective__path="ddpm"),
    "flux, rectified flow": planned(
        "train_text_to_image", TEXT, FLUX, base__backbone="flux", objective__path="rectified_flow"
    ),
    "dit, ddpm": planned("train_class_to_image", CLASSES, DIT, objective__path="ddpm", run__max_train_steps=3600),
    "ddpm, pixels": planned(
        "train_unconditional", PIXELS, DDPM, objective__path="ddpm", objective__beta_schedule="linear"
    ),
    "ncsnpp, pixels": planned("train_unconditional", {**PIXELS, **VE}, NCSNPP),
}
"""What is trained, by name"""


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
    weight: torch.Tensor
    """(M,) of the squared error, as training weighs it: 1, or for scores that of the noise they stand for"""

    @classmethod
    def draw(
        cls,
        latents: torch.Tensor,
        path: ProbabilityPath,
        seed: int = 0,
        draws: int = DRAWS,
        weighting: Weighting = uniform_weighting,
    ) -> "Trial":
        """Every held-out latent, (N, C, h, w), at every time, `draws` times."""
        count = len(latents)
        picture = torch.arange(count).repeat(len(TIMES) * draws)
        time = torch.arange(len(TIMES)).repeat_interleave(count * draws)
        data = latents.double()[picture]
        # A stream of its own: the same seed elsewhere would give data that is correlated with the noise.
        generator = generator_of(seed, 0, "linear denoiser")
        noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
        sample = path.sample(data, noise, torch.tensor(TIMES, dtype=torch.float64)[time])
        t = sample.t.double()
        return cls(sample.x_t, t, sample.target, picture, time, weighting(path, t))

    def loss(self, prediction: torch.Tensor) -> torch.Tensor:
        """Mean squared error at each of `TIMES`, (T,)."""
        error = self.weight * (prediction.double() - self.target).square().mean(dim=(1, 2, 3))
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
    backbone: Any, condition: Condition, trial: Trial, path: ProbabilityPath, batch_size: int = 128
) -> torch.Tensor:
    """Loss of the network at each time, (T,); it is given the held-out pictures' conditions, (N, ...)."""
    predictions = []
    channels = trial.x_t.shape[1]
    for rows in torch.arange(len(trial.t)).split(batch_size):
        chosen = condition.map(lambda value, rows=rows: value[trial.picture[rows]])
        timestep = path.timestep(trial.t[rows].float())
        predictions.append(predict(backbone, trial.x_t[rows].float(), timestep, chosen)[:, :channels])
    return trial.loss(torch.cat(predictions))


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def prepare_data(data: Path, folder: Path, validation: int = VALIDATION_PICTURES, seed: int = 0) -> None:
    """Copies the pictures of `data` to `folder`, of the training ones `validation` into a split of that name."""
    for split in ("train", "held_out"):
        source = ImageTextFolder(data, split=split).folder
        lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = set(order[:validation]) if split == "train" else set()
        parts = {split: [line for row, line in enumerate(lines) if row not in chosen]}
        if chosen:
            parts["validation"] = [lines[row] for row in sorted(chosen)]
        for part, rows in parts.items():
            target = folder / ("test" if part == "held_out" else part)
            if (target / "metadata.jsonl").is_file():
                continue
            target.mkdir(parents=True, exist_ok=True)
            for line in rows:
                shutil.copyfile(source / json.loads(line)["file_name"], target / json.loads(line)["file_name"])
            report.write_text(target / "metadata.jsonl", "\n".join(rows) + "\n")


def train(script: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Runs a training script with `settings` as its recipe; goes on where it stopped, does nothing if it is done."""
    recipe = folder / "recipe.yaml"
    content = yaml.safe_dump(dict(settings), sort_keys=True)
    if (folder / "pipeline" / "model_index.json").is_file():
        if recipe.read_text(encoding="utf-8") == content:
            return
        raise ValueError(f"{recipe} is not the recipe of this run; remove {folder} or give another --work")
    report.write_text(recipe, content)
    subprocess.run([sys.executable, "-m", f"hubgen.training.{script}", "--config", str(recipe)], check=True)


def measure(script: str, folder: Path) -> dict[str, Any]:
    """The losses of the trained network in `folder` and of the linear denoisers, at each time, on the test pictures."""
    from hubgen import ClassToImagePipeline, TextToImagePipeline, UnconditionalPipeline
    from hubgen.training.kit.labels import Labels
    from hubgen.training.kit.objectives import objective_from
    from hubgen.training.kit.parse import parse_settings
    from hubgen.training.kit.pictures import open_pictures

    module = importlib.import_module(f"hubgen.training.{script}")
    settings = parse_settings(module.Settings, ["--config", str(folder / "recipe.yaml")])
    objective = objective_from(settings.objective)
    columns = [settings.data.label_column] if script == "train_class_to_image" else []
    training, test = (
        open_pictures(settings.data, split, settings.run.seed, side=64, columns=columns, train=split == "train")
        for split in (settings.data.split, "test")
    )
    draws = [Draw(row, row) for row in range(len(test))]
    condition = Condition()
    if script == "train_unconditional":
        pipeline: Any = UnconditionalPipeline.from_pretrained(folder / "pipeline")
        shown = [training.views.view(row, n) for row in range(len(training)) for n in range(training.views.count)]
        rows = [row for row in range(len(training)) for _ in range(training.views.count)]
        pixels = [view.of(training.examples.picture(row)) for view, row in zip(shown, rows, strict=True)]
        scale = 0.5 if pipeline.learned_on_unit_range else 1.0
        means = torch.stack([pixels_of(picture) for picture in pixels]) * scale + (1 - scale)
        moments = Moments.of_posteriors(means, torch.zeros_like(means))
        data = test.pixels(draws) * scale + (1 - scale)
        backbone = pipeline.unet
    else:
        cls = TextToImagePipeline if script == "train_text_to_image" else ClassToImagePipeline
        pipeline = cls.from_pretrained(folder / "pipeline", torch_dtype=torch.float32)
        vae, backbone = pipeline.vae, pipeline.backbone
        cache = settings.data.cache_dir or folder / "cache"
        source = LatentSource(vae, training.examples, training.views, settings.run.seed, cache)
        source.fill()
        assert source.cache is not None
        views = [training.views.key(row, n) for row in range(len(training)) for n in range(training.views.count)]
        means, stds = (torch.stack([source.cache[key][name] for key in views]) for name in ("mean", "std"))
        moments = Moments.of_posteriors(normalised(means, vae), stds * vae.config.scaling_factor)
        source = LatentSource(vae, test.examples, test.views, 0)
        data = source.latents(source.read(draws), draws, torch.device("cpu"))
        if script == "train_class_to_image":
            condition = Condition(labels=torch.tensor(Labels(test, settings.data, pipeline).numbers))
        else:
            test = open_pictures(settings.data, "test", settings.run.seed, side=64, caption_column="text", train=False)
            embeddings = TextSource(pipeline.condition, test.examples.texts)(test.examples.texts, torch.device("cpu"))
            micro = test.micro(draws) if "micro" in pipeline.family.takes else None
            guidance = settings.base.guidance_scale if pipeline.family.distilled else None
            condition = Condition(embeddings.tokens, embeddings.pooled, micro=micro, guidance_scale=guidance)

    path = objective.path
    trial = Trial.draw(data, path, weighting=objective.weighting)
    network = network_loss(backbone.eval(), condition, trial, path)
    full, shrinkage = best_linear_loss(moments, trial, path)
    diagonal = linear_loss(LinearDenoiser(moments.mean, moments.diagonal()), trial, path)
    print(f"network {network.mean():.4f}, linear {full.mean():.4f} ({shrinkage}), diagonal {diagonal.mean():.4f}")
    return {
        "prediction_type": path.prediction_type,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "steps": settings.run.max_train_steps,
        "training_pictures": len(training),
        "test_pictures": len(test),
        "times": list(TIMES),
        "network": {"mean": network.mean().item(), "by_time": network.tolist()},
        "linear": {"mean": full.mean().item(), "by_time": full.tolist(), "shrinkage": shrinkage},
        "diagonal": {"mean": diagonal.mean().item(), "by_time": diagonal.tolist()},
        "below_linear": bool(network.mean() < full.mean()),
        "times_below_linear": int((network < full).sum()),
    }


def to_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a page."""
    rows = [
        [
            f"{name} ({result['parameters'] / 1e6:.1f} M, {result['steps']} steps)",
            result["prediction_type"],
            f"**{result['network']['mean']:.4f}**",
            f"{result['linear']['mean']:.4f} ({result['linear']['shrinkage']})",
            f"{result['diagonal']['mean']:.4f}",
            f"{'yes' if result['below_linear'] else 'no'} ({result['times_below_linear']} of {len(TIMES)} times)",
        ]
        for name, result in results.items()
    ]
    table = report.markdown_table(
        ["run", "predicts", "network", "linear, full covariance (shrinkage)", "linear, diagonal", "below the linear"],
        rows,
    )
    by_time = report.markdown_table(
        ["t", *results],
        [
            [
                f"{time:.3f}",
                *(f"{r['network']['by_time'][row]:.4f} / {r['linear']['by_time'][row]:.4f}" for r in results.values()),
            ]
            for row, time in enumerate(TIMES)
        ],
    )
    first = next(iter(results.values()))
    return (
        "# Networks against the optimal linear denoiser\n\n"
        "Written by `python -m tests.benchmarks.linear_denoiser`. Mean squared error of the prediction (of scores: of "
        f"the noise that they stand for) on {first['test_pictures']} test pictures at {len(TIMES)} times, averaged "
        f"over the times; networks and moments from {first['training_pictures']} pictures, each also mirrored. "
        "Settings were tuned on other pictures.\n\n"
        f"{table}\nAt each time, network / linear:\n\n{by_time}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    parser.add_argument("--data", type=Path, help="folder of `hubgen data emoji`; built in the cache if not given")
    parser.add_argument("--work", type=Path, default=Path("runs/linear_denoiser"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--max-train-steps", type=int, help="of every run (default: the settings in this file)")
    arguments = parser.parse_args(argv)

    from tests.benchmarks.bundled_model import default_data, default_model

    data = arguments.work / "data"
    prepare_data(arguments.data or default_data(), data)
    stored = arguments.output / "linear_denoiser.json"
    results = json.loads(stored.read_text(encoding="utf-8"))["results"] if stored.is_file() else {}
    results = results if isinstance(results, dict) else {}
    for name in arguments.runs:
        print(name, flush=True)
        plan, folder = RUNS[name], arguments.work / name.replace(", ", "-").replace(" ", "-")
        settings = {**plan.settings, "data.source": str(data), "run.output_dir": str(folder)}
        if plan.script != "train_unconditional":
            settings |= {"base.autoencoder": str(default_model() / "vae")}
            settings |= {"data.cache_dir": str(arguments.work / "cache")}
        if arguments.max_train_steps is not None:
            settings["run.max_train_steps"] = arguments.max_train_steps
        train(plan.script, settings, folder)
        results[name] = {**measure(plan.script, folder), "script": plan.script, "settings": dict(plan.settings)}
        # After each run, so that an interrupted benchmark has stored what it found.
        results = {name: results[name] for name in RUNS if name in results}
        report.write_json(stored, {"results": results, "environment": report.environment()})
        report.write_text(arguments.output / "linear_denoiser.md", to_markdown(results))
    print(to_markdown(results))
    print(f"stored in {arguments.output}")


if __name__ == "__main__":
    main()
