import importlib.util
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hubgen.cli import main
from hubgen.data.errors import DataError
from hubgen.data.pictures import decode_picture
from hubgen.data.web.embedding import duplicates, index
from hubgen.data.web.embedding.duplicates import near_duplicates
from hubgen.data.web.embedding.index import SearchIndex, build_index, nearest, unit
from hubgen.data.web.shards import Outcome, open_shards, read_table, write_shard, write_stats
from tests.benchmarks.search_index import KINDS, measure, stored, vectors_of
from tests.data.web.contrastive import save_model
from tests.data.web.site import file_of

PHOTOS = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "gradio": tuple(f"media_assets/images/{name}" for name in ("cheetah1.jpg", "groot.jpeg", "lion.jpg", "tower.jpg")),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}
"""Photographs that come with packages of the tests"""


def tiles(count: int) -> list[Image.Image]:
    """Different pictures: pieces of 64 x 64 of photographs, those with something to see."""
    found = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for name in names:
            photo = decode_picture((Path(spec.submodule_search_locations[0]) / name).read_bytes(), name).convert("RGB")
            for top in range(0, photo.height - 63, 64):
                for left in range(0, photo.width - 63, 64):
                    tile = photo.crop((left, top, left + 64, top + 64))
                    if np.asarray(tile.convert("L")).std() >= 20:
                        found.append(tile)
    return random.Random(0).sample(found, count)


def recompressed(picture: Image.Image, seed: int) -> bytes:
    """A JPEG of another size and quality."""
    chance = random.Random(seed)
    scale, quality = chance.choice((0.75, 1.0, 1.5, 2.0)), chance.choice((40, 60, 80))
    return file_of(picture.resize((round(64 * scale), round(64 * scale))), quality=quality)


@pytest.mark.parametrize("kind", ["clusters", "wide clusters"])
def test_at_least_95_of_100_neighbours_are_found(kind: str, tmp_path: Path) -> None:
    """20,000 vectors of 512 numbers, against a comparison with all; the questions are none of them."""
    found = measure(KINDS[kind], tmp_path)
    assert found["cells"] == 128 and found["probes"] >= 16
    assert found["recall"] >= 0.95
    if kind == "clusters":
        assert found["probes"] == 16


def test_small_indexes_compare_all_and_the_nearest_come_first(tmp_path: Path) -> None:
    vectors = vectors_of(None, 300, 16)
    made = build_index(stored(vectors, tmp_path / "embeddings"), tmp_path / "index")
    similarities, rows = made.search(3 * vectors[:5], 4)
    cosines = unit(vectors[:5]) @ unit(vectors).T
    assert np.array_equal(rows, np.argsort(-cosines, axis=1)[:, :4])
    assert np.allclose(similarities, -np.sort(-cosines, axis=1)[:, :4], atol=1e-6)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4] and len(made.search(vectors[:1], 999)[1][0]) == 300
    assert [row["key"] for row in made.shown(rows[2])] == [f"{row:09d}" for row in rows[2]]


def test_the_same_vectors_give_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "EXACT", 500)
    embeddings = stored(vectors_of(1.0, 2000, 16), tmp_path / "embeddings")
    for name in ("one", "two"):
        build_index(embeddings, tmp_path / name)
    for name in (index.VECTORS, index.ROWS, index.INFO):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    info = json.loads((tmp_path / "one" / index.INFO).read_text())
    assert info["embeddings"] == embeddings.digest() and info["recall"] >= 0.96


def test_exact_neighbours_do_not_depend_on_the_blocks_that_are_read(tmp_path: Path) -> None:
    vectors = vectors_of(None, 9000, 8)  # more than a block
    rows = nearest(unit(vectors[:20]), stored(vectors, tmp_path), 10)
    assert np.array_equal(rows, np.argsort(-(unit(vectors[:20]) @ unit(vectors).T), axis=1)[:, :10])


def test_indexes_that_cannot_be_searched_are_named(tmp_path: Path) -> None:
    vectors = vectors_of(None, 50, 16)
    embeddings = stored(vectors, tmp_path / "embeddings")
    made = build_index(embeddings, tmp_path / "index")
    with pytest.raises(DataError, match=r"index: got a question of shape \(1, 8\), expected vectors of 16 numbers"):
        made.search(vectors[:1, :8])
    with pytest.raises(DataError, match="embeddings: is there and is no index"):
        build_index(embeddings, tmp_path / "embeddings")
    with pytest.raises(DataError, match=r"none: got no readable index.json, expected an index"):
        SearchIndex.open(tmp_path / "none")
    (tmp_path / "index" / index.VECTORS).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"vectors.faiss: cannot be read"):
        SearchIndex.open(tmp_path / "index")
    shutil.copy(build_index(embeddings, tmp_path / "other").folder / index.VECTORS, tmp_path / "index")
    (tmp_path / "index" / index.INFO).write_text(json.dumps({**made.info, "vectors": 49}))
    with pytest.raises(DataError, match=r"vectors.faiss: got 50 vectors of 16, expected 49 of 16 as index.json says"):
        SearchIndex.open(tmp_path / "index")


def test_what_stays_is_apart_and_what_goes_is_near_something_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is the same with one block as with many, and with an index of cells."""
    vectors = vectors_of(0.5, 1500, 16)
    embeddings, cosines = stored(vectors, tmp_path), unit(vectors) @ unit(vectors).T
    found = near_duplicates(embeddings, 0.9)
    stays = found < 0
    apart = cosines[np.ix_(stays, stays)]
    assert 0 < stays.sum() < 1500 and (apart - np.eye(len(apart)) < 0.9).all()
    for row in np.flatnonzero(~stays):
        before = np.flatnonzero(stays[:row])
        assert found[row] == before[cosines[row, before].argmax()] and cosines[row, found[row]] >= 0.9 - 1e-6
    monkeypatch.setattr(duplicates, "BLOCK", 100)
    assert np.array_equal(near_duplicates(embeddings, 0.9), found)
    monkeypatch.setattr(index, "EXACT", 1000)  # 32 cells, of which 16 are looked into
    assert (near_duplicates(embeddings, 0.9) == found).mean() > 0.995
    assert (near_duplicates(stored(np.repeat(vectors[:3], 2, 0), tmp_path / "equal"), 1) == [-1, 0, -1, 2, -1, 4]).all()


def test_recompressed_pictures_are_marked_and_different_ones_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """100 pictures, their 100 recompressions and 100 different pictures in two shards; by the commands."""
    pictures = tiles(200)
    files = [file_of(one, quality=95) for one in pictures[:100]]
    files += [recompressed(one, seed) for seed, one in enumerate(pictures[:100])]
    files += [file_of(one, quality=95) for one in pictures[100:]]
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        part = files[150 * number :][:150]
        table = pa.table({"caption": ["a tile"] * 150})
        outcomes = [Outcome("success", None, file, 64, 64, 64, 64) for file in part]
        write_stats(shards / f"0000{number}_stats.json", write_shard(shards, number, 150, table, outcomes))
    seen, kept = tmp_path / "thumbnails", tmp_path / "kept"
    mark = ["data", "duplicates", str(shards), "--embeddings", str(seen)]
    assert main(["data", "embed", str(shards), "--model", "thumbnail", "--out", str(seen)]) == 0
    assert main([*mark, "--threshold", "0.95"]) == 0
    assert "100 of 300 rows are near-duplicates of an earlier one" in capsys.readouterr().out
    rows = [row for number in range(2) for row in read_table(shards / f"0000{number}.parquet").to_pylist()]
    keys = [row["key"] for row in rows]
    assert [row["duplicate_of"] for row in rows] == [None] * 100 + keys[:100] + [None] * 100
    assert main(["data", "filter", str(shards), "--where", "duplicate_of is null", "--out", str(kept)]) == 0
    left = [key for shard in open_shards(kept) for key in shard.read(["key"]).column("key").to_pylist()]
    assert left == keys[:100] + keys[200:]
    assert main([*mark, "--threshold", "0.9"]) == 2
    assert "was made with " in capsys.readouterr().err
    few = stored(vectors_of(None, 3, 8), tmp_path / "few").folder
    assert main(["data", "duplicates", str(kept), "--embeddings", str(few)]) == 2
    assert "got no vector for the key 00000000 of" in capsys.readouterr().err


def test_pictures_are_found_by_a_picture_and_by_a_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = f"clip:{save_model('clip', tmp_path / 'clip')}"
    shards, out, made = tmp_path / "shards", tmp_path / "out", tmp_path / "index"
    shards.mkdir()
    shown = tiles(6)
    table = pa.table({"caption": [f"tile\t{n}" for n in range(6)], "url": [f"http://a/{n}" for n in range(6)]})
    outcomes = [Outcome("success", None, file_of(one, "PNG"), 64, 64, 64, 64) for one in shown]
    write_stats(shards / "00000_stats.json", write_shard(shards, 0, 6, table, outcomes, ending="png"))
    shown[4].save(tmp_path / "asked.png")
    assert main(["data", "embed", str(shards), "--model", model, "--out", str(out), "--device", "cpu"]) == 0
    assert main(["data", "index", str(out), "--out", str(made)]) == 0
    assert f"{made}: 6 vectors of 8 numbers; all are compared" in capsys.readouterr().out
    ask = ["data", "search", str(made), "--device", "cpu", "--k", "3"]
    assert main([*ask, "--image", str(tmp_path / "asked.png")]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["000004", "1.0000", "tile 4", "http://a/4"] and len(lines) == 3
    assert main([*ask, "--text", "a red cat"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    problems = {
        ("--text", "a", "--model", "conse"): "--model conse: makes vectors of 384 numbers, expected 8 as",
        ("--text", "a", "--model", "clip:no/model"): "clip:no/model: cannot be loaded (",
        ("--image", "none.png"): "none.png: No such file",
    }
    for words, problem in problems.items():
        assert main([*ask, *words]) == 2
        assert problem in capsys.readouterr().err
