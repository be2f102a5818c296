"""What does a control cost? A ControlNet on Stable Diffusion 1.5, hubgen beside diffusers, and a call without controls.

    python -m tests.benchmarks.controls [--pairs N] [--side PIXELS] [--steps N] [--threads N] [--output DIR]

Both pipelines share one U-Net's and one ControlNet's random weights (Stable Diffusion 1.5's sizes), in one process, and
must give the same latents. Calls are timed in turns; a row's ratio is the median over the pairs.

- *all of the way*: the network runs at every step in both.
- *half of the way* (`end=0.5`): diffusers runs the network all the same and multiplies what it says by zero.
- *no control*: hubgen with `controls=[]` beside hubgen without the argument.

Stored: controls.json and controls.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.backbones.unet_condition_config import stable_diffusion_1
from hubgen.controls.controlnet import ControlNet
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.schedulers.ddim import DDIMScheduler
from tests.benchmarks import report

RESULTS = Path(__file__).parent / "results" / "controls"
TARGETS = {"half of the way": 0.90, "no control": 1.02}
TOLERANCE = 1e-3
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 32, 32, 32),
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def pipelines() -> tuple[TextToImagePipeline, Any, Any]:
    """hubgen's and diffusers' pipeline and the network, on the same weights."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**stable_diffusion_1()).eval()
    net = diffusers.ControlNetModel.from_unet(unet).eval()
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(parameter, std=0.01)
    ours = UNet2DConditionModel(**stable_diffusion_1()).eval()
    ours.load_state_dict(unet.state_dict(), assign=True)
    vae = diffusers.AutoencoderKL(**VAE).eval()
    none = {"text_encoder": None, "tokenizer": None}
    theirs = diffusers.StableDiffusionControlNetPipeline(
        vae=vae, unet=unet, controlnet=net, scheduler=diffusers.DDIMScheduler(**SCHEDULE),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **none,
    )  # fmt: skip
    pipe = TextToImagePipeline(vae=vae, unet=ours, scheduler=DDIMScheduler(**SCHEDULE), **none)
    for one in (theirs, pipe):
        one.set_progress_bar_config(disable=True)
    return pipe, theirs, net


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def compared(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Times of two calls in turns, each warmed up once."""
    first(), second()
    times = [(seconds(first), seconds(second)) for _ in range(pairs)]
    ratios = [one / other for one, other in times]
    return {
        "seconds": [statistics.median(one) for one in zip(*times, strict=True)],
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
    }


def measure(pairs: int, side: int, steps: int) -> dict[str, Any]:
    """All rows."""
    pipe, theirs, net = pipelines()
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(2, 1, 77, 768, generator=draw)
    call = {
        "prompt_embeds": text[0], "negative_prompt_embeds": text[1], "num_inference_steps": steps,
        "height": side, "width": side, "output_type": "latent", "guidance_scale": 7.5,
        "latents": torch.randn(1, 4, side // 8, side // 8, generator=draw),
    }  # fmt: skip
    hint = torch.rand(1, 3, side, side, generator=draw)

    def hubgen(**control: Any) -> torch.Tensor:
        return pipe(**call, controls=[ControlNet(net, hint, **control)]).images

    def peer(**control: Any) -> torch.Tensor:
        return theirs(**call, image=hint, **control).images

    rows = {}
    for name, end in (("all of the way", 1.0), ("half of the way", 0.5)):
        found, expected = hubgen(end=end), peer(control_guidance_end=end)
        error = ((found - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE:
            raise SystemExit(f"{name}: latents differ by {error:.1e} of their norm, expected less than {TOLERANCE:g}")
        both = compared(lambda end=end: hubgen(end=end), lambda end=end: peer(control_guidance_end=end), pairs)
        rows[name] = {**both, "error": error}
        print(f"{name}: {both['ratio']:.2f}", flush=True)
    rows["no control"] = compared(lambda: pipe(**call, controls=[]), lambda: pipe(**call), pairs)
    print(f"no control: {rows['no control']['ratio']:.3f}", flush=True)
    return {"rows": rows, "pairs": pairs, "side": side, "steps": steps, "environment": report.environment()}


def page(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    table = []
    for name, row in content["rows"].items():
        target = TARGETS.get(name)
        spread = f"{row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f}"
        ours, other = (f"{value:.1f}" for value in row["seconds"])
        table.append([name, ours, other, f"{row['ratio']:.2f}", spread, "" if target is None else f"{target:.2f}"])
    head = ["", "hubgen, s", "beside it, s", "ratio", "spread", "at most"]
    environment = ", ".join(f"{name} {value}" for name, value in content["environment"].items())
    return (
        "# What a control costs\n\nWritten by `python -m tests.benchmarks.controls`: a ControlNet on Stable Diffusion "
        f"1.5 (random weights, float32), {content['side']}x{content['side']} pixels, {content['steps']} steps with "
        f"guidance, medians of {content['pairs']} pairs in turns. Beside it: diffusers; in the last row hubgen without "
        f"the argument `controls`.\n\n{report.markdown_table(head, table)}\n{environment}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="of calls in turns (default: %(default)s)")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of a call (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    content = measure(arguments.pairs, arguments.side, arguments.steps)
    report.write_json(arguments.output / "controls.json", content)
    report.write_text(arguments.output / "controls.md", page(content))
    print(f"stored in {arguments.output}")


if __name__ == "__main__":
    main()
