"""A captioner: transformers' `LlavaForConditionalGeneration` with the processor that feeds it.

    picture -> vision tower, hidden states of one layer -> projector -> in the place of <image> in the text -> answer

LLaVA (2304.08485, 2310.03744) and ShareGPT4V (2311.12793) are this: CLIP ViT-L/14 at 336 pixels, hidden states of the
last block but one without the class token (576 of them), a projector of two layers, and Vicuna-7B. The model's code is
transformers'; what is ours is how one is built, checked, taught and asked.

    captioner = open_captioner("runs/captioner/captioner")      # or owner/name on the Hub
    small = small_captioner(captions, side=64)                  # from scratch, for a CPU
    put_together("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hubgen.errors import one_line
from hubgen.hub.finding import HUB_ID

IMAGE = "<image>"
"""The token in whose place a picture comes"""
START, END, PADDING = "<s>", "</s>", "<pad>"
NEEDED = ("patch_size", "vision_feature_select_strategy", "tokenizer", "image_processor")
"""Of a processor"""


@dataclass
class Captioner:
    """A model and what makes its inputs."""

    model: Any
    """`LlavaForConditionalGeneration`"""
    processor: Any
    """`LlavaProcessor`"""

    @property
    def tokenizer(self) -> Any:
        """Of the processor."""
        return self.processor.tokenizer

    @cached_property
    def image_tokens(self) -> int:
        """Tokens that stand for a picture."""
        return image_tokens_of(self.model.config)

    @property
    def longest(self) -> int:
        """Tokens that the language model takes at most, those of the picture among them."""
        return int(self.model.config.text_config.max_position_embeddings)

    def pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures as the vision tower takes them, (B, 3, H, W) float32; each is treated alone."""
        return self.processor.image_processor(list(pictures), return_tensors="pt").pixel_values

    def save(self, folder: Path) -> None:
        """Writes model and processor; `open_captioner` and transformers' `Auto` classes load the folder."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.processor.save_pretrained(folder)


# ---- whether they fit ----


def image_tokens_of(config: Any) -> int:
    """How many vectors the vision tower of a Llava config gives for a picture.

    The tower itself is asked, without weights, so that any kind of tower is right.
    """
    from transformers import AutoModel

    vision = config.vision_config
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(vision)
        pixels = torch.empty(1, vision.num_channels, vision.image_size, vision.image_size)
        states = tower(pixels, output_hidden_states=True).hidden_states[0]
    return int(states.shape[1]) - (config.vision_feature_select_strategy == "default")


def check_fit(config: Any, processor: Any, place: str) -> None:
    """Checks a config and a processor against each other, before any weight is read.

    Args:
        config: Of the model.
        processor: Of transformers.
        place: Name of the captioner, for the message.

    Raises:
        ValueError: They do not belong together; names what was found and what was expected.
    """

    def need(condition: bool, what: str, found: Any, expected: Any) -> None:
        if not condition:
            raise ValueError(f"{place}: {what}: got {found}, expected {expected}")

    lacking = [name for name in NEEDED if getattr(processor, name, None) is None]
    need(
        not lacking, f"its processor, {type(processor).__name__}", f"no {', '.join(lacking)}", "those of LlavaProcessor"
    )
    vision, tokenizer = config.vision_config, processor.tokenizer
    need(tokenizer.is_fast, "its tokenizer", type(tokenizer).__name__, "a fast one (tokenizer.json)")
    need(tokenizer.eos_token_id is not None, "its tokenizer", "no eos_token", "one, which ends an answer")
    need(len(tokenizer) <= config.text_config.vocab_size, "its tokenizer", f"{len(tokenizer)} tokens",
         f"at most {config.text_config.vocab_size}, those of the language model")  # fmt: skip
    token = processor.image_token
    ids = tokenizer.encode(token, add_special_tokens=False)
    need(len(ids) == 1, f"the image token {token!r}", f"the ids {ids}", "one id: a token of the tokenizer's")
    need(ids[0] == config.image_token_id, f"the image token {token!r}", f"the id {ids[0]} in the tokenizer",
         f"{config.image_token_id}, image_token_id of config.json")  # fmt: skip
    for name, found, expected in (
        ("patch_size", processor.patch_size, vision.patch_size),
        ("vision_feature_select_strategy", processor.vision_feature_select_strategy,
         config.vision_feature_select_strategy),
        ("pixels of a side", side_of(processor), vision.image_size),
    ):  # fmt: skip
        need(found == expected, f"{name} of its processor", found, f"{expected}, as config.json has it")
    places = (side_of(processor) // processor.patch_size) ** 2 + processor.num_additional_image_tokens
    places -= processor.vision_feature_select_strategy == "default"
    vectors = image_tokens_of(config)
    need(places == vectors, "its processor", f"{places} image tokens for a picture", f"{vectors}: the vision tower "
         "gives so many (num_additional_image_tokens counts its class token)")  # fmt: skip


def side_of(processor: Any) -> int | None:
    """Pixels of a side that a processor brings pictures to; `None` where they are not square."""
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    height, width = (size.get(name) if isinstance(size, dict) else getattr(size, name) for name in ("height", "width"))
    return height if height == width else None


# ---- opening ----


def open_captioner(
    place: str | os.PathLike[str], dtype: torch.dtype = torch.float32, revision: str | None = None
) -> Captioner:
    """A captioner from a folder, or from the Hub, in evaluation mode.

    Args:
        place: The folder, or owner/name.
        dtype: Of the weights.
        revision: Commit or branch on the Hub.

    Raises:
        ValueError: There is none, it is no Llava, or its processor does not fit; see `check_fit`.
    """
    from transformers import LlavaForConditionalGeneration

    place = os.path.expanduser(os.fspath(place))
    _, processor = open_parts(place, revision)
    try:
        model = LlavaForConditionalGeneration.from_pretrained(place, torch_dtype=dtype, **_at(revision))
    except Exception as error:  # files of weights fail in every way there is
        raise ValueError(f"{place}: its weights cannot be read ({one_line(error)})") from error
    return Captioner(model.eval(), processor)


def _at(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}


def open_parts(place: str, revision: str | None = None) -> tuple[Any, Any]:
    """Config and processor of a captioner, which fit each other; no weights are read. See `open_captioner`."""
    from transformers import AutoConfig, AutoProcessor

    place = os.path.expanduser(place)
    check_place(place)
    try:
        config = AutoConfig.from_pretrained(place, **_at(revision))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: its config.json cannot be read ({one_line(error)})") from error
    if config.model_type != "llava":
        raise ValueError(f"{place}: got a model of the type {config.model_type!r}, expected 'llava'")
    try:
        processor = AutoProcessor.from_pretrained(place, **_at(revision))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: its processor cannot be read ({one_line(error)})") from error
    check_fit(config, processor, place)
    return config, processor


def check_place(place: str) -> None:
    """Raises ValueError unless a name is a folder with a model of transformers, or of the form owner/name."""
    folder = Path(place)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{place}: holds no config.json, expected a captioner (config.json, model.safetensors, ...)"
            )
    elif folder.exists():
        raise ValueError(f"{place}: is a file, expected the folder of a captioner")
    elif not HUB_ID.fullmatch(place):
        raise ValueError(f"{place}: no such folder, expected that of a captioner, or owner/name on the Hub")


# ---- building ----


@dataclass(frozen=True)
class Sizes:
    """Of a captioner from scratch; vision tower and language model have the same."""

    patch: int = 16
    """Pixels of a side of a patch"""
    width: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1024
    """Tokens at most, the 256 bytes among them"""
    longest: int = 2048
    """Tokens of a text at most"""


def small_captioner(texts: Iterable[str], side: int, sizes: Sizes | None = None) -> Captioner:
    """A captioner from scratch, with random weights of torch's global generator.

    Args:
        texts: That its tokenizer is fitted to.
        side: Of the pictures in pixels; others are brought to it.
        sizes: Those of `Sizes` if not given: 2 million numbers, which a CPU teaches a hundred captions in a minute.

    Raises:
        ValueError: The sizes do not fit each other.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = sizes or Sizes()
    for name, found, of in (("side", side, sizes.patch), ("width", sizes.width, sizes.heads)):
        if found % of:
            raise ValueError(f"`{name}`: got {found}, expected a multiple of {of}.")
    tokenizer = fitted_tokenizer(texts, sizes.vocabulary)
    shared = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **shared, intermediate_size=4 * sizes.width, image_size=side, patch_size=sizes.patch
        ),
        text_config=LlamaConfig(
            **shared,
            intermediate_size=3 * sizes.width,
            vocab_size=len(tokenizer),
            max_position_embeddings=sizes.longest,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(side // sizes.patch) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    return Captioner(model, processor_for(tokenizer, image_processor(side), sizes.patch, class_token=True))


def put_together(vision_tower: str, language_model: str) -> Captioner:
    """A captioner of a vision tower and a language model, with a projector that has learned nothing yet, as LLaVA.

    Args:
        vision_tower: Folder or Hub id of a CLIP or SigLIP vision model.
        language_model: Folder or Hub id of a causal language model. Its tokenizer gets `<image>`, and a token for
            padding if it has none; their rows of the embedding are drawn anew.

    Raises:
        ValueError: One of them cannot be read, or is none.
    """
    from transformers import (
        AutoImageProcessor,
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPVisionModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionModel,
    )

    check_place(vision_tower)
    check_place(language_model)
    try:
        kind = json.loads(_config_of(vision_tower).read_text(encoding="utf-8")).get("model_type", "")
        tower = (SiglipVisionModel if "siglip" in kind else CLIPVisionModel).from_pretrained(vision_tower)
        images = AutoImageProcessor.from_pretrained(vision_tower)
    except Exception as error:  # folders of weights fail in every way there is
        raise ValueError(f"{vision_tower}: cannot be read as a vision tower ({one_line(error)})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(language_model)
        language = AutoModelForCausalLM.from_pretrained(language_model)
    except Exception as error:
        raise ValueError(f"{language_model}: cannot be read as a language model ({one_line(error)})") from error
    further = [IMAGE, *([] if tokenizer.pad_token is not None else [PADDING])]
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PADDING
    if len(tokenizer) > language.config.vocab_size:
        language.resize_token_embeddings(language.config.vocab_size + len(further))
    has_class_token = "siglip" not in kind
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="default" if has_class_token else "full",
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.get_decoder().state_dict())
    model.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
    model.tie_weights()
    processor = processor_for(tokenizer, images, tower.config.patch_size, has_class_token)
    check_fit(config, processor, f"{vision_tower} and {language_model}")
    return Captioner(model, processor)


def _config_of(place: str) -> Path:
    if Path(place).is_dir():
        return Path(place) / "config.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(place, "config.json"))


def fitted_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A tokenizer of byte pairs (1508.07909) fitted to texts: it takes every text, and the same texts give the same.

    Args:
        texts: In any number.
        vocabulary: Tokens at most; the 256 bytes and the special ones are always there.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [START, END, PADDING, IMAGE]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, made.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=START,
        eos_token=END,
        pad_token=PADDING,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )


def processor_for(tokenizer: Any, images: Any, patch: int, class_token: bool) -> Any:
    """A `LlavaProcessor`.

    Args:
        tokenizer: That knows `<image>`.
        images: An image processor.
        patch: Pixels of a side of the vision tower's patches.
        class_token: Whether the tower has one, which is left out then.
    """
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        num_additional_image_tokens=int(class_token),
        vision_feature_select_strategy="default" if class_token else "full",
    )


def image_processor(side: int, like: Any = None, padded: bool = False) -> Any:
    """LLaVA's image processor on Pillow: shorter side to `side`, square from the middle, CLIP's mean and deviation.

    Args:
        side: Pixels of a side.
        like: An image processor whose mean, deviation and resampling it takes over.
        padded: Whether a picture is first padded to a square of the mean colour, so that nothing is cut off.
    """
    import transformers

    # Before transformers 5, the class without the ending was the one on Pillow.
    cls = getattr(transformers, "LlavaImageProcessorPil", None) or transformers.LlavaImageProcessor
    names = ("image_mean", "image_std", "resample", "rescale_factor")
    known = {name: getattr(like, name) for name in names if getattr(like, name, None) is not None}
    return cls(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=padded, **known)
