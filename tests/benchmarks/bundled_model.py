"""How good is a text-to-image model of emoji: does it draw what it is asked for, also in words that it never saw?

    python -m tests.benchmarks.bundled_model [--model DIR] [--data DIR] [--output DIR]

Measured, with default settings of the pipeline and one seed:

- *Retrieval*: how often one of the five real pictures nearest to a generated one bears the caption asked for, for 200
  training captions against the training pictures and 100 held-out captions against the held-out pictures. Beside it
  chance, the same pictures with shuffled captions, and the ceiling: the real pictures through the autoencoder.
- *Colour words*: how often a colour that the caption names shows in the pixels; beside it real pictures and, as
  control, the colours of the other captions.
- *Autoencoder*: PSNR and perceptual distance on the held-out pictures, also with weights rounded to float16.

The measures are defined in measures.py. Stored: bundled_model.json, bundled_model.md, and grids of real and generated
pictures, train.png, held_out.png and reconstruction.png.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.autoencoders.perceptual import PerceptualLoss
from hubgen.data.image_folder import ImageTextFolder
from hubgen.hub.card import replace_section
from tests.benchmarks import measures, report

RESULTS = Path(__file__).parent / "results" / "bundled_model"
NEIGHBOURS = 5


@dataclass(frozen=True)
class RealPictures:
    """One split of the data."""

    pixels: torch.Tensor
    """(N, 3, H, W) in [-1, 1]"""
    captions: list[list[str]]
    """Wordings of each picture's caption, the first is its name"""

    @classmethod
    def from_folder(cls, folder: Path, split: str, size: int) -> "RealPictures":
        dataset = ImageTextFolder(folder, split=split, size=size)
        return cls(dataset.load_pixels(range(len(dataset))), dataset.captions)

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
        rates = {}
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
        rate, control = measures.colours_shown(measures.colour_shares(pixels), texts, threshold)
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
    **settings: Any,
) -> dict[str, Any]:
    """Measures `pipeline`, stores everything in `output` and returns the results.

    Args:
        pipeline: A TextToImagePipeline on its device.
        train, held_out: The real pictures, of the size that the pipeline makes.
        output: Folder of the results.
        train_captions, held_out_captions: Captions of each set, at most.
        colour_seeds: Pictures a caption with a colour word.
        seed: Chooses the captions and starts the pictures.
        batch_size: Pictures at once.
        network: ImageNet features; the published weights if not given.
        settings: Passed on to the pipeline's call; none means its defaults.
    """
    began = time.perf_counter()
    network = network or EfficientNetLite0.from_pretrained()
    perceptual = PerceptualLoss(network)
    results: dict[str, Any] = {"seed": seed, "pipeline_settings": settings or "defaults"}

    results["autoencoder"], held_out_rebuilt = measure_autoencoder(
        pipeline.vae, perceptual, held_out.pixels, batch_size
    )
    train_rows = choose(train_captions, len(train), seed)
    held_out_rows = choose(held_out_captions, len(held_out), seed)
    everything = RealPictures(torch.cat([held_out.pixels, train.pixels]), held_out.captions + train.captions)
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

    coloured = [row for row, text in enumerate(train.texts) if measures.colour_words(text)]
    shares = measures.colour_shares(train.pixels[coloured])
    threshold = measures.calibrate_colour_threshold(shares, [train.texts[row] for row in coloured])
    results["colours"] = {}
    for name, real in (("train", train), ("held_out", held_out)):
        captions = [text for text in real.texts if measures.colour_words(text)] * colour_seeds
        generated = generate(pipeline, captions, seed, batch_size, f"{name} colours", **settings)
        results["colours"][name] = measure_colours(real, generated, captions, threshold)

    shown = held_out_rows
    report.draw_grid(
        [held_out.pixels[shown], held_out_rebuilt[shown]],
        [held_out.texts[row] for row in shown],
        output / "reconstruction.png",
    )
    results["seconds"] = time.perf_counter() - began
    results["environment"] = report.environment()
    report.write_json(output / "bundled_model.json", results)
    report.write_text(output / "bundled_model.md", to_markdown(results))
    return results


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    names = {
        "train": "training captions, among training pictures",
        "held_out": "held-out captions, among held-out pictures",
        "held_out_among_all": "held-out captions, among all pictures",
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
    rows = []
    for key, colours in results["colours"].items():
        for kind in ("real", "generated"):
            rate = colours[kind]
            rows.append(
                [
                    f"{key.replace('_', '-')} captions, {kind} pictures",
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
    return (
        "# The model, measured\n\n"
        "Written by `python -m tests.benchmarks.bundled_model`; definitions in tests/benchmarks/measures.py.\n"
        f"Seed {results['seed']}, pipeline settings: {settings}, {results['seconds']:.0f} s in all, "
        f"{results['retrieval']['train']['seconds_per_picture']:.2f} s a picture.\n\n"
        f"## Does it draw what it is asked for?\n\n{retrieval_table}\n"
        "Ceiling: the real pictures of the same captions through the autoencoder.\n\n"
        f"## Do colour words show?\n\n{colour_table}\n"
        f"A colour shows from {threshold} of the pixels that are not background; the figure was calibrated on the real "
        "training pictures.\n\n"
        f"## Autoencoder, on {results['autoencoder']['pictures']} held-out pictures\n\n{autoencoder_table}\n"
        f"Different pictures are {different:.4f} apart on average.\n\n"
        "Pictures, the real one to the left: [training captions](train.png), [held-out captions](held_out.png), "
        "[reconstructions](reconstruction.png).\n"
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
    reconstruction = results["autoencoder"]["float16_weights"]
    rows.append(
        [
            f"autoencoder, PSNR on {results['autoencoder']['pictures']} held-out pictures",
            f"{reconstruction['psnr_db']:.1f} dB",
            f"perceptual distance {reconstruction['perceptual_distance']:.3f}, where different pictures are "
            f"{results['autoencoder']['perceptual_distance_of_different_pictures']:.2f} apart",
        ]
    )
    table = report.markdown_table(["measure", "model", "beside it"], rows)
    return f"By `python -m tests.benchmarks.bundled_model`, seed {results['seed']}, default settings.\n\n{table}"


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
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--train-captions", type=int, default=200)
    parser.add_argument("--held-out-captions", type=int, default=100)
    parser.add_argument("--colour-seeds", type=int, default=4, help="pictures a caption with a colour word")
    parser.add_argument("--num-inference-steps", type=int, help="the pipeline's default if not given")
    parser.add_argument("--guidance-scale", type=float, help="the pipeline's default if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--card", action="store_true", help="also put the figures into the model's README.md")
    arguments = parser.parse_args(argv)

    from hubgen.pipelines.text_to_image import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained(arguments.model or default_model(), torch_dtype=torch.float32)
    pipeline.to(arguments.device)
    size, _ = pipeline.default_size
    data = arguments.data or default_data()
    train, held_out = (RealPictures.from_folder(data, split, size) for split in ("train", "held_out"))
    settings = {
        name: getattr(arguments, name)
        for name in ("num_inference_steps", "guidance_scale")
        if getattr(arguments, name) is not None
    }
    results = run(
        pipeline,
        train,
        held_out,
        arguments.output,
        train_captions=arguments.train_captions,
        held_out_captions=arguments.held_out_captions,
        colour_seeds=arguments.colour_seeds,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        **settings,
    )
    if arguments.card:
        replace_section(Path(arguments.model or default_model()) / "README.md", "measured", to_card_section(results))
    print(to_markdown(results))
    print(f"stored in {arguments.output}")


if __name__ == "__main__":
    main()
