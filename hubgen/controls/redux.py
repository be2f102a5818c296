"""FLUX.1 Redux: variations of a picture, which becomes further tokens after those of the text.

    redux = Redux.from_pretrained("black-forest-labs/FLUX.1-Redux-dev", image=picture)
    pipe("", controls=[redux])                       # or with a prompt, a weight (`scale`), and other controls

SigLIP sees the picture, two linear layers bring its tokens to the width of T5's. The weights are described by the
authors' code, black-forest-labs/flux; there is no paper. Several pictures are mixed by several controls. As against
diffusers' prior pipeline, whose weight counts for text and picture alike, `scale` is the picture's alone; at 1 both are
the same.

Shapes: B pictures to be made, n pictures to be shown, P patches of F features, D features of a text token.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from hubgen.checks import is_number
from hubgen.conditioning.predict import BackboneCall
from hubgen.controls.control import Control, Prepared, Span, Start, Target
from hubgen.controls.image_encoders import pixels_of
from hubgen.data.images import read_hints
from hubgen.formats.loading import StrictModelMixin
from hubgen.hub.classes import require_class

PRIOR = "FluxPriorReduxPipeline"
"""diffusers' pipeline, whose folders are read"""


class ReduxImageEncoder(StrictModelMixin, ConfigMixin):
    """Patches of a picture to tokens of text; same name, same checkpoint as diffusers' class.

    Args:
        redux_dim: F.
        txt_in_features: D.
    """

    @register_to_config
    def __init__(self, redux_dim: int = 1152, txt_in_features: int = 4096):
        super().__init__()
        self.redux_up = nn.Linear(redux_dim, 3 * txt_in_features)
        self.redux_down = nn.Linear(3 * txt_in_features, txt_in_features)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(n, P, F) -> (n, P, D)."""
        return self.redux_down(nn.functional.silu(self.redux_up(patches)))


@dataclass(frozen=True, eq=False)
class ReduxNetworks:
    """What several `Redux` share."""

    embedder: ReduxImageEncoder
    image_encoder: Any
    """SigLIP's vision model"""
    feature_extractor: Any
    """Its image processor"""

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], torch_dtype: torch.dtype | None = None, revision: str | None = None
    ) -> Self:
        """See `Redux.from_pretrained`."""
        path = Path(name)
        if not path.is_dir():
            from huggingface_hub import snapshot_download

            parts = ["model_index.json", "image_encoder/*", "image_embedder/*", "feature_extractor/*"]
            path = Path(snapshot_download(str(name), revision=revision, allow_patterns=parts))
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        if index.get("_class_name") != PRIOR:
            raise ValueError(f"{name}: is a {index.get('_class_name')}, expected a {PRIOR}.")
        parts_of: Any = {
            part: require_class(*index[part], where=f"{name}: `{part}`")
            for part in ("image_encoder", "feature_extractor")
        }
        loading = {} if torch_dtype is None else {"torch_dtype": torch_dtype}
        encoder = parts_of["image_encoder"].from_pretrained(path / "image_encoder", **loading).eval()
        extractor = parts_of["feature_extractor"].from_pretrained(path / "feature_extractor")
        embedder = ReduxImageEncoder.from_pretrained(path / "image_embedder", **loading).eval()
        return cls(embedder, encoder, extractor)


class Redux(Control):
    """Shows a picture as further tokens of text, in all branches of the guidance.

    Args:
        embedder: Of the pictures' patches.
        image_encoder: SigLIP's vision model.
        image: One or n pictures, n a divisor of the number of results (PIL, arrays, or tensors (n, 3, H, W) in [0, 1]).
        scale: How much it counts; 0 is not at all.
        start: Share of the steps after which it begins ...
        end: ... and ends, see `Span`.
        feature_extractor: The encoder's image processor; `None` for the usual one.

    Raises:
        ValueError: A value is out of its range, or encoder and embedder are of different widths.
    """

    def __init__(
        self,
        embedder: ReduxImageEncoder,
        image_encoder: Any,
        image: Any,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        feature_extractor: Any = None,
    ):
        if not is_number(scale):
            raise ValueError(f"`scale`: got {scale!r}, expected a finite number.")
        self.span, self.scale = Span(start, end), float(scale)
        self.embedder, self.image_encoder, self.feature_extractor = embedder, image_encoder, feature_extractor
        found, expected = image_encoder.config.hidden_size, embedder.config.redux_dim
        if found != expected:
            raise ValueError(f"`image_encoder`: got one of {found} features, expected {expected}.")
        self.images = read_hints(image, 3)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        image: Any,
        torch_dtype: torch.dtype | None = None,
        revision: str | None = None,
        **settings: Any,
    ) -> Self:
        """Reads a folder or repository of diffusers' `FluxPriorReduxPipeline`; its text encoders are not needed.

        Args:
            name: The folder, or owner/name on the Hub.
            image: See the class.
            torch_dtype: Precision of the weights; `None` for that of the files.
            revision: Of a repository.
            **settings: Further arguments of the class.

        Raises:
            ValueError: It holds another pipeline, or a value is out of its range.
            OSError: There is no such folder or repository.
        """
        networks = ReduxNetworks.from_pretrained(name, torch_dtype, revision)
        return cls(
            networks.embedder, networks.image_encoder, image, feature_extractor=networks.feature_extractor, **settings
        )

    def check(self, target: Target) -> None:
        """Raises ValueError where the backbone reads no such text, or the numbers of pictures do not divide."""
        found, expected = target.family.text_features, self.embedder.config.txt_in_features
        if found != expected:
            raise ValueError(
                f"`controls`: got a Redux of {expected} features, expected {found or 'none'}: so many have this "
                "backbone's text tokens."
            )
        if target.batch % len(self.images):
            raise ValueError(
                f"`image`: got {len(self.images)}, expected a number that divides the {target.batch} pictures."
            )

    @torch.no_grad()
    def prepare(self, target: Target, start: Start) -> Prepared:
        steps = len(target.timesteps)
        if not self.scale or not any(self.span.covers(step, steps) for step in range(steps)):
            return Prepared()
        for network in (self.image_encoder, self.embedder):
            network.to(target.device)
        pixels = pixels_of(self.images, self.image_encoder, self.feature_extractor)
        patches = self.image_encoder(pixels).last_hidden_state  # (n, P, F)
        tokens = self.embedder(patches.to(self.embedder.dtype))  # (n, P, D)
        return AfterText(target.for_all(self.scale * tokens), self.span, steps)


class AfterText(Prepared):
    """Tokens after those of the text, in the steps of a span.

    Args:
        shown: (B, L', D).
        span: The steps.
        steps: Of the call.
    """

    def __init__(self, shown: torch.Tensor, span: Span, steps: int):
        self.shown, self.span, self.steps = shown, span, steps
        self.live = True

    def before_call(self, call: BackboneCall) -> None:
        self.live = self.span.covers(call.step, self.steps)

    def text_tokens(self, branch: str) -> torch.Tensor | None:
        return self.shown if self.live else None
