"""Model cards: what a published folder says about itself, written from records that training leaves behind.

A script that trains writes a `training.json` beside the weights: its settings, the data and the curve. The card of a
pipeline is made of the records of its components. Text between `<!-- NAME -->` and `<!-- /NAME -->` is a section that a
later tool may replace, as benchmarks do with their figures.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from torch import nn

from hubgen.formats.atomic import written

RECORD = "training.json"
CURVE_ROWS = 12


@dataclass(frozen=True)
class TrainingRecord:
    """How a component got its weights."""

    script: str
    """Module that was run, as in `accelerate launch -m SCRIPT`"""
    settings: dict[str, Any]
    """All of the script's settings, as plain JSON values"""
    data: dict[str, Any]
    """Pictures seen, their fingerprint, and the sources with their licences where the data folder names them"""
    curve: list[dict[str, float]]
    """Measurements in order of "step" """

    def save(self, folder: Path) -> None:
        """Writes `training.json` into the component's folder."""
        with written(folder / RECORD) as temporary:
            text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TrainingRecord | None":
        """The record in a component's folder; None where there is none.

        Raises:
            ValueError: The file is there and is not such a record.
        """
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a record of training ({error}).") from error


def describe_data(folder: Path, pictures: int, fingerprint: str) -> dict[str, Any]:
    """What a record says about a data folder: `build.json` of `hubgen data` names the sources."""
    described: dict[str, Any] = {"pictures": pictures, "fingerprint": fingerprint}
    if (folder / "build.json").is_file():
        build = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        described["sources"] = [
            {key: source[key] for key in ("from", "license") if key in source} for source in build["sources"]
        ]
    return described


@dataclass(frozen=True)
class Usage:
    """How a pipeline is called, for the example in its card."""

    pipeline: str
    """Class of hubgen"""
    task: str
    """As the Hub names it"""
    arguments: str
    """Of a call"""


TEXT_TO_IMAGE = Usage("TextToImagePipeline", "text-to-image", '"a red apple"')
CLASS_TO_IMAGE = Usage("ClassToImagePipeline", "unconditional-image-generation", "0")
UNCONDITIONAL = Usage("UnconditionalPipeline", "unconditional-image-generation", "")


def usage_of(pipeline: Any) -> Usage:
    """How a pipeline of hubgen's is called."""
    known = {usage.pipeline: usage for usage in (TEXT_TO_IMAGE, CLASS_TO_IMAGE, UNCONDITIONAL)}
    return next((known[cls.__name__] for cls in type(pipeline).__mro__ if cls.__name__ in known), UNCONDITIONAL)


def parts_of(pipeline: Any) -> dict[str, tuple[str, int]]:
    """The networks of a pipeline: class and number of parameters by name."""
    return {
        part: (type(module).__name__, sum(parameter.numel() for parameter in module.parameters()))
        for part, module in pipeline.components.items()
        if isinstance(module, nn.Module)
    }


def pipeline_card(
    name: str,
    summary: str,
    components: Mapping[str, tuple[str, int]],
    records: Mapping[str, TrainingRecord | None],
    *,
    usage: Usage = TEXT_TO_IMAGE,
    licence: str | None = None,
) -> str:
    """The README.md of a pipeline.

    Args:
        name: Title.
        summary: First paragraph.
        components: Component to its class and number of parameters.
        records: Trained component to its record.
        usage: How it is called.
        licence: Identifier as the Hub knows it; left out of the metadata if not given.
    """
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=usage.task,
        license=licence,
        language="en" if usage == TEXT_TO_IMAGE else None,
        tags=["hubgen", usage.task, "diffusers"],
    )
    lines = [
        *heading(metadata, name, summary),
        "```python",
        f"from hubgen import {usage.pipeline}",
        "",
        f'pipe = {usage.pipeline}.from_pretrained("{name}")',
        f'pipe({usage.arguments}).images[0].save("picture.png")',
        "```",
        "",
        "## Parts",
        "",
        "| part | class | parameters |",
        "|---|---|---:|",
        *(f"| `{part}` | {cls} | {count:,} |" for part, (cls, count) in components.items()),
        "",
        "## Measured quality",
        "",
        "<!-- measured -->",
        "Not measured yet.",
        "<!-- /measured -->",
        "",
        "## Training",
        "",
    ]
    for part, record in records.items():
        lines += [f"### `{part}`", "", *(describe_record(record) if record else ["Not recorded."]), ""]
    return "\n".join(lines).rstrip() + "\n"


def heading(metadata: ModelCardData, name: str, summary: str) -> list[str]:
    """The first lines of a card: what the Hub reads, title and first paragraph."""
    return ["---", metadata.to_yaml(), "---", f"# {name}", "", summary.strip(), ""]


def adapter_card(
    name: str,
    summary: str,
    record: TrainingRecord,
    *,
    base_model: str | None,
    pipeline: str,
    parameters: int,
    prompts: Sequence[str] = (),
    samples: Sequence[str] = (),
    words: Sequence[str] = (),
    repo: str | None = None,
    licence: str | None = None,
) -> str:
    """The README.md of an adapter.

    Args:
        name: Title.
        summary: First paragraph.
        record: How it was trained.
        base_model: Repository of the base, or its name.
        pipeline: Class of hubgen.
        parameters: How many numbers it has.
        prompts: Of the pictures.
        samples: Files of pictures beside it, before and after.
        words: That text encoders learned beside it.
        repo: Where it will be; its title if not given.
        licence: Identifier as the Hub knows it; left out of the metadata if not given.
    """
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence,
        base_model=base_model if base_model is not None and "/" in base_model else None,
        tags=["hubgen", "lora", "text-to-image", "diffusers"],
    )
    loaded = "bundled_model()" if base_model is None else f'"{base_model}"'
    imported = [f"from hubgen import {pipeline}"]
    imported += ["from hubgen.hub.bundled import bundled_model"] if base_model is None else []
    lines = [
        *heading(metadata, name, summary),
        "```python",
        *imported,
        "",
        f"pipe = {pipeline}.from_pretrained({loaded})",
        f'pipe.load_lora_weights("{repo or name}")',
        *([f'pipe.load_textual_inversion("{repo or name}", token="{words[0]}")'] if len(words) == 1 else []),
        f'pipe({json.dumps(prompts[0] if prompts else "a red apple")}).images[0].save("picture.png")',
        "```",
        "",
        "It loads in diffusers by the same call, and in every program that reads diffusers' adapters: "
        f"{parameters:,} numbers, each product scaled by 1.",
        "",
    ]
    for sample in samples:
        lines += [f"{sample.removesuffix('.png').capitalize()}:", "", f"![{', '.join(prompts)}]({sample})", ""]
    lines += ["## Training", "", *describe_record(record)]
    return "\n".join(lines).rstrip() + "\n"


def describe_record(record: TrainingRecord) -> list[str]:
    """Lines of Markdown: data, settings and curve."""
    sources = ", ".join(
        source["from"] + (f" ({source['license']})" if "license" in source else "")
        for source in record.data.get("sources", [])
    )
    shown = {key: value for key, value in record.settings.items() if value is not None}
    return [
        f"By `accelerate launch -m {record.script}` on {record.data['pictures']:,} pictures"
        + (f" from {sources}." if sources else "."),
        "",
        *markdown_curve(record.curve),
        "",
        "<details><summary>All settings</summary>",
        "",
        "```yaml",
        yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
        "</details>",
    ]


def markdown_curve(curve: Sequence[Mapping[str, float]]) -> list[str]:
    """A table of at most `CURVE_ROWS` of the measurements, the first and the last among them."""
    if not curve:
        return ["No measurements."]
    columns = list(dict.fromkeys(key for row in curve for key in row))
    last, rows = len(curve) - 1, min(CURVE_ROWS, len(curve))
    kept = sorted({round(i * last / max(rows - 1, 1)) for i in range(rows)})
    cell = {int: "{:d}", float: "{:.4g}"}
    table = ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |", "|" + "---:|" * len(columns)]
    for index in kept:
        values = (curve[index].get(column) for column in columns)
        table.append("| " + " | ".join("" if v is None else cell[type(v)].format(v) for v in values) + " |")
    return table


def replace_section(path: Path, name: str, text: str) -> None:
    """Puts `text` between the marks of section `name` of a card.

    Raises:
        ValueError: The card has no such section.
    """
    card = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- /{re.escape(name)} -->", re.DOTALL)
    if not pattern.search(card):
        raise ValueError(f"{path}: no section between <!-- {name} --> and <!-- /{name} -->.")
    section = f"<!-- {name} -->\n{text.strip()}\n<!-- /{name} -->"
    with written(path) as temporary:
        temporary.write_text(pattern.sub(lambda _: section, card), encoding="utf-8")
