"""The page that trains, as people see it, in a real browser without a window.

HUBGEN_SCREENSHOTS=1 python -m pytest tests/spaces/test_train_page.py      stores what it looks like in screenshots/
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.hub.loopback import Hub
from tests.spaces.client import Served
from tests.spaces.training import ball, ball_files, holding

pytest.importorskip("gradio", reason="the page needs Gradio (pip install 'hubgen[demo]')")
pytest.importorskip("playwright", reason="no playwright (pip install playwright)")
pytest.importorskip("datasets", reason="training needs datasets (pip install 'hubgen[train]')")

from tests.spaces.test_page import SCREENSHOTS, View, axe, browser, names_of

__all__ = ["axe", "browser"]

PATIENCE = 240_000
"""Milliseconds; the machine may be busy"""


class TrainView(View):
    """A window on the page."""

    def open(self, query: str = "") -> None:
        self.page.goto(f"{self.served.url}/{query}")
        self.page.wait_for_selector("#train")
        self.page.wait_for_selector("#drop input[type=file]", state="attached")
        self.page.wait_for_timeout(600)  # its events are being tied

    def bring(self, files: list[str]) -> None:
        self.page.set_input_files("#drop input[type=file]", files)
        self.page.wait_for_selector(".item .look")
        self.page.wait_for_function("document.querySelector('#pictures-note').innerText.includes('to learn from')")

    def text(self, place: str) -> str:
        return self.page.inner_text(f"#{place}")

    def until(self, place: str, words: str) -> None:
        self.page.wait_for_function(
            "([place, words]) => document.querySelector('#' + place).innerText.includes(words)",
            arg=[place, words],
            timeout=PATIENCE,
        )

    def points(self) -> int:
        """Of the curve."""
        return int(self.page.evaluate("document.querySelector('#curve svg')?.dataset.points || 0"))

    def setting(self, name: str, value: int) -> None:
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def keep(self, name: str) -> None:
        """Stores what it looks like, if that was asked for."""
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width
        if os.environ.get("HUBGEN_SCREENSHOTS"):
            SCREENSHOTS.mkdir(exist_ok=True)
            self.page.mouse.move(0, 0)
            small = Image.open(io.BytesIO(self.page.screenshot(full_page=True))).convert("RGB").quantize(128)
            small.save(SCREENSHOTS / f"{name}-{self.name}.png", optimize=True)


@pytest.fixture
def view(served_training: Served, browser: Any) -> Iterator[Callable[..., TrainView]]:
    opened: list[TrainView] = []

    def window(name: str = "desktop-light") -> TrainView:
        opened.append(TrainView(served_training, browser, name))
        return opened[-1]

    yield window
    for one in opened:
        one.context.close()


def faults_of(window: TrainView, axe: str) -> list[Any]:
    window.page.evaluate(axe)
    found = window.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        (one["id"], one["impact"], [node["html"][:160] for node in one["nodes"]][:4])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_pictures_become_an_adapter_that_loads(view: Callable[..., TrainView], tmp_path: Path, axe: str) -> None:
    window = view()
    assert window.page.is_disabled("#train")
    window.bring(ball_files(tmp_path))
    captions = window.page.locator(".item .caption :is(input, textarea)")
    assert captions.first.input_value() == "red ball"
    captions.first.fill("a shiny red ball")
    window.say("words", "zog")
    window.page.get_by_role("button", name="Settings").click()
    window.page.wait_for_selector("#steps input[type=number]")
    window.setting("steps", 120)
    window.setting("rank", 2)
    window.until("plan", "120 steps")
    assert "On this machine" in window.text("plan")
    window.page.wait_for_function("!document.querySelector('#train').disabled")

    window.page.click("#train")
    window.page.wait_for_function("document.querySelectorAll('#samples img').length >= 3", timeout=PATIENCE)
    window.page.wait_for_function("+document.querySelector('#curve svg')?.dataset.points >= 2", timeout=PATIENCE)
    first = window.points()
    window.page.wait_for_function(f"+document.querySelector('#curve svg').dataset.points > {first}", timeout=PATIENCE)
    assert "zog, a shiny red ball" in window.text("samples")
    window.keep("train-running")
    window.page.click("#stop")
    window.until("state", "are saved")
    stopped = window.points()
    assert faults_of(window, axe) == []

    window.page.click("#go-on")
    window.until("state", "Done: 120 steps")
    assert window.points() > stopped
    window.page.wait_for_selector("a.file")
    url = window.page.get_attribute("a.file", "href")
    (tmp_path / "taken.safetensors").write_bytes(window.context.request.get(f"{window.served.url}/{url}").body())

    assert window.page.input_value("#try-prompt :is(input, textarea)") == "zog, a shiny red ball"
    window.page.click("#try")
    window.done("try-stage", 2)
    window.keep("train-done")
    assert [label for role, label in names_of(window.page) if not label.strip()] == []
    assert faults_of(window, axe) == []
    window.check()

    from hubgen import TextToImagePipeline, bundled_model

    pipe = TextToImagePipeline.from_pretrained(bundled_model())
    pipe.load_lora_weights(str(tmp_path / "taken.safetensors"), adapter_name="taken")
    with_it, without = (drawn(pipe, weight) for weight in (1.0, 0.0))
    assert (with_it - without).abs().max() > 1e-3


def drawn(pipe: Any, weight: float) -> torch.Tensor:
    pipe.set_adapters(["taken"], [weight])
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe("zog, a shiny red ball", **options).images


def test_a_subject_that_was_stopped_is_taken_as_it_is_and_sent_to_the_hub(
    view: Callable[..., TrainView], training_hub: Hub, tmp_path: Path
) -> None:
    assert training_hub.token is not None
    window = view()
    window.bring(ball_files(tmp_path))
    window.page.get_by_role("radio", name="A subject").check()
    window.say("words", "a zog ball")
    window.until("plan", "All pictures are called “a zog ball”; captions are for styles, and not used.")
    window.page.wait_for_function("!document.querySelector('#train').disabled")
    window.page.click("#train")
    window.page.wait_for_function("+document.querySelector('#curve svg')?.dataset.points >= 1", timeout=PATIENCE)
    window.page.click("#stop")
    window.until("state", "are saved")
    (saved,) = re.findall(r"(\d+) of 500 steps are saved", window.text("state"))

    window.page.click("#as-it-is")
    window.until("state", f"Done: {saved} steps.")
    window.page.wait_for_selector("a.file")
    assert window.page.input_value("#try-prompt :is(input, textarea)") == "a zog ball"
    assert not window.page.is_visible("#go-on") and not window.page.is_visible("#as-it-is")

    window.page.get_by_role("button", name="Send it to the Hub").click()
    window.page.wait_for_selector("#send")
    window.say("repo", "tester/zog-ball")
    window.say("token", "hf_of_somebody_else")
    window.page.click("#send")
    window.until("sent", "The Hub does not let this token write to tester/zog-ball")
    assert window.page.input_value("#token input") == ""
    window.say("token", training_hub.token)
    window.page.get_by_role("checkbox", name="Private").check()
    window.page.click("#send")
    window.until("sent", f"It is at {training_hub.url}/tester/zog-ball")
    assert window.page.input_value("#token input") == ""
    assert window.page.get_attribute("#sent a", "href") == f"{training_hub.url}/tester/zog-ball"

    sent = training_hub.repos["tester/zog-ball"]
    card = sent["README.md"].decode()
    assert "license: apache-2.0" in card and f"max_train_steps: {saved}" in card and "prompt: a zog ball" in card
    url = window.page.get_attribute("a.file", "href")
    taken = window.context.request.get(f"{window.served.url}/{url}").body()
    assert sent["pytorch_lora_weights.safetensors"] == taken
    assert training_hub.created["tester/zog-ball"]["visibility"] == "private"
    assert training_hub.token not in window.page.content() and holding(training_hub.token, window.served.folder) == []
    window.check()


@pytest.mark.parametrize("name", ["desktop-dark", "phone-light", "phone-dark"])
def test_what_was_read_is_shown_with_what_is_wrong(
    view: Callable[..., TrainView], name: str, tmp_path: Path, axe: str
) -> None:
    window = view(name)
    files = ball_files(tmp_path)
    for name_of, content in {
        "broken.png": b"hello",
        "tiny.png": ball("red", 20, 20),
        "again.png": Path(files[0]).read_bytes(),
        "small.png": ball("pink", 40, 40),
    }.items():
        (tmp_path / name_of).write_bytes(content)
        files.append(str(tmp_path / name_of))
    window.bring(files)
    text = window.page.inner_text(".items")
    assert "7 pictures to learn from, 3 not used" in window.text("pictures-note")
    for words in ("not a picture that can be read", "too small: 20 × 20", "same picture as red-ball.png", "look soft"):
        assert words in text
    window.keep("train-pictures")
    for _ in range(3):
        window.page.locator(".item button", has_text="Remove").first.click()
        window.page.wait_for_timeout(500)
    window.until("pictures-note", "At least 5 are needed")
    window.page.wait_for_function("document.querySelector('#train').disabled")
    window.page.get_by_role("radio", name="A subject").check()
    window.page.wait_for_selector("#class-words")
    window.page.get_by_role("button", name="Settings").click()
    window.page.wait_for_timeout(400)
    found = names_of(window.page)
    assert len(found) >= 12 and [role for role, label in found if not label.strip()] == []
    assert faults_of(window, axe) == []
    window.check()
