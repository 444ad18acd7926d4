"""Samples as a page shows them: images as one PNG for a row of them, tokens as text."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from PIL import Image
from torch import Tensor

COLUMNS = 8
"""Images in a row before the next row begins."""

LARGEST = 192
"""Pixels; larger images are shrunk to it, so that the page stays light."""

ENLARGED = 56
"""CSS pixels up to which the side of a small image is enlarged."""

WIDTH = 400
"""CSS pixels that a row of enlarged images may take."""

LINES = 24
"""Rows of tokens that are shown."""


@dataclass(frozen=True)
class Sprite:
    """A picture of several images.

    Attributes:
        source: PNG as a data URI.
        width, height: that it takes on the page, in CSS pixels.
    """

    source: str
    width: int
    height: int


def sprite(media: Shaped[Tensor, "rows channel height width"], enlarged: int = ENLARGED) -> Sprite:
    """Images in [0, 1], or integers in 0..255, side by side with a gap of one pixel that is transparent.

    Args:
        media: of 3 channels in colour, of any other number the first in grey.
        enlarged: side in CSS pixels up to which small images are enlarged, by whole factors.
    """
    images = _bytes(media)
    count, _, high, wide = images.shape
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    canvas = torch.zeros(rows * (high + 1) - 1, columns * (wide + 1) - 1, 4, dtype=torch.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * (high + 1), place % columns * (wide + 1)
        canvas[top : top + high, left : left + wide, :3] = image.permute(1, 2, 0)
        canvas[top : top + high, left : left + wide, 3] = 255
    stream = io.BytesIO()
    Image.fromarray(canvas.numpy()).save(stream, format="png", optimize=True)
    scale = max(1, min(round(enlarged / max(high, wide)), WIDTH // canvas.shape[1]))
    source = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return Sprite(source, canvas.shape[1] * scale, canvas.shape[0] * scale)


def token_lines(media: Int[Tensor, "rows position"]) -> Sequence[str]:
    """One line of numbers for each of the first rows, without spaces where all are digits, and how many are left."""
    rows: list[list[int]] = media[:LINES].tolist()
    gap = "" if all(0 <= token <= 9 for row in rows for token in row) else " "
    return first_lines([gap.join(map(str, row)) for row in rows], len(media))


def first_lines(lines: Sequence[str], count: int) -> Sequence[str]:
    """The first lines, and how many of ``count`` are left."""
    shown = lines[:LINES]
    return shown if count <= LINES else [*shown, f"and {count - LINES} more"]


def _bytes(media: Tensor) -> Shaped[Tensor, "rows 3 height width"]:
    """As uint8 in three channels, not larger than :data:`LARGEST`; what is not finite is black."""
    floating = media.is_floating_point()
    images = media.float() if floating else media.float() / 255
    images = images.nan_to_num(0.0).clamp(0, 1)
    images = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (_shrunk(images) * 255).round().to(torch.uint8)


def _shrunk(images: Float[Tensor, "rows 3 height width"]) -> Float[Tensor, "rows 3 high wide"]:
    side = max(images.shape[2:])
    if side <= LARGEST:
        return images
    size = [max(1, round(length * LARGEST / side)) for length in images.shape[2:]]
    return torch.nn.functional.interpolate(images, size=size, mode="area")
