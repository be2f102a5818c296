"""The thirty URLs that img2dataset and hubgen both downloaded, and how img2dataset's answer was recorded.

    python -m tests.data.web.layout /tmp/img2dataset/bin/img2dataset       # of a virtual environment of its own

writes img2dataset.json: it stands for img2dataset in the tests, which do without its 782 MB.
"""

import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from tests.data.web.site import Answer, Site, file_of, picture, redirect, reply, serving, turned

RECORD = Path(__file__).parent / "img2dataset.json"
SIZE, ROWS = 64, 12
FULL = "keep_ratio"
"""The mode of which everything is recorded; of the others, the pictures' sides"""
MODES = ("no", "border", "keep_ratio", "center_crop", "keep_ratio_largest")
OPTIONS = [
    "--input_format=parquet", "--url_col=url", "--caption_col=text", '--save_additional_columns=["license","number"]',
    "--output_format=webdataset", f"--image_size={SIZE}", f"--number_sample_per_shard={ROWS}", "--processes_count=1",
    "--thread_count=4", "--timeout=3", "--user_agent_token=hubgen",
]  # fmt: skip
CAPTIONS = ["a cat", "Straße, 猫 ", "", None, "two\nlines", '"quoted"']


def answers() -> dict[str, Answer]:
    """By path, in order; the rest of the URLs is `foreign`."""
    jpeg = file_of(picture(90, 60))
    png = file_of(picture(100, 70, "RGBA"), "PNG")
    return {
        "/300x200.jpg": reply(file_of(picture(300, 200))),
        "/201x333.png": reply(file_of(picture(201, 333), "PNG"), "image/png"),
        "/640x481.webp": reply(file_of(picture(640, 481), "WEBP"), "image/webp"),
        "/grey.jpg": reply(file_of(picture(127, 66, "L"))),
        "/alpha.png": reply(png, "image/png"),
        "/palette.png": reply(file_of(picture(80, 80, "P"), "PNG"), "image/png"),
        "/tiny.jpg": reply(file_of(picture(5, 7))),
        "/tall.jpg": reply(file_of(picture(51, 901))),
        "/wide.png": reply(file_of(picture(777, 33), "PNG"), "image/png"),
        "/exact.jpg": reply(file_of(picture(64, 64))),
        "/bitmap.bmp": reply(file_of(picture(65, 129), "BMP"), "image/bmp"),
        "/print.tiff": reply(file_of(picture(99, 98), "TIFF"), "image/tiff"),
        "/cmyk.jpg": reply(file_of(picture(120, 80, "CMYK"))),
        "/kind.jpg": reply(jpeg, "text/plain"),
        "/other-kind.gif": reply(jpeg, "image/gif"),
        "/query?size=1&name=a": reply(jpeg),
        "/moved": redirect("/300x200.jpg", 301),
        "/moved-307": redirect("/kind.jpg", 307),
        "/moved-to-nothing": redirect("/nothing.jpg"),
        "/nothing.jpg": reply(b"gone", "text/plain", 404),
        "/forbidden.jpg": reply(b"no", "text/plain", 403),
        "/broken": reply(b"oh", "text/plain", 500),
        "/page.jpg": reply(b"<!DOCTYPE html><html><body>a picture</body></html>", "text/html"),
        "/empty.jpg": reply(b""),
        "/noise.png": reply(bytes(range(256)) * 8, "image/png"),
        "/noai.jpg": reply(jpeg, headers=(("X-Robots-Tag", "noai"),)),
        "/noindex.jpg": reply(jpeg, headers=(("X-Robots-Tag", "nofollow, NoImageIndex"),)),
        "/other-bot.jpg": reply(jpeg, headers=(("X-Robots-Tag", "otherbot: noai"),)),
        "/our-bot.jpg": reply(jpeg, headers=(("X-Robots-Tag", "hubgen: noai"),)),
        "/turned.jpg": reply(turned(120, 80)),
    }


def candidates(site: Site, path: Path) -> list[str]:
    """Writes the table of URLs; they, without the site's address."""
    paths = list(answers())
    rows = range(len(paths))
    table = {
        "license": ["?" if row % 3 else "cc0" for row in rows],
        "number": pa.array([row * 7 for row in rows], pa.int64()),
        "url": [site.url(name) for name in paths],
        "text": [CAPTIONS[row % len(CAPTIONS)] for row in rows],
    }
    pa.parquet.write_table(pa.table(table), path)
    return paths


def described(folder: Path, site: Site) -> dict[str, Any]:
    """What a folder of shards is made of, without what differs from run to run."""
    shards = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pa.parquet.read_table(path)
        rows = sorted(table.to_pylist(), key=lambda row: row["key"])
        for row in rows:
            row["url"] = row["url"].removeprefix(site.url(""))
        with tarfile.open(path.with_suffix(".tar")) as tar:
            members = sorted(tar.getnames())
            texts = {m.name: tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")}  # type: ignore
            fields = [list(json.load(tar.extractfile(m))) for m in tar if m.name.endswith(".json")]  # type: ignore
        stats = json.loads(path.with_name(f"{path.stem}_stats.json").read_text())
        for name in ("duration", "start_time", "end_time"):
            assert isinstance(stats.pop(name), float)
        shards[path.stem] = {
            "columns": {name: str(kind) for name, kind in zip(table.schema.names, table.schema.types, strict=True)},
            "rows": [{name: value for name, value in row.items() if name != "sha256"} for row in rows],
            "members": members,
            "texts": dict(sorted(texts.items())),
            "json_fields": fields[0],
            "stats": stats,
        }
    return shards


def sides(shards: dict[str, Any]) -> dict[str, list[int | None]]:
    """Width and height of each row, by its key."""
    return {row["key"]: [row["width"], row["height"]] for shard in shards.values() for row in shard["rows"]}


def main() -> None:
    record: dict[str, Any] = {"program": "img2dataset 1.47.0", "command": ["img2dataset", *OPTIONS], "modes": {}}
    with serving(answers()) as site, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record["urls"] = candidates(site, folder / "urls.parquet")
        for mode in MODES:
            out = folder / mode
            where = [f"--url_list={folder / 'urls.parquet'}", f"--output_folder={out}", f"--resize_mode={mode}"]
            subprocess.run([sys.argv[1], *where, *OPTIONS], check=True)
            record["modes"][mode] = described(out, site) if mode == FULL else sides(described(out, site))
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([\w.]+),\s+([\w.]+)\s+\]", r"[\1, \2]", text)
    RECORD.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
