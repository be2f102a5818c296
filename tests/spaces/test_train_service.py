"""What strangers may ask of the page that trains and what they may not: over raw HTTP, without its widgets."""

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.hub.loopback import Hub
from tests.spaces.client import Served, file_data
from tests.spaces.test_service import HUGE, bomb, in_words
from tests.spaces.training import Visitor as Client
from tests.spaces.training import ball, holding

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


NASTY = [
    "run: {output_dir: /tmp/stolen}",
    '"\n  push_to_hub: owner/name',
    "../../../etc/passwd",
    "!!python/object/apply:os.system ['id']",
    "<script>alert(1)</script>",
    "{% raw %} & *anchor # %YAML",
]


@pytest.fixture(scope="module")
def learned(served_training: Served) -> Client:
    """A visitor whose training is done, with captions that look like settings or paths."""
    visitor = Client(served_training)
    visitor.bring()
    words = "zog: !!str {a: [b], push_to_hub: x/y}"
    answer = visitor.train(words=words, captions=NASTY, steps=3, rank=1, prompts="- *a: &b")
    assert answer.error is None, answer.error
    assert "stop it first" in in_words(visitor.train())
    in_words(visitor.call("result"))
    done = visitor.until("done", "failed", "stopped")
    assert done["state"] == "done", visitor.served.log.read_text()[-2000:]
    assert done["step"] == done["of"] == 3 and len(done["loss"]) == 3
    return visitor


def test_captions_that_look_like_settings_or_paths_stay_captions(learned: Client) -> None:
    """They are trained on as they are, and change no setting of the script."""
    files = learned.call("result").value[0]
    assert [one["orig_name"] for one in files] == ["pytorch_lora_weights.safetensors", "kohya.safetensors", "README.md"]
    card = learned.served.fetch(files[2]["path"]).text
    assert "<script>" not in card and "stolen" not in card.split("---")[1]
    assert "/tmp" not in card
    assert not Path("/tmp/stolen").exists()
    assert not any("push_to_hub: x" in one for one in learned.served.log.read_text().splitlines())


def test_what_one_visitor_learned_no_other_sees(learned: Client) -> None:
    other = Client(learned.served)
    assert "no training" in in_words(other.call("progress"))
    in_words(other.call("stop"))
    in_words(other.call("go_on", False))
    in_words(other.call("result"))
    assert other.call("look", []).value[0] == []
    hidden = [path for path in learned.served.folder.glob("hubgen-training-*/*/**/*") if path.is_file() and path.suffix]
    assert any(path.name == "recipe.yaml" for path in hidden) and any(path.name == "00.png" for path in hidden)
    for path in hidden[:40]:
        assert learned.served.fetch(str(path)).status_code in (400, 403, 404)


def sending(visitor: Client, repo: Any, licence: Any, private: Any, token: Any) -> str:
    """What the page says to Send."""
    event = next(
        one["id"]
        for one in visitor.served.config["dependencies"]
        if one["backend_fn"] and len(one["inputs"]) == 4 and len(one["outputs"]) == 2
    )
    answer = visitor.served.call(event, repo, licence, private, token, session=visitor.session)
    if answer.error:
        return in_words(answer)
    said, kept = answer.value
    assert kept == "", "the token goes from the page"
    return said


REFUSED = "hf_ThisIsVerySecret"


@pytest.mark.parametrize(
    ("repo", "licence", "token", "says"),
    [
        ("../../etc", "mit", REFUSED, "owner/name"),
        ("owner/..", "mit", REFUSED, "owner/name"),
        ("a/b/c", "mit", REFUSED, "owner/name"),
        ("owner/na me", "mit", REFUSED, "owner/name"),
        ("x" * 5000, "mit", REFUSED, "owner/name"),
        (["owner/name"], "mit", REFUSED, "owner/name"),
        ("owner/name", "my own", REFUSED, "my own is not in the list"),
        ("owner/name", "mit", "", "Type a token"),
        ("owner/name", "mit", None, "Type a token"),
        ("owner/name", "mit", "hf_\r\nX: y", "no token of the Hub"),
        ("owner/name", "mit", REFUSED, "does not let this token write to owner/name; expected one with the right to"),
    ],
)
def test_what_cannot_be_sent_is_said_and_the_token_is_kept_nowhere(
    learned: Client, training_hub: Hub, repo: Any, licence: str, token: str | None, says: str
) -> None:
    said = sending(learned, repo, licence, False, token)
    assert says in said and "It is at" not in said and "/tmp" not in said
    assert REFUSED not in said and holding(REFUSED, learned.served.folder) == []
    assert training_hub.commits == [] and "owner/name" not in training_hub.repos


def test_what_was_learned_reaches_the_hub_with_its_card_and_the_token_stays_nowhere(
    learned: Client, training_hub: Hub
) -> None:
    assert training_hub.token is not None
    said = sending(learned, "tester/zog", "cc-by-4.0", True, training_hub.token)
    address = f"{training_hub.url}/tester/zog"
    assert f'<a href="{address}"' in said and "problem" not in said

    files = training_hub.repos["tester/zog"]
    assert training_hub.created["tester/zog"]["visibility"] == "private"
    assert {"README.md", "pytorch_lora_weights.safetensors", "training.json"} <= set(files)
    assert not [name for name in files if Path(name).suffix not in (".md", ".safetensors", ".json", ".png")]
    taken = {one["orig_name"]: one["path"] for one in learned.call("result").value[0]}
    name = "pytorch_lora_weights.safetensors"
    assert files[name] == learned.served.fetch(taken[name]).content
    text = files["README.md"].decode()
    card = yaml.safe_load(text.split("---")[1])
    assert card["license"] == "cc-by-4.0" and "lora" in card["tags"] and card["pipeline_tag"] == "text-to-image"
    assert card["widget"][0]["output"]["url"] in files
    assert 'load_lora_weights("tester/zog")' in text and str(learned.served.folder) not in text

    assert training_hub.token not in said and training_hub.token not in json.dumps(learned.call("progress").value)
    assert holding(training_hub.token, learned.served.folder) == []
    assert training_hub.token.encode() not in b"".join(files.values())
    for secret in ("environ", "cmdline"):
        assert training_hub.token.encode() not in Path(f"/proc/{learned.served.pid}/{secret}").read_bytes()

    commits = len(training_hub.commits)
    assert address in sending(learned, "tester/zog", "cc-by-4.0", True, training_hub.token)
    assert len(training_hub.commits) == commits, "nothing changed, so nothing is sent"


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
