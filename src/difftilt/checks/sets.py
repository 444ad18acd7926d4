"""Statistics of sets: all sets that differ by one sample at once equal each computed anew; positive sets by swaps."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.credit.sets import Partition, swap_sets
from difftilt.rewards import FrechetReward, ReferenceSet
from difftilt.statistics import (
    FrechetReference,
    FrechetState,
    KernelState,
    MeanState,
    Negated,
    SetMoments,
    SetState,
    mmd_squared,
    polynomial_kernel,
)

Distance = Callable[[Tensor], float]


def drawn(seed: int, *shape: int) -> Float[Tensor, "*shape"]:
    """Standard normals, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest_error(state: SetState, pool: Tensor, distance: Distance) -> float:
    """Largest relative error of all leave-one-outs and of as many exchanges, after a third of the set was exchanged."""
    count = len(state.members)
    for place in range(0, count, 3):
        state.swap(place, count + place)
    members, places = state.members, torch.arange(count)
    rows = torch.where(members < count, places + count, places)
    without = [distance(pool[members[places != place]]) for place in range(count)]
    exchanged = [
        distance(pool[members.index_fill(0, place, int(row))]) for place, row in zip(places, rows, strict=True)
    ]
    found = torch.cat([state.leave_one_out(), state.swapped(places, rows)])
    exact = torch.tensor([*without, *exchanged], dtype=torch.float64)
    return float(((found - exact) / exact).abs().max())


def frechet_error(count: int, dim: int, references: int, shrinkage: float = 0.0) -> float:
    """Of the Fréchet distance by the resolvent, against an eigen-decomposition for each set."""
    pool = drawn(0, 2 * count, dim) @ drawn(1, dim, dim) + 0.3
    others = drawn(2, references, dim) @ drawn(3, dim, dim)
    moments = SetMoments.of(others)
    reference = FrechetReference(moments.mean, moments.scatter / (references - 1), shrinkage=shrinkage)
    state = FrechetState(pool, torch.arange(count), reference)
    return largest_error(state, pool, lambda features: reference.distance(SetMoments.of(features)))


def kernel_error() -> float:
    """Of the squared MMD from row sums, against kernel matrices for each set."""
    pool, others, kernel = drawn(0, 80, 5), drawn(1, 50, 5) + 0.5, polynomial_kernel()
    state = KernelState(pool, torch.arange(40), others, kernel)
    return largest_error(state, pool, lambda features: float(mmd_squared(features, others, kernel)))


REWARD = FrechetReward(ReferenceSet.gaussian(torch.tensor([1.0, 0.0]), 0.5 * torch.eye(2)))
GROUP = torch.arange(200).repeat_interleave(2)
SEEDS = 5


@cache
def constructed(seed: int) -> tuple[Tensor, Partition]:
    """200 pairs of N(0, I) and the sets that one sweep of exchanges finds for N((1, 0), I/2)."""
    pool, order = drawn(seed, 400, 2), torch.rand(400, 2, generator=torch.Generator().manual_seed(seed))
    return pool, swap_sets(pool, GROUP, order, begin=REWARD.begin)


def by_instance(seed: int) -> float:
    """Fréchet distance of the set of samples that are nearer to the reference's mean than their partners."""
    pool, _ = constructed(seed)
    nearness = -(pool - torch.tensor([1.0, 0.0])).norm(dim=1)
    order = torch.rand(400, 2, generator=torch.Generator().manual_seed(seed))
    chosen = swap_sets(nearness[:, None], GROUP, order, begin=lambda x, rows: MeanState(x[:, 0], rows)).label > 0
    return -REWARD.score_features(pool[chosen])


def mean_of(column: str) -> float:
    """Mean over seeds of a distance of the construction."""
    return sum(-float(getattr(constructed(seed)[1], column)[0]) for seed in range(SEEDS)) / SEEDS


def smallest_lead() -> float:
    """Smallest share of the instance set's distance that the set-aware assignment saves, over seeds."""
    return min(1 + float(constructed(seed)[1].positive[0]) / by_instance(seed) for seed in range(SEEDS))


class Watched(Negated):
    """The state of a score that keeps the distance of every set it was, computed anew from the samples."""

    def __init__(self, pool: Tensor, members: Tensor) -> None:
        super().__init__(FrechetState(pool, members, REWARD.reference))
        self.pool = pool
        self.seen: list[float] = []

    def swap(self, place: int, row: int) -> None:
        super().swap(place, row)
        self.seen.append(-REWARD.score_features(self.pool[self.members]))


def largest_step_up() -> float:
    """Largest rise of the Fréchet distance of D+ from one exchange to the next, over two sweeps."""
    pool, order = drawn(0, 400, 2), torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    states: list[Watched] = []

    def begin(features: Tensor, members: Tensor) -> SetState:
        states.append(Watched(features, members))
        return states[-1]

    swap_sets(pool, GROUP, order, begin=begin)
    return max(later - earlier for earlier, later in pairwise(states[0].seen))


ROUNDING = 1e-8
"""Of the rule in log y, exp(-π²/0.4) = 2e-11 and its ends, relative to a distance that is a difference of traces."""

PROOFS = (
    Proof(
        "Fréchet of all leave-one-outs and exchanges from one decomposition: largest relative error",
        lambda: frechet_error(60, 12, 200),
        at_most=ROUNDING,
    ),
    Proof(
        "the same with fewer samples than dimensions, where covariances are singular",
        lambda: frechet_error(12, 30, 100),
        at_most=ROUNDING,
    ),
    Proof(
        "the same with as many samples as dimensions, where one sample less makes it singular",
        lambda: frechet_error(31, 30, 100),
        at_most=ROUNDING,
    ),
    Proof("the same with fewer references than dimensions", lambda: frechet_error(40, 30, 12), at_most=ROUNDING),
    Proof("the same with shrinkage 0.3", lambda: frechet_error(20, 30, 100, 0.3), at_most=ROUNDING),
    Proof("squared MMD of the same sets from row sums: largest relative error", kernel_error, at_most=ROUNDING),
    Proof(
        "200 pairs of N(0, I), reference N((1, 0), I/2): Fréchet distance of a random half, mean of 5 seeds; law 1.17",
        lambda: mean_of("before"),
        at_least=1.0,
        at_most=1.35,
        long=True,
    ),
    Proof(
        "of D+ after one sweep of exchanges",
        lambda: mean_of("positive"),
        at_least=0.15,
        at_most=0.35,
        long=True,
    ),
    Proof("of D-", lambda: mean_of("negative"), at_least=2.3, at_most=2.9, long=True),
    Proof(
        "smallest share of its distance that D+ saves against choosing the nearer sample of each pair, of 5 seeds",
        smallest_lead,
        at_least=0.1,
        long=True,
    ),
    Proof(
        "largest rise of the Fréchet distance of D+ from one exchange to the next, each computed anew",
        largest_step_up,
        at_most=0.0,
        long=True,
    ),
)
