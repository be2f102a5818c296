"""Adapters of a run: put on a pipeline, called with it, published as a file of their own."""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hubgen.adaptation.adapters import RESIDUAL, AdapterShape, add_adapter, targets
from hubgen.adaptation.attach import layers_of
from hubgen.adaptation.header_keys import BASE, PROMPT
from hubgen.adaptation.lora_files import Layers, as_diffusers
from hubgen.adaptation.low_rank import LowRank
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.predict import predict
from hubgen.hub.card import adapter_card
from hubgen.hub.records import TrainingRecord
from hubgen.training.kit.groups import Adapter, Data, Publish
from hubgen.training.kit.new_words import NewWords
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.publishing import about_run, place_of, publish_folder
from hubgen.training.kit.quantization import refuse_quantised
from hubgen.training.kit.run import Run

NAME = "default"
"""Of the adapter that is trained"""
FILE = "pytorch_lora_weights.safetensors"
"""Where diffusers looks for an adapter in a folder or repository"""
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Asked:
    """What a step asks the network about B pictures."""

    x_t: torch.Tensor
    timestep: torch.Tensor
    condition: Condition
    captions: Sequence[str]
    """Read by text encoders that learn; else the condition has them"""


class Learner(nn.Module):
    """The models of a pipeline that learn, as one network, so that data parallelism sees all that a step uses.

    Args:
        pipe: The pipeline.
        parts: Names of its components that learn, the backbone first.
    """

    def __init__(self, pipe: Any, parts: Sequence[str]) -> None:
        super().__init__()
        self.models = nn.ModuleDict({name: getattr(pipe, name) for name in parts})
        self._pipe = (pipe,)  # in a tuple, which keeps it from becoming a part
        self.reads = any(name in ENCODERS for name in parts)
        """Whether text encoders learn, and so read the captions of each step"""

    @property
    def backbone(self) -> Any:
        """The network that predicts."""
        return self._pipe[0].backbone

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes the backbone's activations in the backward pass."""
        self.backbone.enable_gradient_checkpointing()

    def train(self, mode: bool = True) -> "Learner":
        """Training mode for the backbone; text encoders leave nothing out at random, also while they learn."""
        super().train(mode)
        for name, model in self.models.items():
            model.train(mode and name not in ENCODERS)
        return self

    def forward(self, asked: Sequence[Asked]) -> list[torch.Tensor]:
        """The predictions of each batch, (B, C, h, w)."""
        return [predict(self.backbone, one.x_t, one.timestep, self.condition(one)) for one in asked]

    def condition(self, asked: Asked) -> Condition:
        """The condition with its text."""
        if not self.reads:
            return asked.condition
        text = Condition.of_text(self._pipe[0].condition.encode(asked.captions, asked.x_t.device))
        return replace(text, micro=asked.condition.micro, guidance_scale=asked.condition.guidance_scale)


def backbone_name(pipe: Any) -> str:
    """The name of a pipeline's backbone among its components."""
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def parts_that_learn(pipe: Any, text_encoder: bool) -> list[str]:
    """Names of a pipeline's backbone and, if they are to learn too, of its text encoders."""
    encoders = [name for name in ENCODERS if getattr(pipe, name, None) is not None]
    return [backbone_name(pipe), *(encoders if text_encoder else [])]


def check_texts(adapter: Adapter, data: Data) -> None:
    """Raises SettingsError where a text encoder learns while what it said before is kept."""
    learns = {"text_encoder": adapter.text_encoder, "new_words": list(adapter.new_words)}
    for name, value in learns.items():
        if value and data.cache and data.cache_texts:
            raise SettingsError(
                f"setting 'adapter.{name}': got {value} with data.cache_texts, which keeps what the text encoder said "
                "before it learnt; expected data.cache_texts false."
            )


def with_adapters(pipe: Any, adapter: Adapter) -> "Adapted":
    """Puts fresh adapters on a pipeline; all else of it is frozen.

    Args:
        pipe: In evaluation mode.
        adapter: The settings.

    Raises:
        SettingsError: Settings that do not go together, or do not suit the model.
    """
    parts = parts_that_learn(pipe, adapter.text_encoder)
    try:
        shape = AdapterShape(
            kind=adapter.kind,
            rank=adapter.rank,
            alpha=adapter.alpha,
            ranks=adapter.ranks,
            alphas=adapter.alphas,
            dropout=adapter.dropout,
            rank_stabilised=adapter.rank_stabilised,
            decomposed=adapter.decomposed,
            init=adapter.init,
        )
        chosen = {name: targets(getattr(pipe, name), adapter.targets) for name in parts}
        for name, layers in chosen.items():
            add_adapter(getattr(pipe, name), NAME, shape, layers)
    except ValueError as error:
        raise SettingsError(f"settings of 'adapter': {error}") from error
    words = None
    if adapter.new_words:
        words = NewWords(pipe, adapter.new_words, adapter.word_vectors, adapter.word_start)
        parts += [name for name in words.parts if name not in parts]
    return Adapted(pipe, Learner(pipe, parts), list(chosen), adapter.init in RESIDUAL, words)


def check_whole(pipe: Any, text_encoder: bool) -> None:
    """Raises SettingsError where what is to learn without adapters is quantised."""
    for name in parts_that_learn(pipe, text_encoder):
        refuse_quantised(name, getattr(pipe, name))


def whole(pipe: Any, text_encoder: bool) -> Learner:
    """What learns of a pipeline without adapters: its backbone, and its text encoders if they are to, in float32."""
    parts = parts_that_learn(pipe, text_encoder)
    for name in parts:
        getattr(pipe, name).to(torch.float32).requires_grad_(True)
    return Learner(pipe, parts)


class Adapted:
    """A pipeline with the adapters that learn.

    Args:
        pipe: The pipeline.
        learner: What of it learns.
        parts: Names of the components that have an adapter.
        residual: Whether the adapters took a part of the weights when they were made; then what they add is what they
            are more than at that time.
        words: That text encoders learn beside it.
    """

    def __init__(
        self, pipe: Any, learner: Learner, parts: Sequence[str], residual: bool, words: NewWords | None = None
    ) -> None:
        self.pipe, self.learner, self.parts, self.words = pipe, learner, list(parts), words
        self._first: Layers = self._now() if residual else {}

    def _now(self) -> Layers:
        found = {name: layers_of(getattr(self.pipe, name), NAME) for name in self.parts}
        return {name: {layer: _copied(value) for layer, value in layers.items()} for name, layers in found.items()}

    def layers(self) -> Layers:
        """What is added to the base, by component and layer."""
        now = self._now()
        if not self._first:
            return now
        return {
            name: {layer: _less(value, self._first[name][layer]) for layer, value in layers.items()}
            for name, layers in now.items()
        }


def _copied(layer: LowRank) -> LowRank:
    return replace(layer, down=layer.down.detach().clone(), up=layer.up.detach().clone())


def _less(now: LowRank, first: LowRank) -> LowRank:
    """The difference of two products, as one of twice as many terms."""
    down, up = torch.cat([now.down, first.down]), torch.cat([now.up, -first.up], 1)
    return LowRank(down, up, now.alpha / now.rank * len(down), now.magnitude, now.bias)


def publish_adapter(
    run: Run,
    adapted: Adapted,
    record: TrainingRecord,
    publish: Publish,
    base: str | None,
    prompts: Sequence[str],
    header: Mapping[str, str],
) -> None:
    """Writes `output_dir/lora`, whole or not at all, and sends it to the Hub if the settings say so.

    Args:
        run: That is done; only its main process writes.
        adapted: With the weights as they are published.
        record: How they came about.
        publish: The settings.
        base: Folder or repository of the base; `None` for the model of the package.
        prompts: Of the pictures in the grids.
        header: More for the file's header.
    """

    def write(temporary: Path) -> list[str]:
        temporary.mkdir()
        base_model = place_of(base)
        named = {} if base_model is None else {BASE: base_model}
        tensors, metadata = as_diffusers(adapted.layers(), {**named, **header})
        dtype = getattr(torch, publish.dtype)
        save_file({key: value.to(dtype) for key, value in tensors.items()}, temporary / FILE, metadata)
        files = [] if adapted.words is None else adapted.words.save(temporary)
        grids = sorted((run.options.output_dir / "validation").glob("step-*.png"))
        samples = {"before.png": grids[0], "after.png": grids[-1]} if len(grids) > 1 else {}
        for name, grid in samples.items():
            shutil.copyfile(grid, temporary / name)
        record.save(temporary)
        count = sum(tensor.numel() for tensor in tensors.values())
        card = adapter_card(
            about_run(run, temporary, publish, {"adapter": record}, prompts),
            record,
            base_model=base_model,
            pipeline=type(adapted.pipe).__name__,
            parameters=count,
            prompts=prompts,
            grids=list(samples),
            words=[] if adapted.words is None else adapted.words.words,
            trigger=header.get(PROMPT),
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if not prompts:
            return []
        options = [] if base is None else ["--model", base]
        folder = run.options.output_dir / "lora"
        options += [text for name in files for text in ("--embedding", str(folder / name))]
        command = ["hubgen", "generate", prompts[0], *options, "--lora", str(folder)]
        return [f"to use it: {shlex.join(command)}"]

    publish_folder(run, "lora", "adapter", publish, write)
