"""Step 3: it is trained, with its loss and its pictures as they come; it can be stopped, and go on."""

from typing import Any

import gradio as gr

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.limits import Refused
from steps.amounts import lasts
from steps.curve import curve
from steps.learn import Learn
from steps.pictures import Pictures, heading
from steps.runs import Seen
from steps.workshop import Workshop

TITLE = "Train"
SECONDS = 1.0
"""Between two looks of the page"""
ACTIVE = ("waiting", "running", "stopping")


class Train:
    """The step's widgets.

    Args:
        workshop: Behind the page.
        learn: The step before.
        pictures: The one before it.
    """

    def __init__(self, workshop: Workshop, learn: Learn, pictures: Pictures):
        self.workshop, self.learn, self.pictures = workshop, learn, pictures
        gr.HTML(
            heading(3, TITLE, "Keep this page open: when you leave, the training ends and your pictures are removed.")
        )
        with gr.Row(elem_classes="buttons"):
            self.begin = gr.Button("Train", variant="primary", interactive=False, elem_id="train", scale=2)
            self.stop = gr.Button("Stop", visible=False, elem_id="stop", scale=1, min_width=110)
            self.go_on = gr.Button("Go on", visible=False, variant="primary", elem_id="go-on", scale=1, min_width=110)
            self.as_it_is = gr.Button("Take it as it is", visible=False, elem_id="as-it-is", scale=1, min_width=150)
        self.state = gr.HTML(elem_id="state")
        self.curve = gr.HTML(elem_id="curve")
        self.samples = gr.HTML(elem_id="samples")
        self.known = gr.State("")
        self.timer = gr.Timer(SECONDS)

    @property
    def buttons(self) -> list[Any]:
        """In the order of `Train.looked`."""
        return [self.begin, self.stop, self.go_on, self.as_it_is]

    def wire(self, taking: list[Any], taken: Any) -> None:
        """Ties the events.

        Args:
            taking: Widgets of the next step that change when there is a result.
            taken: Their updates, of a visitor's bench.
        """
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        outputs = [self.known, self.state, self.curve, self.samples, *self.buttons, *taking]

        def fresh(known: Any, request: gr.Request) -> list[Any]:
            bench = self.workshop.benches.find(getattr(request, "session_hash", None))
            if bench is None or bench.run is None:
                return [gr.skip()] * len(outputs)
            seen = bench.run.seen()
            key = key_of(seen, bench.run.number)
            if key == known:
                return [gr.skip()] * len(outputs)
            before = known.rsplit("/", 1)[-1] if isinstance(known, str) else ""
            changed = seen.state != before or not known
            more = taken(bench) if changed else [gr.skip()] * len(taking)
            buttons = self.buttons_of(seen) if changed else [gr.skip()] * len(self.buttons)
            return [key, *views(seen, bench.run.wish.prompts), *buttons, *more]

        def start(request: gr.Request, *given: Any) -> list[Any]:
            bench = self.workshop.bench(request)
            self.workshop.start(bench, *self.learn.values(bench, given))
            return fresh("", request)

        def stopped(request: gr.Request) -> list[Any]:
            self.workshop.trainings.stop(self.workshop.bench(request))
            return fresh("", request)

        def gone_on(as_it_is: bool) -> Any:
            def again(request: gr.Request) -> list[Any]:
                self.workshop.trainings.go_on(self.workshop.bench(request), as_it_is)
                return fresh("", request)

            return again

        inputs = self.learn.inputs(self.pictures)
        starting: dict[str, Any] = {"concurrency_id": "start", "concurrency_limit": 1, "trigger_mode": "once"}
        self.begin.click(
            start, inputs, outputs, **starting, show_progress_on=[self.state], **{**options, "show_progress": "full"}
        )
        self.stop.click(stopped, None, outputs, queue=False, **options)
        self.go_on.click(gone_on(False), None, outputs, queue=False, **options)
        self.as_it_is.click(gone_on(True), None, outputs, queue=False, **options)
        self.timer.tick(fresh, self.known, outputs, queue=False, **options)

    @staticmethod
    def buttons_of(seen: Seen) -> list[Any]:
        """Updates of the buttons."""
        active = seen.state in ACTIVE
        return [
            gr.Button("Train anew" if not active else "Train", visible=not active),
            gr.Button(visible=active, interactive=seen.state != "stopping"),
            gr.Button(visible=seen.state == "stopped" and seen.goes_on),
            gr.Button(visible=seen.saved > 0),
        ]


def key_of(seen: Seen, number: str) -> str:
    """What changes when there is something new to show; ends with the state."""
    left = lasts(seen.seconds_left) if seen.seconds_left is not None else ""
    return f"{number}/{seen.step}/{seen.text}/{left}/{len(seen.curve)}/{[at for at, _ in seen.grids]}/{seen.state}"


def views(seen: Seen, prompts: tuple[str, ...]) -> list[str]:
    """Progress, curve and pictures."""
    text = seen.text
    if seen.seconds_left is not None and 0 < seen.step < seen.of and seen.state == "running":
        text += f", about {lasts(seen.seconds_left)} left"
    head = stage.said(text, "problem") if seen.state == "failed" else stage.progress(seen.step, seen.of, text)
    return [head, curve(seen.curve, seen.of), samples(seen, prompts)]


def samples(seen: Seen, prompts: tuple[str, ...]) -> str:
    """Pictures of the prompts: before, in between, and now."""
    strips = []
    for place, (step, pictures) in enumerate(seen.grids):
        title = "Before" if step == 0 else f"After all {step:,} steps" if step >= seen.of else f"After {step:,} steps"
        figures = [
            stage.figure(
                stage.data_url(picture), f"{prompt}: {title.lower()}", picture.size, prompt if not place else ""
            )
            for prompt, picture in zip(prompts, pictures, strict=False)
        ]
        strips.append(stage.strip(figures, title))
    return f'<div class="samples">{"".join(strips)}</div>' if strips else ""


def described(seen: Seen) -> dict[str, Any]:
    """For the endpoint."""
    return {
        "state": seen.state,
        "text": seen.text,
        "step": seen.step,
        "of": seen.of,
        "loss": [list(point) for point in seen.curve],
        "pictures_at": [step for step, _ in seen.grids],
        "seconds_left": seen.seconds_left,
        "goes_on": seen.goes_on,
        "saved": seen.saved,
    }


def none() -> Refused:
    """Where there is no training."""
    return Refused("You have no training here.")
