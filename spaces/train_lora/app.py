"""The page: pictures become a LoRA.

python app.py            in this folder, as a Space runs it; hubgen.spaces.kit.settings lists the environment's settings
hubgen demo --train      the same from the command line
"""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.page import Page
from hubgen.spaces.kit.service import Service
from hubgen.spaces.kit.settings import Settings

# isort: split
import gradio as gr

from steps import pictures as looking
from steps import train as training
from steps.learn import Learn
from steps.pictures import Pictures, look_at
from steps.take import Take
from steps.train import Train
from steps.workshop import Workshop

TITLE = "hubgen"
TEXT = "Drop some pictures, and teach the model their style or their subject."


class TrainingPage(Page):
    """A page that judges each picture by itself, and says beside it what is wrong with it."""

    def check_file(self, path: Path) -> None:
        """Leaves it to `Bench.add`."""


def build(workshop: Workshop) -> Page:
    """The page around a workshop, whose base may still be loading."""
    with TrainingPage(workshop.limits, title=f"{TITLE}: train a LoRA") as page:
        gr.HTML(stage.header(TITLE, TEXT))
        with gr.Row(elem_classes="halves"):
            with gr.Column(scale=1, min_width=320):
                with gr.Column(elem_classes="card"):
                    pictures = Pictures(workshop)
                with gr.Column(elem_classes="card"):
                    learn = Learn(workshop)
            with gr.Column(scale=1, min_width=320):
                with gr.Column(elem_classes="card"):
                    train = Train(workshop, learn, pictures)
                with gr.Column(elem_classes="card"):
                    take = Take(workshop)
        learn.wire(pictures, [learn.plan, learn.class_words, train.begin, learn.words])
        train.wire(take.outputs, take.taken)
        take.wire()
        gr.HTML(stage.footer(workshop.about_lines()))
        add_endpoints(workshop)
    return page


def add_endpoints(workshop: Workshop) -> None:
    """What programs call; they are known by the session of their client."""

    def look(pictures: Sequence[gr.FileData], request: gr.Request = None) -> list[dict]:  # type: ignore[assignment]
        """Takes pictures to learn from, beside those that were sent before.

        Args:
            pictures: To add.

        Returns:
            All of them: name, size, a caption that is proposed, what was found, and whether it is used.
        """
        if not isinstance(pictures, list):
            raise gr.Error("Send a list of pictures.")
        bench = workshop.bench(request)
        look_at(bench, pictures, workshop)
        return looking.described(bench)

    def train(
        kind: str,
        words: str,
        captions: list[str] | None = None,
        steps: int | None = None,
        rank: int | None = None,
        learning_rate: float | None = None,
        prompts: str = "",
        class_words: str = "",
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict:
        """Begins a training; /progress tells of it.

        Args:
            kind: style or subject.
            words: That call it; before every caption.
            captions: Of each picture that is used, in order.
            steps: None is what suits the pictures.
            rank: None is what suits.
            learning_rate: None is what suits.
            prompts: To draw along the way, one a line.
            class_words: What kind of thing a subject is.

        Returns:
            Where it is.
        """
        bench = workshop.bench(request)
        run = workshop.start(bench, kind, words, class_words, captions or [], steps, rank, learning_rate, prompts)
        return training.described(run.seen())

    def progress(request: gr.Request = None) -> dict:  # type: ignore[assignment]
        """Tells where your training is.

        Returns:
            Its state, step and losses.
        """
        bench = workshop.bench(request)
        if bench.run is None:
            raise training.none()
        return training.described(bench.run.seen())

    def stop(request: gr.Request = None) -> dict:  # type: ignore[assignment]
        """Stops your training, which saves.

        Returns:
            Where it is.
        """
        workshop.trainings.stop(workshop.bench(request))
        return progress(request)

    def go_on(as_it_is: bool = False, request: gr.Request = None) -> dict:  # type: ignore[assignment]
        """Goes on with your training where it stopped.

        Args:
            as_it_is: End it at the step that is saved, and write what it has learned.

        Returns:
            Where it is.
        """
        workshop.trainings.go_on(workshop.bench(request), as_it_is is True)
        return progress(request)

    def result(request: gr.Request = None) -> list[gr.FileData]:  # type: ignore[assignment]
        """Gives what was learned.

        Returns:
            The files.
        """
        files: Any = workshop.files(workshop.bench(request)).values()
        return [gr.FileData(path=str(path), orig_name=path.name).model_dump() for path in files]  # type: ignore[misc]

    gr.api(look, api_name="look", concurrency_id="look", concurrency_limit=2)
    gr.api(train, api_name="train", concurrency_id="start", concurrency_limit=1)
    gr.api(workshop.about, api_name="about", queue=False)
    for endpoint in (progress, stop, go_on, result):
        gr.api(endpoint, api_name=endpoint.__name__)


def main() -> None:
    """Checks the settings, then builds the page while the base loads, and serves it until it is ended."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no training outlives the page
    service = Service(Settings.from_environment())
    service.start()
    workshop = Workshop(service)
    workshop.measure()
    try:
        build(workshop).serve(service, TITLE)
    finally:
        workshop.close()


if __name__ == "__main__":
    main()
