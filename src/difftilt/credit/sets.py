"""Which samples of a round belong together: a positive and a negative set, found by exchanging whole samples.

No sample needs a score of its own. R is asked only for sets that differ by one exchange (DRAGON, arXiv 2504.15217).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.statistics.folds import compact, segment_rank
from difftilt.statistics.states import SetState
from difftilt.trees import Batched

Begin = Callable[[Tensor, Tensor], SetState]
"""(features of the pool, its rows that are members) -> the scores of this set and of its neighbours."""

ROUNDING = 1e-9
"""Gains below this share of the score are rounding, not gains."""
BLOCK = 256
"""Largest number of exchanges that are scored together."""


@dataclass(frozen=True)
class Partition(Batched):
    """A round cut in two sets.

    Attributes:
        label: 1 in the positive set, -1 in the negative one.
        change: fall of what is maximised if the sample's pair were exchanged back; NaN where it was not asked for.
        positive, negative: R of the two sets, the same in all rows.
        before: R of the positive set of the random assignment; without a search, of the whole round.
        accepted: exchanges that were made.
    """

    label: Float[Tensor, " samples"]
    change: Float[Tensor, " samples"]
    positive: Float[Tensor, " samples"]
    negative: Float[Tensor, " samples"]
    before: Float[Tensor, " samples"]
    accepted: Int[Tensor, " samples"]

    @classmethod
    def of(
        cls,
        chosen: Bool[Tensor, " samples"],
        features: Float[Tensor, "samples dim"],
        score: Callable[[Tensor], float],
    ) -> "Partition":
        """Of a choice that was made without a search."""
        whole = torch.full((len(chosen),), score(features), dtype=torch.float64, device=features.device)
        label = torch.where(chosen, 1.0, -1.0)
        return cls(
            label,
            torch.full_like(whole, float("nan")),
            torch.full_like(whole, score(features[chosen])),
            torch.full_like(whole, score(features[~chosen])),
            whole,
            torch.zeros_like(label, dtype=torch.int64),
        )


def partners(group: Int[Tensor, " samples"]) -> Int[Tensor, " samples"]:
    """Row of each sample's partner: the members of a group, in order of row, two by two.

    >>> partners(torch.tensor([7, 7, 3, 7, 3, 7]))
    tensor([1, 0, 4, 5, 2, 3])
    """
    index, count = compact(group)
    rows = torch.arange(len(group), device=group.device)
    place = segment_rank(rows.float(), index, count)
    if bool((torch.bincount(index) % 2).any()):
        raise ValueError("samples are compared two by two: every group needs an even number of them")
    order = (index * len(group) + place).argsort(stable=True)
    swapped = order.reshape(-1, 2).flip(1).reshape(-1)
    return torch.empty_like(order).scatter(0, order, swapped)


def swap_sets(
    features: Float[Tensor, "samples dim"],
    group: Int[Tensor, " samples"],
    order: Float[Tensor, "samples keys"],
    *,
    begin: Begin,
    against: bool = False,
    margin: float = 0.0,
    paired: bool = True,
    changes: bool = False,
) -> Partition:
    """Exchange samples between a positive and a negative set as long as that raises R of the positive one.

    From a random assignment, pairs are visited in random order, once for every sweep, and an exchange stays if it
    raises R(D+), or with ``against`` R(D+) - R(D-), by more than ``margin``. R is never lower than before: a local
    optimum of 2^pairs assignments. A sweep without an exchange is the last one where the pairs stay the same.

    Args:
        features: of all samples of the round.
        group: of each sample; paired, each set receives one of every two members of a group.
        order: independent uniforms; the first column assigns, each other one orders a sweep.
        begin: starts the state of a set.
        against: see above.
        margin: in units of R.
        paired: else any two samples may be exchanged: each sweep matches the two sets anew, at random.
        changes: fill ``Partition.change``.
    """
    search = _Search(begin, features, *_start(group, order[:, 0], paired), against)
    before = search.ours.value
    for sweep in range(1, order.shape[1]):
        key = order[:, sweep]
        visit = key[search.first].argsort(stable=True)
        match = torch.arange(len(visit), device=visit.device)
        if not paired:
            match = torch.empty_like(visit).scatter(0, visit, key[search.theirs.members].argsort(stable=True))
        if not search.sweep(visit, match, margin) and paired:
            break
    return search.partition(before, changes)


def _start(
    group: Int[Tensor, " samples"], key: Float[Tensor, " samples"], paired: bool
) -> tuple[Int[Tensor, " half"], Int[Tensor, " half"]]:
    """Rows of the two sets at first: a coin for every pair, or a random half; partners stand at one place."""
    if not paired:
        first, second = key.argsort(stable=True).chunk(2)
        return first, second
    pair = partners(group)
    rows = torch.arange(len(group), device=group.device)
    one = rows[rows < pair]
    heads = key[one] < 0.5
    return torch.where(heads, one, pair[one]), torch.where(heads, pair[one], one)


class _Search:
    """The two sets, and what is gained by exchanging members of them."""

    def __init__(self, begin: Begin, features: Tensor, positive: Tensor, negative: Tensor, against: bool) -> None:
        self.ours, self.theirs = begin(features, positive), begin(features, negative)
        self.against = against
        self.accepted = 0
        # the key of a pair is that of its lower row, so that exchanges do not change the order of visits
        self.first = torch.minimum(positive, negative)

    def gains(self, places: Int[Tensor, " swaps"], match: Int[Tensor, " swaps"]) -> Float[Tensor, " swaps"]:
        """Of each exchange on its own: of the members at ``places`` with those of the other set at ``match``."""
        gain = self.ours.swapped(places, self.theirs.members[match]) - self.ours.value
        if self.against:
            gain = gain - (self.theirs.swapped(match, self.ours.members[places]) - self.theirs.value)
        return gain

    def sweep(self, visit: Int[Tensor, " half"], match: Int[Tensor, " half"], margin: float) -> int:
        """Visit all places in order and keep what gains; the number of exchanges.

        As long as nothing changes, gains of many places can be found together; the first that gains is taken and those
        behind it are asked again.
        """
        done, size, made = 0, 1, 0
        while done < len(visit):
            block = visit[done : done + size]
            threshold = margin + ROUNDING * abs(self.ours.value)
            better = (self.gains(block, match[block]) > threshold).nonzero()[:, 0]
            if len(better) == 0:
                done, size = done + len(block), min(2 * size, BLOCK)
                continue
            place = int(block[better[0]])
            self._exchange(place, int(match[place]))
            done, size, made = done + int(better[0]) + 1, max(1, size // 2), made + 1
        self.accepted += made
        return made

    def _exchange(self, place: int, other: int) -> None:
        mine, theirs = int(self.ours.members[place]), int(self.theirs.members[other])
        self.ours.swap(place, theirs)
        self.theirs.swap(other, mine)

    def partition(self, before: float, changes: bool) -> Partition:
        """The sets as columns of all samples."""
        positive, negative = self.ours.members, self.theirs.members
        column = torch.full((2 * len(positive),), float("nan"), dtype=torch.float64, device=positive.device)
        change = column
        if changes:
            places = torch.arange(len(positive), device=positive.device)
            fall = -self.gains(places, places)
            change = column.scatter(0, positive, fall).scatter(0, negative, fall)
        label = torch.full_like(column, -1.0).index_fill(0, positive, 1.0).float()
        return Partition(
            label,
            change,
            torch.full_like(column, self.ours.value),
            torch.full_like(column, self.theirs.value),
            torch.full_like(column, before),
            torch.full_like(label, self.accepted, dtype=torch.int64),
        )


def top_half(scores: Float[Tensor, " samples"]) -> Bool[Tensor, " samples"]:
    """The better half of all samples, whatever their prompts; of equal ones the earlier."""
    place = scores.argsort(descending=True, stable=True).argsort(stable=True)
    return place < len(scores) // 2
