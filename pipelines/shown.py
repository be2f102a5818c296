"""The picture that a model is shown beside x_t, among the arguments of a call.

    taken = take_picture(arguments, kind, space)     # checked; what is left says where to begin
    control = taken.control(canvas)

A picture that is edited is `image`: the call then begins at noise, with a mask too, outside of which the picture stays.
A control is `control_image`; `image` and `mask_image` beside it mean what they mean elsewhere.
"""

from dataclasses import dataclass, replace
from typing import Any

from hubgen.autoencoders.latents import LatentSpace
from hubgen.controls.shown_picture import EditInput, ShownPicture
from hubgen.data.images import Canvas, one_size, read_images, read_masks
from hubgen.pipelines.sizes import reference_size, result_size


@dataclass(frozen=True)
class Taken:
    """A call's picture to be shown, and the rest of the arguments about images."""

    kind: EditInput
    image: Any
    """As `read_images` gives it"""
    mask: Any
    """As `read_masks` gives it, where the backbone is shown it too; `None`: none"""
    rest: Any
    """The other arguments, `ImageArguments`"""
    space: LatentSpace

    def control(self, canvas: Canvas) -> ShownPicture:
        """Shows the picture.

        Args:
            canvas: Of the result.

        Raises:
            ValueError: Latents of another size than the result, or a control that cannot be cropped as the image is.
        """
        kind, space, is_latent = self.kind, self.space, Canvas.is_latent(self.image)
        found = one_size(kind.argument, self.image)
        if kind.as_tokens:
            if is_latent and any(side * space.factor % space.multiple for side in found):
                raise ValueError(
                    f"`{kind.argument}`: got latents of {found[0]}x{found[1]}, expected multiples of "
                    f"{space.multiple // space.factor}."
                )
            if canvas.crop is None and self.rest.mask_image is None:
                canvas = replace(canvas, size=reference_size(found, space))
        elif is_latent and found != (canvas.size[0] // space.factor, canvas.size[1] // space.factor):
            raise ValueError(
                f"`{kind.argument}`: got latents of {found[0]}x{found[1]}, expected those of the result of "
                f"{canvas.size[0]}x{canvas.size[1]} pixels."
            )
        if canvas.crop is not None and not kind.is_edited:
            raise ValueError(f"`padding_mask_crop`: got one, expected none beside `{kind.argument}`.")
        return ShownPicture(kind, self.image, canvas, self.mask)


def take_picture(arguments: Any, kind: EditInput, space: LatentSpace) -> Taken:
    """Takes the picture out of a call's arguments.

    Args:
        arguments: `ImageArguments`.
        kind: What the backbone is shown.
        space: Of its latents.

    Raises:
        ValueError: There is none, or arguments that make no sense for a call that begins at noise.
    """
    given = getattr(arguments, kind.argument)
    if given is None:
        raise ValueError(f"`{kind.argument}`: got None, expected a picture: this model is shown one at every step.")
    image = read_images(given, space.channels, kind.argument)
    if not kind.is_edited:
        return Taken(kind, image, None, replace(arguments, control_image=None), space)
    if not kind.begins_at_noise(arguments.mask_image is not None):
        size = (arguments.height, arguments.width)
        if size == (None, None) and not Canvas.is_latent(image):
            found = one_size("image", image)
            size = reference_size(found, space) if kind.as_tokens else size
        return Taken(kind, image, None, replace(arguments, height=size[0], width=size[1]), space)
    for name in ("strength", "denoising_start", "masked_image_latents", "padding_mask_crop"):
        if getattr(arguments, name) is not None:
            raise ValueError(
                f"`{name}`: got one, expected none: this call begins at noise, and the model is shown `image` at every "
                "step."
            )
    mask = None if arguments.mask_image is None else read_masks(arguments.mask_image)
    size = (arguments.height, arguments.width)
    if not kind.as_tokens:
        size = result_size("image", image, space, *size, keeps=True)
    rest = replace(arguments, image=None, mask_image=None, height=size[0], width=size[1])
    return Taken(kind, image, mask, rest, space)
