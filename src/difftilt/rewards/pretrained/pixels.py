"""How published models are shown images, in tensors, so that gradients flow.

The resizing is Pillow's, which the processors of ``transformers`` use: the columns, then the rows, with a filter as
wide as the reduction, clipped to [0, 1] after each. Pillow also rounds to 1/255 after each, which is left out, and from
version 13 on it may begin with the rows, which differs only where something is clipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, pad

from difftilt.errors import UserError

Triple = tuple[float, float, float]
Size = tuple[int, int]
Fit = Literal["shortest", "longest", "exact"]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

_FILTERS: Mapping[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""Number of a filter in Pillow -> its name."""


@dataclass(frozen=True)
class Preparation:
    """Resize, crop or pad, normalise.

    Attributes:
        size: height and width that ``exact`` resizes to; the smaller and larger edge is brought to the first of them
            by ``shortest`` and ``longest``, and ``longest`` then pads with black to a square, in the middle.
        fit: which of the three.
        crop: height and width cut out of the middle; None keeps all.
        resample: filter.
        mean, std: of each channel, subtracted and divided by.
    """

    size: Size = (224, 224)
    fit: Fit = "shortest"
    crop: Size | None = (224, 224)
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD

    def __post_init__(self) -> None:
        if self.crop is not None and (self.crop[0] > self.size[0] or self.crop[1] > self.size[1]):
            raise UserError(f"images of {self.size} cannot be cropped to {self.crop}: give a size at least as large")

    @classmethod
    def square(cls, edge: int, **settings: Any) -> "Preparation":
        """The shortest edge brought to ``edge``, and a square of it."""
        return cls(size=(edge, edge), crop=(edge, edge), **settings)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Preparation":
        """From the values of a ``preprocessor_config.json``; what it leaves out is CLIP's.

        Raises:
            UserError: for a step or a filter that is not known here.
        """
        size, crop = values.get("size", 224), values.get("crop_size", 224)
        if values.get("do_resize") is False or not values.get("do_rescale", True):
            raise UserError("images of unequal size cannot be prepared: the processor must resize and rescale")
        number = int(values.get("resample", 3))
        if number not in _FILTERS:
            raise UserError(f"resample = {number}: known filters are 2 (bilinear) and 3 (bicubic)")
        normal = values.get("do_normalize", True)
        return cls(
            size=_edges(size),
            fit="exact" if isinstance(size, Mapping) and "height" in size else "shortest",
            crop=_edges(crop) if values.get("do_center_crop", False) else None,
            resample=_FILTERS[number],
            mean=_triple(values.get("image_mean", CLIP_MEAN)) if normal else (0.0, 0.0, 0.0),
            std=_triple(values.get("image_std", CLIP_STD)) if normal else (1.0, 1.0, 1.0),
        )

    def __call__(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch 3 new_height new_width"]:
        """Images of 1 or 3 channels in [0, 1], as float32; beyond that range they are clipped."""
        x = images.float().clamp(0, 1).expand(-1, 3, -1, -1)
        x = resized(x, *self._target(x.shape[-2], x.shape[-1]), self.resample)
        if self.fit == "longest":
            x = _padded(x, self.size)
        if self.crop is not None:
            x = _cropped(x, self.crop)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std

    def _target(self, height: int, width: int) -> Size:
        if self.fit == "exact":
            return self.size
        edge = self.size[0]
        if self.fit == "longest":
            scale = edge / max(height, width)
            return round(height * scale), round(width * scale)
        short, long = sorted((height, width))
        other = int(edge * long / short)
        return (edge, other) if height <= width else (other, edge)


def resized(
    images: Float[Tensor, "batch channel height width"], height: int, width: int, resample: str
) -> Float[Tensor, "batch channel new_height new_width"]:
    """Images of another size, antialiased, in [0, 1]."""
    for shape in ((images.shape[-2], width), (height, width)):
        if shape != images.shape[-2:]:
            images = interpolate(images, shape, mode=resample, align_corners=False, antialias=True).clamp(0, 1)
    return images


def _cropped(images: Tensor, crop: Size) -> Tensor:
    top, left = (images.shape[-2] - crop[0]) // 2, (images.shape[-1] - crop[1]) // 2
    return images[..., top : top + crop[0], left : left + crop[1]]


def _padded(images: Tensor, size: Size) -> Tensor:
    below, beside = size[0] - images.shape[-2], size[1] - images.shape[-1]
    return pad(images, (beside // 2, beside - beside // 2, below // 2, below - below // 2))


def _edges(size: Any) -> Size:
    """Height and width of a size as processors write it."""
    if not isinstance(size, Mapping):
        return int(size), int(size)
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    if "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    raise UserError(f"size = {dict(size)}: give shortest_edge, or height and width")


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = map(float, values)
    return red, green, blue
