"""The benchmark of the captioner, on few pictures for a moment."""

import json
from pathlib import Path

from tests.benchmarks import captioner
from tests.captioning.taught import NAMED


def test_the_benchmark_of_the_captioner_stores_what_it_measured(tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    rows = []
    for number, (caption, picture) in enumerate(NAMED.items()):
        picture.save(tmp_path / "data" / "train" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": caption}) + "\n")
    (tmp_path / "data" / "train" / "metadata.jsonl").write_text("".join(rows))
    small = {"base.width": 16, "base.layers": 2, "base.heads": 2, "base.image_size": 32, "validation.max_new_tokens": 8}
    results = captioner.run(tmp_path / "data", tmp_path / "out", tmp_path / "work", steps=1, **small)
    assert results["pictures"] == results["distinct_captions"] == results["recaption"]["captions"] == 8
    assert list(results["exact"]) == ["1"] and results["reached"] == (results["exact"]["1"] >= 0.9)
    assert sum(results["recaption"]["marks"].values()) == 8 and results["recaption"]["captions_per_second"] > 0
    assert json.loads((tmp_path / "out" / "captioner.json").read_text()) == results
