"""Control: pictures that steer what is drawn, by a ControlNet, a T2I-adapter, an IP-Adapter or Redux."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.controls import Offered, Steering, hint_kinds
from hubgen.spaces.kit.limits import Refused
from hubgen.spaces.kit.recipes import shown_file
from tabs.create import described
from tabs.desk import QUEUE, Desk, returned, sampling_sliders, seed_fields, tie_drawing, write_picture

NONE = """## No network to steer by here yet
A **ControlNet** keeps the shapes of a picture of yours while the words change everything else; an **IP-Adapter** takes
over its look. Both are networks beside the model, made for the model that draws. There is none on this page; to have
some:

- **train one** for this model from a folder of pictures: `hubgen train controlnet PICTURES --hint canny`;
- or **take one** that was made for the model you draw with, by its name on the Hub, such as
  `lllyasviel/control_v11p_sd15_canny` for Stable Diffusion 1.5.

Then start the page with `hubgen demo --model MODEL --controls NETWORK`. An IP-Adapter sees with the image encoder of
the model, which has to have one, unless it was trained with an encoder of hubgen's own, which its file names.

Without any, a picture can still be where the drawing starts: see **Transform**, which also draws a painted part
anew."""
LEAD = """## Steer by a picture
Send a picture, see what the network is shown of it, and say what is drawn by it."""
NETWORKS = "**A picture whose shapes are kept.** The network is shown a hint of it."
ADAPTERS = "**A picture whose look is taken over.** It is shown as it is."
EMPTY = "What the network is shown, and what was drawn by it."
PREVIEWS: dict[str, Any] = {"concurrency_id": "hints", "concurrency_limit": 2}
"""Of the events that only make a hint"""


def build(desk: Desk) -> None:
    """The tab, and the endpoint /control."""
    if desk.model.offered:
        _build(desk)
    else:
        with gr.Column(elem_classes="card"):
            gr.Markdown(NONE, elem_classes="lead")

    async def control(
        prompt: str,
        picture: gr.FileData,
        network: str | None = None,
        hint: str | None = None,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> tuple[gr.FileData, gr.FileData, dict]:
        """Draws what a prompt says, steered by a picture.

        Args:
            prompt: What the picture shows.
            picture: That steers; its middle is cut to a shape that the model makes.
            network: By which; /about lists the names. None is the first.
            hint: What a ControlNet is shown of the picture, /about lists the kinds; none if the picture is a hint
                already. None is the first kind. An IP-Adapter and Redux are always shown the picture itself.
            scale: How much it counts.
            start: Share of the steps after which it begins.
            end: Share of the steps after which it ends.
            negative_prompt: What to avoid.
            steps: From noise to the picture; None is the model's own number.
            guidance: How strongly the prompt steers; None is the model's own.
            seed: None draws one.

        Returns:
            The picture, what the network was shown, and the settings that it was drawn with.
        """
        offered, sent = desk.model.offered, desk.upload(picture)
        chosen = offered[:1] if network is None else [one for one in offered if one.name == network]
        size, kind = desk.nearest_size(sent), next(iter(hint_kinds())) if hint is None else hint
        steering = desk.steering(chosen or offered, network, sent, kind, scale, start, end, size)
        drawing = desk.drawing(prompt, negative_prompt, steps, guidance, size, seed, steering=at_work([steering]))
        (made,) = await desk.made(drawing, request, "/control")
        shown = returned(write_picture(steering.shown, shown_file(0).removesuffix(".png")))
        said = {"network": steering.offered.name, "hint": kind, "scale": scale, "start": start, "end": end}
        return made.file(), shown, {**described(drawing), **said}  # type: ignore[return-value]

    gr.api(control, api_name="control", **QUEUE)


def _build(desk: Desk) -> None:
    """The tab where there are networks."""
    networks = [one for one in desk.model.offered if not one.sees_pictures]
    adapters = [one for one in desk.model.offered if one.sees_pictures]
    groups = [group for group in (networks, adapters) if group]
    given: list[Any] = []
    with gr.Row(elem_classes="halves"):
        with gr.Column(scale=5, min_width=300, elem_classes="card"):
            gr.Markdown(LEAD, elem_classes="lead")
            prompt = gr.Textbox(
                label="What the picture shows",
                placeholder="a red apple",
                max_length=desk.limits.prompt_characters,
                elem_id="control-prompt",
                elem_classes="prompt",
            )
            for group in groups:
                given += section(desk, group)
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="steer", scale=3)
                stop = gr.Button("Stop", scale=1, min_width=90)
            with gr.Accordion("Settings", open=False, elem_classes="accordion"):
                negative = gr.Textbox(label="What to avoid", max_length=desk.limits.prompt_characters)
                steps, guidance = sampling_sliders(desk, "control-")
                seed, fresh = seed_fields("control-")
        with gr.Column(scale=6, min_width=300, elem_classes=["card", "sticky"]):
            view = gr.HTML(stage.empty(EMPTY), elem_id="control-stage")

    async def drawn(
        prompt: Any,
        negative: Any,
        steps: Any,
        guidance: Any,
        seed: Any,
        fresh: Any,
        request: gr.Request,
        *asked: Any,
    ) -> AsyncIterator[tuple[Any, Any]]:
        size = next((desk.nearest_size(sent) for sent in asked[:: len(FIELDS)] if isinstance(sent, Image.Image)), None)
        steering = [
            desk.steering(group, name, sent, hint, scale, start, end, size)
            for group, (sent, name, hint, scale, start, end) in zip(groups, fields(asked), strict=False)
            if sent is not None
        ]
        if size is None or not steering:
            raise Refused("Send a picture first.")
        seed = None if fresh is True else seed
        drawing = desk.drawing(prompt, negative, steps, guidance, size, seed, steering=at_work(steering))
        before = [figure(one, i) for i, one in enumerate(drawing.steering)]
        yield stage.stage(stage.pictures(before), stage.progress(0, drawing.steps, "Getting ready")), drawing.seed
        async for event in desk.draw(drawing, request, "control"):
            if isinstance(event, str):
                yield event, gr.skip()
            else:
                yield stage.stage(stage.pictures([*before, *(one.figure() for one in event)])), gr.skip()

    settings = [prompt, negative, steps, guidance, seed, fresh]
    tie_drawing(desk, [draw.click], stop, drawn, [*settings, *given], [view, seed])


FIELDS = ("picture", "network", "hint", "strength", "start", "end")
"""Of one section"""


def fields(asked: Sequence[Any]) -> list[Sequence[Any]]:
    """What was sent, section by section."""
    return [asked[first : first + len(FIELDS)] for first in range(0, len(asked), len(FIELDS))]


def section(desk: Desk, group: Sequence[Offered]) -> list[Any]:
    """The fields of one kind of networks: those of `FIELDS`."""
    looks, kinds = group[0].sees_pictures, hint_kinds()
    tab = "look" if looks else "shape"
    gr.Markdown(ADAPTERS if looks else NETWORKS, elem_classes="lead")
    picture = gr.Image(
        label="Its look" if looks else "Its shapes",
        type="pil",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=[],
        height=240,
        placeholder="Drop a picture here, or click to choose one",
        elem_id=f"{tab}-picture",
    )
    names = [one.name for one in group]
    network = gr.Dropdown(names, value=names[0], label="Network", visible=len(names) > 1, elem_id=f"{tab}-network")
    choices = [(label, kind) for kind, label in kinds.items()]
    hint = gr.Radio(
        choices,
        value="none" if looks else choices[0][1],
        label="What it is shown",
        visible=not looks,
        elem_id=f"{tab}-hint",
    )
    preview = gr.HTML(elem_id=f"{tab}-preview", visible=not looks)
    scale = gr.Slider(0, desk.limits.control, 1, step=0.05, label="Strength", elem_id=f"{tab}-strength")
    with gr.Row():
        start = gr.Slider(0, 0.95, 0, step=0.05, label="From", info="Share of the steps", elem_id=f"{tab}-start")
        end = gr.Slider(0.05, 1, 1, step=0.05, label="Until", info="Share of the steps", elem_id=f"{tab}-end")

    def previewed(sent: Any, kind: Any) -> str:
        if not isinstance(sent, Image.Image):
            return ""
        shown = desk.hint(sent, kind, desk.nearest_size(sent))
        words = "What the network is shown"
        return stage.strip([stage.figure(stage.data_url(shown), words, shown.size, words)])

    if not looks:
        changes = [picture.change, hint.change]
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", **PREVIEWS}
        gr.on(changes, previewed, [picture, hint], preview, trigger_mode="always_last", **options)
    return [picture, network, hint, scale, start, end]


def at_work(steering: Sequence[Steering]) -> tuple[Steering, ...]:
    """Those that count; Refused where none does."""
    found = tuple(one for one in steering if one.scale)
    if not found:
        raise Refused("The strength is 0, so nothing would steer; give it more.")
    return found


def figure(steering: Steering, number: int) -> str:
    """What a network is shown, which can be saved under the name that the recipe has for it."""
    path = write_picture(steering.shown, shown_file(number).removesuffix(".png"))
    words = f"Shown to {steering.offered.name}"
    return stage.figure(stage.file_url(path), words, steering.shown.size, words, shown_file(number), "Download PNG")
