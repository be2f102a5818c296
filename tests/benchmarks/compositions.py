"""Does the bundled model put together what no caption has together? Twelve prompts, four seeds each, to be looked at.

    python -m tests.benchmarks.compositions [--model DIR] [--data DIR] [--output DIR]
    python -m tests.benchmarks.compositions --answers FILE --judged-by TEXT [--output DIR]

The first draws and judges by itself: a picture shows its subject if one of the five training pictures nearest to it
(features of measures.py) has the subject's noun in one of its captions; a row does if at least half of its pictures do.
Beside it the nouns of the other prompts.

The second draws nothing. It adds what somebody called the rows who saw compositions.png and not the prompts: FILE is
JSON, from each row's number to the answer ({"1": "a cat", "2": "", ...}); TEXT says who answered, and how. An answer
is right if one of its words is the subject, or another word for it that stands in `COMPOSITIONS`.

Stored: compositions.png, rows of pictures with numbers, compositions.json and compositions.md.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.data.errors import DataError
from hubgen.data.metadata import has_metadata, read_rows
from tests.benchmarks import measures, report
from tests.benchmarks.bundled_model import NEIGHBOURS, RESULTS, RealPictures, default_data, default_model, generate

SEEDS = 4
ASKED = 8
"""Rows whose subject can be named, at least."""
SMALL_WORDS = frozenset(("a", "an", "the", "with", "in", "on", "and", "of"))
SHOWN_SIZE = 128
MARGIN = 48


@dataclass(frozen=True)
class Composition:
    """A prompt, and what it is about."""

    prompt: str
    subject: str
    """Its noun, as captions have it"""
    also: tuple[str, ...] = ()
    """Other words that an answer may use for it"""


# A colour and a thing, a mood and a thing, two things; in mixed order, as nobody is to guess the prompts by the rows.
# No thing is known in its colour, neither drawn nor recoloured, nor inside of a longer caption.
COMPOSITIONS = (
    Composition("a purple duck", "duck", ("mallard",)),
    Composition("a sad rocket", "rocket", ("spaceship", "spacecraft")),
    Composition("a blue strawberry", "strawberry"),
    Composition("a pig with a crown", "pig", ("piglet", "piggy")),
    Composition("a black dog", "dog", ("puppy",)),
    Composition("a pink elephant", "elephant"),
    Composition("an angry banana", "banana"),
    Composition("a bear with sunglasses", "bear", ("teddy",)),
    Composition("a blue frog", "frog", ("toad",)),
    Composition("a sleeping fox", "fox"),
    Composition("a pink shark", "shark"),
    Composition("an owl with a heart", "owl"),
)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def captions_of(folder: Path) -> list[str]:
    """All wordings of all captions of all splits of a data folder."""

    def fail(problem: DataError) -> None:
        raise problem

    splits = sorted(path for path in folder.iterdir() if path.is_dir() and has_metadata(path))
    return [caption for split in splits for row in read_rows(split, "text", fail)[0] for caption in row.captions]


def check_new(compositions: Sequence[Composition], captions: Iterable[str], train: Sequence[Sequence[str]]) -> None:
    """Raises ValueError where a caption has all the words of a prompt, or no training caption has its subject."""
    known = [(caption, words_of(caption)) for caption in captions]
    learnt = words_of(" ".join(caption for wordings in train for caption in wordings))
    for composition in compositions:
        words = words_of(composition.prompt) - SMALL_WORDS
        found = next((caption for caption, own in known if words <= own), None)
        if found is not None:
            raise ValueError(f"{composition.prompt!r}: the data have the caption {found!r}, expected none like it")
        if composition.subject not in learnt:
            raise ValueError(f"{composition.prompt!r}: no training caption has the word {composition.subject!r}")


def subjects_found(
    queries: torch.Tensor,
    index: torch.Tensor,
    index_captions: Sequence[Sequence[str]],
    subjects: Sequence[str],
    neighbours: int = NEIGHBOURS,
) -> torch.Tensor:
    """(Q, S) bool: whether a caption of one of the pictures nearest to picture q has the word s.

    Args:
        queries: (Q, D) unit vectors of the generated pictures.
        index: (N, D) unit vectors of the real pictures.
        index_captions: The wordings of each real picture's caption.
        subjects: The S words.
        neighbours: Real pictures that are looked at.
    """
    nearest = (queries @ index.T).topk(neighbours, dim=-1).indices.tolist()
    words = [set().union(*(words_of(text) for row in rows for text in index_captions[row])) for rows in nearest]
    return torch.tensor([[subject in own for subject in subjects] for own in words])


def draw_rows(pictures: torch.Tensor, path: Path) -> None:
    """Stores the pictures (R, S, 3, H, W), a numbered row for each R and nothing that tells what was asked for."""
    rows, columns = pictures.shape[:2]
    cell = SHOWN_SIZE + report.GAP
    sheet = Image.new("RGB", (MARGIN + columns * cell, rows * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(24)
    tiles = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy()
    for row in range(rows):
        draw.text((4, row * cell + SHOWN_SIZE // 2 - 12), str(row + 1), fill="black", font=font)
        for column in range(columns):
            tile = Image.fromarray(np.ascontiguousarray(tiles[row, column])).resize((SHOWN_SIZE, SHOWN_SIZE))
            sheet.paste(tile, (MARGIN + column * cell, row * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    sheet.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)


def run(
    pipeline: Any,
    train: RealPictures,
    captions: Iterable[str],
    output: Path,
    compositions: Sequence[Composition] = COMPOSITIONS,
    seeds: int = SEEDS,
    seed: int = 0,
    batch_size: int = 32,
    network: EfficientNetLite0 | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Draws the prompts, judges the pictures by their neighbours, and stores everything in `output`.

    Args:
        pipeline: A TextToImagePipeline on its device.
        train: All training pictures, with their variants, of the size that the pipeline makes.
        captions: All captions that there are, none of which may have a prompt's words.
        output: Folder of the results.
        compositions: The prompts.
        seeds: Pictures a prompt.
        seed: Of the first picture.
        batch_size: Pictures at once.
        network: ImageNet features; the published weights if not given.
        settings: Passed on to the pipeline's call; none means its defaults.

    Raises:
        ValueError: A caption has all the words of a prompt, or no training caption has its subject.
    """
    check_new(compositions, captions, train.captions)
    network = network or EfficientNetLite0.from_pretrained()
    asked = [one.prompt for one in compositions for _ in range(seeds)]
    pictures = generate(pipeline, asked, seed, batch_size, "compositions", **settings)
    own, index = (measures.describe(network, pixels, batch_size) for pixels in (pictures, train.pixels))
    subjects = [one.subject for one in compositions]
    differ = torch.tensor([[one != other for other in subjects] for one in subjects])  # (R, R)
    rows: list[dict[str, Any]] = [{"prompt": one.prompt, "subject": one.subject} for one in compositions]
    results: dict[str, Any] = {
        "seed": seed,
        "seeds": seeds,
        "pipeline_settings": settings or "defaults",
        "real_pictures": len(train),
        "rows": rows,
    }
    for kind in ("layout", "pooled"):
        by_picture = subjects_found(own[kind], index[kind], train.captions, subjects)  # (R * seeds, R)
        found = by_picture.unflatten(0, (len(rows), seeds)).sum(dim=1)  # (R, R): prompt, and subject looked for
        nearest = (own[kind] @ index[kind].T).topk(NEIGHBOURS, dim=-1).indices.tolist()
        for number, row in enumerate(rows):
            names = [[train.texts[real] for real in nearest[number * seeds + one]] for one in range(seeds)]
            row[kind] = {"pictures": found[number, number].item(), "nearest": names}
        shows = 2 * found >= seeds
        results[kind] = {
            "rows": shows.diagonal().sum().item(),
            "other_subjects": shows[differ].float().mean().item(),
        }
    draw_rows(pictures.unflatten(0, (len(rows), seeds)), output / "compositions.png")
    results["environment"] = report.environment()
    store(results, output)
    return results


def answered(results: dict[str, Any], answers: dict[str, str], judged_by: str) -> dict[str, Any]:
    """The results with somebody's answers, one for each row.

    Raises:
        ValueError: A row has no answer, or an answer no row.
    """
    numbers = [str(number) for number in range(1, len(results["rows"]) + 1)]
    wrong = sorted(set(numbers) ^ set(answers)) + [n for n in answers if not isinstance(answers[n], str)]
    if wrong:
        raise ValueError(f"answers: got {', '.join(answers)}, expected a text for each of the rows 1 to {numbers[-1]}")
    also = {one.prompt: one.also for one in COMPOSITIONS}
    rows = []
    for number, row in zip(numbers, results["rows"], strict=True):
        accepted = {row["subject"], *also.get(row["prompt"], ())}
        rows.append({**row, "answer": answers[number], "named": not accepted.isdisjoint(words_of(answers[number]))})
    named = sum(row["named"] for row in rows)
    return {**results, "rows": rows, "judged_by": judged_by, "named": named}


def store(results: dict[str, Any], output: Path) -> None:
    report.write_json(output / "compositions.json", results)
    report.write_text(output / "compositions.md", to_markdown(results))


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    rows, seeds = results["rows"], results["seeds"]
    table = report.markdown_table(
        ["prompt", "row", "subject near, layout", "pooled", "what it was called", "named"],
        [
            [
                row["prompt"],
                str(number),
                f"{row['layout']['pictures']} of {seeds}",
                f"{row['pooled']['pictures']} of {seeds}",
                row.get("answer", ""),
                {True: "yes", False: "no"}.get(row.get("named"), ""),
            ]
            for number, row in enumerate(rows, start=1)
        ],
    )
    layout, pooled = results["layout"], results["pooled"]
    person = "Nobody has looked at the pictures yet."
    if "judged_by" in results:
        person = (
            f"By answers: **{results['named']} of {len(rows)}** subjects were named (asked: {ASKED} of 12). Judged by: "
            f"{results['judged_by']}"
        )
    return (
        "# Compositions that no caption has\n\n"
        f"Written by `python -m tests.benchmarks.compositions`; seed {results['seed']}, {seeds} pictures a prompt, "
        f"pipeline settings: {results['pipeline_settings']}. No caption of any split has all the words of a prompt.\n\n"
        f"![the rows](compositions.png)\n\n{table}\n"
        f"{person}\n\n"
        f"By neighbours: one of the five nearest of {results['real_pictures']} training pictures has the subject's "
        f"noun in a caption, for at least half of a row's pictures, in **{layout['rows']} of {len(rows)}** rows by "
        f"layout and in **{pooled['rows']} of {len(rows)}** by pooled features; another prompt's noun in "
        f"{report.percent(layout['other_subjects'])} and {report.percent(pooled['other_subjects'])} of the cases. This "
        "tells what a network of ImageNet finds alike, not what a person sees; the neighbours stand in "
        "compositions.json.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Draws and judges, or adds answers to what was drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="pipeline folder; the bundled model if not given")
    parser.add_argument("--data", type=Path, help="folder of `hubgen data emoji`; built in the cache if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--answers", type=Path, help="JSON, from row number to what somebody called it")
    parser.add_argument("--judged-by", metavar="TEXT", help="who answered, and how")
    arguments = parser.parse_args(argv)
    if (arguments.answers is None) != (arguments.judged_by is None):
        parser.error("--answers and --judged-by: one of them alone, expected both")
    if arguments.answers is not None:
        stored = json.loads((arguments.output / "compositions.json").read_text(encoding="utf-8"))
        answers = json.loads(arguments.answers.read_text(encoding="utf-8"))
        results = answered(stored, answers, arguments.judged_by)
        store(results, arguments.output)
    else:
        from hubgen.pipelines.text_to_image import TextToImagePipeline

        pipeline = TextToImagePipeline.from_pretrained(arguments.model or default_model(), torch_dtype=torch.float32)
        pipeline.to(arguments.device)
        size, _ = pipeline.default_size
        data = arguments.data or default_data()
        train, captions = RealPictures.from_folder(data, "train", size), captions_of(data)
        results = run(
            pipeline,
            train,
            captions,
            arguments.output,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
        )
    print(to_markdown(results))
    print(f"stored in {arguments.output}")


if __name__ == "__main__":
    main()
