"""Look inside: the way from noise, what more steps bring, where the model looks for a word, two models side by side."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from PIL import Image

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.limits import Refused
from hubgen.spaces.kit.service import Call, Drawing, Drawn, Progress, words_in
from tabs.desk import QUEUE, Desk, returned, visitor_of, write_picture

MOMENTS = 8
COUNTS = (4, 10, 25, 50)
WIDEST = 320
"""Pixels of a side, of pictures under the colours of a map"""
WAY = """## The way from noise
Every picture begins as noise. Above, what there is at each step; below, what the model expects to come out of it."""
STEPS = """## What more steps bring
The same words and the same noise, in few steps and in many."""
LOOKS = """## Where it looks for a word
While it draws, each part of the picture asks each word of the prompt. Bright is where a word is asked most."""
MODELS = """## Two models, side by side
The same words, the same noise, two models."""
ONE_MODEL = """## Two models, side by side
Start the page with `hubgen demo --second-model MODEL` to see the same words and the same noise drawn by two models."""


def build(desk: Desk) -> None:
    """The tab, and the endpoints /trajectory, /steps, /attention and /compare."""
    limits = desk.limits
    with gr.Row(elem_classes="card"):
        prompt = gr.Textbox(
            "a smiling cat",
            label="What the picture shows",
            max_length=limits.prompt_characters,
            elem_id="inside-prompt",
            elem_classes="prompt",
            scale=4,
        )
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, elem_id="inside-seed", scale=1, min_width=120)
    asked = [prompt, seed]

    def section(text: str, button: str, name: str) -> tuple[gr.Button, gr.HTML]:
        gr.Markdown(text, elem_classes="lead")
        return gr.Button(button, elem_id=name, elem_classes="ask"), gr.HTML(elem_id=f"{name}-stage")

    def on_click(button: gr.Button, function: Any, outputs: list[Any], view: gr.HTML) -> None:
        button.click(
            function,
            asked,
            outputs,
            show_progress="full",
            show_progress_on=[view],
            api_visibility="private",
            trigger_mode="once",
            **QUEUE,
        )

    with gr.Column(elem_classes="card"):
        button, view = section(WAY, "Show the way", "way")
        on_click(button, shown(desk, "way", way_jobs, way_html), [view], view)
    with gr.Column(elem_classes="card"):
        button, view = section(STEPS, "Compare steps", "steps-of")
        on_click(button, shown(desk, "steps", steps_jobs, several_html), [view], view)
    with gr.Column(elem_classes="card"):
        gr.Markdown(LOOKS, elem_classes="lead")
        button = gr.Button("Look for the words", elem_id="looks", elem_classes="ask")
        word = gr.Radio([], label="Word", visible=False, elem_id="word")
        view = gr.HTML(elem_id="looks-stage")
        maps = gr.State({})
        on_click(button, looked(desk), [view, word, maps], view)
        word.input(chosen, [word, maps], view, queue=False, show_progress="hidden", api_visibility="private")
    with gr.Column(elem_classes="card"):
        if len(desk.service.models) > 1:
            button, view = section(MODELS, "Compare models", "models")
            on_click(button, shown(desk, "models", models_jobs, several_html), [view], view)
        else:
            gr.Markdown(ONE_MODEL, elem_classes="lead")
    add_endpoints(desk)


# ---- what is drawn: by its name, each drawing ----


def way_jobs(desk: Desk, prompt: Any, seed: Any) -> dict[str, Drawing]:
    """One picture with moments of its way."""
    return {"": desk.drawing(prompt, seed=seed, keep=MOMENTS)}


def steps_jobs(desk: Desk, prompt: Any, seed: Any) -> dict[str, Drawing]:
    """The same in other numbers of steps."""
    counts = [count for count in COUNTS if count <= desk.limits.steps]
    return {f"{count} steps": desk.drawing(prompt, steps=count, seed=seed) for count in counts}


def models_jobs(desk: Desk, prompt: Any, seed: Any) -> dict[str, Drawing]:
    """The same by each model, at its own size and settings."""
    jobs = {}
    for number, model in enumerate(desk.service.models):
        defaults, (height, width) = model.defaults(), model.space.default_size
        desk.limits.checked_sides(width, height)
        first = desk.drawing(prompt, seed=seed)
        jobs[model.title if model.title not in jobs else f"{model.title}, again"] = Drawing(
            prompt=first.prompt,
            steps=min(defaults.steps, desk.limits.steps),
            guidance=defaults.guidance_scale,
            width=width,
            height=height,
            seed=first.seed,
            model=number,
        )
    return jobs


# ---- what is seen ----


def shown(desk: Desk, what: str, jobs: Any, html: Any) -> Any:
    """What a button does: draw all jobs in one turn, showing those that are done."""

    async def drawn(prompt: Any, seed: Any, request: gr.Request) -> AsyncIterator[str]:
        todo: dict[str, Drawing] = jobs(desk, prompt, 1 if seed is None else seed)
        yield stage.stage("", stage.progress(0, 1, "Getting ready"))
        done: dict[str, Drawn] = {}
        async for event in desk.service.run(visitor_of(request), work_of(todo), what):
            if isinstance(event, Progress):
                name = list(todo)[len(done)]
                text = f"{name}: step {event.step} of {event.of}" if name else ""
                yield html(done, todo) + stage.progress(event.step, event.of, text)
            else:
                done[event[0]] = event[1]
                yield html(done, todo)

    return drawn


def work_of(todo: dict[str, Drawing]) -> Any:
    """Draws one after another."""

    def work(call: Call) -> None:
        for name, drawing in todo.items():
            call.tell((name, call.draw(drawing, show=False)))

    return work


def way_html(done: dict[str, Drawn], todo: dict[str, Drawing]) -> str:
    """Two strips."""
    strips = ""
    for drawn in done.values():
        of = todo[""].steps
        for title, place in (("What there is", 1), ("What it expects", 2)):
            figures = [
                stage.figure(
                    stage.data_url(moment[place]),
                    f"{title} after step {moment[0]}",
                    moment[place].size,
                    f"Step {moment[0]} of {of}",
                )
                for moment in drawn.on_the_way
            ]
            strips += stage.strip(figures, title)
    return strips


def several_html(done: dict[str, Drawn], todo: dict[str, Drawing]) -> str:
    """Side by side, with their names."""
    figures = [
        stage.figure(stage.data_url(drawn.pictures[0]), f"{todo[name].prompt}, {name}", drawn.pictures[0].size, name)
        for name, drawn in done.items()
    ]
    return stage.strip(figures, large=True) if figures else ""


def looked(desk: Desk) -> Any:
    """What the button does that looks for words."""

    async def drawn(prompt: Any, seed: Any, request: gr.Request) -> AsyncIterator[tuple[Any, Any, Any]]:
        drawing = desk.drawing(prompt, seed=1 if seed is None else seed, watch=True)
        if not words_in(drawing.prompt):
            raise Refused("There is no word in the prompt to look for.")
        yield stage.stage("", stage.progress(0, drawing.steps, "Getting ready")), gr.skip(), gr.skip()
        async for event in desk.service.run(visitor_of(request), work_of({"": drawing}), "attention"):
            if isinstance(event, Progress):
                yield stage.progress(event.step, event.of), gr.skip(), gr.skip()
                continue
            _, result = event
            maps = {word: stage.data_url(map_of(result, word)) for word in result.heats}
            found = {
                "picture": stage.data_url(small(result.pictures[0])),
                "size": small(result.pictures[0]).size,
                "maps": maps,
            }
            first = longest(list(maps))
            yield chosen(first, found), gr.Radio(list(maps), value=first, visible=True), found

    return drawn


def longest(words: list[str]) -> str:
    """Of the words, the one that is likeliest to be a thing in the picture."""
    return max(words, key=len, default="")


def chosen(word: Any, found: Any) -> str:
    """The picture beside the map of a word."""
    if not isinstance(found, dict) or word not in found.get("maps", {}):
        return ""
    size = tuple(found["size"])
    return stage.strip(
        [
            stage.figure(found["picture"], "The picture", size, "The picture"),
            stage.figure(found["maps"][word], f"Where it looks for {word}", size, f"Where it looks for “{word}”"),
        ],
        large=True,
    )


def small(picture: Image.Image) -> Image.Image:
    """A picture at a size at which a map's colours lie smoothly on it."""
    scale = WIDEST / max(picture.size)
    size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def map_of(drawn: Drawn, word: str) -> Image.Image:
    """The picture under the colours of a word's map."""
    from hubgen.controls.attention_maps import overlay

    return overlay(small(drawn.pictures[0]), drawn.heats[word])


# ---- the same for programs ----


def add_endpoints(desk: Desk) -> None:
    """/trajectory, /steps, /attention and /compare."""

    async def drawn(jobs: dict[str, Drawing], request: gr.Request, what: str) -> dict[str, Drawn]:
        return {
            event[0]: event[1]
            async for event in desk.service.run(visitor_of(request), work_of(jobs), what)
            if not isinstance(event, Progress)
        }

    async def trajectory(
        prompt: str,
        seed: int = 1,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> tuple[list[gr.FileData], list[gr.FileData], list[int]]:
        """Shows the way from noise to a picture.

        Args:
            prompt: What the picture shows.
            seed: Of its noise.

        Returns:
            What there is after some steps, what the model expects then, and which steps these are.
        """
        (result,) = (await drawn(way_jobs(desk, prompt, seed), request, "/trajectory")).values()
        there = [returned(write_picture(moment[1], f"step-{moment[0]}")) for moment in result.on_the_way]
        expected = [returned(write_picture(moment[2], f"expected-{moment[0]}")) for moment in result.on_the_way]
        return there, expected, [moment[0] for moment in result.on_the_way]  # type: ignore[return-value]

    async def steps(
        prompt: str,
        seed: int = 1,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> tuple[list[gr.FileData], list[int]]:
        """Draws the same words and noise in 4, 10, 25 and 50 steps.

        Args:
            prompt: What the picture shows.
            seed: Of its noise.

        Returns:
            The pictures, and their numbers of steps.
        """
        jobs = steps_jobs(desk, prompt, seed)
        results = await drawn(jobs, request, "/steps")
        files = [desk.store(result, jobs[name])[0].file() for name, result in results.items()]
        return files, [drawing.steps for drawing in jobs.values()]  # type: ignore[return-value]

    async def attention(
        prompt: str,
        word: str,
        seed: int = 1,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> tuple[gr.FileData, gr.FileData]:
        """Shows where the model looks for a word of the prompt.

        Args:
            prompt: What the picture shows.
            word: One of its words.
            seed: Of the picture's noise.

        Returns:
            The picture, and the picture under the colours of the word's map.
        """
        drawing = desk.drawing(prompt, seed=seed, watch=True)
        word = desk.limits.checked_prompt(word, "The word")
        if word not in words_in(drawing.prompt):
            raise Refused("That is no word of the prompt.")
        (result,) = (await drawn({"": drawing}, request, "/attention")).values()
        if word not in result.heats:
            raise Refused("The prompt is too long: the model does not read this word.")
        picture = desk.store(result, drawing)[0].file()
        return picture, returned(write_picture(map_of(result, word), "map"))  # type: ignore[return-value]

    async def compare(
        prompt: str,
        seed: int = 1,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> tuple[list[gr.FileData], list[str]]:
        """Draws the same words by two models.

        Args:
            prompt: What the picture shows.
            seed: Of the noise.

        Returns:
            The pictures, and the models' names.
        """
        if len(desk.service.models) < 2:
            raise Refused("This page has one model alone.")
        jobs = models_jobs(desk, prompt, seed)
        results = await drawn(jobs, request, "/compare")
        return [desk.store(result, jobs[name])[0].file() for name, result in results.items()], list(jobs)  # type: ignore[return-value]

    for endpoint in (trajectory, steps, attention, compare):
        gr.api(endpoint, api_name=endpoint.__name__, **QUEUE)
