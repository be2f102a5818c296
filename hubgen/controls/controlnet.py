"""ControlNet (2302.05543): a network that sees a hint of the picture, such as its edges, steers the backbone.

    net = ControlNetModel.from_pretrained("lllyasviel/sd-controlnet-canny")
    pipe("a red cat", controls=[ControlNet(net, image=edges, scale=0.8, end=0.6)])

The same for T2I-adapters and for every family (`hubgen.controls.net_kinds`). A network sees x_t without what other
controls join to it, and several add up, whatever their depth. One that is off, or of scale 0, is not run.

Shapes: B pictures of H x W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from hubgen.checks import is_number
from hubgen.conditioning.condition import Condition
from hubgen.conditioning.guidance import POSITIVE
from hubgen.conditioning.predict import BackboneCall
from hubgen.controls.control import Control, Prepared, Span, Start, Target
from hubgen.controls.net_kinds import Hint, NetKind, Rows, check_modes, kind_of
from hubgen.data.images import mask_processor, read_hints, read_masks


class ControlNet(Control):
    """Steers by a network and a hint.

    Args:
        net: A ControlNet or a T2I-adapter, of hubgen or diffusers.
        image: The hint: one or n pictures, n a divisor of the number of results (PIL, arrays, or tensors
            (n, channels, H, W) in [0, 1]), brought to the size of the result. For SDXL's union a list with the
            pictures of each mode.
        scale: How much it counts; 0 is not at all.
        start: Share of the steps after which it begins ...
        end: ... and ends, see `Span`.
        mode: Which kind of hint, for a union; a list for several at once (SDXL). For Stability's networks for SD3.5
            that do not say it themselves, as those in diffusers' layout: 0 a blurred picture, 1 edges, 2 depths.
        mask: White (from 0.5 on) where the picture is made anew, for networks that are shown a mask (SD3 inpainting).
        guess_mode: Lets the network alone decide, for U-Nets: it runs for the positive prompt only, and counts more
            the deeper its features lie (2302.05543, appendix).
        reuse: Has the features of the positive prompt serve the negative one too, in place of a run of its own, as
            diffusers does it for FLUX.

    Raises:
        ValueError: A value is out of its range, or `net` is no such network.
    """

    def __init__(
        self,
        net: nn.Module,
        image: Any,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        mode: int | Sequence[int] | None = None,
        mask: Any = None,
        guess_mode: bool = False,
        reuse: bool = False,
    ):
        if not is_number(scale):
            raise ValueError(f"`scale`: got {scale!r}, expected a finite number.")
        self.kind, self.span, self.scale = kind_of(net), Span(start, end), float(scale)
        self.guess_mode, self.reuse = guess_mode, reuse
        modes = () if mode is None else tuple(mode) if isinstance(mode, list | tuple) else (mode,)
        several = self.kind.several and len(modes) > 1
        if several and not (isinstance(image, list | tuple) and len(image) == len(modes)):
            raise ValueError(f"`image`: got {image!r:.60}, expected a list with the pictures of each of {list(modes)}.")
        images = list(image) if several else [image]
        self.modes = check_modes(self.kind, modes, len(images))
        self.images = [read_hints(one, self.kind.image_channels) for one in images]
        if (mask is None) == self.kind.masked:
            found, expected = ("None", "one") if self.kind.masked else ("one", "None")
            raise ValueError(f"`mask`: got {found}, expected {expected}: so is this {type(net).__name__} made.")
        self.mask = None if mask is None else read_masks(mask)
        if guess_mode and not self.kind.guesses:
            raise ValueError(f"`guess_mode`: got True, expected False: a {type(net).__name__} has no such mode.")

    @property
    def networks(self) -> Sequence[nn.Module]:  # type: ignore[override]
        return [self.kind.net] if self.scale else []

    def check(self, target: Target) -> None:
        """Raises ValueError where network, hint and call do not fit each other."""
        self.kind.check(target)
        if self.guess_mode and len(target.branches) == 1:
            raise ValueError("`guess_mode`: got True, expected False without guidance, which it is one side of.")
        masks = [] if self.mask is None else [("mask", self.mask)]
        for name, images in [*(("image", images) for images in self.images), *masks]:
            if target.batch % len(images):
                raise ValueError(
                    f"`{name}`: got {len(images)}, expected a number that divides the {target.batch} pictures."
                )

    def prepare_first(self, target: Target) -> Prepared | None:
        return self.prepared(target) if self.kind.early else None

    def prepare(self, target: Target, start: Start) -> Prepared:
        return self.prepared(target)

    def prepared(self, target: Target) -> Prepared:
        """The hint as the network is shown it; nothing where the network will not run."""
        steps = len(target.timesteps)
        if not self.scale or not any(self.span.covers(step, steps) for step in range(steps)):
            return Prepared()
        mask = None if self.mask is None else fitted(self.mask, mask_processor(target.latents.multiple), target)
        images = [fitted(images, hint_processor(images, target), target) for images in self.images]
        hint = Hint(images, mask, self.modes, self.guess_mode)
        return Steered(self, target, self.kind.shown(hint, target))


def hint_processor(images: Any, target: Target) -> VaeImageProcessor:
    """Pictures to [0, 1] at the size of the result."""
    color = not torch.is_tensor(images) and images[0].mode != "L"
    return VaeImageProcessor(vae_scale_factor=target.latents.multiple, do_normalize=False, do_convert_rgb=color)


def fitted(images: Any, processor: VaeImageProcessor, target: Target) -> torch.Tensor:
    """(n, channels, H, W) in float32, where the call computes."""
    return processor.preprocess(images, *target.size).to(target.device, torch.float32)


class Steered(Prepared):
    """A ControlNet in one call.

    Args:
        control: With network, scale and span.
        target: Of the call.
        shown: What the network is shown, for B pictures.
    """

    def __init__(self, control: ControlNet, target: Target, shown: Any):
        self.kind: NetKind = control.kind
        self.target, self.steps = target, len(target.timesteps)
        self.scale, self.span = control.scale, control.span
        self.alone = control.guess_mode or control.kind.pools or control.reuse
        """Whether only the positive branch is asked"""
        self.copied = control.reuse
        """Whether what it says of that counts for the others too"""
        self.shown = {1: shown}
        self.told: dict[tuple[str, ...], tuple[Condition, Mapping[str, Any]]] = {}

    def residuals(self, call: BackboneCall) -> Mapping[str, Any]:
        if not self.span.covers(call.step, self.steps):
            return {}
        rows = call.rows(POSITIVE) if self.alone else slice(None)
        count = 1 if self.alone else len(call.branches)
        if count not in self.shown:
            self.shown[count] = self.kind.repeated(self.shown[1], count)
        asked = Rows(call.x_t[rows], call.timestep[rows], self.keywords(call, rows))
        found = self.kind.residuals(self.target, asked, self.shown[count], self.scale)
        if len(call.branches) == count:
            return found
        return {name: self.of_all(features, call) for name, features in found.items()}

    def keywords(self, call: BackboneCall, rows: slice) -> Mapping[str, Any]:
        """Of the network's forward; the same tensors at every step, by which it knows them again."""
        kept = self.told.get(call.branches)
        if kept is None or kept[0] is not call.condition:
            condition = call.condition.map(lambda value: value[rows]) if self.alone else call.condition
            kept = self.told[call.branches] = call.condition, self.kind.keywords(condition)
        return kept[1]

    def of_all(self, features: Any, call: BackboneCall) -> Any:
        """Features of the positive branch's rows as those of all: nothing, or the same, for the others."""
        if isinstance(features, list):
            return [self.of_all(one, call) for one in features]
        if features is None:
            return None
        others = features if self.copied else torch.zeros_like(features)
        return torch.cat([features if branch == POSITIVE else others for branch in call.branches])
