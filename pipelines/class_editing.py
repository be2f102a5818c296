"""Edits of given pictures by a pipeline of classes: inversion, and another class from the noise that it finds.

    inversion = pipe.invert(picture, "goldfish", num_inference_steps=50)
    edited = pipe.reconstruct(inversion, "hen", guidance_scale=4).images[0]

Shapes: B pictures, n steps.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from hubgen.checks import whole
from hubgen.data.images import Images
from hubgen.pipelines.inversion import DOWNWARDS, Inversion, WayUp, refuse, walk_down, walk_up

Labels = int | str | Sequence[int | str] | torch.Tensor


class ClassEditingMixin:
    """Adds inversion to a pipeline of classes; `EditingMixin` has the same for prompts, and says more."""

    @torch.no_grad()
    def invert(self: Any, image: Images, class_labels: Labels, method: str = "euler", **arguments: Any) -> Inversion:
        """The noise from which the model makes the given pictures.

        Args:
            image: One or several, as in the call.
            class_labels: Their classes: one for all, or one each.
            method: Along a variance-preserving path "euler", which is DDIM; along a flow also "midpoint", "fireflow"
                and "rf".
            **arguments: As in `EditingMixin.invert`: `num_inference_steps`, `guidance_scale` (1.0), `generator`,
                `height`, `width`, `gamma`, `eta`, `eta_span`, and others of the call.

        Raises:
            ValueError: As in `EditingMixin.invert`.
            TypeError: The call does not have an argument.
            RuntimeError: It was interrupted.
        """
        labels, names = self.check_labels(class_labels), [field.name for field in fields(WayUp)]
        way = WayUp(image, method, **{name: value for name, value in arguments.items() if name in names})
        others = {name: value for name, value in arguments.items() if name not in names}
        call = {"class_labels": labels, "guidance_scale": 1.0, **others}
        return walk_up(self, way, call, "class_labels", len(labels), "num_images_per_label")

    def reconstruct(self: Any, inversion: Inversion, class_labels: Labels | None = None, **arguments: Any) -> Any:
        """The pictures of an inversion again, or what another class makes of its noise.

        Args:
            inversion: Of B pictures.
            class_labels: `None` for those of the inversion. One, for all pictures, or a multiple of B, among which the
                noises go in turns.
            **arguments: Others of the call, in the place of the inversion's; without `guidance_scale` it is the
                inversion's. Controls have to be given anew.

        Returns:
            What the call returns.

        Raises:
            ValueError: Labels that do not fit the number of pictures, or an argument that the way back has already.
            TypeError: The call does not have an argument.
        """
        refuse(self, arguments, DOWNWARDS, "the way back has the beginning and the grid of the inversion")
        call = {**inversion.arguments, **arguments}
        if class_labels is not None:
            call["class_labels"] = self.check_labels(class_labels)
            per = len(inversion.latents) if len(call["class_labels"]) == 1 else 1
            call["num_images_per_label"] = arguments.get("num_images_per_label", per)
        pictures = len(call["class_labels"]) * whole("num_images_per_label", call["num_images_per_label"])
        return walk_down(self, inversion, call, pictures)
