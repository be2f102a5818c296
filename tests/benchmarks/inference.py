"""How fast is inference, and in how much memory: hubgen beside diffusers, in one process, on the same weights.

    python -m tests.benchmarks.inference [--rows NAME ...] [--pairs N] [--threads N] [--clock wall|cpu] [--output DIR]

Each row builds diffusers' model with random weights, gives hubgen's the very same tensors, checks that both give the
same, and then times them in turns. A row's ratio is the median of hubgen's time over diffusers' in each pair. Peak
memory is that of fresh processes, one a side. Rows are stored one by one; a run on rows that are there replaces them.
Where a row misses its target, a profile of both sides is stored beside it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hubgen
from hubgen.acceleration.optimize import accelerated
from hubgen.backbones.unet_condition_config import stable_diffusion_1, stable_diffusion_xl
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import Predictor
from tests.benchmarks import report

RESULTS = Path(__file__).parent / "results" / "inference"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDES = ("diffusers", "hubgen")
STEPS = 20
BRANCHES = ("negative", "positive")
# Largest norm of the difference over the norm, by type: in bfloat16 two orders of summation differ by a percent a step.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Half of the way, in the middle: what a whole pipeline is also measured with.
INTERVAL, INTERVAL_TARGET = (0.25, 0.75), 0.68
MEMORY_TARGETS = {"packed": 1.6, "unpacked": 1.0}
KL_F8: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
MMDIT: dict[str, Any] = {
    "sample_size": 64,
    "num_layers": 12,
    "num_attention_heads": 12,
    "caption_projection_dim": 768,
    "joint_attention_dim": 768,
    "pooled_projection_dim": 768,
}
TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}


@dataclass(frozen=True)
class Row:
    """One thing to measure."""

    name: str
    model: str
    """Class, of both libraries."""
    config: dict[str, Any]
    size: int
    """Side of the latents."""
    dtype: str
    target: float | None = None
    """Largest ratio of times that the issue allows."""
    tokens: int = 77
    """Of text."""
    steps: int = 0
    """0 for one call of the model; else those of a whole pipeline's call."""

    def inputs(self) -> dict[str, Any]:
        """Arguments of one call, batch 2 but for the autoencoder."""
        draw = torch.Generator().manual_seed(1)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw).to(DTYPES[self.dtype])

        side, config = self.size, self.config
        if self.model == "AutoencoderKL":
            return {"z": noise(1, 4, side, side)}
        if self.model == "UNet2DConditionModel":
            inputs: dict[str, Any] = {
                "sample": noise(2, 4, side, side),
                "timestep": torch.tensor([500, 500]),
                "encoder_hidden_states": noise(2, self.tokens, config["cross_attention_dim"]),
            }
            if config.get("addition_embed_type") == "text_time":
                ids = torch.tensor([[512.0, 512, 0, 0, 512, 512]] * 2).to(DTYPES[self.dtype])
                inputs["added_cond_kwargs"] = {"text_embeds": noise(2, 1280), "time_ids": ids}
            return inputs
        text = {
            "encoder_hidden_states": noise(2, self.tokens, config.get("joint_attention_dim", 4096)),
            "pooled_projections": noise(2, config.get("pooled_projection_dim", 768)),
        }
        if self.model == "SD3Transformer2DModel":
            return {"hidden_states": noise(2, 16, side, side), "timestep": torch.full((2,), 500.0), **text}
        rows = side // 2
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(rows), indexing="ij"), -1).flatten(0, 1)
        return {
            "hidden_states": noise(2, rows * rows, 64),
            "timestep": torch.full((2,), 0.5, dtype=DTYPES[self.dtype]),
            "guidance": torch.full((2,), 3.5),
            "img_ids": torch.cat([torch.zeros(len(grid), 1), grid], dim=1),
            "txt_ids": torch.zeros(self.tokens, 3),
            **text,
        }


def rows() -> list[Row]:
    """All rows, small ones first."""
    found = []
    targets = {
        "mmdit": {"float32": 0.80, "bfloat16": 0.88},
        "sd15-unet-256": {"float32": 0.75, "bfloat16": 0.75},
    }
    flux = {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}
    for dtype in DTYPES:
        unet, sd15, xl = "UNet2DConditionModel", stable_diffusion_1(), stable_diffusion_xl()
        found += [
            Row(f"sd15-unet-256-{dtype}", unet, sd15, 32, dtype, targets["sd15-unet-256"][dtype]),
            Row(f"sd15-unet-512-{dtype}", unet, sd15, 64, dtype, 0.85),
            Row(f"mmdit-256-{dtype}", "SD3Transformer2DModel", MMDIT, 32, dtype, targets["mmdit"][dtype]),
            Row(f"mmdit-512-{dtype}", "SD3Transformer2DModel", MMDIT, 64, dtype, targets["mmdit"][dtype], 154),
            Row(f"vae-decode-256-{dtype}", "AutoencoderKL", KL_F8, 32, dtype, 0.90),
            Row(f"vae-decode-512-{dtype}", "AutoencoderKL", KL_F8, 64, dtype, 0.90),
            Row(f"sd15-pipeline-256-{dtype}", unet, sd15, 32, dtype, 0.85, steps=STEPS),
            Row(f"mmdit-pipeline-256-{dtype}", "SD3Transformer2DModel", MMDIT, 32, dtype, 0.85, steps=STEPS),
            Row(f"flux-blocks-512-{dtype}", "FluxTransformer2DModel", flux, 64, dtype, None, 512),
            Row(f"sdxl-unet-512-{dtype}", unet, xl, 64, dtype, None),
        ]
    tiny = [
        Row("tiny-unet-float32", "UNet2DConditionModel", TINY_UNET, 8, "float32", None, 5),
        Row("tiny-pipeline-float32", "UNet2DConditionModel", TINY_UNET, 8, "float32", None, 5, 2),
    ]
    return found + tiny


# ---------------------------------------------------------------------------------------------------------------------
# The two sides


def built(library: Any, name: str, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A model without values for its weights."""
    with torch.device("meta"):
        return getattr(library, name)(**config).eval().to(dtype)


@torch.no_grad()
def filled(model: nn.Module, device: str) -> nn.Module:
    """Random weights at scales that keep activations around one; buffers as the constructor has them."""
    buffers = {name for name, _ in model.named_buffers()}
    if buffers:  # positions: computed, so built in earnest
        model = type(model).from_config(model.config).eval().to(model.dtype)
    else:
        model.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=draw)
        else:
            parameter.fill_(float(name.endswith("weight")))
    return model.to(device)


def both(name: str, config: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """Both libraries' models of one set of tensors; nothing is there twice."""
    theirs = filled(built(diffusers, name, config, dtype), device)
    ours = built(hubgen, name, config, dtype)
    ours.load_state_dict({**theirs.state_dict()}, assign=True)
    for (place, buffer), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=False):
        if buffer.is_meta:
            owner, _, attribute = place.rpartition(".")
            setattr(ours.get_submodule(owner), attribute, other)
    return {"diffusers": theirs, "hubgen": ours.requires_grad_(False)}


def prepare(row: Row, sides: Sequence[str], packing: bool, device: str, compiled: bool) -> dict[str, Callable]:
    """What is timed, by side: functions of nothing that return the output, and have run once."""
    dtype = DTYPES[row.dtype]
    models = both(row.model, row.config, dtype, device)
    vaes = both("AutoencoderKL", vae_config(row), dtype, device) if row.steps else {}
    work: dict[str, Callable] = {}
    for side in sides:
        model, vae = models.pop(side), vaes.pop(side, None)
        if side == "hubgen":
            for part in (model, *([vae] if vae is not None else [])):
                hubgen.optimize(part, packing=packing, compile=compiled)
        elif compiled and getattr(model, "_repeated_blocks", None):
            model.compile_repeated_blocks(fullgraph=True)
        if not row.steps:
            work[side] = call(row, side, model, device)
        elif side == "diffusers":
            work[side] = pipeline(row, diffusers_pipeline(row, model, vae), device)
        else:
            ours = hubgen_pipeline(row, model, vae)
            work[side] = pipeline(row, ours, device)
            work["interval"] = pipeline(row, ours, device, guidance_interval=INTERVAL)
    return work


def vae_config(row: Row) -> dict[str, Any]:
    channels = 16 if row.model == "SD3Transformer2DModel" else 4
    if row.config is TINY_UNET:
        small = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
        return {**small, "block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": channels}
    scale = {"scaling_factor": 1.5305, "shift_factor": 0.0609} if channels == 16 else {}
    return {**KL_F8, "latent_channels": channels, **scale}


def call(row: Row, side: str, model: Any, device: str) -> Callable[[], torch.Tensor]:
    inputs = moved(row.inputs(), device)
    method = model.decode if row.model == "AutoencoderKL" else model
    if side == "hubgen":
        return Step(row, model, method, inputs)
    return lambda: method(**inputs, return_dict=False)[0]


class Step:
    """A step of a call of `STEPS`: what a pipeline does once a call is done by `once`."""

    def __init__(self, row: Row, model: Any, method: Callable[..., Any], inputs: dict[str, Any]):
        self.row, self.model, self.method, self.inputs = row, model, method, inputs
        self.stack = ExitStack()
        weakref.finalize(self, self.stack.close)  # also at the end of the process, while its modules are still there
        self.once()

    def once(self) -> None:
        self.stack.close()
        self.fast = self.stack.enter_context(accelerated(self.model))
        if self.row.model == "SD3Transformer2DModel":
            names = ("encoder_hidden_states", "pooled_projections")
            tokens, pooled = (self.inputs[name] for name in names)
            conditions = {
                branch: Condition(tokens=tokens[i : i + 1], pooled=pooled[i : i + 1])
                for i, branch in enumerate(BRANCHES)
            }
            time = self.inputs["timestep"]
            grid = torch.linspace(1000, time[0].item(), STEPS, device=time.device)
            Predictor(self.model, conditions).tabulate(self.fast, grid, BRANCHES)

    def __call__(self) -> torch.Tensor:
        with self.fast.network(STEPS - 1, BRANCHES):
            return self.method(**self.inputs, return_dict=False)[0]


def moved(inputs: Any, device: str) -> Any:
    if isinstance(inputs, dict):
        return {name: moved(value, device) for name, value in inputs.items()}
    return inputs.to(device)


def scheduler(row: Row, library: Any) -> Any:
    if row.model == "SD3Transformer2DModel":
        return library.FlowMatchEulerDiscreteScheduler(shift=3.0)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return library.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def diffusers_pipeline(row: Row, backbone: Any, vae: Any) -> Any:
    """diffusers' own pipeline of these parts, without text encoders."""
    parts = {"vae": vae, "scheduler": scheduler(row, diffusers), "text_encoder": None, "tokenizer": None}
    if row.model == "SD3Transformer2DModel":
        others = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
        return diffusers.StableDiffusion3Pipeline(transformer=backbone, **parts, **others)
    checks = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(unet=backbone, **parts, **checks)


def hubgen_pipeline(row: Row, backbone: Any, vae: Any) -> Any:
    """hubgen's pipeline of these parts, without text encoders."""
    name = "transformer" if row.model == "SD3Transformer2DModel" else "unet"
    return hubgen.TextToImagePipeline(
        vae=vae, text_encoder=None, tokenizer=None, scheduler=scheduler(row, hubgen), **{name: backbone}
    )


def pipeline(row: Row, pipe: Any, device: str, **options: Any) -> Callable[[], torch.Tensor]:
    """A whole call behind the text encoders, which are the same on both sides: the picture, (1, 3, H, W).

    diffusers' pipelines know no guidance interval. With one, ours makes another picture: it is the time that counts.
    """
    pipe.set_progress_bar_config(disable=True)
    inputs = moved(row.inputs(), device)
    embeds = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    told = {}
    for given, name in embeds.items():
        if given in inputs:
            told |= {f"negative_{name}": inputs[given][:1], name: inputs[given][1:]}
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    channels = pipe.vae.config.latent_channels
    noise = torch.randn(1, channels, row.size, row.size, generator=torch.Generator().manual_seed(2))
    told |= {"latents": noise.to(device, DTYPES[row.dtype]), "height": factor * row.size, "width": factor * row.size}
    settings = {"num_inference_steps": row.steps, "guidance_scale": 4.0, "output_type": "pt", **options}
    return lambda: pipe(**told, **settings, return_dict=False)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The measures


def clock(kind: str, device: str) -> Callable[[], float]:
    if device == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronized
    return {"wall": time.perf_counter, "cpu": time.process_time}[kind]


def interleaved(work: dict[str, Callable], pairs: int, now: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each side in each pair; which of the two comes first alternates."""
    seconds: dict[str, list[float]] = {side: [] for side in work}
    for pair in range(pairs):
        for side in list(work)[:: 1 if pair % 2 == 0 else -1]:
            start = now()
            work[side]()
            spent = now() - start
            if hasattr(work[side], "once"):  # its share of a call
                start = now()
                work[side].once()
                spent += (now() - start) / STEPS
            seconds[side].append(spent)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {"median": middle, "min": ordered[0], "max": ordered[-1]}


def attention_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of both products, from the shapes: what torch's counter leaves out on a CPU."""
    batch, heads, length, features = query
    return 2 * batch * heads * length * key[2] * (features + value[3])


def matrix_peak(dtype: torch.dtype, device: str, now: Callable[[], float]) -> float:
    """FLOP a second of the fastest of a few square products and a convolution."""
    best = 0.0
    for side in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        for _ in range(6):
            start = now()
            a @ b
            best = max(best, 2 * side**3 / (now() - start))
    x = torch.randn(2, 640, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(640, 640, 3, 3, device=device).to(dtype)
    for _ in range(4):
        start = now()
        torch.conv2d(x, weight, padding=1)
        best = max(best, 2 * 9 * 640**2 * 2 * 32**2 / (now() - start))
    return best


def profiled(work: Callable) -> dict[str, float]:
    """Share of time by operator, those above one percent."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: event.self_cpu_time_total / total for event in events}
    return {name: round(share, 4) for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share > 0.01}


def memory_of(row: Row, side: str, packing: bool, device: str, threads: int) -> float:
    """Median of the peaks of three fresh processes that run one side twice, in bytes; of a CPU's on Linux only.

    The allocator makes one process differ from the next by a few percent.
    """
    code = [sys.executable, "-m", "tests.benchmarks.inference", "--rows", row.name, "--memory-of", side]
    code += ["--device", device, "--threads", str(threads), *([] if packing else ["--no-packing"])]
    peaks = []
    for _ in range(3):
        done = subprocess.run(code, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            raise RuntimeError(f"the {side} side of {row.name} failed:\n{done.stderr[-2000:]}")
        peaks.append(float(done.stdout.splitlines()[-1]))
    return summary(peaks)["median"]


@torch.no_grad()
def peak_memory(row: Row, side: str, packing: bool, device: str) -> float:
    # A pipeline's peak is that of two steps as well as of twenty.
    row = replace(row, steps=min(row.steps, 2))
    work = prepare(row, [side], packing, device, compiled=False)[side]
    for _ in range(2):
        work()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's figure, which a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


@torch.no_grad()
def measure(row: Row, pairs: int, kind: str, device: str, compiled: bool, memory: bool) -> list[dict[str, Any]]:
    """Everything about one row; of a pipeline a second result, with guidance in an interval only.

    Raises:
        ValueError: The two sides disagree.
    """
    now, dtype = clock(kind, device), DTYPES[row.dtype]
    work = prepare(row, SIDES, True, device, compiled)
    with FlopCounterMode(display=False, custom_mapping={ATTENTION_ON_CPU: attention_flop}) as counter:
        expected = work["diffusers"]()
    actual = work["hubgen"]()
    error = ((actual - expected).float().norm() / expected.float().norm()).item()
    if not error < TOLERANCES[row.dtype]:
        raise ValueError(f"{row.name}: the outputs differ by {error:.2e} of their norm.")
    if hasattr(work["hubgen"], "once"):
        work["hubgen"].once()
    work["hubgen"]()
    seconds = interleaved(work, pairs, now)
    flops = counter.get_total_flops()
    common = {
        "dtype": row.dtype,
        "device": device,
        "pairs": pairs,
        "clock": kind,
        "flop": flops,
        "matrix_peak": matrix_peak(dtype, device, now),
        "machine": machine(device),
    }
    name = row.name + ("-compiled" if compiled else "")
    ratio = ratios(seconds, "hubgen")
    result: dict[str, Any] = {
        "row": name,
        **common,
        "ratio": ratio,
        "target": row.target,
        "seconds": {side: summary(seconds[side]) for side in SIDES},
        "difference": error,
        "flop_per_second": {side: flops / summary(seconds[side])["median"] for side in SIDES},
    }
    results = [result]
    if "interval" in work:
        times = {"diffusers": summary(seconds["diffusers"]), "hubgen": summary(seconds["interval"])}
        interval = {"ratio": ratios(seconds, "interval"), "target": INTERVAL_TARGET, "seconds": times}
        results.append({"row": f"{name}-interval", **common, **interval, "difference": None, "flop_per_second": None})
    if row.target is not None and ratio["median"] > row.target:
        result["profile"] = {side: profiled(work[side]) for side in SIDES}
    del work
    if memory:
        threads = torch.get_num_threads()
        theirs = memory_of(row, "diffusers", True, device, threads)
        result["memory"] = {"diffusers": theirs}
        for share, packing in (("packed", True), ("unpacked", False)):
            ours = memory_of(row, "hubgen", packing, device, threads)
            result["memory"][share] = {"bytes": ours, "ratio": ours / theirs, "target": MEMORY_TARGETS[share]}
    return results


def ratios(seconds: dict[str, list[float]], side: str) -> dict[str, float]:
    """Of the times of a side over diffusers' in the same pair."""
    return summary([ours / theirs for theirs, ours in zip(seconds["diffusers"], seconds[side], strict=True)])


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    cpu = {"cpu": model, "cores": str(os.cpu_count()), "instructions": torch.backends.cpu.get_cpu_capability()}
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {**report.environment(), **cpu, **gpu}


# ---------------------------------------------------------------------------------------------------------------------
# The results


def to_markdown(results: Sequence[dict[str, Any]]) -> str:
    def gigaflops(value: float) -> str:
        return f"{value / 1e9:.0f}"

    table = []
    for result in results:
        ratio, memory = result["ratio"], result.get("memory")
        met = result["target"] is None or ratio["median"] <= result["target"]
        table.append(
            [
                result["row"],
                f"**{ratio['median']:.2f}** ({ratio['min']:.2f}–{ratio['max']:.2f})",
                "" if result["target"] is None else f"{result['target']:.2f}{'' if met else ' missed'}",
                *(f"{result['seconds'][side]['median']:.2f}" for side in SIDES),
                " / ".join(gigaflops(rate) for rate in (result["flop_per_second"] or {}).values()),
                gigaflops(result["matrix_peak"]),
                "" if memory is None else f"{memory['packed']['ratio']:.2f} / {memory['unpacked']['ratio']:.2f}",
                "" if result["difference"] is None else f"{result['difference']:.0e}",
                f"{result['pairs']} {result['clock']}, {result['machine']['threads']} threads",
            ]
        )
    header = ["row", "time ratio", "target", "diffusers s", "hubgen s", "GFLOP/s", "matrix peak"]
    header += ["memory, packed / not", "difference", "pairs"]
    lines = [
        "# Inference: hubgen beside diffusers\n",
        "Written by `python -m tests.benchmarks.inference`. Ratios are hubgen over diffusers: the median of the pairs,",
        "the least and the largest. GFLOP/s count the operations of the plain algorithms on both sides; hubgen's",
        "convolutions by Winograd's method and of doubled pictures do with fewer, so that they may exceed the matrix",
        "peak. Memory: peak of a process, targets 1.6 and 1.0. A step is one of a call of 20, and",
        "bears a twentieth of its preparation. Difference: norm of the outputs' difference over the norm.\n",
        report.markdown_table(header, table),
    ]
    for description in {json.dumps(result["machine"], sort_keys=True) for result in results}:
        lines.append("Machine: " + ", ".join(f"{name} {value}" for name, value in json.loads(description).items()))
    for result in results:
        if "profile" in result:
            lines.append(f"\n## Where the time goes: {result['row']}\n")
            names = list(dict.fromkeys(name for side in SIDES for name in result["profile"][side]))
            shares = [[n, *(report.percent(result["profile"][side].get(n, 0)) for side in SIDES)] for n in names]
            lines.append(report.markdown_table(["operator", *SIDES], shares))
    return "\n".join(lines) + "\n"


def store(result: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Adds a row to what is stored, in place of an older one of its name and device."""
    path = output / "inference.json"
    results = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    key = (result["row"], result["device"])
    results = [old for old in results if (old["row"], old["device"]) != key] + [result]
    order = [row.name for row in rows()]
    results.sort(key=lambda r: (r["device"], [r["row"].startswith(name) for name in order].index(True), r["row"]))
    report.write_json(path, {"rows": results})
    report.write_text(output / "inference.md", to_markdown(results))
    return results


def run(
    names: Sequence[str] | None = None,
    output: Path = RESULTS,
    pairs: int = 5,
    kind: str = "wall",
    device: str = "cpu",
    compiled: bool = False,
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Measures the rows whose names begin so (all but the tiny ones by default) and stores each at once.

    Raises:
        ValueError: A name that no row begins with.
    """
    every = rows()
    for name in names or ():
        if not any(row.name.startswith(name) for row in every):
            raise ValueError(f"`--rows`: got {name!r}, expected the beginning of one of {[r.name for r in every]}.")
    results = []
    for row in every:
        if any(row.name.startswith(name) for name in names) if names else not row.name.startswith("tiny"):
            if device == "cuda" and row.dtype != "bfloat16":
                continue
            for result in measure(row, pairs, kind, device, compiled, memory):
                store(result, output)
                results.append(result)
                ratio, space = result["ratio"], result.get("memory", {})
                spaces = {name: round(space[name]["ratio"], 2) for name in MEMORY_TARGETS if name in space}
                print(f"{result['row']}: {ratio['median']:.3f} (target {result['target']}) {spaces}", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="beginnings of names; all rows by default")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of the process, on busy machines"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compiled", action="store_true", help="both sides with regional torch.compile, on a GPU")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--no-packing", dest="packing", action="store_false", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.list:
        print("\n".join(row.name for row in rows()))
    elif options.memory_of:
        row = next(row for row in rows() if row.name == options.rows[0])
        print(peak_memory(row, options.memory_of, options.packing, options.device))
    else:
        run(
            *(options.rows, options.output, options.pairs, options.clock),
            *(options.device, options.compiled, options.memory),
        )


if __name__ == "__main__":
    main()
