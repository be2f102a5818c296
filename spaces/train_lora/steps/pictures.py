"""Step 1: pictures are dropped; each is shown as it will be trained on, with a caption and with what was found."""

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.limits import Refused
from hubgen.spaces.kit.page import FOLDER
from hubgen.spaces.kit.uploads import uploaded_file
from steps.bench import Bench, Item
from steps.workshop import Workshop

TITLE = "Pictures"


class Pictures:
    """The step's widgets.

    Args:
        workshop: Behind the page.
    """

    def __init__(self, workshop: Workshop):
        self.workshop, limits = workshop, workshop.limits
        few, many, side = limits.fewest_pictures, limits.training_pictures, workshop.benches.side
        gr.HTML(
            heading(
                1,
                TITLE,
                f"{few} to {many} pictures of one subject, or in one style. Each is cut to the square in its middle, "
                f"{side} × {side} pixels, and shown here as it will be trained on.",
            )
        )
        self.drop = gr.File(
            label="Drop pictures here, or click to choose them",
            file_count="multiple",
            file_types=["image"],
            height=130,
            elem_id="drop",
            elem_classes="drop",
        )
        self.note = gr.HTML(elem_id="pictures-note")
        self.rows, self.looks, self.captions, self.removes = [], [], [], []
        with gr.Column(elem_classes="items"):
            for number in range(many):
                with gr.Row(visible=False, elem_classes="item") as row:
                    look = gr.HTML(min_width=120)
                    caption = gr.Textbox(
                        label=f"Caption {number + 1}",
                        placeholder="what it shows",
                        max_length=limits.prompt_characters,
                        elem_classes="caption",
                        min_width=150,
                        scale=4,
                    )
                    remove = gr.Button("Remove", size="sm", min_width=80, scale=0)
                self.rows.append(row)
                self.looks.append(look)
                self.captions.append(caption)
                self.removes.append(remove)

    @property
    def outputs(self) -> list[Any]:
        """What `shown` gives updates of."""
        return [self.note, *self.rows, *self.looks, *self.captions, *self.removes]

    def wire(self, check: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Ties the events.

        Args:
            check: Looks at the whole wish, after each change.
            inputs: Of it.
            outputs: Of it.
        """
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        checked = {"fn": check, "inputs": inputs, "outputs": outputs, "queue": False, **options}
        self.drop.upload(
            self.added,
            [self.drop, *self.captions],
            [self.drop, *self.outputs],
            concurrency_id="look",
            concurrency_limit=2,
            **options,
        ).then(**checked)
        for number, remove in enumerate(self.removes):
            remove.click(self.removing(number), self.captions, self.outputs, queue=False, **options).then(**checked)
        gr.on([one.change for one in self.captions], trigger_mode="always_last", **checked)

    def added(self, files: Any, request: gr.Request, *captions: Any) -> list[Any]:
        """Pictures were dropped."""
        bench = self.workshop.bench(request)
        problem, texts = "", self.texts(bench, captions)
        try:
            look_at(bench, [{"path": str(file)} for file in files or ()], self.workshop)
        except Refused as refused:
            problem = str(refused)
        texts += [item.caption for item in bench.items[len(texts) :]]
        return [None, *self.shown(bench, texts, problem)]

    def removing(self, number: int) -> Any:
        """What a row's button does."""

        def remove(request: gr.Request, *captions: Any) -> list[Any]:
            bench = self.workshop.bench(request)
            texts = self.texts(bench, captions)
            bench.remove(number)
            del texts[number : number + 1]
            return self.shown(bench, texts)

        return remove

    @staticmethod
    def texts(bench: Bench, captions: Sequence[Any]) -> list[str]:
        """The captions as they stand in the page."""
        return [text if isinstance(text, str) else "" for text in captions[: len(bench.items)]]

    def shown(self, bench: Bench, texts: Sequence[str], problem: str = "") -> list[Any]:
        """Updates of `outputs`."""
        rows, looks, captions, removes = [], [], [], []
        for number in range(len(self.rows)):
            item = bench.items[number] if number < len(bench.items) else None
            rows.append(gr.Row(visible=item is not None))
            looks.append(look_of(item, bench.side) if item is not None else "")
            if item is None:
                captions.append(gr.Textbox(value=""))
                removes.append(gr.Button())
            else:
                captions.append(gr.Textbox(value=texts[number], label=f"Caption of {item.name}", visible=item.used))
                removes.append(gr.Button())
        return [said_of(bench, self.workshop, problem), *rows, *looks, *captions, *removes]


def look_at(bench: Bench, files: Sequence[Any], workshop: Workshop) -> None:
    """Takes pictures that were uploaded.

    Raises:
        Refused: A file is none that was, or there are too many.
    """
    many = len(bench.items) + len(files)
    if many > workshop.limits.training_pictures:  # before any is read
        raise Refused(f"That would be {many} pictures; at most {workshop.limits.training_pictures} are taken.")
    paths = [uploaded_file(file, FOLDER, workshop.limits) for file in files]
    bench.add([(path.name, path.read_bytes()) for path in paths], workshop.limits)


def said_of(bench: Bench, workshop: Workshop, problem: str = "") -> str:
    """What there is, in words."""
    few, good, bad = workshop.limits.fewest_pictures, len(bench.good), len(bench.items) - len(bench.good)
    parts = [stage.said(problem, "problem")] if problem else []
    if bench.items:
        text = f"{good} {'picture' if good == 1 else 'pictures'} to learn from"
        text += f", {bad} not used: see why below" if bad else ""
        text += f". At least {few} are needed." if good < few else "."
        parts.append(stage.said(text, "problem" if good < few else "note"))
    return "".join(parts)


def look_of(item: Item, side: int) -> str:
    """A picture with what was found."""
    size = f"{item.size[0]} × {item.size[1]}" if item.size[0] else ""
    notes = "".join(f"<p>{escape(note)}</p>" for note in item.notes)
    if item.picture is None:
        image = '<div class="none" aria-hidden="true">×</div>'
    else:
        image = stage.image(stage.data_url(item.picture), f"{item.name}, as it is trained on", (side, side))
    return (
        f'<div class="look{"" if item.used else " bad"}">{image}'
        f"<div><strong>{escape(item.name)}</strong><span>{size}</span>{notes}</div></div>"
    )


def described(bench: Bench) -> list[dict[str, Any]]:
    """The pictures, for the endpoint."""
    return [
        {"name": item.name, "used": item.used, "size": list(item.size), "caption": item.caption, "notes": item.notes}
        for item in bench.items
    ]


def heading(number: int, title: str, text: str) -> str:
    """Of a step."""
    return (
        f'<div class="step-head"><span aria-hidden="true">{number}</span>'
        f"<div><h2>{escape(title)}</h2><p>{escape(text)}</p></div></div>"
    )
