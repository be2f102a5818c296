"""What is left of a crawl, and what each rule dropped, is what the recipe says; however often the run is killed."""

import json
import multiprocessing
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hubgen.cli import main
from hubgen.data.errors import DataError
from hubgen.data.web.crawling.crawl import IncompleteCrawl, KeepNew, Parse, crawl
from hubgen.data.web.engines.engine import run
from hubgen.data.web.rules import CRAWLED, load_recipe
from hubgen.data.web.stages import Work
from tests.data.web.wats import TEXT, WebPage, anchor, image, write_warc, write_wat

RECIPES = ("laion-400m", "laion-5b", "datacomp-basic")
KEPT = "kept"
LICENSE = "https://creativecommons.org/licenses/by-sa/4.0/deed.en"


def picture(name: str, alt: str | None = TEXT, **more: Any) -> WebPage:
    """A page with one picture, both named."""
    return WebPage(f"http://page.org/{name}", [image(f"http://pictures.org/{name}.jpg", alt)], **more)


def at(name: str, url: str, **more: Any) -> WebPage:
    """A page with a picture at this address."""
    return WebPage(f"http://page.org/{name}", [image(url)], **more)


# Each page has one picture, or names below how many; what becomes of them in laion-400m, laion-5b, datacomp-basic.
TABLE: list[tuple[WebPage, str, str, str]] = [
    (picture("plain"), KEPT, KEPT, KEPT),
    (picture("no-alt", None), "has_alt", "has_alt", "has_alt"),
    (picture("empty-alt", ""), "has_alt", "has_alt", "has_alt"),
    (picture("only-spaces", " \n "), "text_length", "text_length", "word_count"),
    (picture("4-characters", "tabl"), "text_length", "text_length", "word_count"),
    (picture("4-with-spaces", "  tabl\n"), "text_length", "text_length", "word_count"),
    (picture("5-characters", "table"), KEPT, KEPT, "word_count"),
    (picture("2-words", "the best"), KEPT, KEPT, "word_count"),
    (picture("3-words-5-characters", "a b c"), "languages", KEPT, "text_length"),
    (picture("3-words-6-characters", "a b cd"), "languages", KEPT, KEPT),
    (picture("german", "Eine graue Katze sitzt auf dem Sofa im Garten"), "languages", KEPT, "languages"),
    (picture("unreliable", "Sunset over hills"), "languages", KEPT, KEPT),
    (picture("mojibake", "a cafÃ© in the old town of Paris | &amp; a dog\n"), KEPT, KEPT, KEPT),
    (at("gif", "http://pictures.org/gif.gif"), "url_without", "url_without", KEPT),
    (at("gif-in-the-middle", "http://pictures.org/a.gif/2.jpg"), "url_without", "url_without", KEPT),
    (at("almost-gif", "http://pictures.org/2.gi"), KEPT, KEPT, KEPT),
    (at("GIF", "http://pictures.org/3.GIF"), KEPT, KEPT, KEPT),
    (at("svg", "http://pictures.org/4.svg?x=1"), "url_without", "url_without", KEPT),
    (at("data", "data:image/png;base64,AAAA"), "http_url", "valid_url", "http_url"),
    (at("script", "javascript:show(1)"), "http_url", "valid_url", "http_url"),
    (at("ftp", "ftp://pictures.org/5.jpg"), "http_url", "valid_url", "http_url"),
    (at("HTTPS", "HTTPS://pictures.org/6.jpg"), KEPT, KEPT, KEPT),
    (at("space", "http://pictures.org/a b.jpg"), KEPT, "valid_url", KEPT),
    (at("host-without-dot", "http://pictures/7.jpg"), KEPT, "valid_url", KEPT),
    (at("no-port", "http://pictures.org:99999/7.jpg"), KEPT, "valid_url", KEPT),
    (at("port-and-user", "http://me:word@pictures.org:8080/7.jpg"), KEPT, KEPT, KEPT),
    (at("numbers", "http://93.184.216.34/7.jpg"), KEPT, KEPT, KEPT),
    (at("too-large-numbers", "http://93.184.216.256/7.jpg"), KEPT, "valid_url", KEPT),
    (at("host-60", f"http://{'a' * 56}.org/8.jpg"), KEPT, KEPT, KEPT),
    (at("host-61", f"http://{'a' * 57}.org/8.jpg"), KEPT, "host_length", KEPT),
    (at("folder/relative", "../9.jpg"), KEPT, KEPT, KEPT),
    (at("folder/with-base", "../9.jpg", base="http://base.org/a/b/"), KEPT, KEPT, KEPT),
    (at("folder/relative-base", "10.jpg", base="/else/"), KEPT, KEPT, KEPT),
    (at("no-scheme", "//pictures.org/11.jpg"), KEPT, KEPT, KEPT),
    (at("broken-host", "http://[pictures/12.jpg"), KEPT, "valid_url", KEPT),
    (picture("noai", meta="noai"), *["page_opt_out"] * 3),
    (picture("noimageai", meta="all, NoImageAI"), *["page_opt_out"] * 3),
    (picture("noindex", header="noindex"), *["page_opt_out"] * 3),
    (picture("noimageindex", header="max-snippet: 5, noimageindex"), *["page_opt_out"] * 3),
    (picture("noml", header="unavailable_after: Fri, 25 Jun 2100 15:00:00 GMT, noml"), *["page_opt_out"] * 3),
    (picture("none", meta="none"), *["page_opt_out"] * 3),
    (picture("noarchive", meta="noarchive, nofollow"), KEPT, KEPT, KEPT),
    (picture("otherbot", header="otherbot: noai, noindex"), KEPT, KEPT, KEPT),
    (WebPage("http://page.org/input", [image("http://pictures.org/13.jpg", TEXT, "INPUT@/src"), {"path": "IMG@/src"}]),
     KEPT, KEPT, "image_source"),
    (WebPage("http://page.org/license-before", [anchor(LICENSE), image("http://pictures.org/14.jpg")]), KEPT, KEPT,
     KEPT),
    (WebPage("http://page.org/license-after", [image("http://pictures.org/15.jpg"), anchor(LICENSE)]), KEPT, KEPT,
     KEPT),
    (WebPage("http://page.org/no-pictures", [anchor("http://page.org/plain")]), "", "", ""),
    # Addresses that came before: with other text, and with the same.
    (WebPage("http://page.org/other-text", [image("http://pictures.org/plain.jpg", TEXT + "s")]), KEPT,
     "first_in_file", KEPT),
    (WebPage("http://page.org/same-text", [image("http://pictures.org/plain.jpg")]), "repeated", "first_in_file",
     "repeated"),
]  # fmt: skip
SECOND: list[tuple[WebPage, str, str, str]] = [
    (at("second/same", "http://pictures.org/plain.jpg"), "repeated", "repeated", "repeated"),
    (WebPage("http://page.org/second/other", [image("http://pictures.org/plain.jpg", "my old cat and a new dog")]),
     KEPT, "first_in_file", KEPT),
    (picture("second/new"), KEPT, KEPT, KEPT),
]  # fmt: skip
BROKEN = (b'{"Envelope": {"IMG@": ', b'["IMG@"]', b'{"Envelope": {"IMG@": 1, "Payload-Metadata": {}}}')


def page_names(pages: list[WebPage]) -> list[str]:
    return [page.url.removeprefix("http://page.org/") for page in pages]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder of tables, in order."""
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The table's pages in one file, with broken records; and a second file, cut within its last record."""
    folder = tmp_path_factory.mktemp("wats")
    first, second = folder / "first.wat.gz", folder / "second.wat.gz"
    write_wat(first, [page for page, *_ in TABLE], *BROKEN)
    write_wat(second, [page for page, *_ in SECOND])
    whole = second.stat().st_size
    write_wat(second, [page for page, *_ in SECOND] + [picture("second/cut")])
    second.write_bytes(second.read_bytes()[: (whole + second.stat().st_size) // 2])
    return [first, second]


@pytest.mark.parametrize("number", range(3), ids=RECIPES)
def test_survivors_and_counts_are_those_of_the_table(files: list[Path], number: int, tmp_path: Path) -> None:
    report = crawl(files, load_recipe(RECIPES[number]), tmp_path, on_error="skip")
    fates = [(page, fate[number]) for page, *fate in [*TABLE, *SECOND]]
    names = page_names([page for page, fate in fates if fate == KEPT])
    assert [row["page_url"].removeprefix("http://page.org/") for row in rows_of(tmp_path)] == names
    found = {rule: dropped for rule, dropped in report["dropped"].items() if dropped}
    assert found == Counter(fate for _, fate in fates if fate not in (KEPT, ""))
    assert report["kept"] == len(names) and report["broken_records"] == len(BROKEN)
    assert report["links"] == report["kept"] + sum(report["dropped"].values())
    assert report["records"] == len(TABLE) + len(BROKEN) + len(SECOND) and report["pages"] == len(fates) - 1
    assert list(report["cut_files"]) == ["second.wat.gz"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "00000.parquet", "00000_stats.json", "00001.parquet", "00001_stats.json", "report.json"
    ]  # fmt: skip


def test_rows_have_absolute_addresses_licences_languages_and_laions_hash(files: list[Path], tmp_path: Path) -> None:
    import mmh3

    crawl(files, load_recipe("laion-5b"), tmp_path, on_error="skip")
    rows = {row["page_url"].removeprefix("http://page.org/"): row for row in rows_of(tmp_path)}
    assert tuple(rows["plain"]) == CRAWLED
    urls = {name: row["url"] for name, row in rows.items()}
    assert urls["folder/relative"] == "http://page.org/9.jpg"
    assert urls["folder/with-base"] == "http://base.org/a/9.jpg"
    assert urls["folder/relative-base"] == "http://page.org/else/10.jpg"
    assert urls["no-scheme"] == "http://pictures.org/11.jpg"
    assert (rows["license-before"]["license"], rows["license-after"]["license"]) == (LICENSE, "?")
    languages = {name: row["language"] for name, row in rows.items()}
    assert (languages["german"], languages["unreliable"], languages["plain"]) == ("de", "", "en")
    assert rows["mojibake"]["text"] == "a café in the old town of Paris   & a dog"
    assert (rows["plain"]["crawl_file"], rows["second/new"]["crawl_file"]) == ("first.wat.gz", "second.wat.gz")
    for row in rows.values():
        assert row["hash"] == mmh3.hash64((row["url"] + row["text"]).encode())[0]
    crawl(files, load_recipe("datacomp-basic"), tmp_path / "raw", on_error="skip")
    raw = {row["page_url"]: row["text"] for row in rows_of(tmp_path / "raw")}
    assert raw["http://page.org/mojibake"] == "a cafÃ© in the old town of Paris | &amp; a dog\n"


def test_addresses_and_texts_are_cut_as_laion_cut_them(tmp_path: Path) -> None:
    url = "http://pictures.org/" + "a" * 3000
    write_wat(tmp_path / "a.wat", [WebPage("http://page.org/", [image(url, "a cat " * 500)])], packed=False)
    crawl([tmp_path / "a.wat"], load_recipe("laion-5b"), tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert (row["url"], row["text"]) == (url[:2000], ("a cat " * 500)[:2000])


def test_a_warc_of_html_gives_the_rows_of_its_wat(tmp_path: Path) -> None:
    pages = [page for page, *_ in TABLE if page.links[0]["path"] != "INPUT@/src" and "\n" not in page.links[0]["url"]]
    write_wat(tmp_path / "a.gz", pages)
    write_warc(tmp_path / "b.gz", pages)
    write_warc(tmp_path / "c.gz", pages, charset="utf-16")
    found = []
    for name in "abc":
        report = crawl([tmp_path / f"{name}.gz"], load_recipe("laion-5b"), tmp_path / name)
        rows = [{key: value for key, value in row.items() if key != "crawl_file"} for row in rows_of(tmp_path / name)]
        found.append((rows, report["dropped"]))
    assert len(found[0][0]) > 20 and found[0] == found[1] == found[2]


def test_halves_of_surrogate_pairs_and_other_rubbish_are_no_fault(tmp_path: Path) -> None:
    pages = [
        WebPage("http://page.org/1", [image("http://pictures.org/\ud800.jpg"), image(alt="a cat \ud800 on a sofa")]),
        WebPage("http://page.org/2", [image(alt="a \x00 cat \u200b on a sofa"), {"path": "IMG@/src"}]),
    ]
    write_wat(tmp_path / "a.gz", pages)
    for name in RECIPES:
        report = crawl([tmp_path / "a.gz"], load_recipe(name), tmp_path / name)
        assert report["links"] == 3 and report["kept"] >= 1


def many(folder: Path, files: int = 4, pages: int = 60) -> list[Path]:
    """Files with repeats in and among them."""
    folder.mkdir(exist_ok=True)
    for number in range(files):
        written = [
            WebPage(f"http://page{number}.org/{page}", [image(f"http://pictures.org/{page % 40}-{number % 3}.jpg"),
                                                        image(f"/{page}.jpg", f"{TEXT} {page}")])
            for page in range(pages)
        ]  # fmt: skip
        write_wat(folder / f"{number}.wat.gz", written)
    return sorted(folder.glob("*.gz"))


def content(folder: Path) -> dict[str, Any]:
    """What a run wrote; of counts, without the times."""
    found: dict[str, Any] = {}
    for path in folder.glob("[!.]*"):
        found[path.name] = path.read_bytes()
        if path.name.endswith("_stats.json"):
            stats = json.loads(path.read_text())
            found[path.name] = {key: value for key, value in stats.items() if not key.endswith(("time", "duration"))}
    return found


@pytest.mark.slow
def test_of_equal_pairs_the_first_stays_and_the_number_of_workers_is_no_matter(tmp_path: Path) -> None:
    files = many(tmp_path / "wats")
    recipe = load_recipe("laion-400m")
    report = crawl(files, recipe, tmp_path / "one")
    seen: dict[tuple[str, str], str] = {}
    for number in range(4):
        for page in range(60):
            rows = [(f"http://pictures.org/{page % 40}-{number % 3}.jpg", TEXT)]
            rows.append((f"http://page{number}.org/{page}.jpg", f"{TEXT} {page}"))
            for row in rows:
                seen.setdefault(row, f"http://page{number}.org/{page}")
    assert {(row["url"], row["text"]): row["page_url"] for row in rows_of(tmp_path / "one")} == seen
    assert report["kept"] == len(seen) and report["dropped"]["repeated"] == 480 - len(seen)
    assert crawl(files, recipe, tmp_path / "two", workers=2) == report
    assert content(tmp_path / "two") == content(tmp_path / "one")


def bloom_crawl(files: list[Path], out: Path) -> None:
    crawl(files, load_recipe("laion-5b"), out, dedup="bloom", capacity=1000, error=0.001)


def exact_crawl(files: list[Path], out: Path) -> None:
    crawl(files, load_recipe("laion-5b"), out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [exact_crawl, bloom_crawl])
def test_a_run_that_was_killed_anywhere_and_started_again_gives_the_same_files(kind: Any, tmp_path: Path) -> None:
    files = many(tmp_path / "wats", pages=20)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.web.test_crawl"])

    def start(out: Path) -> Any:
        process = context.Process(target=kind, args=(files, out))
        process.start()
        return process

    start(tmp_path / "warm").join()  # the server of forks has imported by now
    began = time.monotonic()
    start(tmp_path / "whole").join()
    took = time.monotonic() - began
    expected = content(tmp_path / "whole")
    assert "report.json" in expected
    killed = 0
    for moment in range(10):
        out = tmp_path / f"killed{moment}"
        process = start(out)
        process.join(took * (moment + 0.5) / 10)
        killed += process.is_alive()
        process.kill()
        process.join()
        done = {path: path.stat().st_mtime_ns for path in out.glob("*_stats.json")}
        again = start(out)
        again.join()
        assert again.exitcode == 0
        assert content(out) == expected
        assert {path: path.stat().st_mtime_ns for path in done} == done  # what was committed was not done again
        assert not [path.name for path in out.glob(".*") if path.name not in (".lock", ".seen")]
    assert killed >= 3


def test_a_finished_crawl_is_not_done_again(tmp_path: Path) -> None:
    files = many(tmp_path / "wats", files=2, pages=5)
    first = crawl(files, load_recipe("laion-5b"), tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert crawl(files, load_recipe("laion-5b"), tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_a_bloom_filter_lets_a_later_run_add_files(tmp_path: Path) -> None:
    files = many(tmp_path / "wats")
    bloom_crawl(files, tmp_path / "at-once")
    for last in (1, 3, 4):
        bloom_crawl(files[:last], tmp_path / "by-and-by")
    assert rows_of(tmp_path / "by-and-by") == rows_of(tmp_path / "at-once")
    exact_crawl(files, tmp_path / "exact")
    assert rows_of(tmp_path / "exact") == rows_of(tmp_path / "at-once")  # 240 of 1000 keys: no false drop
    report = json.loads((tmp_path / "by-and-by" / "report.json").read_text())
    assert report["dedup"]["error"] == 0.001 and 0 < report["dedup"]["error_now"] < 0.001


def test_a_bloom_filter_forgets_what_could_not_be_written(tmp_path: Path) -> None:
    files, parsed = many(tmp_path / "wats"), tmp_path / "parsed"
    parse = Parse(load_recipe("laion-5b"))
    run(parse, [Work(number, path, 0, 1, path.name) for number, path in enumerate(files)], parsed)
    works = [Work(number, parsed / f"{number:05d}.parquet", 0, 1, path.name) for number, path in enumerate(files)]

    def keep(out: Path) -> dict[str, str]:
        return run(KeepNew(parse, parsed, out, 1000, 0.001), works, out).failed

    assert keep(tmp_path / "whole") == {}
    counts = parsed / "00001_stats.json"  # read when the filter has the rows already
    text = counts.read_text()
    counts.write_text("{")
    failed = keep(tmp_path / "out")
    assert sorted(failed) == ["00001", "00002", "00003"] and "an earlier file failed" in failed["00002"]
    counts.write_text(text)
    assert keep(tmp_path / "out") == {}
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_file_that_is_cut_off_fails_alone_and_is_done_once_it_is_whole(files: list[Path], tmp_path: Path) -> None:
    first, second = files
    (tmp_path / "wats").mkdir()
    cut = tmp_path / "wats" / "second.wat.gz"
    cut.write_bytes(second.read_bytes())
    recipe = load_recipe("laion-5b")
    with pytest.raises(IncompleteCrawl, match=r"1 of 2 failed.*second\.wat\.gz.*expected a whole file"):
        crawl([first, cut], recipe, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))
    write_wat(cut, [page for page, *_ in SECOND])
    crawl([first, cut], recipe, tmp_path / "out")
    crawl([first, cut], recipe, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_cut_anywhere_gives_the_pages_before_or_says_so(packed: bool, tmp_path: Path) -> None:
    from hubgen.data.web.crawling.wat import CutFile, read_pages

    path = tmp_path / "a.wat"
    write_wat(path, [picture(str(number)) for number in range(3)], packed=packed)
    whole = path.read_bytes()
    pages = list(read_pages(path, Counter()))
    for length in range(10, len(whole), 37):
        path.write_bytes(whole[:length])
        found, problem = [], None
        try:
            for page in read_pages(path, Counter()):
                found.append(page)
        except CutFile as error:
            problem = str(error)
        if problem is not None:
            assert str(path) in problem
        else:
            assert whole[length:].strip() == b"" or whole[length:].startswith((b"WARC/", b"\x1f\x8b"))
        assert found == pages[: len(found)]


# --- bad input: one line that names the file, before anything is parsed ----------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no file to read (No such file or directory)"),
        (b"", "found a file that starts with b''"),
        (b"\x89PNG\r\n\x1a\n", r"found a file that starts with b'\x89PNG\r'"),
        (b"\x1f\x8bnot packed at all", "found broken gzip"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.wat.gz", tmp_path / "bad.wat.gz"
    write_wat(good, [picture("1")])
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(DataError) as error:
        crawl([good, bad], load_recipe("laion-5b"), tmp_path / "out")
    assert str(bad) in str(error.value) and message in str(error.value)
    assert main(["data", "crawl", str(good), str(bad), "--recipe", "laion-5b", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(bad) in said and "expected a WAT or WARC file" in said
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_folder_of_other_settings_or_files_is_refused(tmp_path: Path) -> None:
    files, out = many(tmp_path / "wats", files=2, pages=5), tmp_path / "out"
    crawl(files, load_recipe("laion-5b"), out)
    with pytest.raises(DataError, match=r'00000_stats.json: was made with clean \["spaces"'):
        crawl(files, load_recipe("laion-400m"), out)
    changed = tmp_path / "mine.yaml"
    text = Path(load_recipe.__globals__["RECIPES"] / "laion-5b.yaml").read_text()
    changed.write_text(text.replace("text_length: {least: 5}", "text_length: {least: 6}"))
    with pytest.raises(DataError, match=r"was made with text_length.least 5"):
        crawl(files, load_recipe(str(changed)), out)
    for other in (files[:1], files[::-1], [*files, *many(tmp_path / "more", files=1)]):
        with pytest.raises(DataError, match="expected the same input"):
            crawl(other, load_recipe("laion-5b"), out)
    with pytest.raises(DataError, match="found twice"):
        crawl([files[0], files[0]], load_recipe("laion-5b"), tmp_path / "new")
    changed.write_text(text.replace("file_size: {least: 5000}", "file_size: {least: 1}"))  # of a later stage
    crawl(files, load_recipe(str(changed)), out)


def test_the_command_writes_candidates_and_says_what_went(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "crawl", *map(str, files), "--recipe", "laion-5b", "--out", str(tmp_path)]
    assert main(words) == 3
    assert "second.wat.gz" in capsys.readouterr().err
    assert main([*words, "--on-error", "skip"]) == 0
    out, err = capsys.readouterr()
    assert f"{len(rows_of(tmp_path))} pairs of" in out and "page_opt_out 6" in out and "second.wat.gz" in err
    for further, message in (
        (["--bloom-error", "0.1"], "--bloom-error: is for --dedup bloom"),
        (["--dedup", "bloom", "--bloom-error", "1"], "--bloom-error: got 1, expected"),
        (["--out", str(files[0])], "is a file, expected the folder to write"),
        (["--recipe", "laion"], "recipe laion: found none of that name, expected datacomp-basic, laion-400m, laion-5b"),
    ):
        assert main([*words, *further]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
