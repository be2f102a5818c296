"""Does a captioner learn, and how fast does it caption? 64 emoji, a small Llava from scratch, 300 steps.

    python -m tests.benchmarks.captioner [--data DIR] [--output DIR] [--work DIR] [--steps N]

64 emoji, taken evenly from the training pictures, are taught by `hubgen.training.train_captioner` (stage `pretrain`,
2 million numbers, patches of 16 pixels, 64 pictures a step, AdamW at 0.001). Every 100 steps: which share of the
captions that it writes for them is right word for word. Then a folder of shards of the same pictures is recaptioned
(`hubgen.data.web.recaption`), and timed. Stored: captioner.json. What is asked: 0.9 after 300 steps.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate.state import AcceleratorState

from hubgen.captioning.captioner import open_captioner
from hubgen.data.web.engines.engine import run as run_stage
from hubgen.data.web.recaption import MARKS, Recaption
from hubgen.data.web.shards import STATS, SUCCESS, Outcome, open_shards, shard_name, write_shard, write_stats
from hubgen.training.kit.parse import parse_settings
from hubgen.training.train_captioner import Settings
from hubgen.training.train_captioner import main as train
from tests.benchmarks import report

RESULTS = Path(__file__).parent / "results" / "web_data"
PICTURES, BATCH, RATE, SHARDS = 64, 64, 1e-3, 4
ASKED = 0.9


def run(data: Path, output: Path, work: Path, steps: int = 300, **changes: Any) -> dict[str, Any]:
    """Trains, measures and stores.

    Args:
        data: An image-text folder with the split `train`.
        output: Where captioner.json goes.
        work: Where the run goes.
        steps: Of the training.
        changes: Further settings, by dotted name.
    """
    rows = chosen(data / "train", work / "data" / "train")
    settings = {
        "data.source": work / "data",
        "run.output_dir": work / "run",
        "run.batch_size": min(BATCH, len(rows)),
        "run.max_train_steps": steps,
        "run.report_to": "none",
        "run.log_steps": 50,
        "optim.learning_rate": RATE,
        "optim.lr_warmup_steps": 10,
        "validation.split": "train",
        "validation.steps": max(steps // 3, 1),
        "validation.max_new_tokens": 48,
        **changes,
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    begun = time.perf_counter()
    train(parse_settings(Settings, [f"--{name}={value}" for name, value in settings.items()]))
    seconds = time.perf_counter() - begun
    lines = map(json.loads, (work / "run" / "metrics.jsonl").read_text().splitlines())
    measured = [row for row in lines if "held_out_exact" in row]
    captioner = open_captioner(work / "run" / "captioner")
    results = {
        "environment": report.environment(),
        "pictures": len(rows),
        "distinct_captions": len({row["text"] for row in rows}),
        "parameters": sum(one.numel() for one in captioner.model.parameters()),
        "image_tokens": captioner.image_tokens,
        "batch_size": settings["run.batch_size"],
        "steps": steps,
        "training_seconds": round(seconds, 1),
        "exact": {str(row["step"]): round(row["held_out_exact"], 4) for row in measured},
        "loss": {str(row["step"]): round(row["held_out_loss"], 4) for row in measured},
        "asked": ASKED,
        "reached": measured[-1]["held_out_exact"] >= ASKED,
        "recaption": recaptioned(rows, work),
    }
    report.write_json(output / "captioner.json", results)
    return results


def chosen(source: Path, target: Path) -> list[dict[str, Any]]:
    """Copies `PICTURES` rows, taken evenly, or all if there are fewer; gives them."""
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    count = min(PICTURES, len(rows))
    taken = [rows[number * len(rows) // count] for number in range(count)]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    kept = [{"file_name": row["file_name"], "text": row["text"]} for row in taken]
    for row in kept:
        shutil.copyfile(source / row["file_name"], target / row["file_name"])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    (target / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return kept


def recaptioned(rows: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    """Captions of the same pictures in shards, by one process: how many are right, and how many it writes a second."""
    folder = work / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    size = -(-len(rows) // SHARDS)
    for number in range(SHARDS):
        part = rows[number * size : (number + 1) * size]
        outcomes = [Outcome(SUCCESS, picture=(work / "data" / "train" / row["file_name"]).read_bytes()) for row in part]
        table = pa.table({"caption": [row["text"] for row in part], "url": [row["file_name"] for row in part]})
        stats = write_shard(folder, number, size, table, outcomes, digest=None, ending="png")
        write_stats(folder / f"{shard_name(number)}{STATS}", stats)
    stage = Recaption.of(str(work / "run" / "captioner"), max_new_tokens=48)
    report_of_run = run_stage(stage, stage.works(open_shards(folder)), folder)
    assert not report_of_run.failed, report_of_run.failed
    works, begun = stage.works(open_shards(folder)), time.perf_counter()
    stage.setup()
    loaded = time.perf_counter()
    with tempfile.TemporaryDirectory() as again:
        for one in works:
            stage(one, Path(again))
    seconds = time.perf_counter() - loaded
    stage.close()
    written = [row for shard in open_shards(folder) for row in shard.read(["caption", "synthetic_caption"]).to_pylist()]
    marks = Counter[str]()
    for shard in open_shards(folder):
        marks.update(shard.stats[MARKS])
    return {
        "captions": len(written),
        "exact": round(sum(row["caption"] == row["synthetic_caption"] for row in written) / len(written), 4),
        "marks": dict(marks),
        "engine": "local, 1 worker, greedy, 16 at a time",
        "seconds_to_load": round(loaded - begun, 2),
        "captions_per_second": round(len(written) / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/fluent"), help="built by `hubgen data emoji`")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="folder of the run, resumable (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = run(options.data, options.output, options.work or Path(temporary), options.steps)
    print(json.dumps({name: value for name, value in results.items() if name != "environment"}, indent=2))


if __name__ == "__main__":
    main()
