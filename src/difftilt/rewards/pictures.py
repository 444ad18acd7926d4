"""Between tensors and pictures: files as tensors, samples as bytes and as pictures of Pillow."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from difftilt.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def as_bytes(images: Float[Tensor, "batch channel height width"]) -> UInt8[Tensor, "batch 3 height width"]:
    """Images of 1 or 3 channels as a file would hold them: clipped to [0, 1], rounded to 1/255, on the CPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().expand(-1, 3, -1, -1)


def as_pictures(images: Float[Tensor, "batch channel height width"]) -> list[Image.Image]:
    """The same as pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in as_bytes(images)]


def read_images(folder: str) -> list[Float[Tensor, "3 height width"]]:
    """All images of a folder, by name, in [0, 1].

    Raises:
        UserError: for no folder, an empty one, or a file that is no image.
    """
    place = Path(folder).expanduser()
    files = sorted(file for file in place.glob("*") if file.suffix.lower() in ENDINGS) if place.is_dir() else []
    if not files:
        raise UserError(f"{folder} is no folder with images in it ({', '.join(ENDINGS)})")
    return [_read(file) for file in files]


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{file} cannot be read as an image: {error}") from error
