"""Which formulation and which network learn most from one budget? SD3's comparisons (2403.03206), in miniature.

    python -m tests.benchmarks.formulations [--cells NAME ...] [--seeds N ...] [--steps N] [--data DIR] [--work DIR]

*Formulations*: seven ways to train one small MM-DiT on the latents of emoji with their captions. *Networks*: the
MM-DiT, a DiT with cross-attention and a U-Net, of equal size within 5 %, all by rf/lognorm(0,1). Every cell has the
same steps, and for one seed the same pictures, noise and, of one network, initial weights; its times are the quantiles
of the same uniform numbers. Cells are run one by one and are kept in `--work`: the same command goes on where it was
stopped, also in the middle of a training, and results that are stored are not made again. Averaged weights are
measured.

*Samplers* are Euler's method along the ordinary differential equation of each path, one evaluation a step: for a flow
and EDM their own scheduler, for schedules of betas DDIM. The ancestral one that those are published with is measured
beside it at the fewest and the most steps. Start noise and captions are the same for all cells of a seed.

*Fréchet distance*: features of EfficientNet-Lite0 (`measures.describe`) of generated and real pictures, each set taken
as a Gaussian, in the 64 directions in which real pictures differ most. All 1,280 would need many thousand pictures for
a covariance that can be inverted; in 64, 512 pictures are eight a direction, and the directions are the same for all.
Asked are 512 captions drawn from all, training and held-out alike; the real ones are the pictures of all other
captions, so that the real pictures of the asked captions say where the measure ends: `real`, and `autoencoder` after
their way through it. Without guidance at every number of steps, because guidance trades the distribution for the
caption, and once with guidance, as models are used.

*Found*: how often one of the five nearest real pictures bears the caption, as in bundled_model.

On one thread of a 2020s server core a formulation takes about 8 minutes a seed, and the two other networks about 10.

Stored: formulations.json; `python -m tests.benchmarks.claims` makes the page.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hubgen import TextToImagePipeline
from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.backbones.sd3 import SD3Transformer2DModel
from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.conditioning.prompts import OneEncoder
from hubgen.formats.atomic import written
from hubgen.paths.timesteps import CosMapDensity, ModeDensity, TimestepDensity
from hubgen.schedulers.ddim import DDIMScheduler
from hubgen.schedulers.objective import Objective, scheduler_of
from hubgen.training.kit import groups
from hubgen.training.kit.bases import built, load_autoencoder, load_text_encoder
from hubgen.training.kit.conditioned import PromptedPictures, losses_of
from hubgen.training.kit.objectives import objective_from
from hubgen.training.kit.run import Run
from hubgen.training.kit.signals import Interrupted
from tests.benchmarks import measures, report
from tests.benchmarks.bundled_model import TEST, RealPictures, choose, default_data, default_model, generate

RESULTS = Path(__file__).parent / "results" / "formulations"
MAX_TEXT_TOKENS = 16
"""Of the wordings of all captions two in a thousand are longer."""
NUMBERS_OF_STEPS = (5, 10, 25, 50)
GUIDED_STEPS, GUIDANCE = 25, 2.5
DIMENSIONS = 64
RESAMPLES = 200
DRAWN_AT_ONCE = 64
APART = 1_000_000
"""Between the first picture's seed of one training seed and that of the next"""
TOLERANCE = 0.05

OPTIM = groups.Optim(learning_rate=4e-3, lr_warmup_steps=100, lr_schedule="cosine", ema_decay=0.995)


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@dataclass(frozen=True)
class Network:
    """An architecture and its size."""

    cls: Any
    config: Mapping[str, Any]
    """Arguments of the constructor but for those that follow from latents and text"""

    def build(self, side: int, channels: int, tokens: int, pooled: int) -> Any:
        """The network with fresh weights.

        Args:
            side: Of the latents.
            channels: Of the latents.
            tokens: Features of a text token.
            pooled: Features of the pooled text.
        """
        follows = {
            "sample_size": side,
            "in_channels": channels,
            "out_channels": channels,
            "joint_attention_dim": tokens,
            "cross_attention_dim": tokens,
            "pooled_projection_dim": pooled,
            "projection_class_embeddings_input_dim": pooled,
        }
        if "patch_size" in self.config:
            follows["caption_projection_dim"] = self.config["num_attention_heads"] * self.config["attention_head_dim"]
            follows["pos_embed_max_size"] = side // self.config["patch_size"]
        return built(self.cls, self.config, {}, follows)


TRANSFORMER = {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 64}
MMDIT = Network(SD3Transformer2DModel, {**TRANSFORMER, "num_layers": 4, "qk_norm": "rms_norm"})


def cross_attention_dit() -> Network:
    """The transformer of as many parameters that reads the text by cross-attention."""
    from tests.benchmarks.cross_attention_dit import CrossAttentionDiT

    return Network(CrossAttentionDiT, {**TRANSFORMER, "num_layers": 6})


UNET = Network(
    UNet2DConditionModel,
    {
        "block_out_channels": [56, 88],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "class_embed_type": "projection",  # the pooled text, which the transformers are given too
    },
)


@dataclass(frozen=True)
class Cell:
    """One training."""

    objective: groups.Objective
    density: TimestepDensity | None = None
    """Of the times, where the settings of the kit have none such"""
    network: Network = MMDIT

    def learns(self) -> Objective:
        """What the network learns."""
        objective = objective_from(self.objective)
        return objective if self.density is None else dataclasses.replace(objective, density=self.density)

    def description(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        density = None if self.density is None else {"kind": type(self.density).__name__, **vars(self.density)}
        network = {"class": self.network.cls.__name__, **self.network.config}
        return {"objective": dataclasses.asdict(self.objective), "density": density, "network": network}


def flow(density: Any, network: Network = MMDIT) -> Cell:
    """A rectified flow, whose times have a density of the settings, by name, or another one."""
    if isinstance(density, str):
        return Cell(groups.Objective(path="rectified_flow", density=density), network=network)  # type: ignore[arg-type]
    return Cell(groups.Objective(path="rectified_flow"), density, network)


FORMULATIONS: dict[str, Cell] = {
    "rf": flow("uniform"),
    "rf/lognorm(0,1)": flow("logit_normal"),
    "rf/mode(1.29)": flow(ModeDensity(1.29)),
    "rf/cosmap": flow(CosMapDensity()),
    # SD3's eps/linear is the schedule of latent diffusion, which is linear in the square root of beta.
    "eps/linear": Cell(groups.Objective(path="ddpm", prediction="noise", beta_schedule="scaled_linear")),
    "v/cos": Cell(groups.Objective(path="cosine", prediction="v")),
    "edm(-1.2,1.2)": Cell(groups.Objective(path="edm")),
}
NETWORKS: dict[str, Cell] = {
    "cross-attention DiT": flow("logit_normal", cross_attention_dit()),
    "U-Net": flow("logit_normal", UNET),
}
"""Beside the MM-DiT, which is rf/lognorm(0,1) of the formulations"""
CELLS = FORMULATIONS | NETWORKS


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless numbers of parameters are those of the first, within 5 %."""
    (first, expected), *others = sizes.items()
    for name, found in others:
        if abs(found / expected - 1) > TOLERANCE:
            raise ValueError(f"{name}: got {found:,} parameters, expected {expected:,} within 5 %, those of {first}")


# ---------------------------------------------------------------------------------------------------------------------
# The measure


class Gaussian:
    """A normal distribution of d features.

    Args:
        mean: (d,) float64.
        covariance: (d, d) float64.
    """

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor):
        self.mean, self.covariance = mean, covariance

    @classmethod
    def of(cls, points: torch.Tensor) -> "Gaussian":
        """With the moments of N points, (N, d)."""
        points = points.double()
        return cls(points.mean(dim=0), torch.cov(points.T).view(points.shape[1], points.shape[1]))

    @functools.cached_property
    def root(self) -> torch.Tensor:
        """The symmetric square root of the covariance, (d, d)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    def distance(self, other: "Gaussian") -> float:
        """Fréchet's: |m - n|^2 + tr(C + D - 2 (C^1/2 D C^1/2)^1/2) (1706.08500, eq. 6)."""
        overlap = torch.linalg.eigvalsh(self.root @ other.covariance @ self.root).clamp(min=0).sqrt().sum()
        spread = self.covariance.trace() + other.covariance.trace() - 2 * overlap
        return ((self.mean - other.mean).square().sum() + spread).item()


class Directions:
    """The directions in which features of real pictures differ most, and the real pictures in them.

    Args:
        features: (N, D) of the real pictures.
        dimensions: How many directions, d; at most N - 1.
    """

    def __init__(self, features: torch.Tensor, dimensions: int = DIMENSIONS):
        self.mean = features.double().mean(dim=0)
        _, scales, rows = torch.linalg.svd(features.double() - self.mean, full_matrices=False)  # in falling order
        self.vectors = rows[: min(dimensions, len(features) - 1)].T  # (D, d)
        variances = scales.square()
        self.kept = (variances[: self.vectors.shape[1]].sum() / variances.sum()).item()
        """Share of the variance that lies in them"""
        self.real = Gaussian.of(self.of(features))

    def of(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, d)."""
        return (features.double() - self.mean) @ self.vectors

    def distance(self, features: torch.Tensor) -> dict[str, Any]:
        """Of pictures from the real ones, with the error that comes from the choice of these pictures."""
        points = self.of(features)
        distance, error = self.real.distance(Gaussian.of(points)), bootstrap_error(points, self.real)
        return {
            "distance": distance,
            "error": error,
            "interval_95": [distance - 1.96 * error, distance + 1.96 * error],
        }


def bootstrap_error(points: torch.Tensor, real: Gaussian, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Standard deviation of the distance, when pictures are drawn anew from those at hand, with replacement.

    The distances themselves would be too large, because a drawing repeats pictures; their spread is right.
    """
    generator = torch.Generator().manual_seed(seed)
    drawings = (torch.randint(len(points), (len(points),), generator=generator) for _ in range(resamples))
    distances = torch.tensor([real.distance(Gaussian.of(points[rows])) for rows in drawings])
    return distances.std().item()


class Yardstick:
    """Real pictures, the captions that are asked for, and what is measured of pictures of those captions.

    Args:
        data: Folder of an image-text data set with the splits train and test.
        size: Height and width in pixels.
        pictures: How many captions are asked for.
        network: Of the features; the published weights if not given.
    """

    def __init__(self, data: Path, size: int, pictures: int, network: EfficientNetLite0 | None = None):
        self.network = network or EfficientNetLite0.from_pretrained()
        splits = [RealPictures.from_folder(data, split, size) for split in ("train", TEST)]
        self.real = RealPictures(
            torch.cat([one.pixels for one in splits]), [row for one in splits for row in one.captions]
        )
        self.features = measures.describe(self.network, self.real.pixels)
        self.asked = choose(pictures, len(self.real) - 2, seed=0)
        others = sorted(set(range(len(self.real))) - set(self.asked))
        self.directions = {name: Directions(features[others]) for name, features in self.features.items()}
        self.captions = [self.real.texts[row] for row in self.asked]

    def measure(self, pixels: torch.Tensor) -> dict[str, Any]:
        """Distances and retrieval of the pictures of the captions, (N, 3, H, W) in [-1, 1]."""
        features = measures.describe(self.network, pixels)
        queries, index = features["layout"], self.features["layout"]
        found = measures.found_captions(queries, index, self.real.captions, self.captions)
        own, shuffled = measures.asked_and_shuffled(found)
        distances = {name: self.directions[name].distance(features[name]) for name in features}
        return {**distances, "found": {**own.as_dict(), "shuffled": shuffled}}

    def ends(self, vae: Any) -> dict[str, Any]:
        """The same of the real pictures of the captions, as they are and through the autoencoder."""
        pixels = self.real.pixels[self.asked]
        return {
            "real": self.measure(pixels),
            "autoencoder": self.measure(measures.reconstruct(vae, pixels)),
            "pictures": len(self.asked),
            "variance_kept": {name: directions.kept for name, directions in self.directions.items()},
        }


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Bench:
    """What all cells have in common."""

    data: Path
    """Folder of `hubgen data emoji`"""
    work: Path
    """Where everything is kept"""
    autoencoder: Path
    text_encoder: str = "minilm"
    size: int = 64
    """Of the pictures, in pixels"""
    steps: int = 1800
    """Of each training"""
    batch_size: int = 32
    """Pictures of a step"""
    pictures: int = 512
    """That are measured"""
    numbers_of_steps: Sequence[int] = NUMBERS_OF_STEPS
    """Of the samplers"""
    features: EfficientNetLite0 | None = field(default=None, repr=False)
    """See `Yardstick`"""

    @functools.cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.data, self.size, self.pictures, self.features)

    def identity(self) -> dict[str, Any]:
        """What results depend on, as JSON values, beside the cell and its seed."""
        names = ("size", "steps", "batch_size", "pictures", "numbers_of_steps")
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}

    def captioned(self) -> groups.CaptionedData:
        """The pictures, for the kit."""
        return groups.CaptionedData(source=str(self.data), size=self.size)


def untrained(network: Network, vae: Any, bench: Bench, seed: int = 0) -> TextToImagePipeline:
    """A pipeline whose backbone has the initial weights of a seed; it has no scheduler yet."""
    encoder, tokenizer = load_text_encoder(bench.text_encoder, MAX_TEXT_TOKENS)
    text = OneEncoder((encoder,), (tokenizer,)).encode([""])
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    torch.manual_seed(seed)
    backbone = network.build(
        bench.size // factor, vae.config.latent_channels, text.tokens.shape[-1], text.pooled.shape[-1]
    )
    part: dict[str, Any] = {"unet" if isinstance(backbone, UNet2DConditionModel) else "transformer": backbone}
    for frozen in (vae, encoder):
        frozen.eval().requires_grad_(False)
    return TextToImagePipeline(
        vae=vae,
        text_encoder=encoder,  # type: ignore[arg-type]
        tokenizer=tokenizer,
        scheduler=None,
        default_num_inference_steps=GUIDED_STEPS,
        default_guidance_scale=1.0,
        **part,
    )


def parameters(pipe: TextToImagePipeline) -> int:
    """How many numbers the backbone has."""
    return sum(parameter.numel() for parameter in pipe.backbone.parameters())


class Clock:
    """Seconds of computing, of this process on all its threads; a part of checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds += time.process_time() - began

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"seconds": torch.tensor(self.seconds, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.seconds = state["seconds"].item()


class Learner:
    """A training by the kit, of a network and an objective that need not be in its settings.

    A step is that of hubgen.training.train_text_to_image, and so are checkpoints.

    Args:
        pipe: With the network; only this one learns.
        objective: What it learns.
        bench: Pictures, and where things are kept.
        folder: Of this training.
        seed: Of all that is drawn.
        optim: How it learns.
        steps: How long.
        identity: What tells this training from another, as JSON values.
    """

    def __init__(
        self,
        pipe: TextToImagePipeline,
        objective: Objective,
        bench: Bench,
        folder: Path,
        seed: int,
        optim: groups.Optim,
        steps: int,
        identity: Mapping[str, Any],
    ):
        options = groups.RunOptions(
            output_dir=folder,
            max_train_steps=steps,
            batch_size=bench.batch_size,
            seed=seed,
            checkpoint_steps=200,
            report_to="none",
        )
        data = bench.captioned()
        self.run, self.objective, self.clock = Run(options), objective, Clock()
        self.pictures = PromptedPictures(pipe, data, data.split, self.run)
        described = dataclasses.asdict(optim) | {"betas": list(optim.betas), "ema_lengths": []}
        self.run.open({**identity, "optim": described, "data": self.pictures.fingerprint}, optim)
        pipe.to(self.run.device)
        self.pictures.encode(bench.work / "cache")
        self.trained = self.run.trains("backbone", pipe.backbone.requires_grad_(True), optim)
        self.run.keeps("clock", self.clock)
        row = self.pictures.row()
        self.run.describe(len(row), *self.pictures.notes())
        self.run.restore()
        self.batches = self.run.batches(row, self.pictures.read)

    def steps(self) -> Generator[int, None, None]:
        """The steps that are left, each when it is done."""
        for step in self.run.steps():
            with self.clock.running():
                for draws, batch in self.run.micro_batches(self.batches):
                    losses, t = losses_of(self.trained.module, self.objective, self.pictures.shown(draws, batch))
                    self.trained.backward(losses.mean(), self.pictures.names(draws))
                    self.run.window.note_losses(losses, t)
                self.run.update(step)
            yield step


def trained(pipe: TextToImagePipeline, cell: Cell, bench: Bench, folder: Path, seed: int) -> float:
    """Gives the backbone its averaged weights after the training, and returns the seconds that it took."""
    weights = folder / "weights.safetensors"
    if not weights.is_file():
        identity = {"cell": cell.description(), "bench": bench.identity()}
        learner = Learner(pipe, cell.learns(), bench, folder, seed, OPTIM, bench.steps, identity)
        for _ in learner.steps():
            pass
        learner.trained.settle()
        learner.run.finish()
        with written(weights) as temporary:
            metadata = {"seconds": str(learner.clock.seconds)}
            save_file(pipe.backbone.state_dict(), temporary, metadata=metadata)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    pipe.backbone.load_state_dict(load_file(weights))
    pipe.backbone.eval().requires_grad_(False)
    with safe_open(weights, framework="pt") as file:
        return float(file.metadata()["seconds"])


# ---------------------------------------------------------------------------------------------------------------------
# The cells


def samplers(scheduler: Any) -> dict[str, Any]:
    """Schedulers by name: without noise in the steps, and where the model's own one adds some, that one too."""
    if hasattr(scheduler, "alphas_cumprod"):
        return {"deterministic": DDIMScheduler.from_config(scheduler.config), "ancestral": scheduler}
    return {"deterministic": scheduler}


def calls(numbers_of_steps: Sequence[int]) -> list[tuple[str, int, float]]:
    """What is drawn: sampler, steps and guidance."""
    plain = [("deterministic", steps, 1.0) for steps in numbers_of_steps]
    guided = ("deterministic", GUIDED_STEPS, GUIDANCE)
    return [*plain, guided, *(("ancestral", steps, 1.0) for steps in (min(numbers_of_steps), max(numbers_of_steps)))]


def measured(pipe: TextToImagePipeline, bench: Bench, seed: int, steps: int, guidance: float) -> dict[str, Any]:
    """The measures of one way to draw, and the seconds that drawing took."""
    began = time.process_time()
    yardstick = bench.yardstick
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    label = f"{steps} steps, guidance {guidance:g}"
    pixels = generate(pipe, yardstick.captions, seed * APART, DRAWN_AT_ONCE, label, **options)
    seconds = time.process_time() - began
    return {"steps": steps, "guidance": guidance, **yardstick.measure(pixels), "seconds": seconds}


def place(work: Path, kind: str, name: str, seed: int) -> Path:
    """Where something of a cell lies, below the folder of a kind."""
    plain = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    return work / kind / plain / f"seed-{seed}"


def store(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path, durable=False) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stored(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a file, or `None` where there is none.

    Raises:
        ValueError: It is one of other settings.
    """
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["identity"] != json.loads(json.dumps(identity)):
        raise ValueError(
            f"{path} has other settings than those asked for; remove it, or give another --work and --output"
        )
    return result


def lay_out(results: Path, work: Path) -> None:
    """Lays what a file of results holds into `work`, where that has nothing of it, so that it is not made again."""
    if not results.is_file():
        return
    content = json.loads(results.read_text(encoding="utf-8"))
    found = {work / "ends.json": content["ends"]} if "ends" in content else {}
    for result in (result for cell in content["cells"].values() for result in cell):
        after = f"-after-{result['after']:g}" if "after" in result else ""
        path = place(work, "cells", result["cell"], result["seed"])
        found[path.with_name(f"{path.name}{after}.json")] = result
    for path, result in found.items():
        if not path.exists():
            store(path, result)


def run_cell(name: str, cell: Cell, seed: int, bench: Bench) -> dict[str, Any]:
    """The result of a cell for one seed: what is stored, or else it is trained, measured and stored."""
    path = place(bench.work, "cells", name, seed).with_suffix(".json")
    identity = {"cell": cell.description(), "bench": bench.identity()}
    result = stored(path, identity)
    if result is not None:
        return result
    pipe = untrained(cell.network, load_autoencoder(bench.autoencoder), bench, seed)
    seconds = trained(pipe, cell, bench, place(bench.work, "runs", name, seed), seed)
    print(f"{name}, seed {seed}: trained in {seconds:.0f} s of computing", flush=True)
    found, schedulers = [], samplers(scheduler_of(cell.learns()))
    for sampler, steps, guidance in calls(bench.numbers_of_steps):
        if sampler in schedulers:
            pipe.register_modules(scheduler=schedulers[sampler])
            found.append({"sampler": sampler, **measured(pipe, bench, seed, steps, guidance)})
    result = {
        "cell": name,
        "seed": seed,
        "parameters": parameters(pipe),
        "seconds": seconds,
        "measured": found,
        "identity": identity,
    }
    store(path, result)
    return result


def collected(work: Path, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """All results below a folder, by cell, in the order of seeds and times."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in work.glob("cells/*/seed-*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["cell"], []).append(result)
    return {
        name: sorted(found[name], key=lambda result: (result["seed"], result.get("after", 0)))
        for name in names
        if name in found
    }


def arguments_of(description: str | None, cells: Sequence[str], work: str, results: Path) -> argparse.ArgumentParser:
    """The options that the benchmarks of claims share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=list(cells), default=list(cells), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--data", type=Path, help="folder of `hubgen data emoji`; built in the cache if not given")
    parser.add_argument("--work", type=Path, default=Path(work), help="where the cells are kept (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=results, help="folder of the results (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=512, help="that are measured a cell (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    return parser


def bench_of(arguments: argparse.Namespace, **changes: Any) -> Bench:
    """What the options say."""
    torch.set_num_threads(arguments.threads)
    data, vae = arguments.data or default_data(), default_model() / "vae"
    return Bench(data, arguments.work, vae, pictures=arguments.pictures, **changes)


def ends(bench: Bench) -> dict[str, Any]:
    """Where the measure begins and ends; kept in `work`."""
    path = bench.work / "ends.json"
    identity = {name: bench.identity()[name] for name in ("size", "pictures")}
    found = stored(path, identity)
    if found is None:
        found = bench.yardstick.ends(load_autoencoder(bench.autoencoder).eval()) | {"identity": identity}
        store(path, found)
    return found


def stoppable(main: Callable[[], None]) -> None:
    """Runs a benchmark that a signal may end after a step of its training."""
    try:
        main()
    except Interrupted as stop:
        sys.exit(f"stopped: {stop}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and stores all."""
    parser = arguments_of(__doc__, list(CELLS), "runs/formulations", RESULTS)
    parser.add_argument("--steps", type=int, default=1800, help="of each training (default: %(default)s)")
    arguments = parser.parse_args(argv)
    bench, results = bench_of(arguments, steps=arguments.steps), arguments.output / "formulations.json"
    lay_out(results, bench.work)
    check_sizes(
        {
            name: parameters(untrained(CELLS[name].network, load_autoencoder(bench.autoencoder), bench))
            for name in ("rf/lognorm(0,1)", *NETWORKS)
        }
    )
    reference = ends(bench)
    for seed in arguments.seeds:  # all cells of a seed first, so that an early end leaves comparisons
        for name in arguments.cells:
            print(f"{name}, seed {seed}", flush=True)
            run_cell(name, CELLS[name], seed, bench)
            cells = collected(bench.work, list(CELLS))
            content = {"cells": cells, "ends": reference, "environment": report.environment()}
            store(results, content)
    print(f"stored in {arguments.output}; `python -m tests.benchmarks.claims` makes the page")


if __name__ == "__main__":
    stoppable(main)
