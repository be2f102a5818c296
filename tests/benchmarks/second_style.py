"""Does an adapter teach the bundled model a second style? Noto's emoji, on a model that knows Fluent's.

    python -m tests.benchmarks.second_style [--fluent DIR] [--noto DIR] [--output DIR] [--work DIR] [--adapter FILE]

`training/recipes/lora-emoji-noto.yaml` is trained on Noto's training pictures (resumable, in `--work`), or a file is
given. Then the base and the adapter draw the captions that are held out in both styles, from the same seeds:

- *Nearer to Noto*: the share of pictures whose layout features (measures.py) are nearer to the real Noto picture of
  their caption than to the real Fluent one. Beside it the real Noto pictures through the autoencoder, and real ones
  that were learnt from: any of them, and of each caption the one whose words are most alike.
- *Retrieval*: how often one of the five nearest real Noto pictures bears the caption asked for.

What was chosen for the recipe was chosen by a validation split that was taken out of the training pictures.

Stored: second_style.json, second_style.md, and pictures: second_style.png has for each caption the base's, the
adapter's and the real Noto picture.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import hubgen
from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.data.image_folder import ImageTextFolder
from hubgen.hub.bundled import bundled_model
from tests.benchmarks import measures, report
from tests.benchmarks.bundled_model import RealPictures, choose, generate, measure_retrieval

RESULTS = Path(__file__).parent / "results" / "second_style"
RECIPE = Path(__file__).parents[2] / "training" / "recipes" / "lora-emoji-noto.yaml"
SEEDS = (0, 1000, 2000, 3000)
MOST_PARAMETERS = 1_000_000
ASKED = 0.8
BATCH = 32


def hexcodes(folder: Path, split: str) -> list[str]:
    """What tells the emoji of a split, in its order."""
    lines = (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["hexcode"] for line in lines]


def paired(fluent: Path, noto: Path) -> tuple[RealPictures, torch.Tensor]:
    """The Noto pictures whose captions are held out in both styles, and the Fluent ones of the same emoji."""
    codes = {style: hexcodes(folder, "test") for style, folder in (("fluent", fluent), ("noto", noto))}
    known = set(hexcodes(fluent, "train"))
    rows = [row for row, code in enumerate(codes["noto"]) if code in codes["fluent"] and code not in known]
    data = ImageTextFolder(noto, split="test", size=64)
    others = ImageTextFolder(fluent, split="test", size=64)
    real = RealPictures(data.load_pixels(rows), [data.captions[row] for row in rows])
    return real, others.load_pixels([codes["fluent"].index(codes["noto"][row]) for row in rows])


def nearer(features: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """(N,) bool: whether picture n is more like number n of `ours` than of `theirs`; all are unit vectors (N, D)."""
    return (features * ours).sum(1) > (features * theirs).sum(1)


def most_alike(captions: Sequence[str], known: Sequence[str]) -> list[int]:
    """Of each caption the number of the known one that shares the largest part of their words (Jaccard's index)."""
    words = [set(re.findall(r"\w+", text.lower())) for text in known]

    def alike(own: set[str], other: set[str]) -> float:
        return len(own & other) / len(own | other)

    asked = [set(re.findall(r"\w+", text.lower())) for text in captions]
    return [max(range(len(words)), key=lambda number: alike(own, words[number])) for own in asked]


def train(noto: Path, work: Path) -> Path:
    """The adapter's file."""
    command = [sys.executable, "-m", "hubgen.training.train_lora", "--config", str(RECIPE)]
    subprocess.run([*command, "--data.source", str(noto), "--run.output_dir", str(work / "noto")], check=True)
    return work / "noto" / "lora" / "pytorch_lora_weights.safetensors"


def seconds_of(run: Path) -> float | None:
    """The time that a run's steps took, by its own measure; `None` where its metrics are not at hand."""
    metrics, settings = run / "metrics.jsonl", run / "lora" / "training.json"
    if not metrics.is_file() or not settings.is_file():
        return None
    batch = json.loads(settings.read_text(encoding="utf-8"))["settings"]["run"]["batch_size"]
    seconds, last = 0.0, 0
    for row in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
        if "images_per_second" in row:
            seconds += (row["step"] - last) * batch / row["images_per_second"]
            last = row["step"]
    return seconds


def measured(pipeline: Any, adapter: Path, fluent: Path, noto: Path, output: Path) -> dict[str, Any]:
    """Rates of the base and of the adapter."""
    network = EfficientNetLite0.from_pretrained()
    real, fluents = paired(fluent, noto)
    own, others = (measures.describe(network, pixels, BATCH)["layout"] for pixels in (real.pixels, fluents))
    test = RealPictures.from_folder(noto, "test", 64)
    test_features = measures.describe(network, test.pixels, BATCH)
    rows = choose(100, len(test), seed=0)
    asked = [test.texts[row] for row in rows]
    rebuilt = measures.reconstruct(pipeline.vae, real.pixels, BATCH)
    ceiling = nearer(measures.describe(network, rebuilt, BATCH)["layout"], own, others)
    learnt = RealPictures.from_folder(noto, "train", 64)
    features = measures.describe(network, learnt.pixels, BATCH)["layout"]
    alike = features[most_alike(real.texts, learnt.texts)]
    results: dict[str, Any] = {
        "captions": len(real),
        "seeds": len(SEEDS),
        "through_autoencoder": ceiling.float().mean().item(),
        "any_other": (features @ own.T > features @ others.T).float().mean().item(),
        "most_alike_caption": nearer(alike, own, others).float().mean().item(),
    }
    shown: list[torch.Tensor] = []
    for name in ("base", "adapter"):
        if name == "adapter":
            pipeline.load_lora_weights(adapter)
        found = []
        for seed in SEEDS:
            drawn = generate(pipeline, real.texts, seed, BATCH, f"{name}, seed {seed}")
            found.append(nearer(measures.describe(network, drawn, BATCH)["layout"], own, others))
            if seed == SEEDS[0]:
                shown.append(drawn)
        hits = torch.stack(found)
        results[name] = measures.Rate(hits.sum().item(), hits.numel()).as_dict()
        results[name]["by_seed"] = hits.float().mean(1).tolist()
        drawn = generate(pipeline, asked, SEEDS[0], BATCH, f"{name}, retrieval")
        through = measures.reconstruct(pipeline.vae, test.pixels[rows], BATCH)
        results[name]["retrieval"] = measure_retrieval(network, drawn, through, asked, test, test_features, BATCH)
    report.draw_grid([*shown, real.pixels], real.texts, output / "second_style.png", columns=6)
    few = list(range(0, len(real), max(len(real) // 12, 1)))[:12]
    report.draw_grid(
        [*(one[few] for one in shown), real.pixels[few]],
        [real.texts[row] for row in few],
        output / "few.png",
        columns=6,
    )
    return results


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    rows = []
    for name in ("base", "adapter"):
        rate, retrieval = results[name], results[name]["retrieval"]["layout"]
        low, high = rate["interval_95"]
        rows.append(
            [
                name,
                f"**{report.percent(rate['rate'])}** ({report.percent(low)} to {report.percent(high)})",
                report.percent(retrieval["generated"]["rate"]),
            ]
        )
    rows.append(
        [
            "real Noto through the autoencoder",
            report.percent(results["through_autoencoder"]),
            report.percent(results["adapter"]["retrieval"]["layout"]["ceiling_reconstructions"]["rate"]),
        ]
    )
    rows.append(["any real Noto picture that was learnt from", report.percent(results["any_other"]), ""])
    rows.append(["... that of the caption most alike", report.percent(results["most_alike_caption"]), ""])
    table = report.markdown_table(
        ["pictures", "nearer to Noto than to Fluent (95 %)", "caption among the five nearest of Noto"], rows
    )
    reached = "reached" if results["adapter"]["rate"] >= ASKED else "not reached"
    minutes = "" if results["seconds"] is None else f", trained in {results['seconds'] / 60:.1f} minutes"
    return (
        "# A second style\n\n"
        f"Written by `python -m tests.benchmarks.second_style`: {results['captions']} captions held out in both "
        f"styles, {results['seeds']} seeds each; an adapter of {results['parameters']:,} numbers{minutes}. Asked were "
        f"{report.percent(ASKED)}: {reached}.\n\n"
        f"{table}\n"
        "![base, adapter, Noto](few.png)\n\nOf each caption the base's, the adapter's and the real Noto picture; "
        "[all of them](second_style.png).\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fluent", type=Path, default=Path("data/fluent"), help="built by `hubgen data emoji`")
    parser.add_argument(
        "--noto", type=Path, default=Path("data/noto"), help="built by `hubgen data emoji --style noto`"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=None, help="where the run is, so that it can go on")
    parser.add_argument("--adapter", type=Path, default=None, help="a file that is measured, instead of a run")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        adapter = arguments.adapter or train(arguments.noto, arguments.work or Path(temporary))
        seconds = seconds_of(adapter.parent.parent)
        parameters = sum(tensor.numel() for tensor in load_file(adapter).values())
        if parameters > MOST_PARAMETERS:
            raise ValueError(f"{adapter}: got {parameters:,} numbers, expected at most {MOST_PARAMETERS:,}.")
        pipeline = hubgen.TextToImagePipeline.from_pretrained(bundled_model())
        results = measured(
            pipeline.to(dtype=torch.float32), adapter, arguments.fluent, arguments.noto, arguments.output
        )
    results |= {"parameters": parameters, "seconds": seconds, "environment": report.environment()}
    report.write_json(arguments.output / "second_style.json", results)
    report.write_text(arguments.output / "second_style.md", to_markdown(results))
    print(to_markdown(results))


if __name__ == "__main__":
    main()
