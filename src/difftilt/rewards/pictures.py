"""Between tensors and pictures: files as tensors, samples as bytes and as pictures of Pillow."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from difftilt.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def as_bytes(images: Float[Tensor, "batch channel height width"]) -> UInt8[Tensor, "batch 3 height width"]:
    """Images of 1 or 3 channels as a file would hold them: clipped to [0, 1], rounded to 1/255, on the CPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().expand(-1, 3, -1, -1)


def as_pictures(images: Float[Tensor, "batch channel height width"]) -> list[Image.Image]:
    """The same as pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in as_bytes(images)]


def read_images(
    folder: str | Path, shape: tuple[int, int, int] | None = None
) -> list[Float[Tensor, "channel height width"]]:
    """All images of a folder, by name, in [0, 1].

    Args:
        folder: subfolders are not read.
        shape: (channels, height, width) of all, see :func:`as_image`; None leaves them as they are, in colour.

    Raises:
        UserError: for no folder, an empty one, or with the names of all files that are no images.
    """
    place = Path(folder).expanduser()
    files = sorted(file for file in place.glob("*") if file.suffix.lower() in ENDINGS) if place.is_dir() else []
    if not files:
        raise UserError(f"{folder} is no folder with images in it ({', '.join(ENDINGS)})")
    found: list[Tensor] = []
    wrong: list[str] = []
    for file in files:
        try:
            found.append(read_image(file, shape))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n  ".join([f"{len(wrong)} of {len(files)} files in {folder} are no images", *wrong]))
    return found


def read_image(file: Path, shape: tuple[int, int, int] | None = None) -> Float[Tensor, "channel height width"]:
    """One image in [0, 1]; ``shape`` as for :func:`as_image`.

    Raises:
        UserError: names the file that is none.
    """
    try:
        with Image.open(file) as picture:
            return as_image(picture, shape)
    # Pillow's readers of damaged files raise much
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file} cannot be read as an image: {error}") from error


def as_image(picture: Image.Image, shape: tuple[int, int, int] | None = None) -> Float[Tensor, "channel height width"]:
    """A picture as a tensor in [0, 1], turned as its camera was held; transparency is dropped.

    Args:
        picture: of any mode.
        shape: (channels, height, width). The picture is scaled with Pillow's bicubic filter until it covers so many
            pixels, and what stands over is cut off on both sides; one channel is its luminance. None leaves its size.
    """
    upright = ImageOps.exif_transpose(picture).convert("L" if shape is not None and shape[0] == 1 else "RGB")
    if shape is not None and upright.size != (shape[2], shape[1]):
        upright = ImageOps.fit(upright, (shape[2], shape[1]), Image.Resampling.BICUBIC)
    numbers = torch.from_numpy(np.array(upright)).float() / 255
    return numbers[None] if numbers.dim() == 2 else numbers.permute(2, 0, 1)
