"""Model cards: what a published folder says about itself, written from the records that training leaves behind.

A card stands beside the pictures that it shows: samples, which the Hub's gallery takes from its metadata, and the curve
of the losses. Text between `<!-- NAME -->` and `<!-- /NAME -->` is a section that a later tool may replace, as
benchmarks do with their figures. Until it is known where a folder will be published, its examples load `HERE`;
publishing puts the repository in its place.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from torch import nn

from hubgen.formats.atomic import written
from hubgen.hub.records import TrainingRecord, languages_of

HERE = "path/to/this/folder"
CURVE_ROWS = 12


@dataclass(frozen=True)
class Usage:
    """How a pipeline is called, for the example in its card."""

    pipeline: str
    """Class of hubgen"""
    task: str
    """As the Hub names it"""
    arguments: str
    """Of a call"""
    reads_words: bool = False
    before: Sequence[str] = ()
    """Lines of Python before it"""


TEXT_TO_IMAGE = Usage("TextToImagePipeline", "text-to-image", '"a red apple"', reads_words=True)
EDITOR = Usage(
    "TextToImagePipeline",
    "image-to-image",
    '"turn it upside down", image=picture, image_guidance_scale=1.5',
    before=("from PIL import Image", "", 'picture = Image.open("before.png")'),
)
CLASS_TO_IMAGE = Usage("ClassToImagePipeline", "unconditional-image-generation", "0")
UNCONDITIONAL = Usage("UnconditionalPipeline", "unconditional-image-generation", "")


@dataclass(frozen=True, kw_only=True)
class About:
    """What the card of any model says."""

    title: str
    summary: str
    """First paragraph"""
    repo: str | None = None
    """Where it will be, owner/name"""
    licence: str | None = None
    """As the Hub names it; left out of the metadata if not given"""
    samples: Mapping[str, str] = field(default_factory=dict)
    """What it drew: files beside the card, and their prompts"""
    curves: Mapping[str, str] = field(default_factory=dict)
    """Pictures of losses beside the card, by the component"""

    @property
    def place(self) -> str:
        """What examples load."""
        return self.repo or HERE


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
    about: About,
    components: Mapping[str, tuple[str, int]],
    records: Mapping[str, TrainingRecord | None],
    *,
    usage: Usage = TEXT_TO_IMAGE,
    native: bool = False,
    grid: str | None = None,
) -> str:
    """The README.md of a pipeline.

    Args:
        about: What every card says.
        components: Component to its class and number of parameters.
        records: Trained component to its record.
        usage: How it is called.
        native: Whether diffusers has a pipeline for it, so that it needs no code of hubgen's.
        grid: File of pictures beside it, of models that read no words.
    """
    shown = next(iter(about.samples.values()), None) if usage.reads_words else None
    example = usage.arguments if shown is None else quoted(shown)
    loaded = quoted(about.place)
    trust = "" if native else ", trust_remote_code=True"
    lines = [
        *heading(about, usage.task, records.values(), ["hubgen", usage.task, "diffusers"], "finetune"),
        *([f"![Pictures that it drew]({grid})", ""] if grid else []),
        "```python",
        f"from hubgen import {usage.pipeline}",
        *(usage.before or [""]),
        f"pipe = {usage.pipeline}.from_pretrained({loaded})",
        f'pipe({example}).images[0].save("picture.png")',
        "```",
        "",
        "Without hubgen" + ("" if native else ", by the code that comes along in one file") + ":",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        *(usage.before or [""]),
        f"pipe = DiffusionPipeline.from_pretrained({loaded}{trust})",
        f'pipe({example}).images[0].save("picture.png")',
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
        *(measured(records.values()) or ["Not measured yet."]),
        "<!-- /measured -->",
        "",
        "## Training",
        "",
    ]
    for part, record in records.items():
        described = describe_record(record, about.curves.get(part)) if record else ["Not recorded."]
        lines += [f"### `{part}`", "", *described, ""]
    if not records:
        lines += ["Not recorded."]
    return "\n".join(lines).rstrip() + "\n"


def adapter_card(
    about: About,
    record: TrainingRecord,
    *,
    base_model: str | None,
    pipeline: str,
    parameters: int,
    prompts: Sequence[str] = (),
    grids: Sequence[str] = (),
    words: Sequence[str] = (),
    trigger: str | None = None,
) -> str:
    """The README.md of an adapter.

    Args:
        about: What every card says.
        record: How it was trained.
        base_model: Repository of the base, or its name; `None` for the model of the package.
        pipeline: Class of hubgen.
        parameters: How many numbers it has.
        prompts: Of the pictures in the grids.
        grids: Files of pictures beside it, before and after.
        words: That text encoders learned beside it.
        trigger: The words of prompts that call what it learned, if it learned one thing.
    """
    base = "bundled_model()" if base_model is None else quoted(base_model)
    imported = [f"from hubgen import {pipeline}"]
    imported += ["from hubgen.hub.bundled import bundled_model"] if base_model is None else []
    loaded = quoted(about.place)
    lines = [
        *heading(
            about, "text-to-image", [record], ["hubgen", "lora", "text-to-image", "diffusers"], "adapter", trigger
        ),
        *([f"It answers to `{trigger}` in a prompt.", ""] if trigger else []),
        "```python",
        *imported,
        "",
        f"pipe = {pipeline}.from_pretrained({base})",
        f"pipe.load_lora_weights({loaded})",
        *([f"pipe.load_textual_inversion({loaded}, token={quoted(words[0])})"] if len(words) == 1 else []),
        f'pipe({quoted(prompts[0] if prompts else "a red apple")}).images[0].save("picture.png")',
        "```",
        "",
        "It loads in diffusers by the same call, and in every program that reads diffusers' adapters: "
        f"{parameters:,} numbers, each product scaled by 1.",
        "",
    ]
    for grid in grids:
        lines += [f"{grid.removesuffix('.png').capitalize()}:", "", f"![{', '.join(prompts)}]({grid})", ""]
    lines += ["## Training", "", *describe_record(record, next(iter(about.curves.values()), None))]
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True, kw_only=True)
class ControlUsage:
    """What a card says about the use of something that steers a model."""

    kind: str
    """Tag on the Hub: controlnet or ip-adapter"""
    parameters: int
    base_model: str | None
    """Repository of the base, or its name; `None` for the model of the package"""
    pipeline: str
    """Class of hubgen"""
    argument: str
    """Of a call, before the controls"""
    imports: Sequence[str]
    """Names of hubgen's, beside the pipeline"""
    opened: Sequence[str]
    """Lines of Python that open it as `control`; PLACE stands for where it is"""
    elsewhere: str
    """A sentence about its use without hubgen"""


def control_card(about: About, record: TrainingRecord, usage: ControlUsage, grid: str | None = None) -> str:
    """The README.md of something that steers a model.

    Args:
        about: What every card says.
        record: How it was trained.
        usage: How it is used.
        grid: File of pictures beside it.
    """
    bundled = usage.base_model is None
    base = "bundled_model()" if usage.base_model is None else quoted(usage.base_model)
    names = ", ".join(sorted([usage.pipeline, *usage.imports]))
    tags = ["hubgen", usage.kind, "text-to-image", "diffusers"]
    lines = [
        *heading(about, "text-to-image", [record], tags, "adapter"),
        *([f"![What it is shown, and what the model drew with it and without]({grid})", ""] if grid else []),
        "```python",
        f"from hubgen import {names}",
        *(["from hubgen.hub.bundled import bundled_model"] if bundled else []),
        "from PIL import Image",
        "",
        f"pipe = {usage.pipeline}.from_pretrained({base})",
        'image = Image.open("shown.png")',
        *(line.replace("PLACE", quoted(about.place)) for line in usage.opened),
        f'pipe({usage.argument}, controls=[control]).images[0].save("picture.png")',
        "```",
        "",
        f"{usage.elsewhere} It has {usage.parameters:,} numbers.",
        "",
        "## Training",
        "",
        *describe_record(record, next(iter(about.curves.values()), None)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def heading(
    about: About,
    task: str,
    records: Iterable[TrainingRecord | None],
    tags: list[str],
    relation: str,
    trigger: str | None = None,
) -> list[str]:
    """The first lines of a card: what the Hub reads, title, first paragraph and gallery."""
    known = [record for record in records if record is not None]
    bases = sorted({record.base_model for record in known if record.base_model})
    widget = [{"text": prompt, "output": {"url": file}} for file, prompt in about.samples.items()]
    more: dict[str, Any] = {"base_model_relation": relation} if bases else {}
    more |= {"widget": widget} if widget else {}
    more |= {"instance_prompt": trigger} if trigger else {}
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        license=about.licence,
        language=languages_of(known) or None,
        base_model=bases or None,
        datasets=sorted({record.dataset for record in known if record.dataset}) or None,
        tags=tags,
        **more,
    )
    gallery = ["<Gallery />", ""] if widget else []
    return ["---", metadata.to_yaml(), "---", f"# {one_line(about.title)}", "", about.summary.strip(), "", *gallery]


def one_line(text: str) -> str:
    """A title as a heading takes it."""
    return " ".join(text.split())


def quoted(text: str) -> str:
    """A text as Python reads it; JSON's strings are Python's too."""
    return json.dumps(text, ensure_ascii=False)


def measured(records: Iterable[TrainingRecord | None]) -> list[str]:
    """What training itself measured at its end, on pictures that it did not see."""
    lines = []
    for record in records:
        last = record.curve[-1] if record is not None and record.curve else {}
        lines += [
            f"{name.replace('_', ' ').capitalize()} after {last['step']:,} steps: {value:.4g}."
            for name, value in last.items()
            if name.startswith("held_out")
        ]
    return lines


def describe_record(record: TrainingRecord, curve: str | None = None) -> list[str]:
    """Lines of Markdown: data, settings and curve, also as the picture `curve` if there is one."""
    sources = ", ".join(
        source["from"] + (f" ({source['license']})" if "license" in source else "")
        for source in record.data.get("sources", [])
    )
    shown = {key: value for key, value in record.settings.items() if value is not None}
    return [
        f"By `accelerate launch -m {record.script}` on {record.data['pictures']:,} pictures"
        + (f" from {sources}." if sources else "."),
        "",
        *([f"![The losses, by the step]({curve})", ""] if curve else []),
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


def draw_curve(curve: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draws the losses of a record as a PNG; false where there are fewer than two, or no matplotlib (extra `train`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    columns = dict.fromkeys(key for row in curve for key in row if "loss" in key)
    lines = {name: [(row["step"], row[name]) for row in curve if name in row] for name in columns}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    figure = Figure(figsize=(7, 3.5), layout="constrained")  # of its own: pyplot's figures are the program's
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


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
