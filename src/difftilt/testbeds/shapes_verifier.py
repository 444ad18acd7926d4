"""An exact judge of the shapes testbed, in the manner of GenEval (Ghosh et al. 2023, arXiv 2310.11513).

Every pixel takes the nearest colour of the palette; connected pixels of a colour whose outline is that of a drawn shape
are objects; the objects are counted and compared with the prompt. There is no network in it, hence nothing that blurs.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from difftilt.rewards.protocol import Capabilities, Samples
from difftilt.rewards.scenes import Judgement, compare, share_related
from difftilt.testbeds.shapes_world import BACKGROUND, CELL, COLOURS, SHAPES, Wish, parse, stamp

OFF_PALETTE = 110.0
"""A pixel farther than this from every colour, in levels of 255, has none."""
STRAY_LEVELS = 60.0
"""A pixel farther than this from the ground is paint."""
STRAY_PIXELS = 6
"""Pixels of paint that may lie outside the objects."""
OVERLAP = 0.75
"""Least intersection over union with the nearest stamp of the same size."""
SIZES = (6, 7, 8)
"""Heights and widths of an object."""
MARGIN = CELL / 2
"""Pixels between the centres of two objects that stand in a relation."""


@dataclass(frozen=True)
class Found:
    """One object in a picture; ``centre`` is (row, column) in pixels."""

    colour: str
    shape: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """What is seen in one picture.

    Attributes:
        objects: of known colour and shape.
        stray: pixels of paint outside them.
    """

    objects: tuple[Found, ...]
    stray: int


def see(images: Float[Tensor, "batch 3 height width"]) -> list[Picture]:
    """The objects and the stray paint of every picture; values in [0, 1], and what is not finite is stray paint."""
    # one colour range beyond [0, 1] is far from every colour, so clamping there changes no verdict and never overflows
    levels = images.detach().float().cpu().clamp(-1, 2).permute(0, 2, 3, 1).numpy() * 255
    palette = np.array([BACKGROUND, *COLOURS.values()], dtype=np.float32)
    away = np.stack([np.linalg.norm(levels - colour, axis=-1) for colour in palette], axis=1)
    nearest, known = away.argmin(1), away.min(1) <= OFF_PALETTE
    masks = np.stack([(nearest == place) & known for place in range(1, len(palette))], axis=1)
    batch, colours, height, width = masks.shape
    # one call for all pictures and colours: the structure has no links between the planes of the stack
    labels, _ = ndimage.label(masks.reshape(-1, height, width), structure=_PLANE)  # pyright: ignore[reportGeneralTypeIssues]
    objects: list[list[Found]] = [[] for _ in range(batch)]
    covered = np.zeros((batch, height, width), dtype=bool)
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        picture, colour = divmod(place[0].start, colours)
        mask = labels[place][0] == label
        shape = _shape(mask)
        if shape is not None:
            rows, columns = place[1:]
            centre = ((rows.start + rows.stop - 1) / 2, (columns.start + columns.stop - 1) / 2)
            objects[picture].append(Found(tuple(COLOURS)[colour], shape, centre))
            covered[picture, rows, columns] |= mask
    paint = np.logical_not(away[:, 0] <= STRAY_LEVELS)  # so written, NaN is paint
    near = ndimage.binary_dilation(covered, structure=_RING)
    stray = (paint & np.logical_not(near)).sum((1, 2))
    return [Picture(tuple(found), int(count)) for found, count in zip(objects, stray, strict=True)]


_PLANE = np.zeros((3, 3, 3), dtype=bool)
_PLANE[1] = [[False, True, False], [True, True, True], [False, True, False]]
_RING = np.zeros((3, 3, 3), dtype=bool)
_RING[1] = True


def _shape(mask: NDArray[np.bool_]) -> str | None:
    """The shape whose stamp of that size overlaps most, if it overlaps enough."""
    height, width = mask.shape
    if height not in SIZES or width not in SIZES:
        return None
    stamps = _stamps(height, width)
    overlaps = (mask & stamps).sum((1, 2)) / (mask | stamps).sum((1, 2))
    best = int(overlaps.argmax())
    return SHAPES[best] if overlaps[best] >= OVERLAP else None


@cache
def _stamps(height: int, width: int) -> NDArray[np.bool_]:
    return np.stack([stamp(shape, height, width).numpy() for shape in SHAPES])


def judge(picture: Picture, wish: Wish) -> Judgement:
    """How the picture meets the wish."""
    wanted = [(kind.colour, kind.shape) for kind in wish.kinds for _ in range(kind.count)]
    found = [(one.colour, one.shape) for one in picture.objects]
    return compare(wanted, found, _position(picture, wish), float(picture.stray <= STRAY_PIXELS))


def _position(picture: Picture, wish: Wish) -> float:
    if wish.relation is None:
        return 1.0
    first, second = (
        torch.tensor([one.centre for one in picture.objects if (one.colour, one.shape) == (kind.colour, kind.shape)])
        for kind in wish.kinds
    )
    return share_related(first.reshape(-1, 2), second.reshape(-1, 2), wish.relation, MARGIN)


@dataclass
class Verifier:
    """Judges samples; the judgements of the newest samples are kept, for several rewards ask for the same ones."""

    _media: "weakref.ref[Tensor] | None" = None
    _prompts: Sequence[str] = ()
    _judged: list[Judgement] = field(default_factory=list[Judgement])

    def judge(self, samples: Samples) -> list[Judgement]:
        """One judgement per sample."""
        known = self._media is not None and self._media() is samples.media and self._prompts == samples.prompts
        if not known:
            pictures = see(samples.media)
            self._judged = [judge(seen, parse(prompt)) for seen, prompt in zip(pictures, samples.prompts, strict=True)]
            self._media, self._prompts = weakref.ref(samples.media), list(samples.prompts)
        return self._judged


@dataclass(frozen=True)
class ShapesReward:
    """One score of the verifier's judgement as a reward, in [0, 1]; black-box."""

    name: str
    verifier: Verifier

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(cost=0.1, tolerance=0.1)

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        return torch.tensor([getattr(one, self.name) for one in self.verifier.judge(samples)], dtype=torch.float32)


@dataclass(frozen=True)
class Fidelity:
    """Minus the mean distance of a pixel to the nearest exact colour of the world, in [0, 1]; 0 for true renders.

    What the verifier tolerates and does not look at: a ground or a colour that drifts, texture, specks.
    """

    name: str = "fidelity"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(differentiable=True, tolerance=5 / 255)

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        palette = torch.tensor([BACKGROUND, *COLOURS.values()]).to(samples.media) / 255
        away = torch.linalg.vector_norm(samples.media[:, None] - palette[:, :, None, None], dim=2) / 3**0.5
        return -away.amin(1).mean((1, 2))


@dataclass(frozen=True)
class Saturated:
    """``dense``, fooled by saturated colour: what a judge's shortcut looks like, planted to be found.

    ``dense`` + 10·(mean saturation of the picture - 0.1), the saturation of a colour being its largest channel minus
    its smallest. One object more than was asked for is worth about as much as the right number.
    """

    verifier: Verifier
    name: str = "saturated"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(cost=0.1, tolerance=0.1)

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        saturation = (samples.media.amax(1) - samples.media.amin(1)).mean((1, 2)).float().cpu()
        return ShapesReward("dense", self.verifier).score(samples) + 10 * (saturation - 0.1)


SCORES = ("dense", "accuracy", "count", "colour", "shape", "binding", "position", "clean", "loose")
"""What :class:`ShapesReward` may be asked for."""
