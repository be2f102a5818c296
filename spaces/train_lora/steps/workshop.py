"""The workshop: benches of visitors, the base that they train and draw with, and the queue of trainings."""

import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from safetensors.torch import save_file

from hubgen.hub.added import asked_loras
from hubgen.spaces.kit.limits import Refused, checked_number
from hubgen.spaces.kit.page import FOLDER, sweep
from hubgen.spaces.kit.recipes import write_recipe
from hubgen.spaces.kit.service import ZERO_GPU, Call, Drawing, Progress, Service
from hubgen.spaces.kit.styles import LARGEST_WEIGHT, Style, Worn
from hubgen.training.kit.usual import Usual
from steps.amounts import lasts
from steps.bench import Bench, Benches
from steps.recipe import Wish, checked_wish, settings_for, usual_for
from steps.runs import Run, Trainings

logger = logging.getLogger("hubgen.spaces.training")

BACKWARD = 3.0
"""Time of a step of training to that of a call of the network, a picture: back costs twice what forth does"""
START_SECONDS = 12.0
"""About what a script takes to begin and to write its result, until a training has shown it"""
OVER = 1.5
"""Times the time of a training that an estimate, which is rough, has to be over it, for a wish to be refused"""
KOHYA = "kohya.safetensors"
FILE = "pytorch_lora_weights.safetensors"


class Workshop:
    """Where all steps of the page ask.

    Args:
        service: The base.
    """

    def __init__(self, service: Service):
        self.service, self.limits, self.model = service, service.settings.limits, service.model
        self.may_publish = service.settings.publish or not service.settings.public
        self.folder = Path(tempfile.mkdtemp(prefix="hubgen-training-"))
        self.benches = Benches(self.folder, int(self.model.space.default_size[0]), self.limits)
        self.trainings = Trainings(self.benches, self.model.device)
        self.call_seconds: float | None = None
        """Of the network, for one picture among as many as a step of training has"""
        self.defaults = self.model.defaults()

    def measure(self) -> None:
        """Times the network once the base is there."""
        self.service.thread.submit(self._measure)

    def _measure(self) -> None:
        pipe, (height, width) = self.model.pipe, self.model.space.default_size
        prompts = ["warm"] * usual_for(self.model, self.limits.fewest_pictures).batch_size
        times = []
        for steps in (1, 1, 4):  # the first one also warms up
            begun = time.perf_counter()
            pipe(prompts, num_inference_steps=steps, height=height, width=width, guidance_scale=1.0)
            times.append(time.perf_counter() - begun)
        self.call_seconds = max((times[2] - times[1]) / 3, times[2] / 8) / len(prompts)

    def close(self) -> None:
        """Ends all trainings, and removes all files."""
        self.trainings.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what is asked for ----

    def bench(self, request: gr.Request | None) -> Bench:
        """Of the visitor that a request is from."""
        return self.benches.get(getattr(request, "session_hash", None))

    def usual(self, bench: Bench) -> Usual:
        """What suits their pictures."""
        return usual_for(self.model, max(len(bench.good), self.limits.fewest_pictures))

    def wish(self, bench: Bench, *values: Any) -> Wish:
        """See `checked_wish`."""
        return checked_wish(bench, self.limits, self.usual(bench), *values)

    def estimate(self, bench: Bench, wish: Wish) -> float | None:
        """Seconds of a training, by what was measured on this machine; `None` before anything was."""
        if self.call_seconds is None:
            return None
        last, a_drawing = self.trainings.last, self.defaults.steps * 2 * self.call_seconds  # two calls: with guidance
        a_picture, start = BACKWARD * self.call_seconds, START_SECONDS
        if last is not None:
            a_picture, start = last.a_picture, max(last.rest - last.drawn * a_drawing, 1.0)
        pictures = wish.steps * self.usual(bench).batch_size * (1 + wish.beside)
        return start + pictures * a_picture + wish.drawn * a_drawing

    def check_time(self, seconds: float | None) -> None:
        """Raises Refused for a training that would be stopped long before its end.

        Args:
            seconds: As `estimate` has them.
        """
        most = self.limits.training_seconds
        if seconds is not None and seconds > OVER * most:
            raise Refused(f"That would take {lasts(seconds)}; a training may take {lasts(most)}. Choose fewer steps.")

    def start(self, bench: Bench, *values: Any) -> Run:
        """Begins a training.

        Raises:
            Refused: It cannot be had.
        """
        if ZERO_GPU:
            raise Refused("This Space has its GPU for single calls only, which is too short for a training.")
        wish = self.wish(bench, *values)
        self.check_time(self.estimate(bench, wish))
        self.trainings.check_room(bench)
        folder = bench.folder / secrets.token_hex(4)  # its own: what they have stays theirs until this one begins
        try:
            made = settings_for(wish, bench, self.model, self.limits, folder)
            return self.trainings.start(bench, wish, folder, *made)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    # ---- what was learned ----

    def result(self, bench: Bench) -> Path:
        """The folder of the adapter.

        Raises:
            Refused: There is none yet.
        """
        folder = bench.run.result if bench.run is not None else None
        if folder is None:
            raise Refused("Nothing has been learned yet; train first.")
        return folder

    def files(self, bench: Bench) -> dict[str, Path]:
        """What can be taken, by what it is; copied to where it is served from."""
        folder = self.result(bench)
        taken = bench.run.folder / "take"
        if not taken.exists():
            sweep(self.limits.kept_seconds)
            served = FOLDER / secrets.token_hex(16)
            served.mkdir(parents=True)
            shutil.copyfile(folder / FILE, served / FILE)
            shutil.copyfile(folder / "README.md", served / "README.md")
            self.write_kohya(folder / FILE, served / KOHYA)
            taken.write_text(str(served), encoding="utf-8")
        served = Path(taken.read_text(encoding="utf-8"))
        names = {"LoRA, for diffusers and hubgen": FILE, "LoRA, for kohya and A1111": KOHYA, "Card": "README.md"}
        return {label: served / name for label, name in names.items() if (served / name).is_file()}

    def write_kohya(self, source: Path, out: Path) -> None:
        """The adapter in the layout of kohya's scripts, where the base has one."""
        from hubgen.adaptation.locate import load_adapter
        from hubgen.adaptation.lora_files import as_kohya, read_adapter
        from hubgen.hub.bare import ADAPTABLE, bare_parts

        model = self.model
        parts = bare_parts(model.index, model.name, None, model.folder, ADAPTABLE)
        tensors, header = load_adapter(source)
        try:
            written, metadata = as_kohya(read_adapter(tensors, header, parts).layers, parts, {})
        except (ValueError, NotImplementedError, KeyError) as problem:
            logger.info("no file of kohya's layout: %s", type(problem).__name__)
            return
        save_file(
            {key: value.to(torch.float16) if value.ndim else value for key, value in written.items()}, out, metadata
        )

    def drawings(self, bench: Bench, prompt: Any, weight: Any, seed: Any) -> tuple[Drawing, Drawing]:
        """The same picture without what was learned, and with it."""
        folder = self.result(bench)
        weight = checked_number("The weight", weight, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        (added,) = asked_loras([(str(folder / FILE), weight)])
        height, width = self.model.space.default_size
        options: dict[str, Any] = {
            "prompt": self.limits.checked_prompt(prompt),
            "steps": min(self.defaults.steps, self.limits.steps),
            "guidance": self.defaults.guidance_scale,
            "width": width,
            "height": height,
            "seed": secrets.randbelow(2**32) if seed is None else self.limits.checked_seed(seed),
        }
        worn = (Worn(Style("what was learned", added), weight),) if weight else ()
        return Drawing(**options), Drawing(**options, styles=worn)

    async def drawn(
        self, bench: Bench, request: gr.Request, prompt: Any, weight: Any, seed: Any
    ) -> AsyncIterator[Progress | tuple[str, Path, Image.Image, Drawing]]:
        """Steps on the way, and (Without or With, its file, the picture, how it was drawn)."""
        both = self.drawings(bench, prompt, weight, seed)

        def work(call: Call) -> None:
            for name, drawing in zip(("Without", "With"), both, strict=True):
                picture = call.draw(drawing).pictures[0]
                path = write_recipe(picture, self.model.request(drawing), FOLDER / secrets.token_hex(16))
                call.tell((name, path, picture, drawing))

        async for event in self.service.run(getattr(request, "session_hash", None), work, "try"):
            yield event

    def about(self) -> dict[str, Any]:
        """What this page trains with, and the limits of a training."""
        limits = self.limits
        return {
            "base": self.model.title,
            "device": self.model.device,
            "side": self.benches.side,
            "publishes": self.may_publish,
            "limits": {
                "pictures": [limits.fewest_pictures, limits.training_pictures],
                "steps": limits.training_steps,
                "rank": limits.training_rank,
                "seconds": limits.training_seconds,
                "waiting": limits.trainings_waiting,
                "upload_bytes": limits.upload_bytes,
                "upload_pixels": limits.upload_pixels,
            },
            "ready": self.service.ready.done(),
        }

    def about_lines(self) -> list[str]:
        """The same in a line, for the bottom of the page."""
        device = {"cpu": "a CPU", "mps": "Apple silicon"}.get(self.model.device, "a GPU")
        return [f"Trains {self.model.title}", f"on {device}", "made with hubgen"]
