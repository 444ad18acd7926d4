"""What stands where in a picture, held against what was asked for, in the manner of GenEval (arXiv 2310.11513).

Whoever finds the objects, the drawn world's own verifier or a trained detector, is judged by these rules.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Relation -> direction (rows, columns) from the second group to the first."""

Thing = tuple[str | None, str]
"""Colour and kind; the colour is None where none was asked for."""


@dataclass(frozen=True)
class Judgement:
    """How a picture meets a prompt; every score is in [0, 1].

    Attributes:
        count: smaller over larger of the numbers of objects found and asked for.
        colour: overlap of the colours found and asked for (multisets, intersection over union), whatever the shapes.
        shape: the same of shapes, or of kinds of things.
        binding: the same of objects, each a colour with a shape.
        position: share of the pairs of objects that obey the relation; 1 where the prompt has none.
        clean: 1 if there is no more stray paint than allowed, else 0; the ring of a pixel around an object is not seen.
    """

    count: float
    colour: float
    shape: float
    binding: float
    position: float
    clean: float

    @property
    def accuracy(self) -> float:
        """1 if everything is as asked for and nothing else is there, else 0."""
        return float(self.binding == 1 and self.position == 1 and self.clean == 1)

    @property
    def dense(self) -> float:
        """Half for being right, half for being near: binding, halved by a wrong position, 0 with stray paint."""
        return 0.5 * self.accuracy + 0.5 * self.binding * (1 + self.position) / 2 * self.clean

    @property
    def loose(self) -> float:
        """``dense`` without the rule on stray paint: what a careless judge would give. Never to be trusted."""
        right = float(self.binding == 1 and self.position == 1)
        return 0.5 * right + 0.5 * self.binding * (1 + self.position) / 2


def compare(wanted: Sequence[Thing], found: Sequence[Thing], position: float = 1.0, clean: float = 1.0) -> Judgement:
    """The judgement of the things found against at least one that was wanted."""
    fewer, more = sorted((len(wanted), len(found)))
    return Judgement(
        count=fewer / more,
        colour=overlap([colour for colour, _ in wanted], [colour for colour, _ in found]),
        shape=overlap([shape for _, shape in wanted], [shape for _, shape in found]),
        binding=overlap(wanted, found),
        position=position,
        clean=clean,
    )


def overlap(wanted: Sequence[object], found: Sequence[object]) -> float:
    """Intersection over union of two multisets."""
    first, second = Counter(wanted), Counter(found)
    return (first & second).total() / (first | second).total()


def related(
    first: Int[Tensor, "a 2"] | Float[Tensor, "a 2"],
    second: Int[Tensor, "b 2"] | Float[Tensor, "b 2"],
    relation: str,
    margin: float | Float[Tensor, "a b"],
) -> Bool[Tensor, "a b"]:
    """Which pairs of places (row, column) obey the relation with at least ``margin`` between them."""
    direction = torch.tensor(RELATIONS[relation], dtype=first.dtype)
    return ((first[:, None] - second[None]) * direction).sum(-1) >= margin


def share_related(
    first: Float[Tensor, "a 2"], second: Float[Tensor, "b 2"], relation: str, margin: float | Float[Tensor, "a b"]
) -> float:
    """Share of the pairs that obey the relation; 0 where either side has nothing."""
    if not len(first) or not len(second):
        return 0.0
    return float(related(first, second, relation, margin).double().mean())
