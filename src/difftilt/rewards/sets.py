"""Rewards of sets: Fréchet distance, MMD, diversity and coverage.

Each encodes a sample once and scores sets of feature vectors; a search over sets asks its :class:`SetState`, which
knows the scores of all sets that differ by one sample without computing them anew. Distances enter with a minus sign:
higher is better. The scores of finite sets are biased by their size: compare sets of one size.

Features are on the device of the samples. A reference follows the features it is compared with to their device.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.leaves import load
from difftilt.rewards.of_sets import Features, Members, OfSets
from difftilt.rewards.protocol import SetReward
from difftilt.rewards.reference import (
    Encoder,
    ReferenceSet,
    flattened,
    reference_of,
    refuse_singular,
    same_space,
    smallest_set,
)
from difftilt.statistics.moments import FrechetReference, FrechetState, SetMoments, Spread
from difftilt.statistics.sets import Kernel, mean_within, neighbour_radius, polynomial_kernel, rbf_kernel, vendi_score
from difftilt.statistics.states import CoverageState, KernelState, Negated, SetState

CARD = Card(
    name="sets",
    entry="set_reward",
    paper="Bai et al. 2025, DRAGON: Distributional Rewards Optimize Diffusion Generative Models, arXiv 2504.15217",
)

NEIGHBOURS = 5
"""K of coverage, where none is named."""


class FrechetReward(OfSets):
    """Minus the squared Fréchet distance of the samples' features to a reference (FID, FAD).

    Args:
        reference: what to be close to.
        encoder: media -> (batch, dim).
        spread: covariances (``full``), variances of each dimension (``diagonal``), or means alone (``none``).
        shrinkage: of both covariances towards the isotropic one, see :class:`FrechetReference`.
        pooled: whether all samples are one set.
        name: in reports.

    Raises:
        UserError: for a set, of references or of samples, that is too small for a regular covariance.
    """

    def __init__(
        self,
        reference: ReferenceSet,
        encoder: Encoder = flattened,
        *,
        spread: Spread = "full",
        shrinkage: float = 0.0,
        pooled: bool = True,
        name: str = "frechet",
    ) -> None:
        super().__init__(name, encoder, pooled=pooled)
        self.reference: FrechetReference = reference.frechet(spread, shrinkage)
        self.dim = len(self.reference.mean)
        self.smallest = smallest_set(self.dim, spread, shrinkage)

    def score_features(self, features: Features) -> float:
        self._regular(features)
        return -self.reference.distance(SetMoments.of(features))

    def begin(self, features: Features, members: Members) -> SetState:
        self._regular(features[members])
        return Negated(FrechetState(features, members, self.reference))

    def _regular(self, features: Features) -> None:
        same_space(self.name, features, len(self.reference.mean))
        self.reference = self.reference.on(features.device)
        rows, dim = features.shape
        refuse_singular("set of samples", rows, dim, self.reference.spread, self.reference.shrinkage)


class MMDReward(OfSets):
    """Minus the squared maximum mean discrepancy to the references; KID with the cubic polynomial kernel.

    Args:
        reference: features, at least two.
        encoder: media -> (batch, dim).
        kernel: positive definite.
        pooled: whether all samples are one set.
        name: in reports.
    """

    def __init__(
        self,
        reference: ReferenceSet,
        encoder: Encoder = flattened,
        *,
        kernel: Kernel | None = None,
        pooled: bool = True,
        name: str = "mmd",
    ) -> None:
        super().__init__(name, encoder, pooled=pooled)
        self.points = reference.points("the MMD").double()
        self.dim = self.points.shape[1]
        self.kernel = polynomial_kernel() if kernel is None else kernel
        if len(self.points) < 2:
            raise UserError("the MMD needs a reference set of at least 2 exemplars, got 1")

    @cached_property
    def within(self) -> float:
        """Mean kernel of the references with one another, found once."""
        return float(mean_within(self.kernel(self.points, self.points), unbiased=True))

    def score_features(self, features: Features) -> float:
        return self._whole(features)

    def begin(self, features: Features, members: Members) -> SetState:
        self._enough(features[members])
        same_space(self.name, features, self.points.shape[1])
        within, self.points = self.within, self.points.to(features.device)
        return Negated(KernelState(features, members, self.points, self.kernel, within=within))


class VendiReward(OfSets):
    """Effective number of different samples; no reference.

    Only bounded features with the cosine kernel are safe: for a kernel of distances far-away samples are the most
    diverse ones, so a model is paid for leaving the data.

    Args:
        encoder: media -> (batch, dim).
        kernel: with k(x, x) = 1; None is the cosine.
        pooled: whether all samples are one set.
        name: in reports.
    """

    def __init__(
        self,
        encoder: Encoder = flattened,
        *,
        kernel: Kernel | None = None,
        pooled: bool = True,
        name: str = "vendi",
    ) -> None:
        super().__init__(name, encoder, pooled=pooled)
        self.kernel = kernel

    def score_features(self, features: Features) -> float:
        self._enough(features)
        return float(vendi_score(features, self.kernel))


class CoverageReward(OfSets):
    """Share of the references that have a sample as near as their own k-th neighbour.

    Args:
        reference: features, more than ``neighbours``.
        encoder: media -> (batch, dim).
        neighbours: k.
        pooled: whether all samples are one set.
        name: in reports.
    """

    smallest = 1

    def __init__(
        self,
        reference: ReferenceSet,
        encoder: Encoder = flattened,
        *,
        neighbours: int = NEIGHBOURS,
        pooled: bool = True,
        name: str = "coverage",
    ) -> None:
        super().__init__(name, encoder, pooled=pooled)
        self.points = reference.points("coverage")
        self.dim = self.points.shape[1]
        self.neighbours = neighbours
        if not 1 <= neighbours < len(self.points):
            raise UserError(
                f"coverage by {neighbours} neighbours needs more than {neighbours} exemplars, the reference set has "
                f"{len(self.points)}: give more, or lower neighbours (at least 1)"
            )

    @cached_property
    def radius(self) -> Float[Tensor, " references"]:
        """Distance of each reference to its k-th neighbour, found once."""
        return neighbour_radius(self.points, self.neighbours)

    def score_features(self, features: Features) -> float:
        return self._whole(features)

    def begin(self, features: Features, members: Members) -> SetState:
        same_space(self.name, features, self.points.shape[1])
        radius, self.points = self.radius.to(features.device), self.points.to(features.device)
        return CoverageState(features, members, self.points, radius)


SetKind = Literal["frechet", "mmd", "vendi", "coverage"]


@runtime_checkable
class _HasFeatures(Protocol):
    @property
    def features(self) -> Callable[[Tensor], Tensor] | None: ...


def set_reward(
    task: object,
    kind: SetKind,
    reference: str | None = None,
    encoder: str | None = None,
    spread: Spread = "full",
    shrinkage: float = 0.0,
    bandwidth: float | None = None,
    neighbours: int = NEIGHBOURS,
    pooled: bool = True,
) -> SetReward:
    """The reward from plain values, as a recipe writes it.

    Args:
        task: of the recipe.
        kind: which reward.
        reference: file of features, or folder of images, see :func:`reference_of`; all kinds but ``vendi`` need one.
        encoder: ``module:callable`` from media to (batch, dim), into the space of the reference; None is the features
            of the testbed.
        spread: of ``frechet``.
        shrinkage: of ``frechet``.
        bandwidth: of an RBF kernel for ``mmd`` and ``vendi``; None is the cubic kernel and the cosine.
        neighbours: of ``coverage``.
        pooled: whether all samples are one set, or each group.

    Raises:
        UserError: for a setting that the kind does not read, or a value out of its range.
    """
    _refuse_unused(kind, reference, spread, shrinkage, bandwidth, neighbours)
    encode = _encoder(task, encoder)
    kernel = None if bandwidth is None else rbf_kernel(bandwidth)
    if kind == "vendi":
        return VendiReward(encode, kernel=kernel, pooled=pooled)
    if reference is None:
        raise UserError(f"reward.reference: {kind} compares with a reference set: name a file of features, or images")
    known = reference_of(reference, task, encode)
    match kind:
        case "frechet":
            return FrechetReward(known, encode, spread=spread, shrinkage=shrinkage, pooled=pooled)
        case "mmd":
            return MMDReward(known, encode, kernel=kernel, pooled=pooled)
        case "coverage":
            return CoverageReward(known, encode, neighbours=neighbours, pooled=pooled)


def _encoder(task: object, name: str | None) -> Encoder:
    """The callable of that name, else the features of the testbed, else the numbers of a sample as they are."""
    if name is not None:
        if ":" not in name:
            raise UserError(f"reward.encoder = {name!r}: name a callable as module:callable")
        return load("rewards", name)
    return task.features if isinstance(task, _HasFeatures) and task.features is not None else flattened


def _refuse_unused(
    kind: SetKind, reference: str | None, spread: Spread, shrinkage: float, bandwidth: float | None, neighbours: int
) -> None:
    """Refuse settings that were made and would not be read."""
    read: dict[str, tuple[str, ...]] = {
        "frechet": ("reference", "spread", "shrinkage"),
        "mmd": ("reference", "bandwidth"),
        "vendi": ("bandwidth",),
        "coverage": ("reference", "neighbours"),
    }
    made = {
        "reference": reference is not None,
        "spread": spread != "full",
        "shrinkage": shrinkage != 0,
        "bandwidth": bandwidth is not None,
        "neighbours": neighbours != NEIGHBOURS,
    }
    for name in [name for name, changed in made.items() if changed and name not in read[kind]]:
        raise UserError(f"reward.{name}: {kind} does not read it, only {', '.join(read[kind])}: leave it out")
