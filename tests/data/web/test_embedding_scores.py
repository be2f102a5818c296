"""Scores of vectors: those of real tiny models, and given ones of which the answer is known."""

import json
import pickle
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from hubgen.data.errors import DataError
from hubgen.data.pictures import decode_picture
from hubgen.data.web.embedding.embedders import Embedder, embedder
from hubgen.data.web.embedding.embeddings import Embed
from hubgen.data.web.engines.engine import run
from hubgen.data.web.filtering.filters import Filter
from hubgen.data.web.rules import load_recipe
from hubgen.data.web.scoring.embedding_scores import EmbeddingScores, Live, Stored, unit
from hubgen.data.web.scoring.heads import read_head
from hubgen.data.web.scoring.scores import Score
from hubgen.data.web.scoring.tags import ANIMALS, NSFW, PROMPTS, UNDER_AGE, Tags
from hubgen.data.web.shards import open_shards
from hubgen.formats.digests import file_digest
from tests.benchmarks.conse import STAMPS, measured
from tests.data.web.contrastive import save_model
from tests.data.web.pairs import write_pairs


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return embedder(f"clip:{save_model('clip', tmp_path_factory.mktemp('clip'))}", "cpu")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    captions = ["a red cat", "a big dog", None, " ", "a heart"]
    return write_pairs(tmp_path / "shards", {"caption": captions}, {"caption": ["an apple"]}, failed={(0, 1)})


def scored(folder: Path, scores: EmbeddingScores) -> None:
    shards = open_shards(folder)
    stage = pickle.loads(pickle.dumps(Score((scores,))))  # as an engine sends it
    report = run(stage, stage.works(shards), folder)
    if report.failed:
        raise DataError(next(iter(report.failed.values())))


def columns(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [row for shard in open_shards(folder) for row in shard.read(names).to_pylist()]


def given(folder: Path, *parts: tuple[Any, Any], keys: list[list[str]], embedder: str = "clip:given") -> Path:
    """A folder as `hubgen data embed` writes it: vectors of pictures and of captions, for each shard."""
    folder.mkdir(parents=True)
    for number, ((pictures, texts), own) in enumerate(zip(parts, keys, strict=True)):
        np.save(folder / f"{number:05d}.npy", np.asarray(pictures, np.float32))
        np.save(folder / f"{number:05d}.text.npy", np.asarray(texts, np.float32))
        pa.parquet.write_table(pa.table({"key": own}), folder / f"{number:05d}.parquet")
        settings = {"embedder": embedder, "texts": True, "stored": "float32"}
        record = {"stage": "embed", "input": "", "settings": settings, "output": ""}
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": len(own), "stages": [record]}))
    return folder


# ---- similarity ----


def test_similarity_is_the_cosine_of_picture_and_caption(pairs: Path, clip: Embedder) -> None:
    scored(pairs, EmbeddingScores(Live(clip)))
    clip.setup()
    rows = columns(pairs, "similarity", "caption", "offset", "size", "key")
    for row in rows:
        if row["offset"] is None or not (row["caption"] or "").strip():
            assert row["similarity"] is None
        else:
            shard = open_shards(pairs)[int(row["key"]) // 10]
            picture = decode_picture(shard.picture(row["offset"], row["size"]), "it")
            cosine = float((clip.pictures([picture]) @ clip.texts([row["caption"]]).T)[0, 0])
            assert row["similarity"] == pytest.approx(cosine, abs=1e-5)
    assert [row["similarity"] is None for row in rows] == [False, True, True, True, False, False]
    assert open_shards(pairs)[0].read().schema.field("similarity").type == pa.float32()
    assert open_shards(pairs)[0].stats["scored"] == {"similarity": 2}


@pytest.mark.parametrize(("texts", "dtype", "error"), [(True, "float32", 1e-6), (False, "float16", 1e-3)])
def test_stored_vectors_give_the_scores_of_live_ones(
    texts: bool, dtype: str, error: float, pairs: Path, clip: Embedder, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(pairs, again)
    shards = open_shards(pairs)
    stage = Embed(clip, texts, dtype)
    assert run(stage, stage.works(shards), tmp_path / "vectors").failed == {}
    scored(pairs, EmbeddingScores(Live(clip), tags=True))
    scored(again, EmbeddingScores(Stored(tmp_path / "vectors"), tags=True))
    names = ("similarity", "nsfw", "under_age_prompts", "animal_prompts")
    for live, stored in zip(columns(pairs, *names), columns(again, *names), strict=True):
        assert live.pop("similarity") == pytest.approx(stored.pop("similarity"), abs=error)
        assert live == stored


@pytest.mark.parametrize(
    ("recipe", "language", "kept"),
    [
        ("laion-5b", "en", [0.28, 0.2801]),
        ("laion-5b", "de", [0.26, 0.2601, 0.2799, 0.28, 0.2801]),
        ("laion-5b", "", [0.26, 0.2601, 0.2799, 0.28, 0.2801]),
        ("laion-400m", "en", [0.3, 0.3001]),
    ],
)
def test_given_vectors_stay_from_the_recipes_threshold_on(
    recipe: str, language: str, kept: list[float], tmp_path: Path
) -> None:
    asked = [0.2599, 0.26, 0.2601, 0.2799, 0.28, 0.2801, 0.2999, 0.3, 0.3001]
    if recipe == "laion-5b":
        asked = asked[:6]
    count = len(asked)
    rows = {"language": [language] * count, "nsfw": ["UNLIKELY"] * count, "under_age_prompts": [[0, 1]] * count,
            "animal_prompts": [[22, 23]] * count}  # fmt: skip
    source = write_pairs(tmp_path / "shards", rows)
    keys = [shard.read(["key"]).column("key").to_pylist() for shard in open_shards(source)]
    pictures = np.tile(np.eye(2)[0], (count, 1))
    texts = np.stack([asked, np.sqrt(1 - np.square(asked))], axis=1)
    scored(source, EmbeddingScores(Stored(given(tmp_path / "vectors", (pictures, texts), keys=keys))))
    assert [row["similarity"] for row in columns(source, "similarity")] == [float(np.float32(one)) for one in asked]
    shards = open_shards(source)
    stage = Filter.of(shards, recipe=load_recipe(recipe))
    run(stage, stage.works(shards), tmp_path / "kept")
    stayed = [row["similarity"] for row in columns(tmp_path / "kept", "similarity")]
    assert stayed == pytest.approx(kept, abs=1e-7) and len(stayed) == len(kept)


def test_a_cosine_of_another_model_is_no_similarity(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "shards", {"caption": ["a"]})
    vectors = given(tmp_path / "vectors", ([[1, 0]], [[0, 1]]), keys=[["000000"]], embedder="conse")
    scored(source, EmbeddingScores(Stored(vectors)))
    assert columns(source, "conse_similarity") == [{"conse_similarity": 0.0}]
    assert "similarity" not in open_shards(source)[0].read().column_names
    with pytest.raises(DataError, match="tags: got the scorer conse, expected a CLIP"):
        EmbeddingScores(Stored(vectors), tags=True)


def test_a_picture_that_cannot_be_decoded_has_no_score(pairs: Path, clip: Embedder) -> None:
    row = columns(pairs, "offset", "size")[4]
    with (pairs / "00000.tar").open("r+b") as file:
        file.seek(row["offset"])
        file.write(bytes(row["size"]))
    scored(pairs, EmbeddingScores(Live(clip), tags=True))
    assert [row["nsfw"] is None for row in columns(pairs, "nsfw")] == [False, True, False, False, True, False]


def test_vectors_of_halves_are_brought_to_length_1_and_others_stay() -> None:
    whole = np.float32([[0.28, np.sqrt(1 - 0.28**2)], [0.6, 0.8]])
    assert (unit(whole, "it") == whole).all()
    assert np.allclose(np.linalg.norm(unit(whole.astype(np.float16), "it"), axis=1), 1, atol=1e-6)
    with pytest.raises(DataError, match="it: got a vector of length 0 in row 1, expected length 1"):
        unit(np.float32([[1, 0], [0, 0]]), "it")


@pytest.mark.parametrize(
    ("pictures", "keys", "said"),
    [
        ([[1, 0]], ["000000"], "00000.npy: got 1 vectors, expected 2, the pictures of"),
        ([[1, 0], [0, np.nan]], ["000000", "000001"], "00000.npy: got nan in row 1, expected finite numbers"),
        ([[1, 0], [0, 1]], ["000000", "000002"], "got the key 000002, expected 000001, the next picture of"),
        ([[1, 0], [0, 0]], ["000000", "000001"], "got a vector of length 0 in row 1"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(pictures: Any, keys: list[str], said: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "shards", {"caption": ["a", "b", "c"]}, failed={(0, 2)})
    vectors = given(tmp_path / "vectors", (pictures, pictures), keys=[keys])
    with pytest.raises(DataError) as caught:
        scored(source, EmbeddingScores(Stored(vectors)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_vectors_of_another_dimension_or_model_are_refused(pairs: Path, clip: Embedder, tmp_path: Path) -> None:
    keys = [["000000", "000002", "000003", "000004"], ["000010"]]
    vectors = given(tmp_path / "a", ([[1, 0]] * 4, [[1, 0]] * 4), ([[1, 0, 0]], [[1, 0, 0]]), keys=keys)
    with pytest.raises(DataError, match="00001.npy: got vectors of 3 numbers, expected 2"):
        Stored(vectors)
    vectors = given(tmp_path / "b", ([[1, 0]] * 4, [[1, 0]] * 4), ([[1, 0]], [[1, 0]]), keys=keys, embedder=clip.name)
    with pytest.raises(DataError, match="b: was made with dtype None, and here it is float32"):
        EmbeddingScores(Stored(vectors), tags=True)  # whose prompts need the model
    vectors = given(tmp_path / "c", ([[1, 0]] * 4, [[1, 0]] * 4), keys=keys[:1])
    with pytest.raises(DataError, match="c: got no 00001.npy, expected the vectors of"):
        scored(pairs, EmbeddingScores(Stored(vectors)))


@pytest.mark.slow
@pytest.mark.skipif(not STAMPS.is_dir(), reason="needs Debian's tuxpaint-stamps-default")
def test_conse_finds_the_pictures_of_captions() -> None:
    found = measured(STAMPS)
    assert found["captions"] == 403 and found["picture_of_caption"]["R@5"] >= 0.35


# ---- tags ----


def test_the_tag_follows_from_the_two_nearest_prompts_and_prompt_18_is_unsafe(tmp_path: Path) -> None:
    prompts = np.eye(len(PROMPTS), dtype=np.float32)
    under_age, animal = len(NSFW), len(NSFW) + len(UNDER_AGE)
    cases = {  # the two nearest of the 35: what follows
        (3, 17): ("UNLIKELY", "a child", True),
        (17, 18): ("UNSURE", "a child", False),
        (18, 0): ("UNSURE", "a beach", True),
        (34, 18): ("NSFW", "a beach", True),
        (20, 30): ("NSFW", "a teen", False),
    }
    pictures = np.zeros((len(cases), len(PROMPTS)), np.float32)
    for row, (first, second) in enumerate(cases):
        pictures[row, [first, second]] = 0.6, 0.5
        pictures[row, [under_age + 5, under_age + 4, animal + 1, animal + 20]] = 0.3, 0.2, 0.3, 0.2
    found = Tags(prompts).columns(pictures)
    assert found["nsfw"] == [tag for tag, _, _ in cases.values()]
    assert found["under_age_prompts"] == [[5, 4]] * 5 and found["animal_prompts"] == [[1, 20]] * 5
    rows = {
        **found,
        "similarity": [0.5] * 5,
        "language": ["en"] * 5,
        "caption": [text for _, text, _ in cases.values()],
    }
    shards = open_shards(write_pairs(tmp_path / "shards", rows))
    stage = Filter.of(shards, recipe=load_recipe("laion-400m"))
    run(stage, stage.works(shards), tmp_path / "kept")
    keys = [row["key"] for row in columns(tmp_path / "kept", "key")]
    assert keys == [f"{row:06d}" for row, (_, _, stays) in enumerate(cases.values()) if stays]


def test_there_are_as_many_prompts_as_laion_had() -> None:
    assert (len(NSFW), len(UNDER_AGE), len(ANIMALS)) == (35, 8, 33)
    assert NSFW[17] == "talk show" and NSFW[18].startswith("porn") and "insect, fashion" in NSFW[5]
    assert UNDER_AGE[3] == "baby, toddler" and ANIMALS[21] == "animal"


# ---- heads ----


def aesthetic(dimension: int) -> dict[str, torch.Tensor]:
    """LAION's second predictor, with other numbers: linear layers with dropout between some."""
    sides = [dimension, 1024, 128, 64, 16, 1]
    made = torch.Generator().manual_seed(0)
    state = {}
    for place, (before, after) in zip((0, 2, 4, 6, 7), pairwise(sides), strict=True):
        state[f"layers.{place}.weight"] = torch.randn(after, before, generator=made) / before**0.5
        state[f"layers.{place}.bias"] = torch.randn(after, generator=made)
    return state


def sequential(*layers: torch.nn.Module) -> torch.nn.Module:
    whole = torch.nn.Module()
    whole.layers = torch.nn.Sequential(*layers)
    return whole.eval()


def test_heads_are_the_networks_that_their_files_are_of(tmp_path: Path) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), dim=-1)
    layer, relu, dropout = torch.nn.Linear, torch.nn.ReLU, torch.nn.Dropout
    networks = {
        "linear.pth": layer(6, 1),
        "aesthetic.pth": sequential(
            layer(6, 9), dropout(0.2), layer(9, 7), dropout(0.2), layer(7, 4), dropout(0.1), layer(4, 3), layer(3, 1)
        ),
        "unsafe.pt": sequential(
            layer(6, 9), relu(), dropout(0.2), layer(9, 7), relu(), dropout(0.2), layer(7, 4), layer(4, 1)
        ),
    }
    for name, network in networks.items():
        torch.save(network.state_dict(), tmp_path / name)
        with torch.no_grad():
            whole = getattr(network, "layers", network)
            expected = whole.eval()(vectors)[:, 0].numpy()
        head = read_head(tmp_path / name)
        assert head.dimension == 6 and np.allclose(head(vectors.numpy()), expected, atol=1e-6), name
    state = {"norm.mean": torch.randn(6), "norm.variance": torch.rand(6)}
    for number, (before, after) in enumerate(((6, 5), (5, 4), (4, 3), (3, 1)), 1):
        state |= {f"linear_{number}.weight": torch.randn(after, before), f"linear_{number}.bias": torch.randn(after)}
    save_file(state, tmp_path / "normed.safetensors")
    x = (vectors - state["norm.mean"]) / state["norm.variance"].sqrt()
    for number in range(1, 5):
        x = x @ state[f"linear_{number}.weight"].T + state[f"linear_{number}.bias"]
        x = torch.relu(x) if number < 4 else torch.sigmoid(x)
    assert np.allclose(read_head(tmp_path / "normed.safetensors")(vectors.numpy()), x[:, 0].numpy(), atol=1e-6)


def test_heads_become_columns_of_their_names(pairs: Path, clip: Embedder, tmp_path: Path) -> None:
    save_file(aesthetic(8), tmp_path / "a.safetensors")
    torch.save({"weight": torch.ones(1, 8), "bias": torch.zeros(1)}, tmp_path / "p.pth")
    heads = (("aesthetic", tmp_path / "a.safetensors"), ("punsafe", tmp_path / "p.pth"))
    scored(pairs, EmbeddingScores(Live(clip), similarity=False, heads=heads))
    clip.setup()
    rows = columns(pairs, "aesthetic", "punsafe", "offset", "size", "caption")
    assert [row["punsafe"] is None for row in rows] == [False, True, False, False, False, False]
    shard = open_shards(pairs)[0]
    vector = clip.pictures([decode_picture(shard.picture(rows[0]["offset"], rows[0]["size"]), "it")])
    assert rows[0]["punsafe"] == pytest.approx(float(vector.sum()), abs=1e-5)
    assert rows[0]["aesthetic"] == pytest.approx(float(read_head(tmp_path / "a.safetensors")(vector)[0]), abs=1e-4)
    assert "similarity" not in shard.read().column_names
    record = shard.stats["stages"][-1]
    assert record["settings"]["head punsafe"] == file_digest(tmp_path / "p.pth")
    with pytest.raises(DataError, match=r"p.pth: got a head x for vectors of 8 numbers, expected 16"):
        EmbeddingScores(
            Live(embedder(f"clip:{save_model('siglip', tmp_path / 'siglip')}")), heads=(("x", heads[1][1]),)
        )


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"weight": torch.ones(2, 8), "bias": torch.ones(2)}, "found 2 outputs, expected 1"),
        ({"weight": torch.ones(1, 8)}, "found a layer with {'weight': (1, 8)}, expected weight (out, in) and bias"),
        ({"weight": torch.ones(1, 8), "bias": torch.ones(1), "scale": torch.ones(1)}, "found a tensor scale, expected"),
        ({"weight": torch.full((1, 8), torch.nan), "bias": torch.ones(1)}, "a weight that is no finite number"),
        ({"layers.0.weight": torch.ones(3, 8), "layers.0.bias": torch.ones(3),
          "layers.1.weight": torch.ones(1, 4), "layers.1.bias": torch.ones(1)}, "of 3 inputs"),
        ({"layers.0.weight": torch.ones(3, 8), "layers.0.bias": torch.ones(3),
          "layers.9.weight": torch.ones(1, 3), "layers.9.bias": torch.ones(1)}, "found layers at [0, 9]"),
        ({}, "found no outputs, expected 1"),
        ({"weight": "text"}, "found 'weight', which is no tensor"),
        ([1, 2], "got list, expected tensors by name"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_head_is_refused(state: Any, said: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(DataError) as caught:
        read_head(tmp_path / "head.pth")
    assert said in str(caught.value) and "\n" not in str(caught.value) and "head.pth: " in str(caught.value)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Harmful()}, tmp_path / "head.pth")
    with pytest.raises(DataError, match="head.pth: not a pickle of weights alone"):
        read_head(tmp_path / "head.pth")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match=r"none.pth: no such file; expected a head's weights"):
        read_head(tmp_path / "none.pth")
