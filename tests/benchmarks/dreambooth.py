"""Does DreamBooth teach the bundled model a subject, and does it keep the class?

    python -m tests.benchmarks.dreambooth [--output DIR] [--work DIR]

The subject is a creature that no emoji shows, drawn here in four poses. `training/recipes/dreambooth-emoji.yaml` is run
twice (resumable, in `--work`), with the pictures of the class and without. Then, for the base and both:

- *The subject's loss*: on its four pictures with their words, at fixed times and noise.
- *Drift of the class's loss*: the same on 64 pictures that the base drew of the class, from seeds that no run saw.
- *Drift of its pictures*: distance of layout features (measures.py), 1 - cosine, of pictures of the class from the same
  64 seeds.

Stored: dreambooth.json, dreambooth.md, and pictures: subject.png, contexts.png (the base's words beside the subject's
in new contexts).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import hubgen
from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.autoencoders.latents import normalised, posterior
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.data.order import generator_of
from hubgen.hub.bundled import bundled_model
from hubgen.schedulers.objective import objective_of
from hubgen.training.kit.held_out import TIMES
from tests.benchmarks import measures, report
from tests.benchmarks.bundled_model import generate

RESULTS = Path(__file__).parent / "results" / "dreambooth"
RECIPE = Path(__file__).parents[2] / "training" / "recipes" / "dreambooth-emoji.yaml"
INSTANCE, CLASS = "a zog monster", "a monster"
CONTEXTS = ("a green {}", "a {} on a red heart", "a {} with a santa hat")
PICTURES = 64
FIRST_SEED = 10_000
DRAWS = 4
"""Noise drawn for each picture and time"""
LEAST_FALL, MOST_DRIFT = 0.3, 0.5
SIDE, SCALE = 64, 8


def subject(pose: int) -> Image.Image:
    """A round creature with one eye, two feelers and a yellow belly; 0 to 3: standing, waving, tilted, small."""
    picture = Image.new("RGB", (SIDE * SCALE,) * 2, "white")
    pen = ImageDraw.Draw(picture)

    def box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        return tuple(SCALE * n for n in (x - width / 2, y - height / 2, x + width / 2, y + height / 2))  # type: ignore

    lift = -9 if pose == 1 else 6
    for side in (-1, 1):
        pen.line([SCALE * n for n in (32 + 6 * side, 20, 32 + 11 * side, 8)], fill="#e8742a", width=2 * SCALE)
        pen.ellipse(box(32 + 11 * side, 8, 6, 6), fill="#e8742a")
        pen.line([SCALE * n for n in (32 + 15 * side, 36, 32 + 25 * side, 36 + lift)], fill="#0e8f87", width=4 * SCALE)
        pen.ellipse(box(32 + 8 * side, 57, 12, 7), fill="#7a3db8")
    pen.ellipse(box(32, 37, 38, 38), fill="#14b8ac")
    pen.ellipse(box(32, 45, 20, 17), fill="#f7d038")
    pen.ellipse(box(32, 29, 17, 17), fill="white")
    look = {0: 0, 1: 0, 2: 3, 3: -3}[pose]
    pen.ellipse(box(32 + look, 29, 8, 8), fill="#222222")
    pen.arc(box(32, 41, 12, 7), 20, 160, fill="#222222", width=SCALE)
    if pose == 2:
        picture = picture.rotate(14, Image.Resampling.BICUBIC, fillcolor="white")
    if pose == 3:
        small = picture.resize((SIDE * SCALE * 3 // 4,) * 2, Image.Resampling.LANCZOS)
        picture = Image.new("RGB", picture.size, "white")
        picture.paste(small, (SIDE * SCALE // 8, SIDE * SCALE // 5))
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def as_pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    return measures.to_pixels(np.stack([np.asarray(picture) / 255 for picture in pictures]))


@torch.no_grad()
def loss_of(pipeline: Any, pixels: torch.Tensor, prompt: str) -> float:
    """The mean loss on pictures that are told a prompt, at `TIMES` and fixed noise."""
    objective = objective_of(pipeline.scheduler)
    latents = normalised(posterior(pipeline.vae, pixels)[0], pipeline.vae)
    text = Condition.of_text(pipeline.condition.encode([prompt]))
    condition = text.repeat(len(latents))
    found = []
    for draw in range(DRAWS):
        for time_of in TIMES:
            generators = [generator_of(0, row, f"fixed noise {draw} {time_of}") for row in range(len(latents))]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators])
            sample = objective.path.sample(latents, noise, torch.full((len(latents),), time_of))
            prediction = predict(pipeline.backbone, sample.x_t, objective.timestep(sample), condition)
            found.append(objective.loss(prediction, sample).mean())
    return torch.stack(found).mean().item()


def train(name: str, pictures: Path, work: Path, *options: str) -> tuple[Path, float]:
    """A run's adapter and its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "hubgen.training.train_dreambooth", "--config", str(RECIPE)]
    command += ["--data.source", str(pictures), "--run.output_dir", str(work / name), *options]
    subprocess.run(command, check=True)
    return work / name / "lora", time.perf_counter() - began


def measured(adapters: dict[str, Path], output: Path) -> dict[str, Any]:
    """Losses and drifts of the base and of each adapter."""
    network = EfficientNetLite0.from_pretrained()
    pipeline = hubgen.TextToImagePipeline.from_pretrained(bundled_model()).to(dtype=torch.float32)
    own = as_pixels([subject(pose) for pose in range(4)])
    results: dict[str, Any] = {}
    rows = []
    for name in ("base", *adapters):
        if name != "base":
            pipeline.load_lora_weights(adapters[name], adapter_name=name)
        pictures = generate(pipeline, [CLASS] * PICTURES, FIRST_SEED, 32, f"{name}, class")
        if name == "base":
            classes, layout = pictures, measures.describe(network, pictures)["layout"]
        features = measures.describe(network, pictures)["layout"]
        results[name] = {
            "subject_loss": loss_of(pipeline, own, INSTANCE),
            "class_loss": loss_of(pipeline, classes, CLASS),
            "layout_distance": (1 - (features * layout).sum(1)).mean().clamp(min=0).item(),
        }
        words = INSTANCE.removeprefix("a ")
        asked = [INSTANCE, CLASS, *(context.format(words) for context in CONTEXTS)]
        rows.append(generate(pipeline, asked, 0, 8, f"{name}, contexts"))
        if name != "base":
            pipeline.delete_adapters(name)
    report.draw_grid([own], ["the subject", "waving", "tilted", "small"], output / "subject.png", columns=4)
    report.draw_grid(rows, asked, output / "contexts.png", columns=3)
    return results


def verdicts(results: dict[str, Any]) -> dict[str, float]:
    """What is asked, as ratios."""
    base, tuned, bare = (results[name] for name in ("base", "with class pictures", "without"))
    return {
        "fall of the subject's loss": 1 - tuned["subject_loss"] / base["subject_loss"],
        "drift of the class's loss": (tuned["class_loss"] - base["class_loss"])
        / (bare["class_loss"] - base["class_loss"]),
        "drift of its pictures": tuned["layout_distance"] / bare["layout_distance"],
    }


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    rows = [
        [name, *(f"{results[name][key]:.4f}" for key in ("subject_loss", "class_loss", "layout_distance"))]
        for name in ("base", "with class pictures", "without")
    ]
    table = report.markdown_table(["model", "subject's loss", "class's loss", "distance of the class's pictures"], rows)
    found = verdicts(results)
    fall = found["fall of the subject's loss"]
    lines = [f"- The subject's loss falls by {report.percent(fall)} (asked: {report.percent(LEAST_FALL)} at least)."]
    for name in ("drift of the class's loss", "drift of its pictures"):
        lines.append(
            f"- The {name} is {report.percent(found[name])} of that without class pictures "
            f"(asked: {report.percent(MOST_DRIFT)} at most)."
        )
    minutes = ", ".join(f"{seconds / 60:.1f}" for seconds in results["seconds"].values())
    return (
        "# A subject\n\n"
        f"Written by `python -m tests.benchmarks.dreambooth`; the runs took {minutes} minutes.\n\n{table}\n"
        + "\n".join(lines)
        + "\n\n![the subject](subject.png)\n\nOf each prompt the base's picture, the subject's, and that of the run "
        "without class pictures:\n\n![contexts](contexts.png)\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=None, help="where the runs are, so that they can go on")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        pictures = work / "subject"
        pictures.mkdir(parents=True, exist_ok=True)
        for pose in range(4):
            subject(pose).save(pictures / f"{pose}.png")
        prior = ["--instance.prompt", INSTANCE, "--prior.prompt", CLASS]
        tuned, first = train("with", pictures, work, *prior)
        bare, second = train("without", pictures, work, *prior, "--prior.weight", "0")
        results = measured({"with class pictures": tuned, "without": bare}, arguments.output)
    results |= {"seconds": {"with": first, "without": second}, "environment": report.environment()}
    report.write_json(arguments.output / "dreambooth.json", results)
    report.write_text(arguments.output / "dreambooth.md", to_markdown(results))
    print(to_markdown(results))


if __name__ == "__main__":
    main()
