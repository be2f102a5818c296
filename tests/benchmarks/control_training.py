"""Do controls learn? ControlNets, an IP-Adapter and an editor, trained for minutes on the bundled model.

    python -m tests.benchmarks.control_training [--data DIR] [--output DIR] [--work DIR] [--rows NAME ...] [--steps N]

Each row is a run of the script of its kind on the training pictures: 200 steps of 32, learning rate 0.001, one seed,
prompts empty but for the editor's instructions, so that what is learnt comes from the control alone. (Resumable, in
`--work`.)
Then on held-out pictures, at the same noise and times, the flow loss of three questions:

- *none*: the base, which is shown nothing;
- *right*: with the control, shown what belongs to the picture: its hint, itself, or the picture before the edit;
- *shuffled*: with the control, shown what belongs to another picture.

For the editor also *wrong*: the right picture and another edit's instruction. What is asked of the ratios stands in
`ROWS`. Stored: control_training.json, control_training.md, and the last validation grid of each run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

import hubgen
from hubgen.conditioning.predict import predict
from hubgen.data.edits import write_edits
from hubgen.data.order import Draw, generator_of
from hubgen.hub.bundled import bundled_model
from hubgen.schedulers.objective import objective_of
from hubgen.training import train_controlnet, train_instruct_pix2pix, train_ip_adapter
from hubgen.training.kit.beside import Hints, Originals, Seen
from hubgen.training.kit.conditioned import PromptedPictures
from hubgen.training.kit.controlled import (
    Controlled,
    Editing,
    WithControlNet,
    WithPicture,
    adapter_for,
    image_encoder_for,
    made_editor,
    net_for,
)
from hubgen.training.kit.hints import COLUMN, with_hints
from hubgen.training.kit.parse import parse_settings
from hubgen.training.kit.run import Run
from tests.benchmarks import report

RESULTS = Path(__file__).parent / "results" / "control_training"
SIGMAS = (0.5, 0.8)
BATCH = 32
COMMON = {
    "data.size": "64",
    "optim.learning_rate": "0.001",
    "optim.lr_warmup_steps": "0",
    "optim.ema_decay": "none",
    "run.batch_size": str(BATCH),
    "run.seed": "0",
    "run.report_to": "none",
    "run.checkpoint_steps": "50",
    "validation.steps": "100000",
    "publish.dtype": "float32",
}


@dataclass(frozen=True)
class Bound:
    """What is asked of a ratio of two losses."""

    first: str
    second: str
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        asked = f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"
        return f"{self.first} / {self.second} {asked}"

    def ratio(self, losses: Mapping[str, float]) -> float:
        """Of the losses of a row."""
        return losses[self.first] / losses[self.second]

    def holds(self, losses: Mapping[str, float]) -> bool:
        """Whether it is reached."""
        ratio = self.ratio(losses)
        return (self.at_most is None or ratio <= self.at_most) and (self.at_least is None or ratio >= self.at_least)


@dataclass(frozen=True)
class Row:
    """A run."""

    script: Any
    settings: Mapping[str, str]
    bounds: Sequence[Bound]


HINTED = {"data.caption_dropout": "1.0"}
ROWS = {
    "ControlNet, colours of 8x8 places": Row(
        train_controlnet,
        {**HINTED, "data.hint": "color", "data.hint_options": "{cells: 8}"},
        [Bound("right", "none", at_most=0.75), Bound("shuffled", "none", at_least=1.3)],
    ),
    "ControlNet, edges": Row(
        train_controlnet,
        {**HINTED, "data.hint": "canny"},
        [Bound("right", "none", at_most=0.95), Bound("right", "shuffled", at_most=0.9)],
    ),
    "IP-Adapter": Row(
        train_ip_adapter,
        {**HINTED, "adapter.image_encoder": "latents", "adapter.init": "zero"},
        [Bound("right", "none", at_most=0.9), Bound("shuffled", "right", at_least=1.2)],
    ),
    "InstructPix2Pix, four edits": Row(
        train_instruct_pix2pix,
        {},
        [Bound("right", "none", at_most=0.6), Bound("wrong", "right", at_least=1.3)],
    ),
}


def folder_of(name: str) -> str:
    """Of a row's files."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).replace("--", "-")


def arguments_of(row: Row, data: Path, output: Path, steps: int) -> list[str]:
    """The command line of a row's run."""
    options = {**COMMON, **row.settings, "data.source": str(data), "run.output_dir": str(output)}
    options["run.max_train_steps"] = str(steps)
    return [text for name, value in options.items() for text in (f"--{name}", value)]


def train(row: Row, data: Path, output: Path, steps: int) -> float:
    """Runs a row's script, or what is left of it; the seconds of this call."""
    module = row.script.__name__
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *arguments_of(row, data, output, steps)], check=True)
    return time.perf_counter() - begun


# ---- what is measured ----


@dataclass(frozen=True)
class Trained:
    """A control that was trained, with held-out pictures."""

    base: Any
    """The pipeline without it"""
    learner: Controlled
    pictures: PromptedPictures


def opened(row: Row, data: Path, output: Path, steps: int) -> Trained:
    """The result of a row's run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    s = parse_settings(row.script.Settings, arguments_of(row, data, output / "measured", steps))
    run = Run(s.run)
    base = hubgen.TextToImagePipeline.from_pretrained(bundled_model()).to(dtype=torch.float32)
    empty = None if row.script is train_instruct_pix2pix else ""

    def held_out(pipe: Any) -> PromptedPictures:
        return PromptedPictures(pipe, s.data, "held_out", run, train=False, prompt=empty)

    learner: Controlled
    if row.script is train_controlnet:
        pictures = held_out(base)
        with_hints(pictures.pictures, s.data)
        learner = WithControlNet(base, net_for(base, str(output / "controlnet"), s.network))
        pictures.beside = Hints(base, pictures.pictures, COLUMN, learner.kind)
    elif row.script is train_ip_adapter:
        pictures = held_out(base)
        encoder, extractor = image_encoder_for(base, s.adapter, s.data.size)
        file = output / "ip_adapter" / train_ip_adapter.FILE
        adapter = adapter_for(base, str(file), s.adapter, encoder)
        learner = WithPicture(base, adapter)
        pictures.beside = Seen(pictures.pictures, encoder, extractor, adapter)
    else:
        pipe = hubgen.TextToImagePipeline.from_pretrained(output / "pipeline")
        kind = made_editor(pipe)
        pictures = held_out(pipe)
        learner = Editing(pipe)
        pictures.beside = Originals(pipe, pictures.pictures, s.data.original_column, kind)
    learner.eval().requires_grad_(False)
    base.backbone.eval().requires_grad_(False)
    pictures.encode(None)
    return Trained(base, learner, pictures)


@torch.no_grad()
def losses_of(trained: Trained, most: int) -> dict[str, float]:
    """The mean losses over pictures and `SIGMAS`, by question."""
    pictures, learner = trained.pictures, trained.learner
    count = min(most, len(pictures.pictures))
    objective = objective_of(trained.base.scheduler)
    wordings = sorted(set(pictures.captions.all()) - {""})
    sums: dict[str, float] = {}
    for first in range(0, count, BATCH):
        rows = list(range(first, min(first + BATCH, count)))
        x_0, condition, beside = pictures.measured([Draw(row, row) for row in rows])
        # Half of all further on, so that it is another picture's, also where each has several rows.
        others = [Draw(row, row) for row in ((row + count // 2) % count for row in rows)]
        _, _, shuffled = pictures.measured(others)
        questions: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
            "right": lambda x, t, beside=beside, condition=condition: learner(x, t, condition, beside),
            "shuffled": lambda x, t, beside=shuffled, condition=condition: learner(x, t, condition, beside),
        }
        nothing = type(condition).of_text(pictures.texts([""] * len(rows), x_0.device))
        questions["none"] = lambda x, t, nothing=nothing: predict(trained.base.backbone, x, t, nothing)
        if len(wordings) > 1:
            told = [wordings.index(pictures.captions.first(row)) for row in rows]
            wrong = [wordings[(number + 1) % len(wordings)] for number in told]
            other = type(condition).of_text(pictures.texts(wrong, x_0.device))
            questions["wrong"] = lambda x, t, beside=beside, other=other: learner(x, t, other, beside)
        for place, sigma in enumerate(SIGMAS):
            noise = [torch.randn(x_0.shape[1:], generator=generator_of(0, row, f"noise {place}")) for row in rows]
            sample = objective.path.sample(x_0, torch.stack(noise), torch.full((len(rows),), sigma))
            for name, ask in questions.items():
                with nullcontext() if name == "none" else learner.looking():
                    prediction = ask(sample.x_t, objective.timestep(sample))
                error = (prediction - sample.target).square().mean(dim=(1, 2, 3)).sum().item()
                sums[name] = sums.get(name, 0.0) + error / (count * len(SIGMAS))
    return sums


def measured(name: str, data: Path, work: Path, output: Path, steps: int, most: int) -> dict[str, Any]:
    """A row: trained, measured, its grid stored."""
    row, folder = ROWS[name], work / folder_of(name)
    source = data
    if row.script is train_instruct_pix2pix:
        source = work / "edits"
        write_edits(data, source)
    seconds = train(row, source, folder, steps)
    trained = opened(row, source, folder, steps)
    losses = losses_of(trained, most)
    grid = max((folder / "validation").glob("step-*.png"))
    output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(grid, output / f"{folder_of(name)}.png")
    return {
        "losses": losses,
        "parameters": sum(one.numel() for one in trained.learner.learns.parameters()),
        "seconds": seconds,
        "steps": steps,
        "pictures": min(most, len(trained.pictures.pictures)),
        "asked": [
            {"what": str(bound), "ratio": bound.ratio(losses), "reached": bound.holds(losses)} for bound in row.bounds
        ],
    }


def page(content: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    table, grids = [], []
    for name, row in content["rows"].items():
        losses = [f"{row['losses'][key]:.3f}" if key in row["losses"] else "" for key in QUESTIONS]
        asked = "; ".join(
            f"{one['what']}: {one['ratio']:.2f}{'' if one['reached'] else ' (not reached)'}" for one in row["asked"]
        )
        table.append([name, f"{row['parameters']:,}", *losses, f"{row['seconds'] / 60:.0f}", asked])
        grids += [f"{name}:", "", f"![what is shown, and what is drawn]({folder_of(name)}.png)", ""]
    head = ["", "numbers", *QUESTIONS, "minutes", "asked: found"]
    environment = ", ".join(f"{name} {value}" for name, value in content["environment"].items())
    steps = sorted({row["steps"] for row in content["rows"].values()})
    return (
        "# Do controls learn?\n\nWritten by `python -m tests.benchmarks.control_training`: controls of the bundled "
        f"model, {' or '.join(map(str, steps))} steps of {BATCH} pictures, and the flow loss on held-out pictures at "
        f"sigma {' and '.join(map(str, SIGMAS))}.\n\n{report.markdown_table(head, table)}\n"
        + "\n".join(grids)
        + f"\n{environment}\n"
    )


QUESTIONS = ("none", "right", "shuffled", "wrong")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and stores, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/fluent"), help="built by `hubgen data emoji`")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=None, help="where the runs are, so that they can go on")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=256, help="held-out ones, at most (default: %(default)s)")
    arguments = parser.parse_args(argv)
    stored = arguments.output / "control_training.json"
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        rows = json.loads(stored.read_text(encoding="utf-8"))["rows"] if stored.is_file() else {}
        for name in arguments.rows:
            rows[name] = measured(
                name, arguments.data.resolve(), work, arguments.output, arguments.steps, arguments.pictures
            )
            ordered = {known: rows[known] for known in ROWS if known in rows}
            content = {"rows": ordered, "environment": report.environment()}
            report.write_json(stored, content)
            report.write_text(arguments.output / "control_training.md", page(content))
    print(page(content))


if __name__ == "__main__":
    main()
