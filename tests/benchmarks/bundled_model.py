"""How good is a text-to-image model of emoji: does it draw what it is asked for, also in words that it never saw?

    python -m tests.benchmarks.bundled_model [--model DIR] [--data DIR] [--split NAME] [--output DIR]

Measured, with default settings of the pipeline:

- *Retrieval*: how often one of the five real pictures nearest to a generated one bears the caption asked for, for 200
  training captions against the training pictures and 100 held-out captions against the held-out pictures. Beside it
  chance, the same pictures with shuffled captions, and the ceiling: the real pictures through the autoencoder.
- *Colour words*: how often a colour that the caption names shows in the pixels; beside it real pictures and, as
  control, the colours of the other captions. Also for held-out *combinations*: a colour and an object, both known, that
  no training caption has together; whether the object shows too is told by retrieval.
- *Variety*: how far apart eight pictures of one caption are, as a part of the distance between captions; and whether
  they cover different real pictures, where a caption has several.
- *Autoencoder*: PSNR and perceptual distance on the held-out pictures, also with weights rounded to float16.
- *Time*: `hubgen generate` from start to file.

Real pictures are the emoji as drawn; variants of them (see `hubgen data emoji`) count where that is said. What is tuned
is tuned with `--split validation`; the split "test" is for the figures that are stored.

The measures are defined in measures.py. Stored: bundled_model.json, bundled_model.md, and grids of real and generated
pictures, train.png, held_out.png, combinations.png and reconstruction.png; variety.png has eight seeds a caption.
"""

import argparse
import copy
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.autoencoders.perceptual import PerceptualLoss
from hubgen.data.colours import colour_shares, colour_words
from hubgen.data.image_folder import ImageTextFolder
from hubgen.hub.card import replace_section
from tests.benchmarks import measures, report

RESULTS = Path(__file__).parent / "results" / "bundled_model"
NEIGHBOURS = 5
AS_DRAWN, MIRRORED, FRAME, RECOLOURED = "", "mirrored", "frame", "recoloured"
ANOTHER_VIEW = (AS_DRAWN, MIRRORED, FRAME)
"""Variants that show the same thing under the same caption."""
TEST = "test"
REAL_CAPTIONS = 200
"""Captions with several real pictures that are looked at, at most."""
APART = 0.4
"""Two real pictures of a caption are clearly apart from this part of the mean distance between captions on. A blur of
3x3 pixels moves 95 % of the emoji by less than 0.37, a shift of two pixels by less than 0.13."""
PROMPT = "a smiling cat"
TIMED_RUNS = 3


@dataclass(frozen=True)
class RealPictures:
    """One split of the data."""

    pixels: torch.Tensor
    """(N, 3, H, W) in [-1, 1]"""
    captions: list[list[str]]
    """Wordings of each picture's caption, the first is its name"""
    variants: list[str] = field(default_factory=list)
    """What each picture is of its emoji, "" for the emoji as drawn; none at all where every picture is that"""

    @classmethod
    def from_folder(cls, folder: Path, split: str, size: int, variants: Sequence[str] | None = None) -> "RealPictures":
        """The pictures of a split; of some variants only, if given. A row without a variant is an emoji as drawn."""
        dataset = ImageTextFolder(folder, split=split, size=size, columns=("variant",))
        found = [variant or AS_DRAWN for variant in dataset.columns["variant"]]
        rows = [row for row, variant in enumerate(found) if variants is None or variant in variants]
        captions = [dataset.captions[row] for row in rows]
        return cls(dataset.load_pixels(rows), captions, [found[row] for row in rows])

    def only(self, *variants: str) -> "RealPictures":
        """Those of these variants."""
        known = self.variants or [AS_DRAWN] * len(self)
        rows = [row for row, variant in enumerate(known) if variant in variants]
        return RealPictures(self.pixels[rows], [self.captions[row] for row in rows], [known[row] for row in rows])

    def and_then(self, others: "RealPictures") -> "RealPictures":
        """These and, after them, the others; what variants they are is not kept."""
        return RealPictures(torch.cat([self.pixels, others.pixels]), self.captions + others.captions)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def texts(self) -> list[str]:
        return [captions[0] for captions in self.captions]


def choose(count: int, among: int, seed: int) -> list[int]:
    """`count` different indices below `among`, in increasing order; all of them where there are not more."""
    order = torch.randperm(among, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[:count])


def generate(
    pipeline: Any, captions: Sequence[str], seed: int, batch_size: int, label: str, **settings: Any
) -> torch.Tensor:
    """A picture a caption, (N, 3, H, W) in [-1, 1]; picture n starts from seed + n, whatever the batch size."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in tqdm(range(0, len(captions), batch_size), desc=f"generating {label}"):
        batch = list(captions[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(batch))]
        images = pipeline(batch, generator=generators, output_type="np", **settings).images
        pictures.append(measures.to_pixels(images))
    return torch.cat(pictures)


def measure_retrieval(
    network: EfficientNetLite0,
    generated: torch.Tensor,
    reconstructed: torch.Tensor,
    captions: Sequence[str],
    real: RealPictures,
    real_features: dict[str, torch.Tensor],
    batch_size: int,
) -> dict[str, Any]:
    """Rates of one set of captions; `reconstructed`: the real pictures of these captions through the autoencoder."""
    features, ceiling = (measures.describe(network, pictures, batch_size) for pictures in (generated, reconstructed))
    result: dict[str, Any] = {
        "captions": len(captions),
        "real_pictures": len(real),
        "chance": measures.chance_of_caption(real.captions, captions, NEIGHBOURS),
    }
    for name in features:
        rates: dict[str, Any] = {}
        for key, query in (("generated", features[name]), ("reconstructed", ceiling[name])):
            found = measures.found_captions(query, real_features[name], real.captions, captions, NEIGHBOURS)
            rates[key], rates[f"{key}_shuffled"] = measures.asked_and_shuffled(found)
        result[name] = {
            "generated": rates["generated"].as_dict(),
            "shuffled_captions": rates["generated_shuffled"],
            "ceiling_reconstructions": rates["reconstructed"].as_dict(),
        }
    return result


def measure_colours(
    real: RealPictures, generated: torch.Tensor, captions: Sequence[str], threshold: float
) -> dict[str, Any]:
    """Colour words of `captions` in the generated pictures, and those of the real captions in the real pictures."""
    result: dict[str, Any] = {"threshold": threshold}
    sets = {"real": (real.pixels, real.texts), "generated": (generated, list(captions))}
    for name, (pixels, texts) in sets.items():
        rate, control = measures.colours_shown(colour_shares(pixels), texts, threshold)
        result[name] = {**rate.as_dict(), "shuffled_captions": control}
    return result


def measure_autoencoder(
    vae: Any, perceptual: PerceptualLoss, pictures: torch.Tensor, batch_size: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Reconstruction of `pictures` in float32, and with weights rounded to float16 (computed in float32)."""
    halved = copy.deepcopy(vae).half().float()
    result: dict[str, Any] = {"pictures": len(pictures)}
    for name, model in (("float32", vae), ("float16_weights", halved)):
        rebuilt = measures.reconstruct(model, pictures, batch_size)
        decibels = measures.psnr(rebuilt, pictures)
        distances = measures.in_batches(perceptual, rebuilt, pictures, batch_size)
        result[name] = {
            "psnr_db": decibels.mean().item(),
            "psnr_db_worst": decibels.min().item(),
            "perceptual_distance": distances.mean().item(),
        }
        if name == "float32":
            reconstructed = rebuilt
    # How far apart two different pictures are: what a perceptual distance near it would mean.
    others = measures.in_batches(perceptual, pictures, pictures.roll(1, dims=0), batch_size)
    result["perceptual_distance_of_different_pictures"] = others.mean().item()
    return result, reconstructed


def several_pictures(
    network: EfficientNetLite0, train: RealPictures, captions: int, seed: int, batch_size: int
) -> dict[str, torch.Tensor]:
    """Layout features (K, D) of the real pictures of captions that have more than one, of so many captions at most."""
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(train.texts):
        rows.setdefault(text, []).append(row)
    texts = [text for text in rows if len(rows[text]) > 1]
    chosen = [texts[number] for number in choose(captions, len(texts), seed)]
    return {text: measures.describe(network, train.pixels[rows[text]], batch_size)["layout"] for text in chosen}


def measure_coverage(drawn: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> dict[str, Any]:
    """How many of the real pictures of a caption its drawn pictures come near to, each being near to one.

    Args:
        drawn: Features (S, D) of the drawn pictures of each caption.
        real: Those (K, D) of its real pictures that are clearly apart, at least two.
    """
    counts = [measures.covered(own, others) for own, others in zip(drawn, real, strict=True)]
    chances = [measures.chance_of_two(len(others), len(own)) for own, others in zip(drawn, real, strict=True)]
    return {
        "captions": len(counts),
        "real_pictures_a_caption": statistics.mean(len(others) for others in real),
        "covered_a_caption": statistics.mean(counts),
        "at_least_two": measures.Rate(sum(count > 1 for count in counts), len(counts)).as_dict(),
        "at_least_two_of_real_ones": statistics.mean(chances),
    }


def measure_variety(
    pipeline: Any,
    network: EfficientNetLite0,
    train: RealPictures,
    held_out: RealPictures,
    features: dict[str, dict[str, torch.Tensor]],
    captions: int,
    seeds: int,
    seed: int,
    batch_size: int,
    **settings: Any,
) -> tuple[dict[str, Any], torch.Tensor, list[str]]:
    """Variety of three sets of captions: training, held-out, and training captions with real pictures that are apart.

    Args:
        pipeline: Draws the pictures.
        network: Describes them.
        train: Training pictures, with their other views where there are any.
        held_out: Held-out pictures as drawn.
        features: By set, "train" and "held_out", those of the pictures as drawn.
        captions: Of each set, at most.
        seeds: Pictures of each caption.
        seed: Chooses the captions and starts the pictures.
        batch_size: Pictures at once.
        settings: Of the pipeline's call.

    Returns:
        The results, and the pictures of the first two sets, (C, seeds, 3, H, W), with their captions.
    """
    index = {"train": train.only(AS_DRAWN), "held_out": held_out}
    sets = {name: [real.texts[row] for row in choose(captions, len(real), seed)] for name, real in index.items()}
    results: dict[str, Any] = {"seeds": seeds}
    real = several_pictures(network, train, REAL_CAPTIONS, seed, batch_size)
    apart: dict[str, torch.Tensor] = {}
    if len(real) > 1:
        results["real"] = measures.variety(list(real.values()))
        least = APART * results["real"]["between"]
        kept = {text: own[measures.clearly_apart(own, least)] for text, own in real.items()}
        texts = [text for text, own in kept.items() if len(own) > 1]
        apart = {texts[number]: kept[texts[number]] for number in choose(captions, len(texts), seed)}
    if len(apart) > 1:
        sets["several"] = list(apart)
        results["real_several"] = measures.variety([real[text] for text in apart])

    drawn: dict[str, list[torch.Tensor]] = {}
    shown = []
    for name, texts in sets.items():
        among = "held_out" if name == "held_out" else "train"
        asked = [text for text in texts for _ in range(seeds)]
        generated = generate(pipeline, asked, seed, batch_size, f"{name} variety", **settings)
        layout = measures.describe(network, generated, batch_size)["layout"]
        drawn[name] = list(layout.split(seeds))
        found = measures.found_captions(layout, features[among]["layout"], index[among].captions, asked, NEIGHBOURS)
        rate = measures.Rate(found.diagonal().sum().item(), len(asked))
        results[name] = {**measures.variety(drawn[name]), "found": rate.as_dict()}
        if name != "several":
            shown.append(generated.unflatten(0, (len(texts), seeds)))
    results["both"] = measures.variety(drawn["train"] + drawn["held_out"])
    if "several" in sets:
        results["coverage"] = measure_coverage(drawn["several"], list(apart.values()))
    return results, torch.cat(shown), sets["train"] + sets["held_out"]


def measure_command(model: Path | None = None, runs: int = TIMED_RUNS) -> dict[str, Any]:
    """Seconds of `hubgen generate` from its start to the file, and of the sampling in it, as the command says them.

    Raises:
        RuntimeError: The command failed, or says no sampling time.
    """
    load = os.getloadavg()[0]
    whole, sampling = [], []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hubgen.cli", "generate", PROMPT]
        command += [] if model is None else ["--model", str(model)]
        for number in range(runs):
            out = Path(folder) / f"{number}.png"
            start = time.perf_counter()
            done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
            whole.append(time.perf_counter() - start)
            said = re.search(r"sampled in ([\d.]+) s", done.stdout)
            if done.returncode or said is None or not out.is_file():
                raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stdout}{done.stderr}")
            sampling.append(float(said[1]))
    return {
        "prompt": PROMPT,
        "runs": runs,
        "seconds": statistics.median(whole),
        "seconds_sampling": statistics.median(sampling),
        "seconds_of_runs": whole,
        "cores": os.cpu_count(),
        "load_before": load,
    }


def run(
    pipeline: Any,
    train: RealPictures,
    held_out: RealPictures,
    output: Path,
    train_captions: int = 200,
    held_out_captions: int = 100,
    colour_seeds: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    network: EfficientNetLite0 | None = None,
    split: str = TEST,
    combination_seeds: int = 2,
    variety_captions: int = 24,
    variety_seeds: int = 8,
    command: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measures `pipeline`, stores everything in `output` and returns the results.

    Args:
        pipeline: A TextToImagePipeline on its device.
        train, held_out: The real pictures, of the size that the pipeline makes, with their variants.
        output: Folder of the results.
        train_captions, held_out_captions: Captions of each set, at most.
        colour_seeds: Pictures a caption with a colour word.
        seed: Chooses the captions and starts the pictures.
        batch_size: Pictures at once.
        network: ImageNet features; the published weights if not given.
        split: Name of the held-out pictures' split, for the page.
        combination_seeds: Pictures a held-out combination of colour and object.
        variety_captions, variety_seeds: Captions of each set, at most, and pictures of each, for the variety.
        command: What `measure_command` found, if it was asked.
        settings: Passed on to the pipeline's call; none means its defaults.
    """
    began = time.perf_counter()
    network = network or EfficientNetLite0.from_pretrained()
    perceptual = PerceptualLoss(network)
    results: dict[str, Any] = {"seed": seed, "split": split, "pipeline_settings": settings or "defaults"}
    views, train = train.only(*ANOTHER_VIEW), train.only(AS_DRAWN)
    combined, held_out = held_out.only(RECOLOURED), held_out.only(AS_DRAWN)

    results["autoencoder"], held_out_rebuilt = measure_autoencoder(
        pipeline.vae, perceptual, held_out.pixels, batch_size
    )
    train_rows = choose(train_captions, len(train), seed)
    held_out_rows = choose(held_out_captions, len(held_out), seed)
    everything = held_out.and_then(train)
    features = measures.describe(network, everything.pixels, batch_size)
    held_out_features = {name: rows[: len(held_out)] for name, rows in features.items()}
    train_features = {name: rows[len(held_out) :] for name, rows in features.items()}

    results["retrieval"] = {}
    for name, real, rows, rebuilt, real_features in (
        ("train", train, train_rows, None, train_features),
        ("held_out", held_out, held_out_rows, held_out_rebuilt[held_out_rows], held_out_features),
    ):
        captions = [real.texts[row] for row in rows]
        start = time.perf_counter()
        generated = generate(pipeline, captions, seed, batch_size, f"{name} captions", **settings)
        seconds = time.perf_counter() - start
        if rebuilt is None:
            rebuilt = measures.reconstruct(pipeline.vae, real.pixels[rows], batch_size)
        retrieval = measure_retrieval(network, generated, rebuilt, captions, real, real_features, batch_size)
        results["retrieval"][name] = {**retrieval, "seconds_per_picture": seconds / len(captions)}
        if name == "held_out":
            # The harder question: among every real picture, where a copy of a training picture finds that one.
            among_all = measure_retrieval(network, generated, rebuilt, captions, everything, features, batch_size)
            results["retrieval"]["held_out_among_all"] = among_all
        report.draw_grid([real.pixels[rows], generated], captions, output / f"{name}.png")

    coloured = [row for row, text in enumerate(train.texts) if colour_words(text)]
    shares = colour_shares(train.pixels[coloured])
    threshold = measures.calibrate_colour_threshold(shares, [train.texts[row] for row in coloured])
    results["colours"] = {}
    for name, real in (("train", train), ("held_out", held_out)):
        captions = [text for text in real.texts if colour_words(text)] * colour_seeds
        generated = generate(pipeline, captions, seed, batch_size, f"{name} colours", **settings)
        results["colours"][name] = measure_colours(real, generated, captions, threshold)

    if len(combined):
        captions = combined.texts * combination_seeds
        generated = generate(pipeline, captions, seed, batch_size, "combinations", **settings)
        results["colours"]["combinations"] = measure_colours(combined, generated, captions, threshold)
        # Does the object show as well? Asked of one picture a combination, for else seeds of one would be shuffled.
        first = generated[: len(combined)]
        rebuilt = measures.reconstruct(pipeline.vae, combined.pixels, batch_size)
        own = measures.describe(network, combined.pixels, batch_size)
        both = {name: torch.cat([rows, own[name]]) for name, rows in held_out_features.items()}
        results["retrieval"]["combinations"] = measure_retrieval(
            network, first, rebuilt, combined.texts, held_out.and_then(combined), both, batch_size
        )
        report.draw_grid([combined.pixels, first], combined.texts, output / "combinations.png")

    results["variety"], pictures, captions = measure_variety(
        pipeline,
        network,
        views,
        held_out,
        {"train": train_features, "held_out": held_out_features},
        variety_captions,
        variety_seeds,
        seed,
        batch_size,
        **settings,
    )
    report.draw_grid(list(pictures.unbind(dim=1)), captions, output / "variety.png", columns=2)

    shown = held_out_rows
    report.draw_grid(
        [held_out.pixels[shown], held_out_rebuilt[shown]],
        [held_out.texts[row] for row in shown],
        output / "reconstruction.png",
    )
    if command is not None:
        results["command"] = command
    results["seconds"] = time.perf_counter() - began
    results["environment"] = report.environment()
    report.write_json(output / "bundled_model.json", results)
    report.write_text(output / "bundled_model.md", to_markdown(results))
    return results


def asked_table(results: dict[str, Any]) -> str:
    """What is asked of the model, and what was measured."""
    retrieval, colours, variety = results["retrieval"], results["colours"], results["variety"]
    rows = [
        [
            "held-out captions, among held-out pictures",
            "at least 80 %",
            report.percent(retrieval["held_out"]["layout"]["generated"]["rate"]),
        ],
        ["training captions", "at least 90 %", report.percent(retrieval["train"]["layout"]["generated"]["rate"])],
    ]
    if "combinations" in colours:
        rate = colours["combinations"]["generated"]["rate"]
        rows.append(["colour words of held-out combinations", "at least 85 %", report.percent(rate)])
    ratio = report.percent(variety["both"]["ratio"])
    rows.append(["distance of one caption's pictures / of different captions'", "at least 30 %", ratio])
    if "coverage" in variety:
        coverage = variety["coverage"]
        share = report.percent(coverage["at_least_two"]["rate"])
        measured = f"{coverage['covered_a_caption']:.1f} on average, two or more for {share}"
        rows.append(["real pictures that the seeds of a caption cover, where it has several", "at least 2", measured])
    psnr = results["autoencoder"]["float16_weights"]["psnr_db"]
    rows.append(["autoencoder", "at least 29 dB", f"{psnr:.2f} dB"])
    if "command" in results:
        command = results["command"]
        rows.append(["`hubgen generate`, start to file", "under 15 s", f"{command['seconds']:.1f} s"])
        rows.append(["... its sampling", "under 3 s", f"{command['seconds_sampling']:.1f} s"])
    return report.markdown_table(["measure", "asked", "measured"], rows)


def variety_section(variety: dict[str, Any]) -> str:
    """Variety and coverage, as they stand on the page."""
    names = {
        "train": "training captions, generated",
        "held_out": "held-out captions, generated",
        "both": "**both, generated**",
        "several": "training captions with several real pictures, generated",
        "real_several": "... the real pictures of the same captions",
        "real": "real pictures of all training captions with several",
    }
    rows = []
    for key, label in names.items():
        if key in variety:
            one = variety[key]
            rows.append(
                [
                    label,
                    f"**{report.percent(one['ratio'])}** ({interval(one)})",
                    f"{one['within']:.3f}",
                    f"{one['between']:.3f}",
                    f"{one['captions']} / {one['pictures']}",
                    report.percent(one["found"]["rate"]) if "found" in one else "",
                ]
            )
    table = report.markdown_table(
        ["pictures", "within / between (95 %)", "within", "between", "captions / pictures", "caption found"], rows
    )
    text = (
        f"## Do its pictures of one caption differ?\n\n{table}\n"
        "Mean layout distances of two pictures, of one caption and of different captions. Caption found: among "
        "the five nearest, for these pictures.\n\n"
    )
    if "coverage" in variety:
        coverage = variety["coverage"]
        two = coverage["at_least_two"]
        text += (
            f"{coverage['captions']} training captions have real pictures that are clearly apart, "
            f"{coverage['real_pictures_a_caption']:.1f} on average. {variety['seeds']} seeds come nearest to "
            f"**{coverage['covered_a_caption']:.1f}** of them, to at least two for **{report.percent(two['rate'])}** "
            f"({interval(two)}) of the captions; as many real ones drawn at random would for "
            f"{report.percent(coverage['at_least_two_of_real_ones'])}.\n\n"
        )
    return text


def command_section(results: dict[str, Any]) -> str:
    """Times of the command, as they stand on the page."""
    command, environment = results["command"], results["environment"]
    runs = ", ".join(f"{seconds:.1f}" for seconds in command["seconds_of_runs"])
    return (
        f'## How long does it take?\n\n`hubgen generate "{command["prompt"]}"`: **{command["seconds"]:.1f} s** from '
        f"start to file, **{command['seconds_sampling']:.1f} s** of them sampling; medians of {command['runs']} runs "
        f"({runs} s). {command['cores']} cores ({environment['machine']}), {environment['threads']} threads, load "
        f"{command['load_before']:.1f} before the first run; torch {environment['torch']}.\n\n"
    )


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    names = {
        "train": "training captions, among training pictures",
        "held_out": "held-out captions, among held-out pictures",
        "held_out_among_all": "held-out captions, among all pictures",
        "combinations": "held-out combinations, among held-out and recoloured pictures",
    }
    rows = []
    for key, retrieval in results["retrieval"].items():
        for kind in ("layout", "pooled"):
            generated, ceiling = retrieval[kind]["generated"], retrieval[kind]["ceiling_reconstructions"]
            rows.append(
                [
                    f"{retrieval['captions']} {names[key]} ({retrieval['real_pictures']}); {kind} features",
                    f"**{report.percent(generated['rate'])}** ({interval(generated)})",
                    report.percent(retrieval["chance"]),
                    report.percent(retrieval[kind]["shuffled_captions"]),
                    report.percent(ceiling["rate"]),
                ]
            )
    retrieval_table = report.markdown_table(
        ["caption found in the five nearest", "generated (95 %)", "chance", "shuffled captions", "ceiling"], rows
    )
    labels = {"train": "train captions", "held_out": "held-out captions", "combinations": "held-out combinations"}
    rows = []
    for key, colours in results["colours"].items():
        for kind in ("real", "generated"):
            rate = colours[kind]
            rows.append(
                [
                    f"{labels[key]}, {kind} pictures",
                    f"**{report.percent(rate['rate'])}** ({interval(rate)})",
                    report.percent(rate["shuffled_captions"]),
                    str(rate["count"]),
                ]
            )
    threshold = report.percent(results["colours"]["train"]["threshold"])
    colour_table = report.markdown_table(
        ["the colour that the caption names shows", "rate (95 %)", "other captions' colours", "cases"], rows
    )
    rows = [
        [
            name.replace("_", " "),
            f"**{values['psnr_db']:.2f}**",
            f"{values['psnr_db_worst']:.2f}",
            f"{values['perceptual_distance']:.4f}",
        ]
        for name, values in results["autoencoder"].items()
        if isinstance(values, dict)
    ]
    autoencoder_table = report.markdown_table(["weights", "PSNR in dB", "worst picture", "perceptual distance"], rows)
    different = results["autoencoder"]["perceptual_distance_of_different_pictures"]
    settings = results["pipeline_settings"]
    combinations = "[combinations](combinations.png), " if "combinations" in results["colours"] else ""
    return (
        "# The model, measured\n\n"
        "Written by `python -m tests.benchmarks.bundled_model`; definitions in tests/benchmarks/measures.py.\n"
        f"Held-out pictures are those of the split `{results['split']}`. Seed {results['seed']}, pipeline settings: "
        f"{settings}, {results['seconds']:.0f} s in all, "
        f"{results['retrieval']['train']['seconds_per_picture']:.2f} s a picture.\n\n"
        f"{asked_table(results)}\n"
        f"## Does it draw what it is asked for?\n\n{retrieval_table}\n"
        "Ceiling: the real pictures of the same captions through the autoencoder.\n\n"
        f"## Do colour words show?\n\n{colour_table}\n"
        f"A colour shows from {threshold} of the pixels that are not background; the figure was calibrated on the real "
        "training pictures.\n\n"
        f"{variety_section(results['variety'])}"
        f"{command_section(results) if 'command' in results else ''}"
        f"## Autoencoder, on {results['autoencoder']['pictures']} held-out pictures\n\n{autoencoder_table}\n"
        f"Different pictures are {different:.4f} apart on average.\n\n"
        "Pictures, the real one to the left: [training captions](train.png), [held-out captions](held_out.png), "
        f"{combinations}[reconstructions](reconstruction.png). [Seeds of one caption](variety.png).\n"
    )


def to_card_section(results: dict[str, Any]) -> str:
    """The figures that a model card shows, in one table."""
    retrieval, colours = results["retrieval"], results["colours"]
    rows = []
    for name, label in (("train", "training"), ("held_out", "held-out")):
        found = retrieval[name]["layout"]
        rows.append(
            [
                f"one of the five nearest of {retrieval[name]['real_pictures']} real pictures bears the caption, "
                f"{retrieval[name]['captions']} {label} captions",
                report.percent(found["generated"]["rate"]),
                f"{report.percent(retrieval[name]['chance'])} by chance, "
                f"{report.percent(found['shuffled_captions'])} for shuffled captions",
            ]
        )
        shown = colours[name]
        rows.append(
            [
                f"a colour word shows in the pixels, {shown['generated']['count']} pictures of {label} captions",
                report.percent(shown["generated"]["rate"]),
                f"{report.percent(shown['real']['rate'])} in real pictures, "
                f"{report.percent(shown['generated']['shuffled_captions'])} for other captions' colours",
            ]
        )
    if "combinations" in colours:
        shown, found = colours["combinations"], retrieval["combinations"]
        rows.append(
            [
                "the colour shows, of colour and object that no training caption has together, "
                f"{shown['generated']['count']} pictures",
                report.percent(shown["generated"]["rate"]),
                f"{report.percent(shown['real']['rate'])} in real pictures, "
                f"{report.percent(shown['generated']['shuffled_captions'])} for other captions' colours",
            ]
        )
        rows.append(
            [
                f"one of the five nearest of {found['real_pictures']} real pictures bears the caption, "
                f"{found['captions']} such combinations",
                report.percent(found["layout"]["generated"]["rate"]),
                f"{report.percent(found['chance'])} by chance, "
                f"{report.percent(found['layout']['shuffled_captions'])} for shuffled captions",
            ]
        )
    variety = results["variety"]
    beside = "0 % if all seeds gave the same"
    if "real" in variety:
        beside = f"{report.percent(variety['real']['ratio'])} for real pictures of captions that have several"
    rows.append(
        [
            f"distance of {variety['seeds']} pictures of one caption, as a part of that between captions, "
            f"{variety['both']['captions']} captions",
            report.percent(variety["both"]["ratio"]),
            beside,
        ]
    )
    if "coverage" in variety:
        coverage = variety["coverage"]
        rows.append(
            [
                f"{variety['seeds']} pictures come near to two or more of a caption's real ones, "
                f"{coverage['captions']} captions that have several",
                report.percent(coverage["at_least_two"]["rate"]),
                f"{report.percent(coverage['at_least_two_of_real_ones'])} for real pictures drawn at random",
            ]
        )
    reconstruction = results["autoencoder"]["float16_weights"]
    rows.append(
        [
            f"autoencoder, PSNR on {results['autoencoder']['pictures']} held-out pictures",
            f"{reconstruction['psnr_db']:.1f} dB",
            f"perceptual distance {reconstruction['perceptual_distance']:.3f}, where different pictures are "
            f"{results['autoencoder']['perceptual_distance_of_different_pictures']:.2f} apart",
        ]
    )
    if "command" in results:
        command = results["command"]
        rows.append(
            [
                f'`hubgen generate "{command["prompt"]}"` on {command["cores"]} cores, start to file',
                f"{command['seconds']:.1f} s",
                f"{command['seconds_sampling']:.1f} s of them sampling",
            ]
        )
    table = report.markdown_table(["measure", "model", "beside it"], rows)
    return (
        f"By `python -m tests.benchmarks.bundled_model` on the split {results['split']}, seed {results['seed']}, "
        f"default settings.\n\n{table}"
    )


def interval(rate: dict[str, Any]) -> str:
    low, high = rate["interval_95"]
    return f"{100 * low:.0f}–{100 * high:.0f}"


def default_data() -> Path:
    """The Fluent emoji at 64 x 64, built once in the user's cache."""
    from hubgen.data.emoji import build_emoji_dataset
    from hubgen.data.packages import cache_folder

    folder = cache_folder().parent / "benchmarks" / "fluent-64"
    build_emoji_dataset("fluent", 64, folder)
    return folder


def default_model() -> Path:
    from hubgen.hub.bundled import bundled_model

    return bundled_model()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="pipeline folder; the bundled model if not given")
    parser.add_argument("--data", type=Path, help="folder of `hubgen data emoji`; built in the cache if not given")
    parser.add_argument("--split", default=TEST, help="the held-out pictures (default: %(default)s)")
    parser.add_argument("--output", type=Path, help=f"folder of the results (default: {RESULTS}, for the split {TEST})")
    parser.add_argument("--train-captions", type=int, default=200)
    parser.add_argument("--held-out-captions", type=int, default=100)
    parser.add_argument("--colour-seeds", type=int, default=4, help="pictures a caption with a colour word")
    parser.add_argument("--combination-seeds", type=int, default=2, help="pictures a held-out combination")
    parser.add_argument("--variety-captions", type=int, default=24, help="captions of each set, for the variety")
    parser.add_argument("--variety-seeds", type=int, default=8, help="pictures a caption, for the variety")
    parser.add_argument("--no-command", action="store_true", help="do not time `hubgen generate`")
    parser.add_argument("--num-inference-steps", type=int, help="the pipeline's default if not given")
    parser.add_argument("--guidance-scale", type=float, help="the pipeline's default if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--card", action="store_true", help="also put the figures into the model's README.md")
    arguments = parser.parse_args(argv)
    if arguments.split != TEST and (arguments.output is None or arguments.card):
        parser.error(f"--split {arguments.split}: needs --output, and no --card; those are for the split {TEST}")
    output = arguments.output or RESULTS
    # First, while this process does nothing else.
    command = None if arguments.no_command else measure_command(arguments.model)

    from hubgen.pipelines.text_to_image import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained(arguments.model or default_model(), torch_dtype=torch.float32)
    pipeline.to(arguments.device)
    size, _ = pipeline.default_size
    data = arguments.data or default_data()
    train = RealPictures.from_folder(data, "train", size, ANOTHER_VIEW)
    held_out = RealPictures.from_folder(data, arguments.split, size, (AS_DRAWN, RECOLOURED))
    settings = {
        name: getattr(arguments, name)
        for name in ("num_inference_steps", "guidance_scale")
        if getattr(arguments, name) is not None
    }
    results = run(
        pipeline,
        train,
        held_out,
        output,
        train_captions=arguments.train_captions,
        held_out_captions=arguments.held_out_captions,
        colour_seeds=arguments.colour_seeds,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        split=arguments.split,
        combination_seeds=arguments.combination_seeds,
        variety_captions=arguments.variety_captions,
        variety_seeds=arguments.variety_seeds,
        command=command,
        **settings,
    )
    if arguments.card:
        replace_section(Path(arguments.model or default_model()) / "README.md", "measured", to_card_section(results))
    print(to_markdown(results))
    print(f"stored in {output}")


if __name__ == "__main__":
    main()
