"""Create: a prompt becomes a picture, step by step."""

import json
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.limits import Refused
from hubgen.spaces.kit.recipes import read_recipe
from hubgen.spaces.kit.uploads import uploaded_file
from tabs.desk import FOLDER, QUEUE, Desk, Made, restored, sampling_sliders, seed_fields, tie_drawing

EXAMPLES = [
    "a smiling cat",
    "a red apple",
    "a blue heart",
    "a rocket",
    "a birthday cake",
    "a green frog",
    "a full moon",
]
EMPTY = "Say what the picture shows, and watch it form here."
LINK = """(prompt, negative, steps, guidance, size, seed, fresh, pictures) => {
  const link = new URL(location.href);
  const settings = {prompt, negative, steps, guidance, size, seed, fresh: fresh ? 1 : 0, pictures};
  for (const [name, value] of Object.entries(settings)) {
    if (value === "" || value === null || value === undefined) link.searchParams.delete(name);
    else link.searchParams.set(name, value);
  }
  history.replaceState(history.state, "", link);
}"""
"""Keeps the settings in the address, so that it can be sent to somebody"""


def build(page: gr.Blocks, desk: Desk) -> None:
    """The tab, and the endpoints /generate and /recipe."""
    limits = desk.limits
    with gr.Row(elem_classes="halves"):
        with gr.Column(scale=5, min_width=300, elem_classes="card"):
            prompt = gr.Textbox(
                label="What the picture shows",
                placeholder="a smiling cat",
                lines=2,
                max_length=limits.prompt_characters,
                elem_id="prompt",
                elem_classes="prompt",
            )
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=3)
                stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=90)
            with gr.Row(elem_classes="chips"):
                for example in EXAMPLES:
                    chip = gr.Button(example, size="sm", min_width=0)
                    chip.click(None, None, prompt, js=f"() => {json.dumps(example)}", api_visibility="private")
            with gr.Accordion("Settings", open=False, elem_classes="accordion"):
                negative = gr.Textbox(label="What to avoid", max_length=limits.prompt_characters, elem_id="negative")
                steps, guidance = sampling_sliders(desk)
                with gr.Row():
                    size = gr.Dropdown(list(desk.sizes), value=next(iter(desk.sizes)), label="Size", elem_id="size")
                    pictures = gr.Slider(1, limits.pictures, 1, step=1, label="Pictures", elem_id="pictures")
                seed, fresh = seed_fields()
            dropped = gr.File(
                label="Drop a picture that was drawn here to restore its settings",
                file_types=[".png"],
                type="filepath",
                height=120,
                elem_id="dropped",
            )
            note = gr.HTML(elem_id="note")
        with gr.Column(scale=6, min_width=300, elem_classes=["card", "sticky"]):
            view = gr.HTML(stage.empty(EMPTY), elem_id="stage")
    session = gr.State([])
    with gr.Column(elem_classes=["card", "session"], visible=False) as album:
        shown = gr.HTML(elem_id="session")

    settings: list[Any] = [prompt, negative, steps, guidance, size, seed, fresh, pictures]

    async def drawn(
        prompt: Any,
        negative: Any,
        steps: Any,
        guidance: Any,
        size: Any,
        seed: Any,
        fresh: Any,
        pictures: Any,
        kept: list[Made],
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        seed = None if fresh is True else seed
        drawing = desk.drawing(prompt, negative, steps, guidance, desk.size(size), seed, pictures)
        yield stage.stage("", stage.progress(0, drawing.steps, "Getting ready")), drawing.seed, *[gr.skip()] * 3
        async for event in desk.draw(drawing, request, "create"):
            if isinstance(event, str):
                yield event, *[gr.skip()] * 4
                continue
            body = stage.pictures([one.figure() for one in event])
            kept = [*event, *kept][: limits.session_pictures]
            strip = stage.strip([one.figure(one.title, "PNG") for one in kept], "Drawn in this session")
            yield stage.stage(body), gr.skip(), gr.Column(visible=True), strip, kept

    tie_drawing(
        desk, [draw.click, prompt.submit], stop, drawn, [*settings, session], [view, seed, album, shown, session]
    )

    def restore(file: Any) -> tuple[Any, ...]:
        if file is None:
            return ("", *[gr.skip()] * len(settings))
        try:
            found = restored(read_recipe(uploaded_file({"path": file}, FOLDER, limits)), desk)
        except Refused as error:
            return (stage.said(str(error), "problem"), *[gr.skip()] * len(settings))
        drawing = found["drawing"]
        text = " ".join(["All settings are as they were for this picture.", *found["notes"]])
        return (
            stage.said(text),
            drawing.prompt,
            drawing.negative_prompt,
            drawing.steps,
            drawing.guidance,
            found["size"] or gr.skip(),
            drawing.seed,
            False,
            drawing.pictures,
        )

    dropped.change(restore, dropped, [note, *settings], queue=False, show_progress="hidden", api_visibility="private")
    page.load(linked(desk), None, settings, queue=False, show_progress="hidden", api_visibility="private")
    gr.on([one.change for one in settings], None, settings, None, js=LINK, api_visibility="private")
    add_endpoints(desk)


def linked(desk: Desk) -> Any:
    """What reads the settings in the page's address."""

    def read(request: gr.Request) -> list[Any]:
        return from_link(dict(request.query_params), desk)

    return read


def from_link(given: dict[str, str], desk: Desk) -> list[Any]:
    """The settings that an address names; what it names wrongly is left as it is."""
    limits = desk.limits

    def whole(text: str) -> int:
        if len(text) > 20:
            raise Refused("too long")
        return int(text)

    readers: dict[str, Any] = {
        "prompt": limits.checked_prompt,
        "negative": lambda text: limits.checked_prompt(text, empty=True),
        "steps": lambda text: limits.checked_steps(whole(text)),
        "guidance": lambda text: limits.checked_guidance(float(text)),
        "size": lambda text: text if desk.size(text) else None,
        "seed": lambda text: limits.checked_seed(whole(text)),
        "fresh": lambda text: text != "0",
        "pictures": lambda text: limits.checked_pictures(whole(text)),
    }
    values = []
    for name, read in readers.items():
        try:
            values.append(read(given[name]) if name in given else gr.skip())
        except ValueError:
            values.append(gr.skip())
    return values


def add_endpoints(desk: Desk) -> None:
    """/generate and /recipe."""

    async def generate(
        prompt: str,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = None,
        pictures: int = 1,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> tuple[list[gr.FileData], dict]:
        """Draws pictures of a prompt.

        Args:
            prompt: What the picture shows.
            negative_prompt: What to avoid.
            steps: From noise to the picture; None is the model's own number.
            guidance: How strongly the prompt steers; None is the model's own.
            width: In pixels; None is what the model was trained for. /about lists what it makes.
            height: In pixels; see width.
            seed: Of the first picture, the next ones count on; None draws one.
            pictures: How many.

        Returns:
            The pictures, as PNG files that carry their recipes, and the settings that they were drawn with.
        """
        size = None if width is None and height is None else (width, height)
        drawing = desk.drawing(prompt, negative_prompt, steps, guidance, size, seed, pictures)
        made = await desk.made(drawing, request, "/generate")
        return [one.file() for one in made], described(drawing)  # type: ignore[misc]

    def recipe(picture: gr.FileData) -> dict:
        """Says how a picture was made.

        Args:
            picture: A PNG that was drawn here or by hubgen.

        Returns:
            Its settings.
        """
        found = restored(read_recipe(uploaded_file(picture, FOLDER, desk.limits)), desk)
        return {**described(found["drawing"]), "styles": found["styles"], "notes": found["notes"]}

    gr.api(generate, api_name="generate", **QUEUE)
    gr.api(recipe, api_name="recipe", queue=False)


def described(drawing: Any) -> dict[str, Any]:
    """A drawing's settings, for endpoints."""
    names = ("prompt", "negative_prompt", "steps", "guidance", "width", "height", "seed", "pictures")
    return {name: getattr(drawing, name) for name in names}
