"""A training step of hubgen beside one of diffusers' recipes, on the same weights, pictures, times and noise, in turns.

    python -m tests.benchmarks.training [--rows NAME ...] [--pairs N] [--data DIR] [--output DIR]

The whole step of the bundled model on real emoji: pictures read, encoded and captioned at each step (live), or from
the cache (cached; diffusers' recipes have to encode). And the step of a backbone alone, forward, backward and
optimizer, for each family: tiny, where overhead counts, and one block of full width, where arithmetic does. Losses
agree to 1e-4 before anything is timed. diffusers' side is its classes in the order of its example scripts, whose own
data pipelines want torchvision.

Stored: training.json and training.md.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

import hubgen
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.conditioning.prompts import OneEncoder
from hubgen.data.captions import Captions
from hubgen.data.encoded import LatentSource, TextSource
from hubgen.data.image_folder import ImageTextFolder
from hubgen.data.order import EndlessRow, generator_of
from hubgen.data.views import Views
from hubgen.paths.path import RectifiedFlowPath
from hubgen.paths.timesteps import LogitNormalDensity
from hubgen.schedulers.objective import Objective
from tests import models
from tests.benchmarks import report
from tests.benchmarks.inference import interleaved, machine, summary

RESULTS = Path(__file__).parent / "results" / "training"
BATCH = 64
LEAST = {"emoji-64, live": 1.2, "emoji-64, cached": 4.0}
"""What is asked of diffusers' time over hubgen's; 0.97 of all others"""

Side = Callable[[], float]


def optimized(module: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """AdamW as the scripts of each library make it; the rate is 0, so that all steps are of the same weights."""
    return torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0, fused=fused or None)


def moved(module: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    """Backward, clipping and the optimizer's step; the loss."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# ---------------------------------------------------------------------------------------------------------------------
# The whole step


class Emoji:
    """The bundled model's training on pictures of a folder."""

    def __init__(self, data: Path, cache: Path) -> None:
        folder = hubgen.bundled_model()
        self.pipe = hubgen.TextToImagePipeline.from_pretrained(folder)
        for module in (self.pipe.vae, self.pipe.text_encoder, self.pipe.transformer):
            module.float().requires_grad_(False)
        self.backbone = self.pipe.transformer.requires_grad_(True).train()
        # A bundled average is a trained one, whose loss is far from that of random weights; the time is the same.
        self.theirs = diffusers.SD3Transformer2DModel.from_config(self.backbone.config).train()
        self.theirs.load_state_dict(self.backbone.state_dict())
        self.their_vae = diffusers.AutoencoderKL.from_config(self.pipe.vae.config).eval().requires_grad_(False)
        self.their_vae.load_state_dict(self.pipe.vae.state_dict())
        self.pictures = ImageTextFolder(data, split="train")
        self.views = Views(self.pictures.sizes, self.pictures.digests, [(64, 64)])
        self.row = EndlessRow(self.views.buckets, BATCH, seed=0)
        self.captions = Captions(self.pictures.captions, variants=0.5, dropout=0.1)
        self.objective = Objective(RectifiedFlowPath(), LogitNormalDensity())
        self.cache = cache
        self.step = 0

    def ours(self, cached: bool) -> Side:
        """hubgen's step, by what its script is composed of."""
        cache = self.cache if cached else None
        condition = OneEncoder((self.pipe.text_encoder,), (self.pipe.tokenizer,))
        latents = LatentSource(self.pipe.vae, self.pictures, self.views, 0, cache)
        texts = TextSource(condition, self.captions.all(), cache)
        latents.fill()
        texts.fill()
        optimizer = optimized(self.backbone, fused=True)

        def once() -> float:
            draws = self.row.draws(self.step)
            x_0 = latents.latents(latents.read(draws), draws, torch.device("cpu"))
            words = [self.captions.drawn(0, draw.place, draw.row) for draw in draws]
            sample = self.objective.draw(x_0, [generator_of(0, draw.place) for draw in draws])
            embedded = Condition.of_text(texts(words, torch.device("cpu")))
            prediction = predict(self.backbone, sample.x_t, self.objective.timestep(sample), embedded)
            return moved(self.backbone, optimizer, self.objective.loss(prediction, sample).mean())

        return once

    def diffusers(self) -> Side:
        """diffusers' step, in the order of its example for SD3."""
        optimizer, text = optimized(self.theirs, fused=False), self.pipe.text_encoder
        config = self.their_vae.config

        def once() -> float:
            draws = self.row.draws(self.step)
            # The same draws as ours, made outside of what is compared: both sides pay for them.
            drawn = [generator_of(0, draw.place) for draw in draws]
            t = torch.cat([self.objective.density.sample(1, generator=one) for one in drawn])
            noise = torch.stack([torch.randn(16, 8, 8, generator=one) for one in drawn])
            of_posterior = [generator_of(0, draw.place, "posterior") for draw in draws]
            posterior = torch.stack([torch.randn(16, 8, 8, generator=one) for one in of_posterior])
            words = [self.captions.drawn(0, draw.place, draw.row) for draw in draws]

            names = [self.pictures.folder / self.pictures.file_names[draw.row] for draw in draws]
            arrays = [np.array(Image.open(name).convert("RGB")) for name in names]
            pixels = torch.stack([torch.from_numpy(a).permute(2, 0, 1).float() / 127.5 - 1 for a in arrays])
            with torch.no_grad():
                encoded = self.their_vae.encode(pixels).latent_dist
                x_0 = encoded.mean + encoded.std * posterior
                x_0 = (x_0 - config.shift_factor) * config.scaling_factor
                tokens = self.pipe.tokenizer(
                    words, padding="max_length", truncation=True, return_tensors="pt", max_length=20
                )
                states = text(**tokens).last_hidden_state
                mask = tokens["attention_mask"].bool()[..., None]
                states = states.masked_fill(~mask, 0.0)
                pooled = states.sum(1) / mask.sum(1)
            sigma = t.view(-1, 1, 1, 1)
            noisy = (1 - sigma) * x_0 + sigma * noise
            prediction = self.theirs(
                noisy, timestep=1000 * t, encoder_hidden_states=states, pooled_projections=pooled, return_dict=False
            )[0]
            loss = (prediction - (noise - x_0)).square().mean()
            return moved(self.theirs, optimizer, loss)

        return once


# ---------------------------------------------------------------------------------------------------------------------
# The step of a backbone

WIDE: dict[str, dict[str, Any]] = {
    "SD 1.x": {
        "block_out_channels": (320,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "norm_num_groups": 32,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "sample_size": 32,
    },
    "SDXL": {
        "block_out_channels": (640,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "transformer_layers_per_block": 1,
        "norm_num_groups": 32,
        "attention_head_dim": 10,
        "cross_attention_dim": 2048,
        "sample_size": 16,
    },
    "SD 3": {
        "num_layers": 1,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "sample_size": 32,
        "pos_embed_max_size": 32,
    },
    "FLUX.1 dev": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": (16, 56, 56),
    },
}


def backbone_step(name: str, wide: bool) -> tuple[Side, Side]:
    """The steps of both libraries on the same inputs: forward, backward, clipping, AdamW."""
    changes = WIDE[name] if wide else {}
    ours, theirs = models.NETWORKS[name].pair(**changes)
    size = ((changes["sample_size"],) * 2,) if "sample_size" in changes else ()
    inputs = models.NETWORKS[name].inputs(*size, **changes)
    target = torch.randn_like(theirs(**inputs, return_dict=False)[0])

    def side(module: nn.Module, fused: bool) -> Side:
        module.train().requires_grad_(True)
        optimizer = optimized(module, fused)
        return lambda: moved(module, optimizer, (module(**inputs, return_dict=False)[0] - target).square().mean())

    return side(ours, True), side(theirs, False)


# ---------------------------------------------------------------------------------------------------------------------


def compare(ours: Side, theirs: Side, pairs: int) -> dict[str, Any]:
    """Seconds of both and how often hubgen's step fits into diffusers', after their losses agreed."""
    found, expected = ours(), theirs()
    if abs(found - expected) > 1e-4 * max(1.0, abs(expected)):
        raise ValueError(f"losses differ: {found} and {expected}")
    seconds = interleaved({"hubgen": ours, "diffusers": theirs}, pairs, time.perf_counter)
    ratios = [theirs_ / ours_ for ours_, theirs_ in zip(seconds["hubgen"], seconds["diffusers"], strict=True)]
    return {
        "loss": {"hubgen": found, "diffusers": expected},
        "seconds": {side: summary(values) for side, values in seconds.items()},
        "speedup": summary(ratios),
    }


def names() -> list[str]:
    """Of all rows."""
    return [*LEAST, *(f"{name}, {kind}" for name in WIDE for kind in ("tiny", "one block of full width"))]


def measure(name: str, pairs: int, data: Path, cache: Path) -> dict[str, Any]:
    """A row."""
    if name.startswith("emoji"):
        emoji = Emoji(data, cache)
        return compare(emoji.ours("cached" in name), emoji.diffusers(), pairs)
    family, _, kind = name.partition(", ")
    return compare(*backbone_step(family, kind != "tiny"), pairs)


def to_markdown(results: dict[str, dict[str, Any]], where: dict[str, str]) -> str:
    """The results as a page."""
    rows = []
    for name, result in results.items():
        speed, asked = result["speedup"], LEAST.get(name, 0.97)
        ours, theirs = (result["seconds"][side]["median"] for side in ("hubgen", "diffusers"))
        cells = [f"{theirs:.3g}", f"{ours:.3g}", f"**{speed['median']:.2f}** ({speed['min']:.2f}-{speed['max']:.2f})"]
        rows.append([name, *cells, f"{asked:g}", "yes" if speed["median"] >= asked else "no"])
    header = ["step", "diffusers, s", "hubgen, s", "diffusers / hubgen (least-largest)", "asked", "reached"]
    return (
        "# Training steps\n\nWritten by `python -m tests.benchmarks.training`: float32, in one process, in turns, the "
        "median of the pairs.\n\n"
        f"{report.markdown_table(header, rows)}\nMachine: {', '.join(f'{k} {v}' for k, v in where.items())}.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--data", type=Path, help="folder of `hubgen data emoji`; built in the cache if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    arguments = parser.parse_args(argv)

    from tests.benchmarks.bundled_model import default_data

    data = arguments.data or default_data()
    stored = arguments.output / "training.json"
    results = json.loads(stored.read_text(encoding="utf-8"))["results"] if stored.is_file() else {}
    with tempfile.TemporaryDirectory() as cache:
        for name in arguments.rows:
            results[name] = measure(name, arguments.pairs, data, Path(cache))
            print(name, {key: round(value, 3) for key, value in results[name]["speedup"].items()}, flush=True)
            results = {row: results[row] for row in names() if row in results}
            content = {"results": results, "machine": machine("cpu"), "environment": report.environment()}
            report.write_json(stored, content)
            report.write_text(arguments.output / "training.md", to_markdown(results, machine("cpu")))


if __name__ == "__main__":
    main()
