"""Transform: a picture drawn over, all of it or where it is painted."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.limits import Refused
from hubgen.spaces.kit.page import editor
from tabs.create import described
from tabs.desk import QUEUE, STRENGTH, Desk, sampling_sliders, seed_fields, tie_drawing

PAINT = "#e0442a"
LEAD = """## Start from a picture
Send a picture and say what it is to become. **Paint over a part of it** to have only that part drawn anew."""


def build(desk: Desk) -> None:
    """The tab, and the endpoint /transform."""
    limits = desk.limits
    with gr.Row(elem_classes="halves"):
        with gr.Column(scale=5, min_width=300, elem_classes="card"):
            gr.Markdown(LEAD, elem_classes="lead")
            picture = editor(
                limits,
                label="Picture",
                type="pil",
                sources=["upload", "clipboard"],
                transforms=[],
                layers=False,
                brush=gr.Brush(default_size=40, colors=[PAINT], color_mode="fixed"),
                eraser=gr.Eraser(default_size=40),
                canvas_size=(512, 512),
                fixed_canvas=True,
                buttons=[],
                placeholder="Drop a picture here, or click to choose one",
                elem_id="picture",
            )
            prompt = gr.Textbox(
                label="What it becomes",
                placeholder="a blue heart",
                max_length=limits.prompt_characters,
                elem_id="transform-prompt",
                elem_classes="prompt",
            )
            strength = gr.Slider(
                0.05,
                1,
                STRENGTH,
                step=0.05,
                label="Strength",
                info="How much is drawn over: little keeps the picture, 1 forgets it.",
                elem_id="strength",
            )
            with gr.Row():
                draw = gr.Button("Draw over it", variant="primary", elem_id="transform", scale=3)
                stop = gr.Button("Stop", scale=1, min_width=90)
            with gr.Accordion("Settings", open=False, elem_classes="accordion"):
                negative = gr.Textbox(label="What to avoid", max_length=limits.prompt_characters)
                steps, guidance = sampling_sliders(desk, "transform-")
                seed, fresh = seed_fields("transform-")
        with gr.Column(scale=6, min_width=300, elem_classes=["card", "sticky"]):
            view = gr.HTML(stage.empty("The picture and what became of it."), elem_id="transform-stage")

    async def drawn(
        sent: Any,
        prompt: Any,
        strength: Any,
        negative: Any,
        steps: Any,
        guidance: Any,
        seed: Any,
        fresh: Any,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, Any]]:
        seed = None if fresh is True else seed
        options = desk.over(*painted(sent), strength)
        drawing = desk.drawing(prompt, negative, steps, guidance, seed=seed, **options)
        before = stage.figure(stage.data_url(drawing.image), "The picture before", drawing.image.size, "Before")
        yield stage.stage(before_and_after(before, ""), stage.progress(0, drawing.steps, "Getting ready")), drawing.seed
        async for event in desk.draw(drawing, request, "transform"):
            if isinstance(event, str):
                yield event, gr.skip()
            else:
                yield stage.stage(before_and_after(before, event[0].figure(f"After, seed {event[0].seed}"))), gr.skip()

    given = [picture, prompt, strength, negative, steps, guidance, seed, fresh]
    tie_drawing(desk, [draw.click], stop, drawn, given, [view, seed])

    async def transform(
        picture: gr.FileData,
        prompt: str,
        mask: gr.FileData | None = None,
        strength: float = STRENGTH,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> tuple[gr.FileData, dict]:
        """Draws over a picture.

        Args:
            picture: The picture; its middle is cut to a shape that the model makes.
            prompt: What it becomes.
            mask: A picture that is white, or opaque, where it is drawn anew; None: everywhere.
            strength: How much is drawn over, above 0, at most 1.
            negative_prompt: What to avoid.
            steps: From noise to the picture; None is the model's own number.
            guidance: How strongly the prompt steers; None is the model's own.
            seed: None draws one.

        Returns:
            The picture, and the settings that it was drawn with.
        """
        options = desk.over(desk.upload(picture), desk.uploaded_mask(mask), strength)
        drawing = desk.drawing(prompt, negative_prompt, steps, guidance, seed=seed, **options)
        (made,) = await desk.made(drawing, request, "/transform")
        return made.file(), {**described(drawing), "strength": drawing.strength}  # type: ignore[return-value]

    gr.api(transform, api_name="transform", **QUEUE)


def painted(sent: Any) -> tuple[Image.Image, Image.Image | None]:
    """The picture of the editor, and where it was painted on; `None` where it was not."""
    background = sent.get("background") if isinstance(sent, dict) else None
    if background is None:
        raise Refused("Send a picture first.")
    mask = None
    for layer in sent.get("layers") or ():
        alpha = layer.convert("RGBA").getchannel("A").point(lambda value: 255 if value > 40 else 0)
        alpha = alpha if alpha.size == background.size else alpha.resize(background.size)
        mask = alpha if mask is None else ImageChops.lighter(mask, alpha)
    return background, mask if mask is not None and mask.getextrema()[1] else None


def before_and_after(before: str, after: str) -> str:
    """Side by side."""
    return stage.pictures([one for one in (before, after) if one])
