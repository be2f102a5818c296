import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from hubgen.cli import main
from hubgen.data.errors import DataError
from hubgen.data.pictures import decode_picture
from hubgen.data.web.embedding.embedders import embedder
from hubgen.data.web.embedding.embeddings import Embed, StoredEmbeddings
from hubgen.data.web.engines.engine import run
from hubgen.data.web.shards import Outcome, StoredShard, open_shards, read_table, write_shard, write_stats, write_table
from tests.data.web.contrastive import save_model
from tests.data.web.site import file_of, picture


def write_shards(folder: Path, counts: tuple[int, ...] = (5, 4)) -> Path:
    """Shards whose every third row has no picture."""
    folder.mkdir()
    for number, count in enumerate(counts):
        table = pa.table(
            {
                "caption": [f"a red cat {n}" for n in range(count)],
                "url": [f"http://a/{number}/{n}" for n in range(count)],
            }
        )
        outcomes = [
            Outcome("failed_to_download", "HTTP Error 404: Not Found")
            if n % 3 == 2
            else Outcome("success", None, file_of(picture(40, 30, seed=10 * number + n)), 40, 30, 40, 30, "{}", "00")
            for n in range(count)
        ]
        write_stats(folder / f"{number:05d}_stats.json", write_shard(folder, number, 10, table, outcomes))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"clip:{save_model('clip', tmp_path_factory.mktemp('clip'))}"


@pytest.fixture(scope="module")
def embedded(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards, and their vectors by the command."""
    folder = tmp_path_factory.mktemp("embedded")
    shards, out = write_shards(folder / "shards"), folder / "out"
    words = ["data", "embed", str(shards), "--model", model, "--out", str(out), "--texts", "--device", "cpu"]
    assert main(words) == 0
    return shards, out


def test_rows_with_pictures_have_vectors_beside_their_keys(embedded: tuple[Path, Path], model: str) -> None:
    shards, out = embedded
    one = embedder(model, "cpu")
    one.setup()
    stored = StoredEmbeddings.open(out)
    assert (len(stored), stored.dimension, stored.embedder) == (7, 8, model)
    rows = [row for shard in open_shards(shards) for row in shard.read().to_pylist() if row["size"] is not None]
    assert stored.table().to_pylist() == [{name: row[name] for name in ("key", "caption", "url")} for row in rows]
    pictures = [decode_picture(file, "one") for shard in open_shards(shards) for file in pictures_of(shard)]
    assert [start for start, _ in stored.blocks(3)] == [0, 3, 4]
    assert np.allclose(np.concatenate([part for _, part in stored.blocks(3)]), one.pictures(pictures), atol=1e-3)
    texts = np.concatenate([part.read(texts=True) for part in stored.parts])
    assert np.allclose(texts, one.texts([row["caption"] for row in rows]), atol=1e-3)
    assert np.load(out / "00000.npy").dtype == np.float16


def test_columns_that_come_later_change_nothing_and_another_model_is_refused(
    embedded: tuple[Path, Path], model: str, tmp_path: Path
) -> None:
    shards, out = (Path(shutil.copytree(one, tmp_path / one.name)) for one in embedded)
    table = read_table(shards / "00001.parquet")
    write_table(shards / "00001.parquet", table.append_column("similarity", pa.array([0.5] * len(table))))
    stage = Embed(embedder(model, "cpu"), texts=True)
    report = run(stage, stage.works(open_shards(shards)), out)
    assert (report.there, report.done, report.failed) == (2, [], {})
    other = Embed(embedder("thumbnail"))
    with pytest.raises(DataError, match=r"00000_stats.json: was made with dtype \"float32\", and this run has not set"):
        run(other, other.works(open_shards(shards)), out)
    captions = pa.array(["other"] * len(table))
    write_table(shards / "00001.parquet", table.set_column(0, "caption", captions))
    with pytest.raises(DataError, match="00001_stats.json: was made from other rows"):
        run(stage, stage.works(open_shards(shards)), out)


def test_a_picture_that_cannot_be_read_fails_its_shard_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shards = write_shards(tmp_path / "shards")
    (row, *_) = open_shards(shards)[1].read().to_pylist()
    with (shards / "00001.tar").open("r+b") as tar:
        tar.seek(row["offset"])
        tar.write(bytes(row["size"]))
    assert main(["data", "embed", str(shards), "--model", "thumbnail", "--out", str(tmp_path / "out")]) == 3
    assert "shard 00001 failed: DataError: " in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").glob("0*")) == [
        "00000.npy", "00000.parquet", "00000_stats.json",
    ]  # fmt: skip


def test_captions_are_needed_to_embed_them(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", (2,))
    write_table(shards / "00000.parquet", read_table(shards / "00000.parquet").drop_columns(["caption"]))
    with pytest.raises(DataError, match=r"00000.parquet: got the columns \['url', .*expected 'caption' too"):
        Embed(embedder("thumbnail"), texts=True).works(open_shards(shards))


def test_files_that_do_not_fit_are_named(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    def problem(change: Callable[[Path], object]) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        out = Path(shutil.copytree(embedded[1], tmp_path / "out"))
        change(out)
        with pytest.raises(DataError) as told:
            list(StoredEmbeddings.open(out).blocks())
        assert "\n" not in str(told.value)
        return str(told.value).replace(f"{out}/", "")

    vectors = np.load(embedded[1] / "00001.npy")
    hole = vectors.copy()
    hole[1, 3] = np.nan
    half = (embedded[1] / "00001.npy").read_bytes()[:150]
    assert problem(lambda out: np.save(out / "00001.npy", vectors[:2])) == (
        "00001.npy: got 2 vectors, expected 3, the rows of 00001.parquet"
    )
    assert problem(lambda out: np.save(out / "00001.npy", vectors[:, :6])) == (
        "00001.npy: got vectors of 6 numbers, expected 8 as in the first file"
    )
    assert problem(lambda out: np.save(out / "00001.npy", hole)) == (
        "00001.npy: got nan in row 1, expected finite numbers"
    )
    assert problem(lambda out: np.save(out / "00001.npy", vectors.astype(int))).startswith(
        "00001.npy: got int64 (3, 8)"
    )
    assert problem(lambda out: (out / "00001.npy").write_bytes(half)).startswith("00001.npy: not a readable npy file")
    assert problem(lambda out: (out / "00001.npy").unlink()).startswith("00001.npy: not a readable npy file (")
    assert problem(lambda out: (out / "00001_stats.json").unlink()).startswith("00001.npy: got no 00001_stats.json")
    assert problem(lambda out: write_stats(out / "00001_stats.json", {"count": 3})).startswith(
        "00001_stats.json: got no record of embeddings"
    )
    assert problem(lambda out: [path.unlink() for path in out.iterdir()]).endswith(
        ": got no embeddings, expected 00000.npy, 00000.parquet and 00000_stats.json"
    )


def test_folders_of_clip_retrieval_are_read_in_their_order(tmp_path: Path) -> None:
    for name in ("img_emb", "metadata"):
        (tmp_path / name).mkdir()
    vectors = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float16)
    for number in (0, 1, 10):
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", vectors[number : number + 2])
        table = pa.table({"image_path": [f"{number}-0", f"{number}-1"], "caption": [f"a {number}", None]})
        pa.parquet.write_table(table, tmp_path / "metadata" / f"metadata_{number}.parquet")
    stored = StoredEmbeddings.open(tmp_path)
    assert np.array_equal(np.concatenate([part for _, part in stored.blocks()]), vectors[[0, 1, 1, 2, 10, 11]])
    assert stored.table().column("caption").to_pylist() == ["a 0", None, "a 1", None, "a 10", None]
    assert stored.table().column("key").to_pylist() == [str(row) for row in range(6)]
    assert stored.embedder is None
    (tmp_path / "metadata" / "metadata_10.parquet").unlink()
    with pytest.raises(DataError, match=r"metadata_10.parquet: not a readable parquet file"):
        StoredEmbeddings.open(tmp_path)


def pictures_of(shard: StoredShard) -> list[bytes]:
    """The files of a shard's pictures."""
    return [shard.picture(*place) for place in shard.places().values()]
