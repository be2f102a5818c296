"""What do latents gain and lose? Channels and factors of autoencoders, and latents against pixels, in miniature.

    python -m tests.benchmarks.autoencoders [--cells NAME ...] [--seeds N ...] [--steps N] [--seconds N] [--data DIR]

*Autoencoders*: KL autoencoders of 4, 8 and 16 channels at a factor of 8 (SD3, 2403.03206, table 3), and of factors of
4, 8 and 16 at 16 channels (latent diffusion, 2112.10752, table 8); 16, because SD3 and the bundled model have as many,
and because the coarsest of them then still holds 64 numbers a picture. Each is trained by
hubgen.training.train_autoencoder for the same steps, and has the same width at the same resolution. Pictures are of
32x32 pixels, a quarter of the work, so that all come far enough to differ. The loss is the absolute error alone, but
for a millionth of the divergence, as in latent diffusion: the number of latents limits what gets through, and not their
noise. Measured on the held-out pictures: PSNR, and the perceptual distance of bundled_model.

*Spaces*: one transformer, on the latents of the bundled model's autoencoder, and on pixels in patches of 8 (four times
the tokens) and of 4 (sixteen times). Pixels are scaled to a standard deviation of 1, as latents are. Each learns
rf/lognorm(0,1) for the same seconds of computing (of this process, so that another one beside it does not count), and
is measured after a quarter, a half and all of them, as in formulations. A patch of 8 holds 192 numbers, more than the
network is wide, so that it cannot hand on all of the noise that a velocity contains; a patch of 4 is narrower, and
costs more. The training of the autoencoder is not counted: it is done once.

On one thread of a 2020s server core an autoencoder takes about 4 minutes a seed, and a space 5 (latents), 7 (patches of
8) and 13 (patches of 4), of which 4 are its training.

Stored: autoencoders.json; `python -m tests.benchmarks.claims` makes the page.
"""

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.autoencoders.perceptual import PerceptualLoss
from hubgen.autoencoders.vq_model import VQEncoderOutput
from hubgen.schedulers.objective import scheduler_of
from hubgen.training import train_autoencoder
from hubgen.training.kit.bases import load_autoencoder
from hubgen.training.kit.parse import parse_settings
from tests.benchmarks import measures, report
from tests.benchmarks.bundled_model import TEST, RealPictures
from tests.benchmarks.formulations import (
    FORMULATIONS,
    MMDIT,
    OPTIM,
    Bench,
    Learner,
    Network,
    arguments_of,
    bench_of,
    collected,
    lay_out,
    measured,
    parameters,
    place,
    stoppable,
    store,
    stored,
    untrained,
)

RESULTS = Path(__file__).parent / "results" / "autoencoders"
STEPS, SECONDS = 1500, 240
SHARES = (0.25, 0.5, 1.0)
"""Of the seconds, after which a space is measured"""
SAMPLING_STEPS = 25
NO_END = 100_000
"""Steps that no space comes to"""
WIDTHS = (16, 24, 32, 48, 48)
"""Of autoencoders, at each resolution"""
SIDE = 32
"""Of autoencoders' pictures, in pixels"""
AUTOENCODER_BATCH = 16


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoders


@dataclass(frozen=True)
class Shape:
    """Of an autoencoder's latents."""

    factor: int
    """Pixels of a side for each latent"""
    channels: int


SHAPES = {
    f"f={shape.factor}, {shape.channels} channels": shape
    for shape in (Shape(8, 4), Shape(8, 8), Shape(8, 16), Shape(4, 16), Shape(16, 16))
}


def settings_of(shape: Shape, seed: int, steps: int, bench: Bench, folder: Path) -> dict[str, Any]:
    """Of the training of an autoencoder, by dotted name."""
    return {
        "model.latent_channels": shape.channels,
        "model.block_out_channels": list(WIDTHS[: shape.factor.bit_length()]),
        "loss.perceptual_network": "none",
        "loss.kl_weight": 1e-6,
        "data.source": str(bench.data),
        "data.size": bench.size,
        "optim.learning_rate": 2e-3,
        "optim.ema_decay": 0.99,
        "run.output_dir": str(folder),
        "run.batch_size": AUTOENCODER_BATCH,
        "run.max_train_steps": steps,
        "run.seed": seed,
        "run.checkpoint_steps": 100,
        "run.report_to": "none",
    }


def run_autoencoder(name: str, shape: Shape, seed: int, steps: int, bench: Bench) -> dict[str, Any]:
    """The result for one seed: what is stored, or else it is trained, measured and stored."""
    path = place(bench.work, "cells", name, seed).with_suffix(".json")
    folder = place(bench.work, "runs", name, seed)
    settings = settings_of(shape, seed, steps, bench, folder)
    identity = {key: value for key, value in settings.items() if key not in ("data.source", "run.output_dir")}
    result = stored(path, identity)
    if result is not None:
        return result
    if not (folder / "autoencoder" / "config.json").is_file():
        report.write_text(folder / "recipe.yaml", yaml.safe_dump(settings))
        train_autoencoder.main(parse_settings(train_autoencoder.Settings, ["--config", str(folder / "recipe.yaml")]))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    vae = load_autoencoder(folder / "autoencoder").eval()
    pixels = RealPictures.from_folder(bench.data, TEST, bench.size).pixels
    rebuilt = measures.reconstruct(vae, pixels)
    perceptual = PerceptualLoss(bench.features or EfficientNetLite0.from_pretrained())
    result = {
        "cell": name,
        "seed": seed,
        "factor": shape.factor,
        "channels": shape.channels,
        "numbers": shape.channels * (bench.size // shape.factor) ** 2,
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "psnr_db": with_error(measures.psnr(rebuilt, pixels)),
        "perceptual_distance": with_error(measures.in_batches(perceptual, rebuilt, pixels)),
        "identity": identity,
    }
    store(path, result)
    return result


def with_error(values: torch.Tensor) -> dict[str, Any]:
    """Mean of what N pictures gave, (N,), with the error of that mean."""
    mean, error = values.mean().item(), (values.std() / len(values) ** 0.5).item()
    return {"mean": mean, "error": error, "interval_95": [mean - 1.96 * error, mean + 1.96 * error]}


# ---------------------------------------------------------------------------------------------------------------------
# Spaces


class Pixels(ModelMixin, ConfigMixin):
    """An autoencoder that does nothing: its latents are the pixels.

    Args:
        latent_channels: Those of a picture.
        block_out_channels: A level, which halves nothing.
        shift_factor: Mean of the pixels.
        scaling_factor: 1 / standard deviation of the pixels.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 3,
        block_out_channels: tuple[int, ...] = (1,),
        shift_factor: float = 0.0,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))  # tells device and precision

    @classmethod
    def of(cls, pixels: torch.Tensor) -> "Pixels":
        """For pictures like these, (N, 3, H, W)."""
        return cls(shift_factor=pixels.mean().item(), scaling_factor=1 / pixels.std().item())

    def encode(self, x: torch.Tensor) -> VQEncoderOutput:
        """(B, 3, H, W), as it is."""
        return VQEncoderOutput(latents=x)

    def decode(self, z: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """(B, 3, H, W), as it is."""
        return (z,)


@dataclass(frozen=True)
class Space:
    """What a network learns in."""

    network: Network
    pixels: bool

    def autoencoder(self, bench: Bench) -> Any:
        """Into the space and back."""
        if self.pixels:
            return Pixels.of(RealPictures.from_folder(bench.data, "train", bench.size).pixels)
        return load_autoencoder(bench.autoencoder)


def in_patches(size: int) -> Network:
    """The transformer of the formulations with another patch."""
    return Network(MMDIT.cls, {**MMDIT.config, "patch_size": size})


SPACES = {
    "latents": Space(MMDIT, pixels=False),
    "pixels, patches of 8": Space(in_patches(8), pixels=True),
    "pixels, patches of 4": Space(in_patches(4), pixels=True),
}
CELLS = [*SHAPES, *SPACES]


def run_space(name: str, space: Space, seed: int, seconds: float, bench: Bench) -> list[dict[str, Any]]:
    """The results for one seed after each share of the seconds, trained as far as they are not stored."""
    cell = replace(FORMULATIONS["rf/lognorm(0,1)"], network=space.network)
    identity = {"cell": cell.description(), "pixels": space.pixels, "bench": bench.identity()}
    paths = {
        share * seconds: place(bench.work, "cells", name, seed).with_name(f"seed-{seed}-after-{share * seconds:g}.json")
        for share in SHARES
    }
    left = [mark for mark, path in paths.items() if stored(path, {**identity, "seconds": mark}) is None]
    if left:
        folder = place(bench.work, "runs", name, seed)
        pipe, objective = untrained(space.network, space.autoencoder(bench), bench, seed), cell.learns()
        pipe.register_modules(scheduler=scheduler_of(objective))
        optim = replace(OPTIM, lr_schedule="constant", lr_warmup_steps=20)  # the end is not known in steps
        print(f"{name}, seed {seed}: ends after {seconds:g} s of computing, whatever the bar says", flush=True)
        learner = Learner(pipe, objective, bench, folder, seed, optim, NO_END, identity)
        with closing(learner.steps()) as steps:
            for step in steps:
                if learner.clock.seconds < left[0]:
                    continue
                mark = left.pop(0)
                with learner.trained.averaged():
                    found = measured(pipe, bench, seed, SAMPLING_STEPS, 1.0)
                result = {
                    "cell": name,
                    "seed": seed,
                    "seconds": learner.clock.seconds,
                    "after": mark,
                    "steps": step,
                    "parameters": parameters(pipe),
                    "measured": found,
                    "identity": {**identity, "seconds": mark},
                }
                store(paths[mark], result)
                if not left:
                    break
        learner.run.finish()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    results = [stored(path, {**identity, "seconds": mark}) for mark, path in paths.items()]
    return [result for result in results if result is not None]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and stores all."""
    parser = arguments_of(__doc__, CELLS, "runs/autoencoders", RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of an autoencoder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a space (default: %(default)s)")
    arguments = parser.parse_args(argv)
    bench, results = bench_of(arguments), arguments.output / "autoencoders.json"
    lay_out(results, bench.work)
    for seed in arguments.seeds:  # all cells of a seed first, so that an early end leaves comparisons
        for name in arguments.cells:
            print(f"{name}, seed {seed}", flush=True)
            if name in SHAPES:
                run_autoencoder(name, SHAPES[name], seed, arguments.steps, replace(bench, size=SIDE))
            else:
                run_space(name, SPACES[name], seed, arguments.seconds, bench)
            content = {"cells": collected(bench.work, CELLS), "environment": report.environment()}
            store(results, content)
    print(f"stored in {arguments.output}; `python -m tests.benchmarks.claims` makes the page")


if __name__ == "__main__":
    stoppable(main)
