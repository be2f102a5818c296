"""What strangers may ask of the page and what they may not: over raw HTTP, without the page's widgets."""

import io
import json
import math
import re
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.spaces.client import Answer, Served, file_data, together

pytest.importorskip("gradio", reason="the page needs Gradio (pip install 'hubgen[demo]')")

HUGE = 10**40
PATHS = re.compile(r"(?:/tmp|/home|/usr|/etc|/root|/work|/var|[A-Z]:\\\\|site-packages|Traceback|\.py\b)")


def png(width: int = 40, height: int = 30, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kB that claims so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(4000))) + chunk(b"IEND", b"")
    )


def in_words(answer: Answer) -> str:
    """The error, which is a sentence for people, and says nothing about the machine."""
    assert answer.error, f"served: {answer.value!r:.300}"
    assert answer.error != "None" and " " in answer.error and len(answer.error) < 400, answer.error
    assert not PATHS.search(answer.error), answer.error
    return answer.error


def test_a_picture_comes_back_with_its_recipe(served: Served) -> None:
    answer = served.generate("a red apple", steps=3, seed=5)
    assert answer.error is None, answer.error
    (picture,), recipe = answer.value
    assert recipe["seed"] == 5 and recipe["steps"] == 3 and recipe["prompt"] == "a red apple"
    content = served.fetch(picture["path"]).content
    assert Image.open(io.BytesIO(content)).size == (64, 64)
    again = served.call("recipe", served.sent(content))
    assert {name: again.value[0][name] for name in recipe} == recipe


def test_the_page_draws_what_hubgen_generate_draws(served: Served, tmp_path: Path) -> None:
    from hubgen.cli import main

    (picture,), _ = served.generate("a red apple", steps=3, seed=5).value
    (tmp_path / "page.png").write_bytes(served.fetch(picture["path"]).content)
    assert main(["generate", "--from", str(tmp_path / "page.png"), "--out", str(tmp_path / "again.png")]) == 0
    drawn, again = (Image.open(tmp_path / f"{name}.png").convert("RGB").tobytes() for name in ("page", "again"))
    assert max(abs(a - b) for a, b in zip(drawn, again, strict=True)) <= 1


def hostile_numbers() -> list[dict[str, Any]]:
    """Settings of /generate that are none."""
    never = [math.nan, math.inf, -math.inf, -1, HUGE, -HUGE, True, "4", [4], {"a": 1}, 1e308]
    return [
        *({"steps": value} for value in [*never, 0, 51, 2.5]),
        *({"guidance": value} for value in [*never, 20.5]),
        *({"width": value, "height": 64} for value in [*never, 0, 63, 65, 4096]),
        *({"seed": value} for value in [*never, 2**63, 1.5]),
        *({"pictures": value} for value in [*never, 0, 5]),
    ]


def test_hostile_settings_are_refused_in_words_and_the_next_request_is_served(served: Served) -> None:
    refused = [in_words(served.generate(**options)) for options in hostile_numbers()]
    assert len(refused) >= 50
    assert any("whole number from 1 to 50" in text for text in refused)
    assert served.generate().error is None


@pytest.mark.parametrize(
    "prompt", ["", "   ", "x" * 501, "x" * 100_000, None, 7, True, ["a cat"], {"a": "cat"}, "a\0cat", "\ud800"]
)
def test_hostile_prompts_are_refused_in_words(served: Served, prompt: Any) -> None:
    in_words(served.generate(prompt))
    if prompt is not None and not (isinstance(prompt, str) and not prompt.strip()):  # nothing to avoid is fine
        in_words(served.generate("a cat", negative_prompt=prompt))


@pytest.mark.parametrize(
    "styles",
    [
        {"../../etc/passwd": 1.0},
        {"/etc/passwd": 1},
        {"http://127.0.0.1/x.safetensors": 1},
        {"strong": math.nan},
        {"strong": "1"},
        {"strong": 50},
        ["strong"],
        "strong",
        5,
    ],
)
def test_styles_are_those_of_the_page_and_no_paths(served: Served, styles: Any) -> None:
    in_words(served.call("style", "a cat", styles, "", 2, None, 1, 1))


def test_styles_change_the_picture_and_leave_no_trace(served: Served) -> None:
    def drawn(styles: dict[str, float]) -> bytes:
        answer = served.call("style", "a cat", styles, "", 3, None, 1, 1)
        assert answer.error is None, answer.error
        return Image.open(io.BytesIO(served.fetch(answer.value[0][0]["path"]).content)).tobytes()

    plain = drawn({})
    strong, both = drawn({"strong": 1.0}), drawn({"strong": 1.0, "gentle": 0.5})
    assert len({plain, strong, both}) == 3
    assert drawn({}) == plain == drawn({"strong": 0})


def opened(served: Served, file: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(served.fetch(file["path"]).content))


def test_a_picture_steers_by_its_hint_and_leaves_no_trace(served: Served) -> None:
    sent = served.sent(png(100, 100))
    plain = opened(served, served.generate("a cat", steps=3, seed=1, width=64, height=64).value[0][0]).tobytes()

    def drawn(*options: Any) -> tuple[bytes, Image.Image, dict[str, Any], bytes]:
        answer = served.call("control", "a cat", sent, *options, "", 3, None, 1)
        assert answer.error is None, answer.error
        content = served.fetch(answer.value[0]["path"]).content
        return Image.open(io.BytesIO(content)).tobytes(), opened(served, answer.value[1]), answer.value[2], content

    grey, shown, said, content = drawn("shapes", "grey", 1.0, 0.0, 1.0)
    recipe = Image.open(io.BytesIO(content)).info["hubgen"]
    assert shown.size == (64, 64) and shown.getpixel((30, 30)) == (76, 76, 76) and said["network"] == "shapes"
    (used,) = json.loads(recipe)["request"]["control"]
    assert (used["image"], used["scale"], used["end"]) == ("control-1.png", 1.0, 1.0)
    as_sent, shown, _, _ = drawn(None, "none", 1.0, 0.0, 1.0)
    assert shown.getpixel((30, 30)) == (255, 0, 0)
    early = drawn(None, "none", 1.0, 0.0, 0.4)[0]
    assert len({plain, grey, as_sent, early}) == 4
    again = opened(served, served.generate("a cat", steps=3, seed=1, width=64, height=64).value[0][0]).tobytes()
    assert again == plain
    note = served.call("recipe", served.sent(content))
    assert any("steered by another picture" in line for line in note.value[0]["notes"])


def test_a_steered_picture_is_repeated_beside_what_the_network_was_shown(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubgen.cli import main

    values = ("shapes", "blur", 0.8, 0.0, 0.7, "", 4, None, 5)
    picture, shown, _ = served.call("control", "a red apple", served.sent(png(100, 100)), *values).value
    for name, file in (("page.png", picture), ("control-1.png", shown)):
        (tmp_path / name).write_bytes(served.fetch(file["path"]).content)
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--from", "page.png", "--out", "again.png"]) == 0
    drawn, again = (Image.open(tmp_path / f"{name}.png").convert("RGB").tobytes() for name in ("page", "again"))
    assert max(abs(a - b) for a, b in zip(drawn, again, strict=True)) <= 1


def test_what_steers_is_of_the_page_and_within_the_limits(served: Served) -> None:
    sent = served.sent(png())
    usual = {"network": None, "hint": None, "scale": 1.0, "start": 0.0, "end": 1.0}
    never = [math.nan, math.inf, -1, HUGE, "1", [1], True, None]
    wrong = [
        *({"network": value} for value in ("/etc/passwd", "../shapes", "owner/net", "model", 5, ["shapes"], "")),
        *({"hint": value} for value in ("depth", "../x", 5, [], {}, "")),
        *({"scale": value} for value in (*never, 2.1, 0)),
        *({"start": value} for value in (*never, 1.0)),
        *({"end": value} for value in (*never, 0.0, 1.1)),
        {"start": 0.6, "end": 0.6},
    ]
    for changes in wrong:
        in_words(served.call("control", "a cat", sent, *{**usual, **changes}.values(), "", 2, None, 1))
    answer = served.call("control", "a cat", sent, *usual.values(), "", 2, None, 1)
    assert answer.error is None, answer.error


def files_of_strangers(served: Served, secret: Path) -> list[Any]:
    """What calls name in place of a picture that was uploaded."""
    address = f"{served.url}/gradio_api/info"
    return [
        file_data("/etc/passwd"),
        file_data(str(secret)),
        file_data("../../../../etc/passwd"),
        file_data("file:///etc/passwd"),
        file_data(address),
        file_data(address, url=address),
        file_data("x.png", url=address),
        file_data("http://169.254.169.254/latest/meta-data/"),
        file_data("https://example.com/x.png"),
        file_data("\0"),
        file_data(""),
        file_data("x" * 9000),
        file_data(str(Path(__file__))),
        {"path": str(secret)},
        {"url": address},
        {"url": "data:image/png;base64,iVBORw0KGgo="},
        {"is_stream": True, "path": address, "meta": {"_type": "gradio.FileData"}},
        {"path": ["a"], "meta": {"_type": "gradio.FileData"}},
        "/etc/passwd",
        address,
        [file_data(str(secret))],
        5,
        None,
    ]


def test_no_path_and_no_address_of_a_stranger_is_opened(served: Served) -> None:
    secret = served.folder / "secret.png"
    secret.write_bytes(png(64, 64))
    began = served.log.read_text().count("\n")
    for value in files_of_strangers(served, secret):
        in_words(served.call("transform", value, "a cat", None, 0.6, "", 2, None, 1))
        in_words(served.call("recipe", value))
        in_words(served.call("control", "a cat", value, None, None, 1.0, 0.0, 1.0, "", 2, None, 1))
    good = served.sent(png())
    in_words(served.call("transform", good, "a cat", file_data(str(secret)), 0.6, "", 2, None, 1))
    assert "fault" not in "\n".join(served.log.read_text().splitlines()[began:])
    assert served.call("transform", good, "a cat", None, 0.6, "", 2, None, 1).error is None


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "secret.png", "log.txt"],
)
def test_files_outside_the_page_are_not_served(served: Served, path: str) -> None:
    (served.folder / "secret.png").write_bytes(png())
    for name in (path, str(served.folder / path)):
        answer = served.fetch(name)
        assert answer.status_code in (400, 403, 404), (name, answer.status_code)
        assert b"root:" not in answer.content and b"PNG" not in answer.content


def test_the_server_fetches_nothing_for_others(served: Served) -> None:
    for target in (f"{served.url}/config", "http://169.254.169.254/", "https://example.com/"):
        assert httpx.get(f"{served.api}/proxy={target}", timeout=30).status_code in (400, 401, 403, 404)
        answer = httpx.get(f"{served.api}/file={target}", timeout=30, follow_redirects=False)
        assert answer.status_code in (302, 307, 400, 403, 404)  # it may send the browser there; it does not go itself


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "a.svg"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a.png"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.png"),
        (b"", "empty.png"),
        (b"hello", "a.png"),
        (png()[:60], "cut.png"),
        (bomb(30_000, 30_000), "bomb.png"),
        (bomb(5001, 5001), "large.png"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "zeros.png"),
    ],
)
def test_what_is_no_picture_within_the_limits_is_refused(served: Served, content: bytes, name: str) -> None:
    status, paths = served.upload(content, name)
    if status == 200:
        in_words(served.call("transform", file_data(paths[0]), "a cat", None, 0.6, "", 2, None, 1))
        in_words(served.call("recipe", file_data(paths[0])))
        kind = served.fetch(paths[0]).headers
        assert "svg" not in kind.get("content-type", "") or "attachment" in kind.get("content-disposition", "")
    else:
        assert 400 <= status < 500


def test_large_requests_end_while_they_arrive(served: Served) -> None:
    status, text = served.upload(bytes(30_000_000), "large.png")
    assert status == 413 and "too large" in text
    content = json.dumps({"data": ["x" * 3_000_000], "fn_index": served.number("generate"), "session_hash": "large"})
    answer = httpx.post(f"{served.api}/queue/join", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 413 and "too large" in answer.text

    def endless() -> Any:
        for _ in range(40):
            yield b"x" * 1_000_000

    try:
        status = httpx.post(f"{served.api}/upload", content=endless(), timeout=30).status_code
    except httpx.TransportError:
        status = 413  # it hung up
    assert status >= 400
    assert served.generate().error is None


def test_whatever_is_sent_to_whichever_event_is_answered_in_words(served: Served) -> None:
    """The page's own events too, which its widgets alone are meant to call."""
    values: list[Any] = [None, "x", math.nan, -1, HUGE, [], {}, [[]], {"path": "/etc/passwd"}, file_data("/etc/passwd")]
    events = [one for one in served.config["dependencies"] if one["backend_fn"]]
    assert len(events) >= 12
    began = len(served.log.read_text().splitlines())
    for number, event in enumerate(events):
        for value in values[number % 2 :: 2]:
            answer = served.call(event["id"], *[value] * len(event["inputs"]))
            assert answer.error is None or in_words(answer)
        if event["inputs"]:
            in_words(served.call(event["id"]))  # no values at all
    faults = [line for line in served.log.read_text().splitlines()[began:] if "fault" in line]
    assert faults == []


def test_drafts_of_the_editor_are_held_to_the_limits(served: Served) -> None:
    editor = next(one["id"] for one in served.config["components"] if one["type"] == "imageeditor")

    def draft(content: bytes, **changes: Any) -> httpx.Response:
        fields = {"session_hash": "s", "component_id": editor, "fn_name": "accept_blobs", "type": "background"}
        fields |= {"index": "null", "id": "d", **changes}
        files = {"file": ("blob", io.BytesIO(content))}
        return httpx.post(f"{served.api}/component_server", data=fields, files=files, timeout=30)

    assert draft(png()).status_code == 200
    for answer in (
        draft(bomb(30_000, 30_000)),
        draft(b"hello"),
        draft(png(), type="layer", index="999999999"),
        draft(png(), type="layer", index="-5"),
        draft(png(), fn_name="__class__"),
        draft(png(), fn_name="preprocess"),
        draft(bytes(30_000_000)),
    ):
        assert answer.status_code >= 400 and "Traceback" not in answer.text
    assert served.generate().error is None


def test_a_full_queue_says_so_and_those_who_wait_are_told_their_place(served: Served) -> None:
    answers = together([lambda: served.generate(steps=20) for _ in range(14)])
    served_ones = [one for one in answers if one.error is None]
    turned_away = [one for one in answers if one.status == 503]
    assert len(served_ones) >= 6 and turned_away and len(served_ones) + len(turned_away) == 14
    assert all("waiting already" in (one.error or "") for one in turned_away)
    assert max(place for one in served_ones for place in one.places) >= 2
    assert served.generate().error is None


def test_one_visitor_cannot_fill_the_queue(served: Served) -> None:
    number, headers = served.number("generate"), {"content-type": "application/json"}
    body = json.dumps({"data": ["a cat", "", 50, None, None, None, 1, 1], "fn_index": number, "session_hash": "greedy"})
    with httpx.Client(timeout=30) as client:
        statuses = [
            client.post(f"{served.api}/queue/join", content=body, headers=headers).status_code for _ in range(200)
        ]
    assert statuses[:4] == [200] * 4 and statuses.count(503) >= 150 and set(statuses) == {200, 503}
    deadline = time.monotonic() + 60
    while (answer := served.generate()).error is not None:
        assert answer.status == 503 and time.monotonic() < deadline, answer.error
        time.sleep(0.5)


def test_sessions_are_apart(served: Served) -> None:
    """What one has drawn is not seen by another."""
    event = served.drawing_event

    def draw(session: str, prompt: str) -> str:
        answer = served.call(event, prompt, "", 2, 4, "64 × 64", 1, False, 1, None, session=session)
        assert answer.error is None, answer.error
        return json.dumps(answer.value, ensure_ascii=False)

    draw("session-one", "a secret wish")
    assert "a secret wish" not in draw("session-two", "a cat")
    assert "a secret wish" in draw("session-one", "a dog")


def test_gradios_own_client_works_against_the_named_endpoints(served: Served, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(served.url, verbose=False, download_files=str(tmp_path))
    names = set(client.view_api(return_format="dict")["named_endpoints"])
    expected = "about generate recipe transform control style trajectory steps attention compare"
    assert names == {f"/{name}" for name in expected.split()}
    about = client.predict(api_name="/about")
    assert about["ready"] and about["styles"] == ["gentle", "strong"] and [64, 64] in about["sizes"]
    assert about["controls"] == ["shapes"] and {"color", "grey", "blur", "none"} <= set(about["hints"])
    pictures, recipe = client.predict("a red apple", steps=2, seed=3, pictures=2, api_name="/generate")
    assert [Image.open(picture).size for picture in pictures] == [(64, 64)] * 2 and recipe["seed"] == 3
    changed, said = client.predict(
        handle_file(pictures[0]), "a blue heart", strength=0.5, steps=4, api_name="/transform"
    )
    assert Image.open(changed).size == (64, 64) and said["strength"] == 0.5
    steered, shown, said = client.predict("a red apple", handle_file(pictures[0]), steps=2, api_name="/control")
    assert Image.open(steered).size == Image.open(shown).size == (64, 64) and said["network"] == "shapes"
    there, expected, steps = client.predict("a cat", api_name="/trajectory")
    assert len(there) == len(expected) == len(steps) == 8
    picture, heat = client.predict("a red apple", "apple", api_name="/attention")
    assert Image.open(heat).size[0] > Image.open(picture).size[0]
    with pytest.raises(Exception, match="one model alone"):
        client.predict("a cat", api_name="/compare")


def test_a_call_can_be_given_up_and_others_are_served(served: Served) -> None:
    from gradio_client import Client

    client = Client(served.url, verbose=False)
    jobs = [client.submit("a cat", steps=50, pictures=4, api_name="/generate") for _ in range(3)]
    time.sleep(0.5)
    for job in jobs:
        job.cancel()
    assert served.generate(timeout=60).error is None


def test_the_log_has_the_queues_figures_and_no_prompt(served: Served) -> None:
    served.generate("a very private prompt")
    log = served.log.read_text()
    assert re.search(r"queue: joined, \d+ waiting", log) and re.search(r"/generate: served after [\d.]+ s", log)
    assert "very private" not in log
