"""Step 2: what is to be learned, and what it costs."""

from typing import Any

import gradio as gr

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.limits import Refused
from steps.amounts import lasts
from steps.pictures import Pictures, heading
from steps.recipe import LONGEST_WORDS, MOST_PROMPTS, usual_for
from steps.workshop import Workshop

TITLE = "What to learn"
RATES = (("Gentle", 1 / 3), ("Usual", 1.0), ("Strong", 3.0))
"""Of the learning rate that suits"""


class Learn:
    """The step's widgets.

    Args:
        workshop: Behind the page.
    """

    def __init__(self, workshop: Workshop):
        self.workshop, limits = workshop, workshop.limits
        usual = usual_for(workshop.model, limits.fewest_pictures)
        gr.HTML(heading(2, TITLE, f"By which words it is called, and how long {workshop.model.title} learns."))
        self.kind = gr.Radio(
            [
                ("A style: pictures of many things in one manner", "style"),
                ("A subject: one thing in many pictures", "subject"),
            ],
            value="style",
            label="This is",
            elem_id="kind",
        )
        self.words = gr.Textbox(
            label="Words that call it",
            info="Put before every caption; later they bring it into a prompt. A word that nobody uses works best.",
            placeholder="in the style of zog",
            max_length=LONGEST_WORDS,
            elem_id="words",
        )
        self.class_words = gr.Textbox(
            label="What kind of thing it is (optional)",
            info="The base first draws such things itself, so that it does not take all of them for the subject.",
            placeholder="a monster",
            max_length=LONGEST_WORDS,
            visible=False,
            elem_id="class-words",
        )
        with gr.Accordion("Settings", open=False, elem_classes="accordion"):
            with gr.Row():
                self.steps = gr.Slider(
                    1,
                    limits.training_steps,
                    min(usual.steps, limits.training_steps),
                    step=1,
                    label="Steps",
                    elem_id="steps",
                )
                self.rank = gr.Slider(
                    1,
                    limits.training_rank,
                    min(usual.rank, limits.training_rank),
                    step=1,
                    label="Rank",
                    elem_id="rank",
                )
            self.rate = gr.Radio(
                [(f"{name}, {times * usual.learning_rate:.2g}", times * usual.learning_rate) for name, times in RATES],
                value=usual.learning_rate,
                label="Learning rate",
                elem_id="rate",
            )
            self.prompts = gr.Textbox(
                label=f"What to draw before, meanwhile and after (at most {MOST_PROMPTS} lines)",
                placeholder="the first captions",
                lines=2,
                max_length=MOST_PROMPTS * limits.prompt_characters,
                elem_id="prompts",
            )
        self.plan = gr.HTML(stage.said("First the pictures."), elem_id="plan")

    def inputs(self, pictures: Pictures) -> list[Any]:
        """Of whoever needs the whole wish; see `values`."""
        own = [self.kind, self.words, self.class_words, self.steps, self.rank, self.rate, self.prompts]
        return [*own, *pictures.captions]

    def values(self, bench: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of `Workshop.wish`, of what `inputs` gave."""
        kind, words, class_words, steps, rank, rate, prompts, *captions = given
        kept = [text for item, text in zip(bench.items, captions, strict=False) if item.used]
        return kind, words, class_words, kept, steps, rank, rate, prompts

    def check(self, request: gr.Request, *given: Any) -> tuple[Any, Any, Any, Any]:
        """What the page says of the wish; updates of plan, the class, the button of the next step and the words."""
        bench = self.workshop.bench(request)
        subject = given[:1] == ("subject",)
        words = gr.Textbox(placeholder="a zog monster" if subject else "in the style of zog")
        try:
            wish = self.workshop.wish(bench, *self.values(bench, given))
            seconds = self.workshop.estimate(bench, wish)
            self.workshop.check_time(seconds)
        except Refused as problem:
            text = str(problem) if bench.items else "First the pictures."
            return stage.said(text), gr.Textbox(visible=subject), gr.Button(interactive=False), words
        usual = self.workshop.usual(bench)
        uses = round(wish.steps * usual.batch_size / len(wish.texts))
        text = f"{wish.steps:,} steps of {usual.batch_size} pictures: each is seen about {uses:,} times."
        if seconds is not None:
            text += f" On this machine that takes about {lasts(seconds)}."
            most = self.workshop.limits.training_seconds
            text += f" It is stopped after {lasts(most)}, and what it has learned can be taken." * (seconds > most)
        if wish.kind == "subject":
            text += f" All pictures are called “{wish.words}”; captions are for styles, and not used."
        return stage.said(text), gr.Textbox(visible=subject), gr.Button(interactive=True), words

    def wire(self, pictures: Pictures, outputs: list[Any]) -> None:
        """Ties the events."""
        inputs = self.inputs(pictures)
        gr.on(
            [one.change for one in inputs[:7]],
            self.check,
            inputs,
            outputs,
            queue=False,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
        pictures.wire(self.check, inputs, outputs)
