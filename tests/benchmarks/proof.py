"""The proof rule: a change that should not move numerics gives the same latents, pictures and losses, bit for bit.

    python -m tests.benchmarks.proof REVISION     # this working tree beside a git revision, or beside a folder

Each side is installed into a folder of its own (`pip install --no-deps --target`), and records in a fresh process on
one thread: calls of the pipelines on tiny random models of every family, and the losses of short trainings. The
recorder uses public names alone, so that it runs on either side. Exit code 1: something differs; the table says what,
and by how much.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RECORD = "--record"
WORDS = ["a", "the", "red", "blue", "green", "cat", "dog", "heart", "small", "big"]
STEPS = 20


# ---------------------------------------------------------------------------------------------------------------------
# The recorder


def random_weights(model: Any, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.1, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def tokenizer(length: int) -> Any:
    from transformers import BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer({word: i for i, word in enumerate(vocabulary)}, model_max_length=length)


def bert() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return random_weights(BertModel(BertConfig(vocab_size=len(WORDS) + 5, max_position_embeddings=32, **sizes)), 1)


def clip(seed: int, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = CLIPTextConfig(vocab_size=len(WORDS) + 5, projection_dim=12, max_position_embeddings=16, **sizes, **ends)
    return random_weights((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(WORDS) + 5, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return random_weights(T5EncoderModel(config), 5)


def vae(**config: Any) -> Any:
    import hubgen

    sizes = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": 0.7,
        "shift_factor": 0.1,
    }
    return random_weights(hubgen.AutoencoderKL(**{**sizes, **config}), 2)


UNET: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
SD3: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "pos_embed_max_size": 16,
}


def text_pipeline(family: str, **config: Any) -> Any:
    """A pipeline of the family's components."""
    import hubgen
    from hubgen import TextToImagePipeline

    ddim = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    parts: dict[str, Any] = {"vae": vae(**config.pop("vae", {}))}
    texts: list[Any]
    if family in ("sd", "own-unet"):
        parts["unet"] = random_weights(hubgen.UNet2DConditionModel(**{**UNET, **config}), 3)
        parts["scheduler"] = hubgen.DDIMScheduler(**ddim) if family == "sd" else hubgen.DDPMScheduler()
        texts = [clip(4) if family == "sd" else bert(), tokenizer(8)]
    elif family in ("sdxl", "refiner"):
        two = family == "sdxl"
        sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
        sizes |= {"cross_attention_dim": 32 if two else 16}
        sizes |= {"projection_class_embeddings_input_dim": 12 + (6 if two else 5) * 4}
        parts["unet"] = random_weights(hubgen.UNet2DConditionModel(**{**UNET, **sizes, **config}), 3)
        parts["scheduler"] = hubgen.DDIMScheduler(**ddim)
        parts["requires_aesthetics_score"] = not two
        texts = [*([clip(4), tokenizer(8)] if two else [None, None]), clip(6, projected=True), tokenizer(8)]
    elif family == "sd3":
        sizes = {"joint_attention_dim": 32, "pooled_projection_dim": 24}
        parts["transformer"] = random_weights(hubgen.SD3Transformer2DModel(**{**SD3, **sizes, **config}), 3)
        parts["scheduler"] = hubgen.FlowMatchEulerDiscreteScheduler(shift=3.0)
        texts = [clip(4, True), tokenizer(8), clip(6, True), tokenizer(8), t5(), tokenizer(32)]
    elif family == "flux":
        sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
        sizes |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16}
        model = hubgen.FluxTransformer2DModel(**sizes, axes_dims_rope=(4, 6, 6), **{"guidance_embeds": True, **config})
        parts["transformer"] = random_weights(model, 3)
        parts["scheduler"] = hubgen.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        texts = [clip(4), tokenizer(8), t5(), tokenizer(32)]
    else:
        sizes = {"joint_attention_dim": 16, "pooled_projection_dim": 16, "qk_norm": "rms_norm"}
        parts["transformer"] = random_weights(hubgen.SD3Transformer2DModel(**{**SD3, **sizes, **config}), 3)
        parts["scheduler"] = hubgen.FlowMatchEulerDiscreteScheduler(shift=2.0)
        texts = [bert(), tokenizer(8)]
    parts.setdefault("text_encoder", None)
    parts.setdefault("tokenizer", None)
    return TextToImagePipeline(**{**parts, **dict(zip(names, texts, strict=False))})


def picture(seed: int) -> Any:
    import torch

    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def latents(seed: int) -> Any:
    """Half denoised, for a refiner."""
    import torch

    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def mask() -> Any:
    import torch

    values = torch.zeros(1, 1, 16, 16)
    values[..., 4:12, 2:10] = 1
    return values


def new_embeddings(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes what the backbone is given in the middle."""
    return {"prompt_embeds": 0.5 * tensors["prompt_embeds"]} if step == 1 else {}


PROMPT: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 4, "height": 16, "width": 16}
GUIDED: dict[str, Any] = {**PROMPT, "guidance_scale": 5.0, "negative_prompt": "the small dog"}
LATENTS = "latents"
IMAGE: dict[str, Any] = {"image": 1, "strength": 0.6}
MASK: dict[str, Any] = {"image": 1, "mask_image": True, "strength": 0.8}
CALLBACK: dict[str, Any] = {
    "callback_on_step_end": new_embeddings,
    "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
}
BY_CHANNEL = {"shift_factor": None, "latents_mean": (0.1, -0.2, 0.3, 0.0), "latents_std": (0.8, 1.1, 0.9, 1.3)}
OFF: dict[str, Any] = {**PROMPT, "guidance_scale": 1.0}
INTERVAL: dict[str, Any] = {"guidance_interval": (0.3, 0.8)}
# name -> (family, changes to the backbone's config ("vae": to the autoencoder's), arguments of the call)
TEXT_CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd text": ("sd", {}, GUIDED),
    "sd text, no guidance": ("sd", {}, OFF),
    "sd text, latents normalised by channel": ("sd", {"vae": BY_CHANNEL}, GUIDED),
    "sd text, interval and rescale": (
        "sd",
        {},
        {**GUIDED, "guidance_interval": (0.2, 0.7), "guidance_rescale": 0.7},
    ),
    "sd text, callback": ("sd", {}, {**GUIDED, **CALLBACK}),
    "sd image": ("sd", {}, {**GUIDED, **IMAGE}),
    "sd mask": ("sd", {}, {**GUIDED, **MASK}),
    "sd mask, strength 1": ("sd", {}, {**GUIDED, **MASK, "strength": 1.0}),
    "sd mask, shown": ("sd", {"in_channels": 9}, {**GUIDED, **MASK}),
    "sd distilled": ("sd", {"time_cond_proj_dim": 8}, {**PROMPT, "guidance_scale": 5.0}),
    "sdxl text": ("sdxl", {}, {**GUIDED, "original_size": (20, 24), "negative_original_size": (16, 16)}),
    "sdxl text, no negative prompt": ("sdxl", {}, {**PROMPT, "guidance_scale": 5.0}),
    "sdxl text, no guidance": ("sdxl", {}, OFF),
    "sdxl text, interval": ("sdxl", {}, {**GUIDED, **INTERVAL}),
    "sdxl text, the first half": ("sdxl", {}, {**GUIDED, "denoising_end": 0.5}),
    "sdxl image": ("sdxl", {}, {**GUIDED, **IMAGE}),
    "sdxl mask": ("sdxl", {}, {**GUIDED, **MASK}),
    "refiner image": ("refiner", {}, {**GUIDED, **IMAGE, "aesthetic_score": 7.0}),
    "refiner latents, the second half": ("refiner", {}, {**GUIDED, "image": LATENTS, "denoising_start": 0.5}),
    "sd3 text": ("sd3", {}, GUIDED),
    "sd3 text, no guidance": ("sd3", {}, OFF),
    "sd3 text, two attentions": ("sd3", {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}, GUIDED),
    "sd3 text, interval": ("sd3", {}, {**GUIDED, **INTERVAL}),
    "sd3 image": ("sd3", {}, {**GUIDED, **IMAGE}),
    "sd3 mask": ("sd3", {}, {**GUIDED, **MASK}),
    "flux text": ("flux", {}, {**PROMPT, "guidance_scale": 3.5}),
    "flux text, true guidance": ("flux", {}, {**GUIDED, "true_cfg_scale": 3.0}),
    "flux text, true guidance, interval": ("flux", {}, {**GUIDED, "true_cfg_scale": 3.0, **INTERVAL}),
    "flux text, schnell": ("flux", {"guidance_embeds": False}, PROMPT),
    "flux image": ("flux", {}, {**PROMPT, **IMAGE}),
    "flux mask": ("flux", {}, {**PROMPT, **MASK}),
    "own text": ("own", {}, GUIDED),
    "own text, no guidance": ("own", {}, OFF),
    "own text, interval": ("own", {}, {**GUIDED, **INTERVAL}),
    "own text, callback": ("own", {}, {**GUIDED, **CALLBACK}),
    "own image": ("own", {}, {**GUIDED, **IMAGE}),
    "own mask": ("own", {}, {**GUIDED, **MASK}),
    "own unet, pooled text": (
        "own-unet",
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
        GUIDED,
    ),
}


def text_calls() -> Iterator[tuple[str, Any]]:
    import torch

    for number, (name, (family, config, arguments)) in enumerate(TEXT_CALLS.items()):

        def drawn(generator: Any, family: str = family, config: dict[str, Any] = config, **arguments: Any) -> Any:
            pipe = text_pipeline(family, **config)  # a new one for each call
            pipe.set_progress_bar_config(disable=True)
            return pipe(generator=generator, **arguments).images

        arguments = dict(arguments)
        if "image" in arguments:
            arguments["image"] = latents(2) if arguments["image"] == LATENTS else picture(arguments["image"])
        if "mask_image" in arguments:
            arguments["mask_image"] = mask()
        for kind, more in (("latents", {"output_type": "latent"}), ("picture", {"output_type": "pt"})):
            generator = torch.Generator().manual_seed(number)
            yield f"{name}: {kind}", drawn(generator, **arguments, **more)
        generators = [torch.Generator().manual_seed(number + i) for i in range(2)]
        two = drawn(generators, num_images_per_prompt=2, output_type="latent", **arguments)
        yield f"{name}: two pictures", two


def other_calls() -> Iterator[tuple[str, Any]]:
    import torch

    import hubgen
    from hubgen import ClassToImagePipeline, UnconditionalPipeline

    def seeded() -> Any:
        return torch.Generator().manual_seed(7)

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    dit = random_weights(hubgen.DiTTransformer2DModel(**sizes, out_channels=8, num_embeds_ada_norm=10), 3)
    for kind in ("fixed_small", "learned_range"):
        scheduler = hubgen.DDPMScheduler(variance_type=kind, clip_sample=False)
        pipe = ClassToImagePipeline(vae=vae(shift_factor=None), scheduler=scheduler, transformer=dit)
        pipe.set_progress_bar_config(disable=True)
        for guidance, more in (
            ("guidance", {"guidance_scale": 4.0}),
            ("no guidance", {"guidance_scale": 1.0}),
            ("interval", {"guidance_scale": 4.0, **INTERVAL}),
        ):
            call = {"generator": seeded(), "num_inference_steps": 4, **more}
            yield f"dit, {kind} variance, {guidance}", pipe([3, 1], output_type="latent", **call).images
    pixels = {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
    pixels |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "layers_per_block": 1}
    unet = random_weights(hubgen.UNet2DModel(**pixels, up_block_types=("AttnUpBlock2D", "UpBlock2D")), 3)
    skips = {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "layers_per_block": 1}
    skips |= {"up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "block_out_channels": (32, 64)}
    ncsnpp = hubgen.UNet2DModel(
        sample_size=16,
        attention_head_dim=None,
        time_embedding_type="fourier",
        norm_num_groups=None,
        norm_eps=1e-6,
        **skips,
    )
    sde = hubgen.ScoreSdeVeScheduler(sigma_max=10.0)
    for name, model, scheduler in (
        ("ddpm", unet, hubgen.DDPMScheduler()),
        ("ddim", unet, hubgen.DDIMScheduler()),
        ("ncsn++", random_weights(ncsnpp, 3), sde),
    ):
        pipe = UnconditionalPipeline(unet=model, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        yield name, pipe(2, generator=seeded(), num_inference_steps=4, output_type="latent").images


def write_data(folder: Path) -> None:
    """Twelve pictures with captions, for training, and four held out."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("held_out", 4)):
        (folder / split).mkdir(parents=True)
        rows = []
        for i in range(count):
            pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "text": " ".join(random.choice(WORDS, 3))})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / split / "metadata.jsonl").write_text(lines, encoding="utf-8")


AUTOENCODER = "--model.block_out_channels 8 8 --model.latent_channels 4 --model.norm_num_groups 4 --run.batch_size 4"
AUTOENCODER += " --loss.perceptual_network none --adversarial.width 8 --adversarial.layers 1 --adversarial.start 4"
AUTOENCODER += " --adversarial.weight 0.5"
MMDIT = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "pos_embed_max_size": 16}
OWN_UNET = {name: value for name, value in UNET.items() if name not in ("sample_size", "cross_attention_dim")}
TRAININGS: dict[str, list[str]] = {
    "mmdit": ["--base.backbone", "mmdit", "--base.backbone_config", json.dumps(MMDIT)],
    "unet": ["--base.backbone", "unet", "--base.backbone_config", json.dumps(OWN_UNET), "--objective.path", "ddpm"],
}


def logged(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every curve that a run wrote for TensorBoard, by name."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (path for path in folder.rglob("events.out.tfevents.*") if path.parent.name == "logs")
    curves = EventAccumulator(str(events))
    curves.Reload()
    for name in sorted(curves.Tags()["scalars"]):
        yield name, torch.tensor([event.value for event in curves.Scalars(name)]).double()


def losses(folder: Path) -> Iterator[tuple[str, Any]]:
    """Of every step of short trainings, and the weights that they end with."""
    import torch
    from safetensors.torch import load_file

    data, text = folder / "data", folder / "text"
    write_data(data)
    bert().save_pretrained(text)
    tokenizer(8).save_pretrained(text)
    common = ["--data.source", data, "--data.size", "16", "--run.max_train_steps", str(STEPS), "--run.log_steps", "1"]
    common += ["--run.checkpoint_steps", str(STEPS), "--validation.split", "held_out"]
    common += ["--validation.steps", str(STEPS)]

    def run(script: str, output: Path, *arguments: Any) -> None:
        code = [sys.executable, "-m", f"hubgen.training.{script}", "--run.output_dir", output, *common, *arguments]
        done = subprocess.run([str(part) for part in code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{script} failed:\n{done.stderr[-3000:]}")

    run("train_autoencoder", folder / "vae", "--run.report_to", "tensorboard", *AUTOENCODER.split())
    for curve, values in logged(folder / "vae"):
        yield f"autoencoder trained: {curve}", values
    weights = load_file(folder / "vae" / "autoencoder" / "diffusion_pytorch_model.safetensors")
    yield "autoencoder trained: weights", torch.cat([value.flatten() for value in weights.values()])
    for name, arguments in TRAININGS.items():
        output = folder / name
        parts = [
            "--base.autoencoder",
            folder / "vae" / "autoencoder",
            "--base.text_encoder",
            text,
            "--base.max_text_tokens",
            "8",
        ]
        parts += ["--run.report_to", "none"]
        run("train_text_to_image", output, *parts, "--run.batch_size", "4", "--publish.dtype", "float32", *arguments)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        yield f"{name} trained: losses", torch.tensor([row["loss"] for row in rows if "loss" in row]).double()
        held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
        yield f"{name} trained: held-out loss", torch.tensor(held_out).double()


def record(target: Path) -> None:
    """Everything, into one file."""
    import torch
    from safetensors.torch import save_file

    import hubgen

    # Else a side would be compared with itself, and always be equal.
    installed = Path(os.environ["PYTHONPATH"])
    if installed.resolve() not in Path(str(hubgen.__file__)).resolve().parents:
        raise RuntimeError(f"hubgen: got {hubgen.__file__}, expected the one installed in {installed}.")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        recorders: tuple[Callable[[], Iterator[tuple[str, Any]]], ...] = (
            text_calls,
            other_calls,
            lambda: losses(Path(folder)),
        )
        for recorder in recorders:
            for name, value in recorder():
                found[name] = value.detach().clone().contiguous()
    save_file(found, target)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A folder of the project: itself, or a git revision in a temporary worktree."""
    if Path(revision).is_dir():
        yield Path(revision).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(place), revision], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def recorded(project: Path, target: Path) -> dict[str, Any]:
    """What a folder of the project records."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        # Copied, because building leaves files in the project's folder.
        names = ("hubgen", "pipelines", "training", "pyproject.toml", "README.md", "LICENSE")
        copy = ["tar", "-C", str(project), "--exclude=__pycache__", "-cf", "-", *names]
        source, installed = Path(folder) / "source", Path(folder) / "installed"
        source.mkdir()
        archive = subprocess.run(copy, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-C", str(source), "-xf", "-"], input=archive, check=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(source)]
        subprocess.run(pip, check=True)
        env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        script = Path(folder) / "proof.py"
        script.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
        subprocess.run([sys.executable, str(script), RECORD, str(target)], check=True, env=env, cwd=folder)
    return load_file(target)


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Prints a line for each case; returns how many differ."""
    import torch

    different = 0
    for name in sorted({*before, *after}):
        if name not in before or name not in after:
            verdict = "missing " + ("before" if name not in before else "after")
        elif before[name].shape != after[name].shape:
            verdict = f"shape {tuple(before[name].shape)} became {tuple(after[name].shape)}"
        elif torch.equal(before[name], after[name]):
            verdict = "equal"
        else:
            verdict = f"differs by {(before[name] - after[name]).abs().max().item():.2g}"
        different += verdict != "equal"
        print(f"{name:55} {verdict}")
    print(f"{len(before)} recorded before, {len(after)} after, {different} differ")
    return different


def main() -> None:
    if sys.argv[1:2] == [RECORD]:
        record(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="a git revision or the folder of a checkout, to compare this one with")
    revision = parser.parse_args().revision
    with tempfile.TemporaryDirectory() as folder, checkout(revision) as other:
        before = recorded(other, Path(folder) / "before.safetensors")
        after = recorded(ROOT, Path(folder) / "after.safetensors")
        sys.exit(1 if compare(before, after) else 0)


if __name__ == "__main__":
    main()
