"""Known pixels: the image, and the mask to inpaint it, that a prompt names, as pipelines are told of them.

A prompt names files in its metadata,
``{"prompt": "a vase", "image": "room.png", "mask_image": "spot.png"}``; the mask is
where something new is to be drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from difftilt.errors import UserError

IMAGE, MASK = "image", "mask_image"
"""Names in the metadata of a prompt, as the pipelines call what they take."""

PICTURES = (IMAGE, MASK)
"""All of them: paths, which a file of prompts names from where it lies."""

Encode = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch *shape"]]


def known_pixels(
    pipe: Any, encode: Encode, prompts: Sequence[str], size: tuple[int, int]
) -> tuple[Float[Tensor, "batch 1 height width"], Float[Tensor, "batch *shape"]]:
    """The masks, 1 where something new is drawn, and the latents of what is left of the images.

    The pipeline itself draws these latents from the encoder's law; here they are its mode, one and the same for all
    samples of a prompt.

    Args:
        pipe: resizes images and masks, and rounds masks to 0 and 1.
        encode: images in [0, 1] -> latents.
        prompts: with the paths of their images and masks.
        size: height and width of a sample in pixels.

    Raises:
        UserError: for a prompt that names no image or no mask, and for a file that is none.
    """
    height, width = size
    images = _images(pipe, prompts, size)
    masks = pipe.mask_processor.preprocess([_opened(one, MASK) for one in prompts], height=height, width=width)
    with torch.no_grad():
        return masks, encode((images * (masks < 0.5)) / 2 + 0.5)


def first_images(
    pipe: Any, encode: Encode, prompts: Sequence[str], size: tuple[int, int]
) -> Float[Tensor, "batch *shape"]:
    """The latents of the images that sampling begins from; arguments as in :func:`known_pixels`."""
    with torch.no_grad():
        return encode(_images(pipe, prompts, size) / 2 + 0.5)


def _images(pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> Float[Tensor, "batch 3 height width"]:
    """In [-1, 1]."""
    height, width = size
    return pipe.image_processor.preprocess([_opened(one, IMAGE) for one in prompts], height=height, width=width)


def _opened(prompt: str, name: str) -> Image.Image:
    metadata = cast(Mapping[str, Any], getattr(prompt, "metadata", {}))
    path = metadata.get(name)
    if not isinstance(path, str):
        said = f"is {path!r}" if name in metadata else "is missing"
        raise UserError(
            f"prompt {prompt[:60]!r}: this pipeline needs the path of an image, to inpaint that of a mask as well, and "
            f'{name!r} {said}: give them with the prompt, as in {{"prompt": ..., "{IMAGE}": PATH, "{MASK}": PATH}}'
        )
    try:
        with Image.open(Path(path).expanduser()) as picture:
            # turned as its camera was held, as diffusers and rewards read pictures
            return ImageOps.exif_transpose(picture).convert("L" if name == MASK else "RGB")
    # Pillow's readers of damaged files raise much
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"prompt {prompt[:60]!r}: {name} {path!r} cannot be read as a picture ({error})") from error
