"""Step 4: what was learned is taken, tried, and sent to the Hub."""

import logging
import shutil
import tempfile
from collections.abc import AsyncIterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from hubgen.hub.licences import LICENCES
from hubgen.spaces.kit import stage
from hubgen.spaces.kit.limits import Refused
from hubgen.spaces.kit.service import Progress
from steps.amounts import room
from steps.bench import Bench
from steps.pictures import heading
from steps.workshop import Workshop

logger = logging.getLogger("hubgen.spaces.training")

TITLE = "Take it"
SEND_SECONDS = 120.0
LONGEST_TOKEN = 200
USUAL_LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail")
LOCKED = "This opens once something was learned."
OFF = "Sending to the Hub is off on this page. Take the files, and `hubgen publish` sends them from your machine."


class Take:
    """The step's widgets.

    Args:
        workshop: Behind the page.
    """

    def __init__(self, workshop: Workshop):
        self.workshop, limits = workshop, workshop.limits
        gr.HTML(heading(4, TITLE, "A small file that goes with the base: in hubgen, diffusers, ComfyUI and others."))
        self.files = gr.HTML(stage.said(LOCKED), elem_id="files")
        with gr.Column(visible=False, elem_classes="take") as self.body:
            self.prompt = gr.Textbox(
                label="Try it: what the picture shows", max_length=limits.prompt_characters, elem_id="try-prompt"
            )
            with gr.Row(elem_classes="buttons"):
                self.weight = gr.Slider(0, 1.5, 1.0, step=0.05, label="Weight", elem_id="try-weight", scale=3)
                self.seed = gr.Number(
                    1, label="Seed", precision=0, minimum=0, elem_id="try-seed", scale=1, min_width=100
                )
            self.draw = gr.Button("Draw without and with it", elem_id="try")
            self.view = gr.HTML(elem_id="try-stage")
            if workshop.may_publish:
                with gr.Accordion("Send it to the Hub", open=False, elem_classes="accordion"):
                    self.repo = gr.Textbox(label="Repository, owner/name", max_length=96, elem_id="repo")
                    self.licence = gr.Dropdown(
                        list(USUAL_LICENCES), value=USUAL_LICENCES[0], label="Licence", elem_id="licence"
                    )
                    self.private = gr.Checkbox(False, label="Private", elem_id="private")
                    self.token = gr.Textbox(
                        label="Token with the right to write",
                        info="Used once for this, and not kept.",
                        type="password",
                        max_length=LONGEST_TOKEN,
                        elem_id="token",
                        html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
                    )
                    self.send = gr.Button("Send", elem_id="send")
                    self.sent = gr.HTML(elem_id="sent")
            else:
                gr.HTML(stage.said(OFF))

    @property
    def outputs(self) -> list[Any]:
        """What `taken` gives updates of."""
        return [self.files, self.body, self.prompt]

    def taken(self, bench: Bench) -> list[Any]:
        """Updates, of what a visitor has."""
        run = bench.run
        if run is None or run.result is None:
            return [stage.said(LOCKED), gr.Column(visible=False), gr.skip()]
        links = "".join(
            f'<a class="file" href="{escape(stage.file_url(path))}" download="{escape(path.name)}">'
            f"<strong>{escape(label)}</strong><span>{escape(path.name)}, {room(path.stat().st_size)}</span></a>"
            for label, path in self.workshop.files(bench).items()
        )
        text = f'<p class="said">It is {escape(run.learns)}.</p>'
        return [f'<div class="files">{links}</div>{text}', gr.Column(visible=True), run.wish.prompts[0]]

    def wire(self) -> None:
        """Ties the events."""
        self.draw.click(
            self.drawn,
            [self.prompt, self.weight, self.seed],
            self.view,
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="full",
            show_progress_on=[self.view],
            trigger_mode="once",
            api_visibility="private",
        )
        if self.workshop.may_publish:
            self.send.click(
                self.send_it,
                [self.repo, self.licence, self.private, self.token],
                [self.sent, self.token],
                concurrency_id="send",
                concurrency_limit=2,
                trigger_mode="once",
                api_visibility="private",
            )

    async def drawn(self, prompt: Any, weight: Any, seed: Any, request: gr.Request) -> AsyncIterator[str]:
        """The same words and seed, without and with what was learned."""
        bench = self.workshop.bench(request)
        done: list[str] = []
        async for event in self.workshop.drawn(bench, request, prompt, weight, seed):
            if isinstance(event, Progress):
                yield stage.stage(stage.pictures(done), stage.progress(event.step, event.of))
            else:
                name, path, picture, drawing = event
                alt = f"{drawing.prompt}: {name.lower()} what was learned"
                done = [*done, stage.figure(stage.file_url(path), alt, picture.size, name, path.name)]
                yield stage.stage(stage.pictures(done))

    def send_it(self, repo: Any, licence: Any, private: Any, token: Any, request: gr.Request) -> tuple[str, str]:
        """Sends the adapter to the Hub; the token is not kept."""
        try:
            address = publish(self.workshop, self.workshop.bench(request), repo, licence, private, token)
        except Refused as problem:
            return stage.said(str(problem), "problem"), ""
        link = f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(address)}</a>'
        return f'<p class="said" role="status">It is at {link}</p>', ""


def publish(workshop: Workshop, bench: Bench, repo: Any, licence: Any, private: Any, token: Any) -> str:
    """Sends what was learned to the Hub, by a visitor's own token; the address.

    Raises:
        Refused: It cannot be sent, or may not be from this page.
    """
    from huggingface_hub import ModelCard

    from hubgen.hub.publish import PublishError, check_name, prepare

    if not workshop.may_publish:
        raise Refused("Sending to the Hub is off on this page.")
    source = workshop.result(bench)
    if not isinstance(repo, str) or len(repo) > 96:
        raise Refused("Say where it goes, as owner/name.")
    try:
        check_name(repo.strip())
    except PublishError:
        raise Refused("Say where it goes, as owner/name, in letters, digits, dots, dashes and underscores.") from None
    if not isinstance(licence, str) or licence not in LICENCES or licence == "other":
        raise Refused("The licence is none that the Hub knows.")
    if not isinstance(token, str) or not token.strip() or len(token) > LONGEST_TOKEN:
        raise Refused("Type a token of yours with the right to write; none is kept here.")  # nor is this machine's used
    if not token.strip().isascii() or not token.strip().isprintable():
        raise Refused("This is no token of the Hub.")
    with tempfile.TemporaryDirectory(prefix="hubgen-send-") as temporary:
        folder = Path(temporary) / "lora"
        shutil.copytree(source, folder)
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
        card.data.license = licence
        card.save(folder / "README.md")
        try:
            shipment = prepare(
                folder, repo.strip(), private=private is True, message="Trained with hubgen", token=token.strip()
            )
            address = shipment.send(deadline=SEND_SECONDS)
        except PublishError as problem:
            text = str(problem).replace(token.strip(), "…").replace(str(folder), "the adapter")
            logger.info("sending failed: %s", type(problem.__cause__ or problem).__name__)
            if getattr(getattr(problem.__cause__, "response", None), "status_code", 0) in (401, 403):
                text = f"The Hub does not let this token write to {repo.strip()}; expected one with the right to."
            raise Refused(text[:300] if temporary not in text else "The Hub did not take it.") from None
    logger.info("sent to the Hub")
    return address
