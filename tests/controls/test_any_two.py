"""Any two controls on any backbone in any task: they run together; one at scale 0 leaves the other as it was alone.

What can be one of the two stands in `KINDS`, one entry each.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from hubgen.adaptation.adapters import AdapterShape, add_adapter, targets
from hubgen.backbones.controlnet import ControlNetModel
from hubgen.backbones.controlnet_dit import DiTControlNetModel
from hubgen.backbones.controlnet_flux import FluxControlNetModel
from hubgen.backbones.controlnet_sd3 import SD3ControlNetModel
from hubgen.backbones.t2i_adapter import T2IAdapter
from hubgen.controls.control import Control
from hubgen.controls.controlnet import ControlNet
from hubgen.controls.ip_adapter import IPAdapter
from hubgen.controls.prompt_to_prompt import PromptToPrompt
from tests.controls.test_controlnet import widened
from tests.official_images import mask, picture
from tests.parity import certain_, quiet_, randomize_

Pipes = Callable[[str], Any]

NAMES = ["sd1", "sdxl", "dit", "sd3", "flux-dev"]
CELLS = [*((name, task) for name in NAMES for task in ("text", "image", "mask")), ("sd1-inpaint", "mask")]
"""Of the last one, the backbone is shown mask and masked picture beside x_t; its networks are not"""
TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": picture(1), "strength": 1.0},
    "mask": {"image": picture(1), "mask_image": mask(2), "strength": 1.0},
}
U_NETS = ("sd1", "sd1-inpaint", "sdxl")
WORDS = {"text": "", "image": " with an image", "mask": " with a mask"}
PROMPTS = ["a red cat", "a blue cat"]
"""Of one call, for controls that go from one to the next"""
FEATURES = 8
"""Of a picture's embedding"""


@dataclass(frozen=True)
class One:
    """One of the two, for one pipeline."""

    put: Callable[[Any, float], AbstractContextManager[list[Control]]]
    """On a backbone, at a scale: the controls of a call; what it does to the backbone itself holds inside"""
    scaled: bool = True
    """Whether it has a scale, at 0 of which it is not there"""
    pipe: Any = None
    """That draws in place of the usual one"""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of a call"""
    tasks: Sequence[str] = ("text", "image", "mask")
    """That it goes with"""


def controls(make: Callable[[float], Control], scaled: bool = True) -> One:
    """One that is a control and nothing else."""
    return One(lambda backbone, scale: nullcontext([make(scale)]), scaled)


def edit_input(name: str, pipe: Any) -> One | None:
    """A picture in further channels of the backbone, which inpainting models have already.

    FLUX is shown a hint, beside which there may be an image to begin at; the others a picture that is edited.
    """
    if name == "sd1-inpaint":
        return None
    wide = widened(pipe, control=True)
    base = dict(pipe.backbone.named_parameters())
    for key, weights in wide.backbone.named_parameters():
        if key in base and weights.shape != base[key].shape:
            with torch.no_grad():
                new = weights[:, base[key].shape[1] :]
                new.normal_(std=0.3, generator=torch.Generator().manual_seed(6))
    hint = wide.family.shown.control
    return One(
        lambda backbone, scale: nullcontext([]),
        scaled=False,
        pipe=wide,
        call={"control_image" if hint else "image": picture(6)},
        tasks=("text", "image", "mask") if hint else ("text", "mask"),
    )


def controlnet(name: str, pipe: Any, seed: int) -> One:
    """A ControlNet of the backbone's family, all weights random."""
    backbone = pipe.backbone
    if name in U_NETS:
        net = ControlNetModel.from_unet(backbone, conditioning_embedding_out_channels=(4, 8, 8))
        config = {key: value for key, value in net.config.items() if key[0] != "_"}
        net = ControlNetModel(**{**config, "in_channels": 4})
    elif name == "dit":
        net = DiTControlNetModel.from_transformer(backbone, num_layers=2)
    elif name == "sd3":
        net = SD3ControlNetModel.from_transformer(backbone, num_layers=2, num_extra_conditioning_channels=0)
    else:
        net = FluxControlNetModel.from_transformer(backbone, num_layers=1, num_single_layers=1)
    quiet_(randomize_(net, seed))
    return controls(lambda scale: ControlNet(net, picture(seed), scale))


def ip_adapter(name: str, pipe: Any) -> One:
    """An IP-Adapter of a given embedding."""
    adapter = IPAdapter.fresh(pipe.backbone, image_features=FEATURES).adapter
    randomize_(adapter.network, 9)
    embeds = torch.randn(1, FEATURES, generator=torch.Generator().manual_seed(3))
    return controls(lambda scale: IPAdapter(adapter, image_embeds=embeds, scale=scale))


def t2i_adapter(name: str, pipe: Any) -> One | None:
    """A T2I-adapter, which U-Nets alone have."""
    if name not in U_NETS:
        return None
    kind = {"adapter_type": "full_adapter_xl", "downscale_factor": 8} if name == "sdxl" else {"downscale_factor": 4}
    net = randomize_(T2IAdapter(3, list(pipe.backbone.config.block_out_channels), num_res_blocks=1, **kind), 10).eval()
    return controls(lambda scale: ControlNet(net, picture(5), scale))


def lora(name: str, pipe: Any) -> One:
    """LoRA on all attention layers, which is on the model inside and off it afterwards."""

    @contextmanager
    def put(backbone: Any, scale: float) -> Iterator[list[Control]]:
        random = torch.Generator().manual_seed(11)
        add_adapter(backbone, "style", AdapterShape(rank=2), targets(backbone, "attention"))
        try:
            for key, parameter in sorted(backbone.named_parameters()):
                if "lora_" in key:
                    torch.nn.init.normal_(parameter, std=0.3, generator=random)
            backbone.set_adapters("style", scale)
            yield []
        finally:
            backbone.delete_adapters("style")

    return One(put)


def prompt_to_prompt(name: str, pipe: Any) -> One:
    """The second picture as an edit of the first."""
    settings = {"self_tokens": 64} if name in U_NETS else {}
    return controls(lambda scale: PromptToPrompt(self_steps=0.5, **settings), scaled=False)


KINDS: Mapping[str, Callable[[str, Any], One | None]] = {
    "edit input of a widened model": edit_input,
    "ControlNet": partial(controlnet, seed=7),
    "another ControlNet": partial(controlnet, seed=8),
    "IP-Adapter": ip_adapter,
    "T2I-adapter": t2i_adapter,
    "LoRA": lora,
    "prompt-to-prompt": prompt_to_prompt,
}
"""By its name, what makes one for a pipeline; `None` where the family has none"""
NOT_IN_THE_TABLE = ("another ControlNet", "LoRA")
"""Of what works on which model: other tests show it"""


@pytest.fixture(scope="module")
def pipes(pipes: Pipes) -> Pipes:
    """Their autoencoders draw nothing at random, so that the order in which hints are encoded makes no difference."""

    @functools.cache
    def get(name: str) -> Any:
        certain_(pipes(name).vae, exactly=True)
        return pipes(name)

    return get


def drawn(name: str, pipe: Any, task: str, *given: tuple[One, float]) -> torch.Tensor:
    """Latents of two steps; the start is given, so that hints that draw random numbers leave it as it is."""
    shape = pipe.latent_space.shape(len(PROMPTS), (32, 32))
    call: dict[str, Any] = {
        **({"class_labels": [1, 2]} if name == "dit" else {"prompt": PROMPTS}),
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "latents": torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        "generator": torch.Generator().manual_seed(2),
        **TASKS[task],
    }
    for one, _ in given:
        pipe, call = pipe if one.pipe is None else one.pipe, {**call, **one.call}
    with ExitStack() as stack:
        put = [control for one, scale in given for control in stack.enter_context(one.put(pipe.backbone, scale))]
        return pipe(**call, controls=put).images


@pytest.fixture(scope="module")
def kinds(pipes: Pipes) -> Callable[[str], dict[str, One]]:
    """Those of a pipeline, made once."""

    @functools.cache
    def get(name: str) -> dict[str, One]:
        made = {kind: make(name, pipes(name)) for kind, make in KINDS.items()}
        return {kind: one for kind, one in made.items() if one is not None}

    return get


@pytest.mark.parametrize(("name", "task"), CELLS)
def test_any_two_go_together_and_at_scale_0_none_is_there(
    name: str,
    task: str,
    pipes: Pipes,
    kinds: Callable[[str], dict[str, One]],
    shows: Callable[..., None],
) -> None:
    """Beside one alone, and beside none, all others are there at scale 0 at once: so none of them changes anything."""
    pipe = pipes(name)
    available = {kind: one for kind, one in kinds(name).items() if task in one.tasks}
    scaled = {kind: (one, 0.0) for kind, one in available.items() if one.scaled}
    plain = drawn(name, pipe, task)
    assert torch.equal(drawn(name, pipe, task, *scaled.values()), plain)
    alone = {kind: drawn(name, pipe, task, (one, 1.0)) for kind, one in available.items()}
    for kind, latents in alone.items():
        assert (latents - plain).abs().max() > 0.01 * plain.std(), f"{kind} changes next to nothing"
        others = [silent for other, silent in scaled.items() if other != kind]
        assert torch.equal(drawn(name, pipe, task, (available[kind], 1.0), *others), latents), kind
        if kind not in NOT_IN_THE_TABLE:
            shows(name, kind + WORDS[task])
    for (kind, one), (other_kind, other) in itertools.combinations(available.items(), 2):
        both = drawn(name, pipe, task, (one, 1.0), (other, 1.0))
        words = f"{kind} with {other_kind}"
        assert torch.isfinite(both).all(), words
        assert not torch.equal(both, alone[kind]) and not torch.equal(both, alone[other_kind]), words
        if (kind, other_kind) == ("ControlNet", "another ControlNet"):
            assert torch.equal(drawn(name, pipe, task, (other, 1.0), (one, 1.0)), both), "swapped"
