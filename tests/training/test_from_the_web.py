"""From pages of a crawl to a model: the README's commands, one after the other, on a site of this machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from hubgen.cli import main
from hubgen.data.captions import SYNTHETIC
from hubgen.data.pictures import on_white, read_picture
from hubgen.data.web.shards import open_shards
from hubgen.training import train_captioner
from hubgen.training.kit.parse import parse_settings
from tests.data.web.site import file_of, picture, reply, serving
from tests.data.web.wats import WebPage, image, write_wat
from tests.training.conftest import COLORS

pytestmark = pytest.mark.slow

STAMPS = Path("/usr/share/tuxpaint/stamps/animals")
"""Of Debian's package tuxpaint-stamps-default, photographs with a sentence each"""
COUNT = 24
STEPS = 20


def captioned() -> dict[str, bytes]:
    """Captions and the bytes of their pictures: Tux Paint's stamps, or where they are not installed noise."""
    found: dict[str, bytes] = {}
    for text in sorted(STAMPS.rglob("*.txt")):
        caption, file = text.read_text(encoding="utf-8").splitlines()[0].strip(), text.with_suffix(".png")
        if file.is_file() and len(caption) >= 5:
            found.setdefault(caption, file_of(on_white(read_picture(file))))
        if len(found) == COUNT:
            return found
    names = [f"a {COLORS[number % 3]} cloth that hangs in house number {number}" for number in range(COUNT)]
    return {name: file_of(picture(96, 80, seed=number)) for number, name in enumerate(names)}


def run(*command: Any) -> None:
    assert main(["data", *map(str, command)]) == 0


def teach(shards: Path, output: Path) -> None:
    """Trains a captioner of a few hundred thousand numbers on what was kept."""
    settings = {
        "data.source": shards,
        "base.image_size": 32,
        "base.width": 64,
        "base.layers": 2,
        "base.heads": 2,
        "base.vocabulary": 400,
        "optim.learning_rate": 3e-3,
        "run.output_dir": output,
        "run.batch_size": 18,
        "run.max_train_steps": 240,
        "run.report_to": "none",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    train_captioner.main(parse_settings(train_captioner.Settings, arguments))


def test_pages_become_a_model_by_the_commands_of_the_readme(
    recipe: dict[str, Any], train: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    pictures = captioned()
    paths = {f"/{number}.jpg": caption for number, caption in enumerate(pictures)}
    answers = {path: reply(pictures[caption]) for path, caption in paths.items()}
    crawl, cand, shards, kept = (tmp_path / name for name in ("crawl.wat.gz", "cand", "shards", "kept"))
    with serving(answers) as site:
        links = [image(path, caption) for path, caption in paths.items()]
        links += [image("/sign.gif", "a picture that no recipe wants"), image("/0.jpg", "no")]
        write_wat(crawl, [WebPage(site.url("/page.html", "localhost"), links)])
        run("crawl", crawl, "--recipe", "laion-5b", "--out", cand)
        run("download", cand, "--size", 32, "--resize", "center_crop", "--rows", 10, "--out", shards,
            "--allow-host", "localhost")  # fmt: skip
    run("score", shards, "--scorer", "conse")
    (scores,) = [[row["conse_similarity"] for shard in open_shards(shards) for row in shard.read().to_pylist()]]
    assert len(scores) == COUNT and all(-1 <= score <= 1 for score in scores)
    least = sorted(scores)[COUNT // 4]
    run("filter", shards, "--where", f"conse_similarity >= {least!r}", "--out", kept)
    assert sum(shard.stats["successes"] for shard in open_shards(kept)) == sum(score >= least for score in scores)
    report = json.loads((kept / "report.json").read_text())
    assert report["dropped"] and sum(report["dropped"].values()) == sum(score < least for score in scores)

    teach(kept, tmp_path / "runs")
    run("recaption", kept, "--model", tmp_path / "runs" / "captioner", "--max-tokens", 40)
    rows = [row for shard in open_shards(kept) for row in shard.read().to_pylist() if row["status"] == "success"]
    assert all((row[SYNTHETIC] is None) == (row["caption_status"] != "ok") for row in rows)
    assert any(row[SYNTHETIC] for row in rows)

    settings = {"data.source": str(kept), "data.synthetic_captions": 0.5, "run.max_train_steps": STEPS}
    run_dir = train({**recipe, **settings})
    losses = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in losses) == STEPS
    assert (run_dir / "pipeline" / "model_index.json").is_file()
