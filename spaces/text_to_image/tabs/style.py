"""Style: adapters on the model, several at once, each with its weight."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.limits import Refused
from hubgen.spaces.kit.service import Call, Progress
from tabs.create import described
from tabs.desk import QUEUE, Desk, sampling_sliders, seed_fields, tie_drawing, visitor_of

NONE = """## No styles here yet
Start the page with `hubgen demo --adapters FOLDER` to have the adapters (LoRA) in that folder on this tab."""
LEAD = """## Put on a style
Each style is an adapter (LoRA) on the same model. Give each the weight that it shall have; at 0 it is not used."""
EMPTY = "The same words and the same seed, without and with the styles."


def build(desk: Desk) -> None:
    """The tab, and the endpoint /style."""
    if desk.service.styles:
        _build(desk)
    else:
        with gr.Column(elem_classes="card"):
            gr.Markdown(NONE, elem_classes="lead")

    async def style(
        prompt: str,
        styles: dict,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        pictures: int = 1,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> tuple[list[gr.FileData], dict]:
        """Draws with adapters on the model.

        Args:
            prompt: What the picture shows.
            styles: By the name of a style, its weight; /about lists the names.
            negative_prompt: What to avoid.
            steps: From noise to the picture; None is the model's own number.
            guidance: How strongly the prompt steers; None is the model's own.
            seed: Of the first picture; None draws one.
            pictures: How many.

        Returns:
            The pictures, and the settings that they were drawn with.
        """
        drawing = desk.drawing(prompt, negative_prompt, steps, guidance, None, seed, pictures, styles)
        made = await desk.made(drawing, request, "/style")
        worn = {one.style.name: one.weight for one in drawing.styles}
        return [one.file() for one in made], {**described(drawing), "styles": worn}  # type: ignore[misc]

    gr.api(style, api_name="style", **QUEUE)


def _build(desk: Desk) -> None:
    """The tab where there are styles."""
    limits, styles = desk.limits, desk.service.styles
    with gr.Row(elem_classes="halves"):
        with gr.Column(scale=5, min_width=300, elem_classes="card"):
            gr.Markdown(LEAD, elem_classes="lead")
            prompt = gr.Textbox(
                label="What the picture shows",
                placeholder="a smiling cat",
                max_length=limits.prompt_characters,
                elem_id="style-prompt",
                elem_classes="prompt",
            )
            weights = [
                gr.Slider(0, 1.5, float(number == 0), step=0.05, label=style.name, info=info_of(style))
                for number, style in enumerate(styles)
            ]
            compare = gr.Checkbox(True, label="Draw it without them too, to compare")
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="wear", scale=3)
                stop = gr.Button("Stop", scale=1, min_width=90)
            with gr.Accordion("Settings", open=False, elem_classes="accordion"):
                steps, guidance = sampling_sliders(desk, "style-")
                seed, fresh = seed_fields("style-")
        with gr.Column(scale=6, min_width=300, elem_classes=["card", "sticky"]):
            view = gr.HTML(stage.empty(EMPTY), elem_id="style-stage")

    async def drawn(
        prompt: Any,
        compare: Any,
        steps: Any,
        guidance: Any,
        seed: Any,
        fresh: Any,
        request: gr.Request,
        *weights: Any,
    ) -> AsyncIterator[tuple[Any, Any]]:
        asked = {style.name: weight for style, weight in zip(styles, weights, strict=False)}
        drawing = desk.drawing(prompt, "", steps, guidance, None, None if fresh is True else seed, 1, asked)
        if not drawing.styles:
            raise Refused("All weights are 0; give at least one style a weight.")
        plain = desk.drawing(prompt, "", steps, guidance, None, drawing.seed)

        def work(call: Call) -> None:
            for name, one in (("Without", plain), ("With", drawing)) if compare is True else (("With", drawing),):
                call.tell((name, desk.store(call.draw(one), one)[0]))

        yield stage.stage("", stage.progress(0, drawing.steps, "Getting ready")), drawing.seed
        done: list[str] = []
        frames: list[str] = []
        async for event in desk.service.run(visitor_of(request), work, "style"):
            if isinstance(event, Progress):
                frames = desk.frames(event, drawing) or frames
                yield stage.stage(stage.pictures([*done, *frames]), stage.progress(event.step, event.of)), gr.skip()
            else:
                name, made = event
                done, frames = [*done, made.figure(name)], []
                yield stage.stage(stage.pictures(done)), gr.skip()

    given = [prompt, compare, steps, guidance, seed, fresh, *weights]
    tie_drawing(desk, [draw.click], stop, drawn, given, [view, seed])


def info_of(style: Any) -> str:
    """What an adapter's file says of itself."""
    from hubgen.adaptation.describe import describe_adapter

    found = describe_adapter(style.added.path)
    words = [word for word in (found.words.values() if found is not None else ()) if word]
    return f"Answers to: {words[0][:80]}" if words else ""
