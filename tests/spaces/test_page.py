"""The page as people see it, in a real browser without a window.

HUBGEN_SCREENSHOTS=1 python -m pytest tests/spaces/test_page.py      stores what it looks like in screenshots/
"""

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.spaces.client import Served

pytest.importorskip("gradio", reason="the page needs Gradio (pip install 'hubgen[demo]')")
pytest.importorskip("playwright", reason="no playwright (pip install playwright)")

SCREENSHOTS = Path(__file__).parent / "screenshots"
WINDOWS = {
    "desktop-light": (1280, 900, "light"),
    "desktop-dark": (1280, 900, "dark"),
    "phone-light": (390, 844, "light"),
    "phone-dark": (390, 844, "dark"),
}
AXE = "axe-core@4.10.3"
PATIENCE = 60_000
"""Milliseconds; the machine may be busy"""


class View:
    """A window on the page, which remembers what went wrong in it."""

    def __init__(self, served: Served, browser: Any, name: str = "desktop-light"):
        width, height, scheme = WINDOWS[name]
        self.name, self.served, self.width = name, served, width
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.note(request.url))
        self.open()

    def note(self, url: str) -> None:
        if not url.startswith((self.served.url, "data:", "blob:")):
            self.foreign.append(url)

    def open(self, query: str = "") -> None:
        self.page.goto(f"{self.served.url}/{query}")
        self.page.wait_for_selector("#draw")
        self.page.wait_for_function("document.querySelector('#prompt textarea') !== null")
        self.page.wait_for_timeout(400)  # its events are being tied

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def say(self, place: str, text: str) -> None:
        self.page.locator(f"#{place} :is(textarea, input)").first.fill(text)

    def choose(self, place: str, path: str, taken: Callable[[], object]) -> None:
        """Chooses a file there; a part of the page that has only just appeared may not listen yet.

        `taken` waits until the page shows that it has it, or raises a TimeoutError of playwright's.
        """
        from playwright.sync_api import TimeoutError

        for _ in range(6):
            self.page.set_input_files(f"#{place} input[type=file]", path)
            try:
                taken()
                return
            except TimeoutError:
                continue
        raise AssertionError(f"{place} takes no file")

    def send(self, path: str) -> None:
        """Has the editor of Transform take a picture."""
        self.page.locator("#picture canvas").first.wait_for()
        self.page.wait_for_timeout(3000)  # a file that comes while the canvas is being made is lost, and all later ones
        empty = self.page.locator("#picture").get_by_text("Drop a picture here")
        self.choose("picture", path, lambda: empty.wait_for(state="hidden", timeout=PATIENCE / 6))
        self.page.wait_for_timeout(1500)  # it is being drawn

    def send_control(self, path: str) -> None:
        """Has Control take a picture, and waits until it shows what the network will be shown."""
        shown = self.page.locator("#shape-preview img")
        self.choose("shape-picture", path, lambda: shown.wait_for(timeout=PATIENCE / 6))

    def drop(self, path: str, says: str) -> None:
        """Drops a picture whose settings are to be restored, and waits until the page says so."""
        note = self.page.locator("#note").get_by_text(says)
        self.choose("dropped", path, lambda: note.wait_for(timeout=PATIENCE / 6))

    def done(self, place: str, number: int = 1) -> list[str]:
        """The pictures that can be saved there, once there are so many."""
        try:
            self.page.wait_for_function(
                f"document.querySelectorAll('#{place} a[download]').length >= {number}", timeout=PATIENCE
            )
        except Exception as problem:
            raise AssertionError(f"the page says: {self.page.inner_text('body')[-1500:]}") from problem
        return self.page.eval_on_selector_all(f"#{place} a[download]", "links => links.map(one => one.href)")

    def picture(self, url: str) -> Image.Image:
        return Image.open(io.BytesIO(self.context.request.get(url).body()))

    def check(self) -> None:
        assert self.errors == [] and self.foreign == []
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def view(served: Served, browser: Any) -> Iterator[Callable[..., View]]:
    opened: list[View] = []

    def window(name: str = "desktop-light") -> View:
        opened.append(View(served, browser, name))
        return opened[-1]

    yield window
    for one in opened:
        one.context.close()


def sent_picture(folder: Path) -> str:
    picture = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(picture).ellipse((50, 30, 150, 130), fill="red")
    picture.save(folder / "sent.png")
    return str(folder / "sent.png")


def test_a_picture_forms_before_the_eyes_and_carries_its_recipe(view: Callable[..., View]) -> None:
    window = view()
    window.page.evaluate(
        """() => {
          window.frames_seen = new Set();
          new MutationObserver(() => {
            for (const one of document.querySelectorAll('#stage img')) {
              if (one.src.startsWith('data:')) window.frames_seen.add(one.src);
            }
          }).observe(document.querySelector('#stage'), {subtree: true, childList: true, attributes: true});
        }"""
    )
    window.say("prompt", "a smiling cat")
    window.page.click("#draw")
    (url,) = window.done("stage")
    assert window.page.evaluate("window.frames_seen.size") >= 3
    picture = window.picture(url)
    assert picture.size == (64, 64) and "a smiling cat" in picture.info["hubgen"]
    assert window.page.locator("#stage img").get_attribute("alt") == "a smiling cat"
    assert "pixelated" in window.page.locator("#stage img").evaluate("one => getComputedStyle(one).imageRendering")
    assert len(window.done("session")) == 1
    assert "prompt=a+smiling+cat" in window.page.url
    window.check()


def test_the_link_keeps_the_settings(view: Callable[..., View]) -> None:
    window = view()
    window.open("?prompt=a+red+apple&steps=7&seed=5&fresh=0&pictures=2&guidance=nan&size=9")
    window.page.wait_for_function("document.querySelector('#prompt textarea').value === 'a red apple'")
    window.page.click("#draw")
    assert len(window.done("stage", 2)) == 2
    names = window.page.eval_on_selector_all("#stage a[download]", "links => links.map(one => one.download)")
    assert names == ["a-red-apple-5.png", "a-red-apple-6.png"]
    window.check()


def test_one_that_is_drawn_can_be_stopped(view: Callable[..., View], served: Served) -> None:
    window = view()
    window.open("?prompt=a+cat&steps=50&pictures=4")
    window.page.wait_for_function("document.querySelector('#prompt textarea').value === 'a cat'")
    window.page.click("#draw")
    window.page.wait_for_function("/Step [2-9]/.test(document.querySelector('#stage').innerText)")
    window.page.click("#stop")
    window.page.wait_for_function("/Stopped/.test(document.querySelector('#stage').innerText)")
    assert served.generate().error is None
    assert "create: stopped" in served.log.read_text()
    window.check()


def test_a_dropped_picture_restores_its_settings(view: Callable[..., View], tmp_path: Path) -> None:
    window = view()
    window.open("?prompt=a+blue+heart&steps=9&seed=77&fresh=0")
    window.page.wait_for_function("document.querySelector('#prompt textarea').value === 'a blue heart'")
    window.page.click("#draw")
    (url,) = window.done("stage")
    window.picture(url).save(tmp_path / "without.png")
    (tmp_path / "drawn.png").write_bytes(window.context.request.get(url).body())
    window.open()
    assert window.page.input_value("#prompt textarea") == ""
    window.drop(str(tmp_path / "drawn.png"), "as they were")
    window.page.wait_for_function("document.querySelector('#prompt textarea').value === 'a blue heart'")
    window.page.wait_for_function("location.search.includes('seed=77') && location.search.includes('steps=9')")
    window.page.click("#draw")
    (again,) = window.done("stage")
    assert window.picture(again).tobytes() == window.picture(url).tobytes()
    window.check()


def test_a_picture_without_a_recipe_says_so(view: Callable[..., View], tmp_path: Path) -> None:
    window = view()
    window.drop(sent_picture(tmp_path), "says nothing about how it was made")
    window.check()


def test_a_picture_is_drawn_over_and_a_painted_part_alone(view: Callable[..., View], tmp_path: Path) -> None:
    window = view()
    window.tab("Transform")
    window.send(sent_picture(tmp_path))
    window.say("transform-prompt", "a blue heart")
    window.page.click("#transform")
    (url,) = window.done("transform-stage")
    assert '"strength": 0.6' in window.picture(url).info["hubgen"]
    before = window.page.locator("#transform-stage img").first.get_attribute("src")

    box = window.page.locator("#picture canvas").first.bounding_box()
    assert box is not None
    window.page.mouse.move(box["x"] + box["width"] * 0.40, box["y"] + box["height"] * 0.42)
    window.page.mouse.down()
    for step in range(8):
        window.page.mouse.move(box["x"] + box["width"] * (0.40 + 0.02 * step), box["y"] + box["height"] * 0.42)
    window.page.mouse.up()
    window.page.wait_for_timeout(800)
    window.page.click("#transform")
    window.page.wait_for_function(
        f"document.querySelector('#transform-stage a[download]')?.href !== {url!r}"
        " && document.querySelector('#transform-stage a[download]')"
    )
    (painted,) = window.done("transform-stage")
    import base64

    assert before is not None
    original = Image.open(io.BytesIO(base64.b64decode(before.split(",")[1]))).convert("RGB")
    drawn = window.picture(painted).convert("RGB")
    corner = (0, 48, 64, 64)  # far below what was painted: as it was, but for the autoencoder
    change = sum(abs(a - b) for a, b in zip(original.crop(corner).tobytes(), drawn.crop(corner).tobytes(), strict=True))
    assert change / len(original.crop(corner).tobytes()) < 12
    assert drawn.tobytes() != window.picture(url).convert("RGB").tobytes()
    window.check()


def test_a_picture_steers_once_its_hint_is_seen(view: Callable[..., View], tmp_path: Path) -> None:
    window = view()
    window.tab("Control")
    window.send_control(sent_picture(tmp_path))
    edges = window.page.locator("#shape-preview img").get_attribute("src")
    window.page.get_by_role("radio", name="Blur").check()
    window.page.wait_for_function(f"document.querySelector('#shape-preview img').src !== {edges!r}")
    window.say("control-prompt", "a red apple")
    window.page.click("#steer")
    shown, drawn = window.done("control-stage", 2)
    assert shown.endswith("control-1.png") and window.picture(shown).size == window.picture(drawn).size
    assert '"image": "control-1.png"' in window.picture(drawn).info["hubgen"]
    window.check()


def test_styles_are_put_on_with_their_weights(view: Callable[..., View]) -> None:
    window = view()
    window.tab("Style")
    window.say("style-prompt", "a smiling cat")
    window.page.click("#wear")
    without, worn = window.done("style-stage", 2)
    assert window.picture(without).tobytes() != window.picture(worn).tobytes()
    assert '"lora": null' in window.picture(without).info["hubgen"]
    assert '"weight": 1.0' in window.picture(worn).info["hubgen"]
    window.check()


def test_one_can_look_inside(view: Callable[..., View]) -> None:
    window = view()
    window.tab("Look inside")
    window.page.click("#way")
    window.page.wait_for_function("document.querySelectorAll('#way-stage img').length === 16")
    window.page.click("#steps-of")
    window.page.wait_for_function("document.querySelectorAll('#steps-of-stage img').length === 4")
    assert re.findall(r"\d+ steps", window.page.inner_text("#steps-of-stage")) == [
        f"{n} steps" for n in (4, 10, 25, 50)
    ]
    window.page.click("#looks")
    window.page.get_by_text("Where it looks for “smiling”").wait_for()
    window.page.get_by_role("radio", name="cat").check()
    window.page.get_by_text("Where it looks for “cat”").wait_for()
    window.check()


def test_all_of_it_works_by_keyboard(view: Callable[..., View]) -> None:
    window = view()
    window.page.locator("#prompt textarea").focus()
    window.page.keyboard.type("a rocket")
    window.page.keyboard.press("Tab")
    focused = "document.activeElement.innerText"
    assert window.page.evaluate(focused) == "Draw"
    outline = window.page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert float(outline.removesuffix("px")) >= 2
    window.page.keyboard.press("Enter")
    window.done("stage")
    window.check()


def names_of(page: Any) -> list[tuple[str, str]]:
    """(role, name) of everything in the accessibility tree that can be used."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    used = {"button", "textbox", "slider", "spinbutton", "checkbox", "radio", "combobox", "link", "tab", "listbox"}
    return [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored") and node.get("role", {}).get("value") in used
    ]


@pytest.mark.parametrize("name", ["desktop-light", "phone-dark"])
def test_every_control_has_a_name(view: Callable[..., View], name: str, tmp_path: Path) -> None:
    window = view(name)
    for tab in ("Create", "Transform", "Control", "Style", "Look inside"):
        window.tab(tab)
        for settings in window.page.get_by_role("button", name="Settings").all():
            if settings.is_visible():
                settings.click()
        if tab == "Transform":
            window.send(sent_picture(tmp_path))
        if tab == "Control":
            window.send_control(sent_picture(tmp_path))
        window.page.wait_for_timeout(300)
        found = names_of(window.page)
        assert len(found) >= 6
        assert [role for role, label in found if not label.strip()] == [], (tab, found)
    window.check()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, from the npm registry."""
    if shutil.which("npm") is None:
        pytest.skip("no npm here, which fetches axe-core")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "pack", AXE, "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    archive = next(folder.glob("*.tgz"), None)
    if done.returncode or archive is None:
        pytest.skip(f"npm does not give {AXE} here")
    with tarfile.open(archive) as packed:
        script = packed.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


@pytest.mark.parametrize("name", ["desktop-light", "phone-dark"])
def test_axe_finds_no_serious_fault(view: Callable[..., View], axe: str, name: str) -> None:
    window = view(name)
    window.say("prompt", "a smiling cat")
    window.page.click("#draw")
    window.done("stage")
    window.page.evaluate(axe)
    faults = []
    for tab in ("Create", "Transform", "Control", "Style", "Look inside"):
        window.tab(tab)
        for settings in window.page.get_by_role("button", name="Settings").all():
            if settings.is_visible():
                settings.click()
        window.page.wait_for_timeout(500)
        found = window.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        faults += [
            (tab, one["id"], one["impact"], [node["html"][:160] for node in one["nodes"]][:4])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
    assert faults == []


@pytest.mark.parametrize("name", list(WINDOWS))
def test_it_fits_every_window(
    view: Callable[..., View], name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    window = view(name)
    stored = bool(os.environ.get("HUBGEN_SCREENSHOTS"))
    dark = window.page.evaluate("document.body.classList.contains('dark')")
    assert dark == name.endswith("dark")

    def shown(tab: str) -> None:
        window.page.wait_for_timeout(500 if stored else 100)
        assert window.page.evaluate("document.documentElement.scrollWidth") <= window.width, tab
        visible = window.page.get_by_role("tab").filter(visible=True).all_inner_texts()
        assert visible == ["Create", "Transform", "Control", "Style", "Look inside"]
        if stored:
            SCREENSHOTS.mkdir(exist_ok=True)
            window.page.mouse.move(0, 0)
            content = window.page.screenshot(full_page=True)
            small = Image.open(io.BytesIO(content)).convert("RGB").quantize(128)
            small.save(SCREENSHOTS / f"{tab}-{name}.png", optimize=True)

    window.open("?prompt=a+smiling+cat&seed=1&fresh=0&pictures=4")
    if stored:
        window.page.click("#draw")
        window.done("stage", 4)
    shown("create")
    window.tab("Transform")
    if stored:
        window.send(sent_picture(tmp_path))
        window.say("transform-prompt", "a blue heart")
        window.page.click("#transform")
        window.done("transform-stage")
    shown("transform")
    window.tab("Control")
    if stored:
        window.send_control(sent_picture(tmp_path))
        window.say("control-prompt", "a red apple")
        window.page.click("#steer")
        window.done("control-stage", 2)
    shown("control")
    window.tab("Style")
    if stored:
        window.say("style-prompt", "a smiling cat")
        window.page.click("#wear")
        window.done("style-stage", 2)
    shown("style")
    window.tab("Look inside")
    if stored:
        for button, pictures in (("way", 16), ("steps-of", 4), ("looks", 2)):
            window.page.click(f"#{button}")
            window.page.wait_for_function(f"document.querySelectorAll('#{button}-stage img').length === {pictures}")
    shown("look-inside")
    window.check()
