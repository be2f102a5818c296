"""What strangers may ask of the page that trains and what they may not: over raw HTTP, without its widgets."""

import json
import math
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.spaces.client import Served, file_data
from tests.spaces.test_service import HUGE, bomb, in_words
from tests.spaces.training import COLOURS, ball
from tests.spaces.training import Visitor as Client

pytest.importorskip("gradio", reason="the page needs Gradio (pip install 'hubgen[demo]')")
pytest.importorskip("datasets", reason="training needs datasets (pip install 'hubgen[train]')")


@pytest.fixture
def visitor(served_training: Served) -> Client:
    return Client(served_training)


@pytest.fixture(scope="module")
def ready(served_training: Served) -> Client:
    """A visitor with six pictures, who has trained nothing."""
    visitor = Client(served_training)
    answer = visitor.bring()
    assert answer.error is None, answer.error
    assert [one["used"] for one in answer.value[0]] == [True] * 6
    return visitor


def test_what_is_no_picture_is_said_beside_it(visitor: Client) -> None:
    contents = {
        "a.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "bomb.png": bomb(30_000, 30_000),
        "hello.png": b"hello",
        "cut.png": ball("red")[:70],
        "good.png": ball("red"),
    }
    files = []
    for name, content in contents.items():
        status, paths = visitor.served.upload(content, name)
        assert status == 200
        files.append(file_data(paths[0]))
    answer = visitor.call("look", files)
    assert answer.error is None, answer.error
    found = {one["name"]: one for one in answer.value[0]}
    assert [name for name, one in found.items() if one["used"]] == ["good.png"]
    assert all(one["notes"][0].startswith("Not used.") for name, one in found.items() if name != "good.png")


def test_a_hundred_files_are_refused_before_any_is_read(visitor: Client) -> None:
    one = visitor.served.sent(ball("red"))
    assert "at most 20" in in_words(visitor.call("look", [one] * 100))
    assert visitor.call("look", []).value[0] == []


def test_no_path_and_no_address_is_opened(visitor: Client) -> None:
    secret = visitor.served.folder / "secret.png"
    secret.write_bytes(ball("red"))
    for value in ("/etc/passwd", str(secret), "../../etc/passwd", f"{visitor.served.url}/config"):
        in_words(visitor.call("look", [file_data(value)]))
        in_words(visitor.call("look", [{"url": value}]))
        in_words(visitor.call("look", [value]))
    assert visitor.call("look", []).value[0] == []


NEVER = [math.nan, math.inf, -math.inf, -1, 0, HUGE, -HUGE, True, "4", [4], {"a": 1}, 1e308]


@pytest.mark.parametrize(
    "changes",
    [
        *({"steps": value} for value in [*NEVER, 2001, 2.5]),
        *({"rank": value} for value in [*NEVER, 65, 1.5]),
        *({"learning_rate": value} for value in [*NEVER, 0.2, 1e-9]),
        *({"kind": value} for value in ["all", "../subject", None, 5, ["style"]]),
        *({"words": value} for value in ["x" * 81, "x" * 100_000, None, 7, ["a"], "a\0b", "a\u202eb", "\ud800"]),
        *({"class_words": value, "kind": "subject"} for value in ["x" * 81, 7, ["a"], "a\0b"]),
        *({"captions": value} for value in ["abc", [7], [["a"]], ["x" * 501], ["a"] * 21, {"a": 1}, [None, "a\0b"]]),
        *({"prompts": value} for value in [7, ["a"], "a\nb\nc\nd", "x" * 501, "x" * 90_000]),
        {"kind": "subject", "words": ""},
        {"words": "", "captions": []},
    ],
    ids=lambda changes: json.dumps(changes, default=str)[:60],
)
def test_hostile_wishes_are_refused_in_words(ready: Client, changes: dict[str, Any]) -> None:
    if changes.get("words", "") is None:  # no words, and no captions: a caption is missing
        changes = {**changes, "captions": []}
    in_words(ready.train(**changes))
    assert "no training" in in_words(ready.call("progress"))


def test_captions_that_look_like_settings_or_paths_stay_captions(visitor: Client) -> None:
    """They are trained on as they are, and change no setting of the script."""
    visitor.bring()
    nasty = [
        "run: {output_dir: /tmp/stolen}",
        '"\n  push_to_hub: owner/name',
        "../../../etc/passwd",
        "!!python/object/apply:os.system ['id']",
        "<script>alert(1)</script>",
        "{% raw %} & *anchor # %YAML",
    ]
    words = "zog: !!str {a: [b], push_to_hub: x/y}"
    answer = visitor.train(words=words, captions=nasty, steps=3, rank=1, prompts="- *a: &b")
    assert answer.error is None, answer.error
    assert "stop it first" in in_words(visitor.train())
    other = Client(visitor.served)
    assert "no training" in in_words(other.call("progress"))
    in_words(other.call("stop"))
    in_words(other.call("go_on", False))
    in_words(other.call("result"))
    assert other.call("look", []).value[0] == []
    in_words(visitor.call("result"))

    done = visitor.until("done", "failed", "stopped")
    assert done["state"] == "done", visitor.served.log.read_text()[-2000:]
    assert done["step"] == done["of"] == 3 and len(done["loss"]) == 3
    files = visitor.call("result").value[0]
    assert [one["orig_name"] for one in files] == ["pytorch_lora_weights.safetensors", "kohya.safetensors", "README.md"]
    card = visitor.served.fetch(files[2]["path"]).text
    assert "<script>" not in card and "stolen" not in card.split("---")[1]
    assert "/tmp" not in card
    in_words(other.call("result"))
    hidden = [path for path in visitor.served.folder.glob("hubgen-training-*/*/**/*") if path.is_file() and path.suffix]
    assert any(path.name == "recipe.yaml" for path in hidden) and any(path.name == "00.png" for path in hidden)
    for path in hidden[:40]:
        assert visitor.served.fetch(str(path)).status_code in (400, 403, 404)
    assert not Path("/tmp/stolen").exists()
    publishing(visitor)


def publishing(visitor: Client) -> None:
    """What was learned is sent to proper names with a token alone; the token is said nowhere."""
    event = next(
        one["id"]
        for one in visitor.served.config["dependencies"]
        if one["backend_fn"] and len(one["inputs"]) == 4 and len(one["outputs"]) == 2
    )
    token = "hf_ThisIsVerySecret"
    for repo, licence, given in (
        ("../../etc", "mit", token),
        ("owner/..", "mit", token),
        ("a/b/c", "mit", token),
        ("owner/na me", "mit", token),
        ("x" * 5000, "mit", token),
        (["owner/name"], "mit", token),
        ("owner/name", "my own", token),
        ("owner/name", "mit", ""),
        ("owner/name", "mit", None),
        ("owner/name", "mit", "hf_\r\nX: y"),
        ("owner/name", "mit", token),  # nothing is reached from here
    ):
        answer = visitor.served.call(event, repo, licence, False, given, session=visitor.session)
        text = answer.error or answer.value[0]
        assert "problem" in text or answer.error, text
        assert token not in json.dumps(answer.value or "") and token not in text and "/tmp" not in text
    assert token not in visitor.served.log.read_text()
    for path in visitor.served.folder.rglob("*"):
        if path.is_file() and path.stat().st_size < 1_000_000:
            assert token.encode() not in path.read_bytes(), path


def test_whatever_is_sent_to_whichever_event_is_answered_in_words(served_training: Served) -> None:
    values: list[Any] = [None, "x", math.nan, HUGE, [], {}, [[]], file_data("/etc/passwd")]
    events = [one for one in served_training.config["dependencies"] if one["backend_fn"]]
    seen, began = set(), len(served_training.log.read_text().splitlines())
    for number, event in enumerate(events):
        kind = (len(event["inputs"]), len(event["outputs"]))
        if kind in seen:  # the buttons of the rows are alike
            continue
        seen.add(kind)
        for value in values[number % 2 :: 2]:
            answer = served_training.call(event["id"], *[value] * len(event["inputs"]))
            assert answer.error is None or in_words(answer)
    faults = [line for line in served_training.log.read_text().splitlines()[began:] if "fault" in line]
    assert faults == []


def test_the_endpoints_are_named(served_training: Served) -> None:
    info = httpx.get(f"{served_training.api}/info", timeout=30).json()["named_endpoints"]
    assert set(info) == {"/look", "/train", "/progress", "/stop", "/go_on", "/result", "/about"}


def test_who_has_left_is_stopped_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue itself, with scripts that run: one trains, one waits, and a third is told that it is full."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "spaces" / "train_lora"))
    from hubgen.spaces.kit.limits import Limits, Refused
    from hubgen.spaces.kit.service import Model
    from hubgen.spaces.kit.settings import Settings
    from steps.bench import Benches
    from steps.recipe import checked_wish, settings_for, usual_for
    from steps.runs import Trainings

    model, limits = Model("bundled", Settings()), Limits(trainings_waiting=1, away_seconds=60)
    benches = Benches(tmp_path / "benches", 64, limits)
    trainings = Trainings(benches, "cpu")
    runs = []
    for name in ("first", "second"):
        bench = benches.get(name)
        bench.add([(f"{colour}.png", ball(colour)) for colour in COLOURS], limits)
        wish = checked_wish(bench, limits, usual_for(model, 6), "style", "zog")
        runs.append(trainings.start(bench, wish, *settings_for(wish, bench, model, limits)))
        end = time.monotonic() + 20
        while trainings.running is None and time.monotonic() < end:
            time.sleep(0.1)
    first, second = runs
    process = first.process
    assert first.state == "running" and process is not None and second.state == "waiting" and second.place == 2
    with pytest.raises(Refused, match="waiting already"):
        trainings.check_room(benches.get("third"))
    with pytest.raises(Refused, match="stop it first"):
        trainings.check_room(first.bench)
    assert benches.find("another") is None and len({one.folder for one in benches.of.values()}) == 3

    for bench in benches.of.values():
        bench.seen -= 61
    end = time.monotonic() + 20
    while any(benches.folder.iterdir()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(benches.folder.iterdir()) and not benches.of
    assert process.poll() is not None and trainings.running is None and not trainings.waiting
    trainings.close()
