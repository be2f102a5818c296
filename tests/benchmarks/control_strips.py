"""Strips of controlled pictures: what the controls of `tests.benchmarks.control_training` do, at three scales.

    python -m tests.benchmarks.control_training --data DIR --work runs/controls
    python -m tests.benchmarks.control_strips --data DIR --work runs/controls [--pictures N ...] [--output DIR]

A strip a control, of pictures of the test split: what is shown, what the base draws without it from the same noise and
prompt, and what it draws with it. Then two controls in one call: the edges of one picture and the look of another.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hubgen.backbones.controlnet_sd3 import SD3ControlNetModel
from hubgen.controls.controlnet import ControlNet
from hubgen.controls.image_attention import FILE, Adapter
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.data.edits import EDITS, USUAL
from hubgen.data.hints import hint_of
from hubgen.hub.bundled import bundled_model
from hubgen.pipelines.text_to_image import TextToImagePipeline
from tests.benchmarks import report
from tests.benchmarks.bundled_model import TEST, RealPictures
from tests.benchmarks.control_training import RESULTS, folder_of

COLOURS, EDGES = "ControlNet, colours of 8x8 places", "ControlNet, edges"
SHOWN, EDITED = "IP-Adapter", "InstructPix2Pix, four edits"
SCALES = (0.5, 1.0, 1.5)
IMAGE_SCALES = (1.0, 1.5, 2.5)
"""Of InstructPix2Pix's guidance by the picture"""
SIDE = 64

Pictures = list[tuple[str, torch.Tensor]]
"""Captions and pictures, (3, H, W) in [0, 1]"""


@dataclass(frozen=True)
class Request:
    """What is drawn from."""

    pipe: TextToImagePipeline
    work: Path
    """Of the runs"""
    pictures: Sequence[tuple[str, Image.Image]]
    """Captions and pictures"""
    seed: int

    def run(self, name: str) -> Path:
        """The folder of a row's run."""
        return self.work / folder_of(name)

    def net(self, name: str) -> SD3ControlNetModel:
        return SD3ControlNetModel.from_pretrained(self.run(name) / "controlnet")

    def adapter(self) -> Adapter:
        return Adapter.read(self.run(SHOWN) / "ip_adapter" / FILE)

    def draw(self, prompt: str, *controls: ControlNet | IPAdapter) -> torch.Tensor:
        """A picture, from the noise of the seed, (3, H, W) in [0, 1]."""
        generator = torch.Generator().manual_seed(self.seed)
        call = {"generator": generator, "output_type": "pt", "controls": list(controls)}
        return self.pipe(prompt, **call).images[0]


def tensor_of(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def of_net(name: str, kind: str) -> Callable[[Request], Pictures]:
    """The strip of a ControlNet."""

    def strip(request: Request) -> Pictures:
        net, found = request.net(name), []
        for caption, picture in request.pictures:
            hint = hint_of(picture, kind)
            found += [("shown", tensor_of(hint)), (f"{caption}, without", request.draw(caption))]
            for scale in SCALES:
                found.append((f"{scale:g}", request.draw(caption, ControlNet(net, hint, scale))))
        return found

    return strip


def of_adapter(request: Request) -> Pictures:
    """The strip of the IP-Adapter, which was trained without words and is asked without any."""
    adapter, found = request.adapter(), []
    for _, picture in request.pictures:
        found += [("shown", tensor_of(picture)), ("no words, without", request.draw(""))]
        for scale in SCALES:
            found.append((f"{scale:g}", request.draw("", IPAdapter(adapter, picture, scale=scale))))
    return found


def of_editor(request: Request) -> Pictures:
    """The strip of InstructPix2Pix: an instruction a line."""
    pipe = TextToImagePipeline.from_pretrained(request.run(EDITED) / "pipeline", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    found: Pictures = []
    _, picture = request.pictures[0]
    for edit in (EDITS[name][0] for name in USUAL):
        found.append(("shown", tensor_of(picture)))
        for scale in IMAGE_SCALES:
            generator = torch.Generator().manual_seed(request.seed)
            call = {"image": picture, "image_guidance_scale": scale, "generator": generator, "output_type": "pt"}
            found.append((f"{edit}, {scale:g}", pipe(edit, **call).images[0]))
    return found


def of_two(request: Request) -> Pictures:
    """Edges of one picture, look of another: each alone, and both in one call."""
    net, adapter, found = request.net(EDGES), request.adapter(), []
    shown = [picture for _, picture in request.pictures]
    for first, second in zip(shown, [*shown[1:], shown[0]], strict=True):
        hint = hint_of(first, "canny")
        edges, look = ControlNet(net, hint), IPAdapter(adapter, second)
        found += [
            ("edges", tensor_of(hint)),
            ("look", tensor_of(second)),
            ("edges alone", request.draw("", edges)),
            ("look alone", request.draw("", look)),
            ("both", request.draw("", edges, look)),
        ]
    return found


STRIPS: dict[str, tuple[int, Callable[[Request], Pictures]]] = {
    "strip-colours": (2 + len(SCALES), of_net(COLOURS, "color")),
    "strip-edges": (2 + len(SCALES), of_net(EDGES, "canny")),
    "strip-ip-adapter": (2 + len(SCALES), of_adapter),
    "strip-instruct-pix2pix": (1 + len(IMAGE_SCALES), of_editor),
    "strip-two": (5, of_two),
}
"""By the names of their files: pictures of a line, and what draws them"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/fluent"), help="built by `hubgen data emoji`")
    parser.add_argument("--work", type=Path, required=True, help="that of tests.benchmarks.control_training")
    parser.add_argument("--pictures", type=int, nargs="+", default=[0, 40, 80], help="rows of the test split")
    parser.add_argument("--strips", nargs="+", choices=list(STRIPS), default=list(STRIPS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    real = RealPictures.from_folder(options.data, TEST, SIDE)
    pictures = []
    for row in options.pictures:
        pixels = ((real.pixels[row] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        pictures.append((real.captions[row][0], Image.fromarray(pixels)))
    pipe = TextToImagePipeline.from_pretrained(bundled_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    request = Request(pipe, options.work, pictures, options.seed)
    for name in options.strips:
        columns, draw = STRIPS[name]
        captions, drawn = zip(*draw(request), strict=True)
        path = options.output / f"{name}.png"
        report.draw_grid([torch.stack(drawn) * 2 - 1], captions, path, columns)
        print(path)


if __name__ == "__main__":
    main()
