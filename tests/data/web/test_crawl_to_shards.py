from pathlib import Path

import pytest

from hubgen.cli import main
from hubgen.data.web.shards import open_shards
from tests.data.web.site import file_of, picture, reply, serving
from tests.data.web.wats import WebPage, image, write_wat

CAPTIONS = {
    "/cat.jpg": "a cat that sleeps on a red sofa in the garden",
    "/dog.jpg": "a big brown dog that runs along the sandy beach",
    "/gone.jpg": "an old wooden house that stands near the quiet lake",
}


def test_pictures_of_a_crawl_come_with_their_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = {path: reply(file_of(picture(80, 60, seed=n))) for n, path in enumerate(CAPTIONS) if "gone" not in path}
    with serving(pictures) as site:
        links = [image(path, caption) for path, caption in CAPTIONS.items()]  # relative to the page
        write_wat(tmp_path / "a.wat.gz", [WebPage(site.url("/page.html", "localhost"), links)])
        crawl = ["data", "crawl", str(tmp_path / "a.wat.gz"), "--recipe", "laion-5b", "--out", str(tmp_path / "cand")]
        assert main(crawl) == 0
        download = ["data", "download", str(tmp_path / "cand"), "--size", "32", "--out", str(tmp_path / "shards")]
        assert main([*download, "--allow-host", "localhost"]) == 0
    assert "2 pictures of 3 URLs in 1 shards" in capsys.readouterr().out
    rows = {row["caption"]: row for row in open_shards(tmp_path / "shards")[0].read().to_pylist()}
    assert set(rows) == set(CAPTIONS.values())
    assert [rows[CAPTIONS[path]]["status"] for path in CAPTIONS] == ["success", "success", "failed_to_download"]
    assert all(row["page_url"].endswith("/page.html") and row["license"] == "?" for row in rows.values())
