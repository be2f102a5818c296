"""The desk: what a visitor asks for becomes a drawing within the limits, and what is drawn becomes what they see."""

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import FileData
from PIL import Image, ImageOps

from hubgen.data.errors import DataError
from hubgen.data.pictures import as_mask, on_white, standard
from hubgen.hub.provenance import Request
from hubgen.spaces.kit import stage
from hubgen.spaces.kit.controls import Offered, Steering, checked_steering, hint_kinds, made_hint
from hubgen.spaces.kit.limits import Refused, checked_whole
from hubgen.spaces.kit.page import FOLDER, sweep
from hubgen.spaces.kit.recipes import png, shown_name, write_recipe
from hubgen.spaces.kit.service import Call, Drawing, Drawn, Progress, Service
from hubgen.spaces.kit.styles import checked_styles
from hubgen.spaces.kit.uploads import read_upload, uploaded_file

SHAPES = ((1, 1), (3, 4), (4, 3), (2, 3), (3, 2), (9, 16), (16, 9))
"""Width to height"""
STRENGTH = 0.6
"""Of drawing over a picture, where nothing is said"""
MOST_SEEN = 1024
"""Pixels of a side of a picture that a network sees as it is"""
QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""Of all events that need the model: one at a time"""


@dataclass(frozen=True)
class Made:
    """A picture in the page's folder."""

    path: Path
    title: str
    seed: int
    size: tuple[int, int]

    def figure(self, caption: str | None = None, link: str = "Download PNG") -> str:
        """As the page shows it."""
        caption = f"Seed {self.seed}" if caption is None else caption
        return stage.figure(stage.file_url(self.path), self.title, self.size, caption, self.path.name, link)

    def file(self) -> dict[str, Any]:
        """As the API returns it."""
        return returned(self.path)


class Desk:
    """Where all tabs and endpoints ask.

    Args:
        service: The model.
    """

    def __init__(self, service: Service):
        self.service, self.limits, self.model = service, service.settings.limits, service.model
        self.sizes = self.possible_sizes()
        self.defaults = self.model.defaults()
        self.steps = min(self.defaults.steps, self.limits.steps)

    # ---- what can be asked for ----

    def possible_sizes(self) -> dict[str, tuple[int, int]]:
        """By what visitors read, (width, height) of sizes near to those that the model was trained for."""
        space = self.model.space
        height, width = space.default_size
        area, sizes = min(height * width, self.limits.pixels), {}
        for across, down in SHAPES:
            scale = (area / (across * down)) ** 0.5
            sides = [int(part * scale) // space.multiple * space.multiple for part in (across, down)]
            sides = [min(side, space.largest // space.multiple * space.multiple) for side in sides]
            if min(sides) > 0:
                sizes[f"{sides[0]} × {sides[1]}"] = (sides[0], sides[1])
        return sizes

    def size(self, label: Any) -> tuple[int, int]:
        """(width, height) of what the page's list says."""
        if not isinstance(label, str) or label not in self.sizes:
            raise Refused("The size is none of those in the list.")
        return self.sizes[label]

    def nearest_size(self, picture: Image.Image) -> tuple[int, int]:
        """The size of the shape that is nearest to a picture's."""
        wanted = picture.width / picture.height
        return min(self.sizes.values(), key=lambda size: max(wanted * size[1] / size[0], size[0] / size[1] / wanted))

    def drawing(
        self,
        prompt: Any,
        negative_prompt: Any = "",
        steps: Any = None,
        guidance: Any = None,
        size: tuple[Any, Any] | None = None,
        seed: Any = None,
        pictures: Any = 1,
        styles: Any = None,
        **options: Any,
    ) -> Drawing:
        """A drawing of whatever was sent, each value checked; `None` is the model's own.

        Raises:
            Refused: One cannot be had.
        """
        limits = self.limits
        width, height = limits.checked_sides(*(size or next(iter(self.sizes.values()))))
        try:
            height, width = self.model.space.checked_size(height, width)
        except ValueError as error:
            raise Refused(f"This model does not make that size: {error}") from None
        return Drawing(
            prompt=limits.checked_prompt(prompt),
            negative_prompt=limits.checked_prompt(negative_prompt, "What to avoid", empty=True),
            steps=self.steps if steps is None else limits.checked_steps(steps),
            guidance=self.defaults.guidance_scale if guidance is None else limits.checked_guidance(guidance),
            width=width,
            height=height,
            seed=secrets.randbelow(2**32) if seed is None else limits.checked_seed(seed),
            pictures=limits.checked_pictures(pictures),
            styles=checked_styles(styles, self.service.styles, limits),
            **options,
        )

    def over(self, picture: Image.Image, mask: Image.Image | None, strength: Any) -> dict[str, Any]:
        """What a drawing over a picture has beside: both cut to a size that the model makes, the middle of them."""
        size = self.nearest_size(picture)
        options: dict[str, Any] = {
            "size": size,
            "image": ImageOps.fit(on_white(picture), size, Image.Resampling.LANCZOS),
            "strength": STRENGTH if strength is None else self.limits.checked_strength(strength),
        }
        if mask is not None:
            if mask.size != picture.size:
                mask = mask.resize(picture.size)
            options["mask"] = ImageOps.fit(mask, size, Image.Resampling.LANCZOS)
            if options["mask"].getextrema()[1] < 128:
                raise Refused("Nothing of the picture is marked; paint over the part that is to change.")
        return options

    def hint(self, picture: Image.Image, kind: Any, size: tuple[int, int]) -> Image.Image:
        """What a network is shown of a picture that was sent: its middle, cut to (width, height), as a hint."""
        return made_hint(ImageOps.fit(plain_picture(picture), size, Image.Resampling.LANCZOS), kind)

    def steering(
        self,
        offered: Sequence[Offered],
        name: Any,
        picture: Any,
        kind: Any,
        scale: Any,
        start: Any,
        end: Any,
        size: tuple[int, int] | None,
    ) -> Steering:
        """A network of those that are offered, all of one kind, with what it is shown; see `checked_steering`."""
        if not isinstance(picture, Image.Image) or size is None:
            raise Refused("Send a picture first.")
        if offered and offered[0].sees_pictures:
            shown = plain_picture(picture)
            shown.thumbnail((MOST_SEEN, MOST_SEEN))
        else:
            shown = self.hint(picture, kind, size)
        return checked_steering(offered, name, shown, scale, start, end, self.limits)

    def upload(self, value: Any, name: str = "The picture") -> Image.Image:
        """A picture that was sent to an endpoint."""
        if value is None:
            raise Refused(f"{name} is missing.")
        return read_upload(uploaded_file(value, FOLDER, self.limits).read_bytes(), self.limits)

    def uploaded_mask(self, value: Any) -> Image.Image | None:
        """A mask that was sent to an endpoint: white, or opaque, where the picture is to change."""
        return None if value is None else as_mask(self.upload(value, "The mask"))

    # ---- what comes back ----

    def store(self, drawn: Drawn, drawing: Drawing) -> list[Made]:
        """Writes the pictures with their recipes, and removes old ones."""
        sweep(self.limits.kept_seconds)
        made = []
        model = self.service.models[drawing.model]
        for number, picture in enumerate(drawn.pictures):
            path = write_recipe(picture, model.request(drawing, number), new_folder())
            made.append(Made(path, drawing.prompt, drawing.seed + number, picture.size))
        return made

    async def draw(self, drawing: Drawing, request: gr.Request, what: str) -> AsyncIterator[str | list[Made]]:
        """What the page shows while it draws, and at the end what was made."""

        def work(call: Call) -> None:
            call.tell(self.store(call.draw(drawing), drawing))

        seen: list[str] = []
        async for event in self.service.run(visitor_of(request), work, what):
            if isinstance(event, Progress):
                seen = self.frames(event, drawing) or seen
                yield stage.stage(stage.pictures(seen), stage.progress(event.step, event.of))
            else:
                yield event

    async def made(self, drawing: Drawing, request: gr.Request, what: str) -> list[Made]:
        """What an endpoint returns."""

        def work(call: Call) -> None:
            call.tell(self.store(call.draw(drawing, show=False), drawing))

        return [event async for event in self.service.run(visitor_of(request), work, what) if isinstance(event, list)][
            -1
        ]

    @staticmethod
    def frames(event: Progress, drawing: Drawing) -> list[str]:
        """The pictures of a step, if it has some."""
        alt = f"{drawing.prompt}, at step {event.step} of {event.of}"
        size = (drawing.width, drawing.height)
        return [stage.figure(stage.data_url(one), alt, size, pixels=one.size) for one in event.pictures or ()]

    def stopped(self, request: gr.Request) -> str:
        """Stops what a visitor has running; what the page says then."""
        stopped = self.service.stop(visitor_of(request))
        return stage.empty("Stopped." if stopped else "Nothing was being drawn.")

    # ---- what is said about the page ----

    def about(self) -> dict[str, Any]:
        """What this page draws with: models, sizes, styles, networks that steer, and the limits of a request."""
        limits = self.limits
        return {
            "models": [model.title for model in self.service.models],
            "device": self.model.device,
            "sizes": list(self.sizes.values()),
            "styles": [style.name for style in self.service.styles],
            "controls": [one.name for one in self.model.offered],
            "hints": list(hint_kinds()),
            "defaults": {"steps": self.steps, "guidance": self.defaults.guidance_scale},
            "limits": {
                "prompt_characters": limits.prompt_characters,
                "steps": limits.steps,
                "pixels": limits.pixels,
                "pictures": limits.pictures,
                "control": limits.control,
                "upload_bytes": limits.upload_bytes,
                "upload_pixels": limits.upload_pixels,
                "seconds": limits.seconds,
            },
            "ready": self.service.ready.done(),
        }

    def about_lines(self) -> list[str]:
        """The same in a line, for the bottom of the page."""
        licence = licence_of(self.model.folder)
        device = {"cpu": "a CPU", "mps": "Apple silicon"}.get(self.model.device, "a GPU")
        return [
            f"Drawn by {self.model.title}",
            f"licence {licence}" if licence else "",
            f"on {device}",
            "made with hubgen",
        ]


# ---- what several tabs have ----


def sampling_sliders(desk: Desk, tab: str = "") -> tuple[gr.Slider, gr.Slider]:
    """Steps and guidance, side by side.

    Args:
        desk: With the limits, and what the model is used to.
        tab: In front of the names by which the browser knows them.
    """
    with gr.Row():
        steps = gr.Slider(1, desk.limits.steps, desk.steps, step=1, label="Steps", elem_id=f"{tab}steps")
        guidance = gr.Slider(
            0,
            desk.limits.guidance,
            desk.defaults.guidance_scale,
            step=0.5,
            label="Guidance",
            elem_id=f"{tab}guidance",
        )
    return steps, guidance


def seed_fields(tab: str = "") -> tuple[gr.Number, gr.Checkbox]:
    """The seed, and whether a new one is drawn each time, side by side; see `sampling_sliders`."""
    with gr.Row():
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, elem_id=f"{tab}seed")
        fresh = gr.Checkbox(True, label="A new seed each time", elem_id=f"{tab}fresh")
    return seed, fresh


def tie_drawing(
    desk: Desk, begins: Sequence[Any], stop: gr.Button, draw: Any, given: Sequence[Any], shown: list[Any]
) -> None:
    """Ties a drawing to what begins it and to its Stop.

    Args:
        desk: Whose job it is.
        begins: Events.
        stop: The button.
        draw: Yields what is shown.
        given: What it is given.
        shown: Where that goes; the stage is the first.
    """
    running = gr.on(
        list(begins),
        draw,
        list(given),
        shown,
        show_progress="full",
        show_progress_on=shown[:1],
        api_visibility="private",
        trigger_mode="once",
        **QUEUE,
    )
    stop.click(desk.stopped, None, shown[0], queue=False, cancels=[running], api_visibility="private")


def plain_picture(picture: Image.Image) -> Image.Image:
    """A picture that was sent, upright and RGB."""
    try:
        return on_white(standard(picture, "The picture"))
    except DataError:
        raise Refused("The picture is damaged, or of a kind that is not read here; send a PNG, JPEG or WebP.") from None


def new_folder() -> Path:
    """For one file, below the page's folder, under a name that nobody guesses."""
    return FOLDER / secrets.token_hex(16)


def write_picture(picture: Image.Image, name: str) -> Path:
    """A picture without a recipe in the page's folder, for an endpoint's answer."""
    folder = new_folder()
    folder.mkdir()
    path = folder / f"{name}.png"
    path.write_bytes(png(picture))
    return path


def returned(path: Path) -> dict[str, Any]:
    """A file as an endpoint returns it."""
    return FileData(path=str(path), orig_name=path.name, mime_type="image/png").model_dump()


def visitor_of(request: gr.Request | None) -> str | None:
    """By what a visitor's jobs are told from those of others."""
    return getattr(request, "session_hash", None)


def licence_of(folder: Path | None) -> str | None:
    """What the model's card names."""
    from huggingface_hub import ModelCard

    card = folder / "README.md" if folder is not None else None
    if card is None or not card.is_file():
        return None
    return ModelCard.load(card).data.get("license")


def restored(request: Request, desk: Desk) -> dict[str, Any]:
    """The settings of a recipe as far as this page can have them; `notes` says what it cannot."""
    limits, notes = desk.limits, []
    if len(request.prompts) != 1:
        raise Refused("This picture is a grid of several prompts; only single pictures are restored here.")
    drawing = desk.drawing(
        request.prompts[0],
        request.negative_prompt,
        request.num_inference_steps,
        request.guidance_scale,
        (request.width, request.height) if request.width and request.height else None,
        checked_whole("The seed", request.seed, 0, 2**63 - 1 - limits.pictures),
        min(request.n, limits.pictures),
    )
    by_sum = {style.added.used.sha256: style.name for style in desk.service.styles}
    worn = {by_sum[one.sha256]: one.weight for one in request.lora or () if one.sha256 in by_sum}
    if len(worn) < len(request.lora or ()):
        notes.append("It was drawn with styles that are not here.")
    elif worn:
        notes.append(f"It was drawn with {', '.join(worn)}: see Style.")
    if request.model not in (desk.model.name, shown_name(desk.model.name)):
        notes.append("It was drawn by another model, so it will look different.")
    if request.strength is not None:
        notes.append("It was drawn over another picture, which it does not carry.")
    if request.control:
        notes.append("It was steered by another picture, which it does not carry: see Control.")
    size = (drawing.width, drawing.height)
    label = next((label for label, sides in desk.sizes.items() if sides == size), None)
    if label is None:
        notes.append("Its size is not in the list.")
    return {"drawing": drawing, "size": label, "styles": worn, "notes": notes}
