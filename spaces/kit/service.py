"""The model behind a page: loaded once, one job at a time, each of which can be stopped and has its time.

    service = Service(settings); service.start()            # loads in the background
    async for event in service.run(visitor, work): ...      # work(call) draws and tells of it by call.tell(event)

Everything that touches the model happens in one thread. Whoever waits for it waits in the page's queue.
"""

import asyncio
import dataclasses
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from hubgen.acceleration.device import choose_device
from hubgen.autoencoders.latents import LatentSpace, decode
from hubgen.conditioning.text import WORD
from hubgen.controls.control import Control
from hubgen.controls.opening import control_of
from hubgen.hub.bare import bare_parts
from hubgen.hub.finding import BUNDLED, find_model, loaded_commit, read_index
from hubgen.hub.provenance import Request, UsedControl
from hubgen.hub.quiet import quiet_libraries
from hubgen.pipelines.defaults import Defaults
from hubgen.pipelines.loading import bare_pipeline, load_pipeline
from hubgen.spaces.kit.controls import Offered, Steering, find_controls, load_controls
from hubgen.spaces.kit.frames import Mosaic, Step, Steps
from hubgen.spaces.kit.limits import Refused
from hubgen.spaces.kit.recipes import shown_file, shown_name, without_paths
from hubgen.spaces.kit.settings import Settings
from hubgen.spaces.kit.styles import Style, Worn, find_styles, wearing

logger = logging.getLogger(__name__)

ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
"""Whether this is a Space whose GPU is lent for single calls: those run in processes of their own"""
GPU_SECONDS = 60
FRAME_SHARE = 0.06
"""Of the time of a call that may go into decoding what it looks like on its way"""
FRAMES_AT = (0.45, 0.75)
"""Where on the way it is decoded in any case; before the first, a mosaic of colours is shown, which costs nothing"""
MOSAIC_SIDE = 16
TELL_EVERY = 0.12
"""Seconds between two tellings of the step"""


class Stopped(Exception):
    """The visitor has stopped the job, or has left."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A call of a pipeline: checked, within the limits."""

    prompt: str
    negative_prompt: str = ""
    steps: int
    guidance: float
    width: int
    height: int
    seed: int
    pictures: int = 1
    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float | None = None
    styles: tuple[Worn, ...] = ()
    steering: tuple[Steering, ...] = ()
    """Those that do something"""
    keep: int = 0
    """Moments of the way that are kept"""
    watch: bool = False
    """Whether to look where the model looks for each word"""
    model: int = 0
    """0 or 1: which of the page's models draws"""


@dataclass(frozen=True)
class Drawn:
    """What a call made."""

    pictures: list[Image.Image]
    on_the_way: list[tuple[int, Image.Image, Image.Image]] = field(default_factory=list)
    """(step, x_t, what the step aimed at), of the first picture"""
    heats: dict[str, torch.Tensor] = field(default_factory=dict)
    """By word, (h, w) in [0, 1], of the first picture"""


@dataclass(frozen=True)
class Progress:
    """A call on its way."""

    step: int
    of: int
    pictures: list[Image.Image] | None = None
    """What they look like now; `None` where they were not decoded"""


class Model:
    """One of the page's models.

    Args:
        name: As it was named at the start.
        settings: Of the page.
        argument: What messages call the name.

    Raises:
        ValueError: It is nowhere, draws no prompts, or cannot be made of its configs; no weights are read.
    """

    def __init__(self, name: str, settings: Settings, argument: str = "HUBGEN_MODEL"):
        self.name, self.settings, self.argument = name, settings, argument
        self.folder = find_model(name, argument, single_files=False)
        self.index = read_index(name, None, self.folder, argument)
        self.bare = bare_pipeline(self.index, name, None, self.folder, argument)
        self.device, self.dtype = choose_device(settings.device, settings.dtype, "HUBGEN_DEVICE")
        self.space: LatentSpace = self.bare.latent_space
        self.revision = None if self.folder is not None else loaded_commit(name)
        self.pipe: Any = None
        self.offered: list[Offered] = []
        """Networks that visitors may steer by"""
        self.controls: dict[str, Any] = {}
        """The same, loaded, by name"""
        self.mosaic: Mosaic | None = None
        self.decode_seconds = 0.0
        """Of one picture, about"""

    @property
    def title(self) -> str:
        """What visitors read."""
        return "emoji-64, the bundled model" if self.name == BUNDLED else shown_name(self.name)

    def defaults(self, image: bool = False, mask: bool = False) -> Defaults:
        """Of a call that says nothing."""
        return self.bare.defaults(image, mask)

    def load(self) -> None:
        """Reads the weights, and draws once, so that the first visitor does not wait for what happens once."""
        with quiet_libraries():
            pipe = load_pipeline(
                self.index, self.name, self.revision, self.folder, dtype=self.dtype, argument=self.argument
            ).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        height, width = self.space.default_size
        pipe("warm", num_inference_steps=1, height=height, width=width)
        with quiet_libraries():
            self.controls = load_controls(self.offered, pipe, (height, width))
        self.pipe = pipe
        shape = self.space.shape(1, (height, width))
        with torch.no_grad():
            side = min(MOSAIC_SIDE, *shape[2:])
            self.mosaic = Mosaic(lambda latents: decode(pipe.vae, latents), shape[1], side, self.device)
            begun = time.perf_counter()
            self.decoded(torch.zeros(shape, device=self.device))
            self.decode_seconds = time.perf_counter() - begun

    def request(self, drawing: Drawing, number: int = 0, hide: bool = True) -> Request:
        """What one picture of a drawing says about itself.

        Args:
            drawing: As it was checked.
            number: Of the picture among those of the drawing.
            hide: Whether files of this machine go unnamed where strangers may come.
        """
        worn = [dataclasses.replace(one.style.added.used, weight=one.weight) for one in drawing.styles]
        steered = [
            UsedControl(net=one.offered.file, image=shown_file(i), scale=one.scale, start=one.start, end=one.end)
            for i, one in enumerate(drawing.steering)
        ]
        request = Request(
            prompts=[drawing.prompt],
            negative_prompt=drawing.negative_prompt or None,
            n=1,
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            seed=drawing.seed + number,
            width=drawing.width,
            height=drawing.height,
            model=self.name,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            batch_size=8,
            strength=drawing.strength,
            lora=worn or None,
            control=steered or None,
        )
        return without_paths(request) if hide and self.settings.public else request

    def draw(self, drawing: Drawing, tell: Callable[[Step], bool]) -> Drawn:
        """Makes the pictures.

        Args:
            drawing: What to draw.
            tell: Told of each step; whether to go on.
        """
        pipe, kept = self.pipe, Kept(drawing.keep)

        def told(step: Step) -> None:
            kept(step)
            if not tell(step):
                pipe._interrupt = True

        controls: list[Control] = [Steps(told)]
        if drawing.watch:
            from hubgen.controls.attention_maps import AttentionMaps

            maps = AttentionMaps()
            controls.append(maps)
        for one in drawing.steering:
            loaded = self.controls[one.offered.name]
            controls.append(control_of(loaded, one.shown, scale=one.scale, start=one.start, end=one.end))
        options: dict[str, Any] = {"negative_prompt": drawing.negative_prompt or None, "controls": controls}
        for name, value in (("image", drawing.image), ("mask_image", drawing.mask), ("strength", drawing.strength)):
            if value is not None:
                options[name] = value
        with quiet_libraries(), wearing(pipe, drawing.styles):
            pictures = pipe(
                [drawing.prompt] * drawing.pictures,
                height=drawing.height,
                width=drawing.width,
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance,
                generator=[torch.Generator().manual_seed(drawing.seed + number) for number in range(drawing.pictures)],
                **options,
            ).images
            heats = {}
            if drawing.watch and not pipe.interrupt:
                places = {word: at for word, at in pipe.condition.word_places(drawing.prompt).items() if at}
                heats = {word: maps.heat(at)[0].cpu() for word, at in places.items()}
            return Drawn(pictures, kept.decoded(self), heats)

    def decoded(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of latents, (B, C, h, w), on their way."""
        with torch.no_grad():
            pixels = decode(self.pipe.vae, latents)
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")


class Kept:
    """Moments of a call, evenly spread, with the first and the last.

    Args:
        wanted: How many.
    """

    def __init__(self, wanted: int):
        self.wanted = wanted
        self.steps: list[Step] = []

    def __call__(self, step: Step) -> None:
        wanted = min(self.wanted, step.of)
        places = {round(1 + number * (step.of - 1) / max(wanted - 1, 1)) for number in range(wanted)}
        if step.number in places:
            self.steps.append(dataclasses.replace(step, x_t=step.x_t[:1].clone(), expected=step.expected[:1].clone()))

    def decoded(self, model: Model) -> list[tuple[int, Image.Image, Image.Image]]:
        """(step, x_t, expected) as pictures."""
        if not self.steps:
            return []
        both = [pictures for step in self.steps for pictures in (step.x_t, step.expected)]
        pictures = [model.decoded(one)[0] for one in both]
        return [(step.number, *pictures[2 * n : 2 * n + 2]) for n, step in enumerate(self.steps)]  # type: ignore[misc]


class Call:
    """A job of one visitor while it has the model.

    Args:
        service: Whose models it uses.
        tell: Hands an event to whoever listens.
    """

    def __init__(self, service: "Service", tell: Callable[[Any], None]):
        self.service, self.tell = service, tell
        self.stopped = threading.Event()
        self.late = False
        self.begun = 0.0

    def going_on(self) -> bool:
        """Whether there is time left, and someone who waits."""
        self.late = self.late or time.monotonic() - self.begun > self.service.settings.limits.seconds
        return not (self.late or self.stopped.is_set())

    def check(self) -> None:
        """Raises what ends the job early."""
        self.going_on()
        if self.stopped.is_set():
            raise Stopped
        if self.late:
            seconds = self.service.settings.limits.seconds
            raise Refused(f"This took longer than {seconds} seconds and was stopped; try fewer steps or pictures.")

    def draw(self, drawing: Drawing, show: bool = True) -> Drawn:
        """Draws, telling of each step by a `Progress`.

        Args:
            drawing: What.
            show: Whether the picture is shown on its way.
        """
        self.check()
        model = self.service.models[drawing.model]
        watch = Watch(self, model, show)
        drawn = draw_lent(drawing) if ZERO_GPU else model.draw(drawing, watch)
        self.check()
        return drawn


class Watch:
    """Decides which steps of a call are told, and which are shown: showing may cost a small share of the time."""

    def __init__(self, call: Call, model: Model, show: bool):
        self.call, self.model, self.show = call, model, show
        self.begun = time.perf_counter()
        self.spent, self.frames, self.told = 0.0, 0, 0.0

    def __call__(self, step: Step) -> bool:
        if not self.call.going_on():
            return False
        now = time.perf_counter()
        told, pictures = step.number == 1 or now - self.told > TELL_EVERY, None
        if self.show and step.number < step.of:
            if self.is_due(step, now):
                pictures = self.model.decoded(step.expected)
                self.frames, self.spent = self.frames + 1, self.spent + time.perf_counter() - now
            elif told and not self.frames and self.model.mosaic is not None:
                pictures = self.model.mosaic(step.expected)
        if pictures is not None or told:
            self.told = now
            self.call.tell(Progress(step.number, step.of, pictures))
        return True

    def is_due(self, step: Step, now: float) -> bool:
        """Whether the picture is decoded at this step: it costs little by now, or it is time."""
        cost = self.model.decode_seconds * len(step.expected)
        if now - self.told > TELL_EVERY and self.spent + cost < FRAME_SHARE * (now - self.begun):
            return True
        return self.frames < len(FRAMES_AT) and step.number >= FRAMES_AT[self.frames] * step.of


class Service:
    """The models of a page, and the thread that they run in.

    Args:
        settings: Of the page.

    Raises:
        ValueError: A model, an adapter or a network that was named cannot be had; no weights are read.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        with quiet_libraries():
            self.models = [Model(settings.model, settings)]
            if settings.second_model is not None:
                self.models.append(Model(settings.second_model, settings, "HUBGEN_SECOND_MODEL"))
            first = self.models[0]
            parts = bare_parts(first.index, first.name, None, first.folder) if settings.adapters else None
            own = bare_parts(first.index, first.name, None, first.folder, ("controlnet",)).get("controlnet")
        self.styles: list[Style] = find_styles(settings.adapters, parts)
        first.offered = find_controls(settings.controls, first.index, own)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.ready: Future[None] = Future()
        self.calls: dict[str, Call] = {}
        self.figures = {"served": 0, "refused": 0, "stopped": 0, "failed": 0}
        if ZERO_GPU:
            _lent.append(self)

    @property
    def model(self) -> Model:
        """The one that the page is about."""
        return self.models[0]

    def start(self) -> None:
        """Begins to load; `ready` tells when that is done."""
        self.ready = self.thread.submit(self._load)

    def _load(self) -> None:
        for model in self.models:
            model.load()

    async def run(self, visitor: str | None, work: Callable[[Call], Any], what: str = "job") -> AsyncIterator[Any]:
        """Does work in the model's thread, and hands on what it tells.

        Args:
            visitor: By whom it can be stopped.
            work: Called with its `Call`; what it returns is not used.
            what: Of the log's line.

        Raises:
            Stopped: By the visitor.
            Refused: The work said so, or it took too long.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        call = Call(self, tell)
        if visitor is not None:
            self.calls[visitor] = call
        asked, outcome = time.monotonic(), "stopped"
        job = self.thread.submit(self._work, call, work)
        job.add_done_callback(tell)
        try:
            while (event := await events.get()) is not job:
                yield event
            job.result()
            outcome = "served"
        except Refused:
            outcome = "refused"
            raise
        except (Stopped, GeneratorExit, asyncio.CancelledError):
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            call.stopped.set()
            job.cancel()
            if visitor is not None and self.calls.get(visitor) is call:
                del self.calls[visitor]
            self.figures[outcome] += 1
            took = time.monotonic() - (call.begun or asked)
            totals = ", ".join(f"{number} {name}" for name, number in self.figures.items() if number)
            logger.info("%s: %s after %.2f s; %s in all", what, outcome, took, totals)

    @staticmethod
    def _work(call: Call, work: Callable[[Call], Any]) -> None:
        call.begun = time.monotonic()
        call.check()
        work(call)

    def stop(self, visitor: str | None) -> bool:
        """Stops a visitor's job within a step; whether there was one."""
        call = self.calls.get(visitor or "")
        if call is not None:
            call.stopped.set()
        return call is not None

    def close(self) -> None:
        """Stops all jobs."""
        for call in list(self.calls.values()):
            call.stopped.set()
        self.thread.shutdown(wait=False, cancel_futures=True)


def words_in(prompt: str) -> list[str]:
    """Words that attention maps can be asked for, each once."""
    return list(dict.fromkeys(match[0] for match in WORD.finditer(prompt)))


# ---- GPUs that are lent for a call (ZeroGPU) ----

_lent: list[Service] = []


def _draw_lent(drawing: Drawing) -> Drawn:
    return _lent[0].models[drawing.model].draw(drawing, lambda step: True)


draw_lent = _draw_lent
"""Draws where a GPU is lent for the call: in a process of its own, so that nothing is told on the way"""
if ZERO_GPU:  # such functions are looked for when a Space starts
    import spaces

    draw_lent = spaces.GPU(duration=GPU_SECONDS)(_draw_lent)
