"""The numbers of sets that differ by one row of a pool, for searches over sets that encode every sample once.

A :class:`SetState` holds the number of one set and knows it for every set without one of its members or with one of
them exchanged, as cheaply as the number allows. That of the Fréchet distance is in ``moments``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.statistics.sets import Kernel, Others, Points, covered, mean_within

Members = Int[Tensor, " members"]
Places = Int[Tensor, " swaps"]


class SetState(Protocol):
    """The number of a set of rows of a pool, kept up to date while rows are exchanged.

    Attributes:
        members: row in the pool of each member.
        value: of the present set.
    """

    @property
    def members(self) -> Members: ...

    @property
    def value(self) -> float: ...

    def leave_one_out(self) -> Float[Tensor, " members"]:
        """The number without each member, float64."""
        ...

    def swapped(self, places: Places, rows: Places) -> Float[Tensor, " swaps"]:
        """The number with row ``rows[k]`` of the pool as the member at ``places[k]``, each exchange on its own."""
        ...

    def swap(self, place: int, row: int) -> None:
        """Make the row of the pool the member at that place."""
        ...


class RecomputedState:
    """Any number of a set, computed anew for every set: the state of what has no shorter way.

    Attributes:
        pool: (rows, dim).
        members: row in the pool of each member.
        function: features of a set -> its number.
    """

    def __init__(self, features: Points, members: Tensor, function: Callable[[Tensor], float]) -> None:
        self.pool = features
        self.members = members.clone()
        self.function = function
        self._value: float | None = None

    @property
    def value(self) -> float:
        """Of the present set, found once."""
        if self._value is None:
            self._value = self.function(self.pool[self.members])
        return self._value

    def leave_one_out(self) -> Float[Tensor, " members"]:
        place = torch.arange(len(self.members), device=self.members.device)
        return self._of([self.members[place != out] for out in range(len(place))])

    def swapped(self, places: Places, rows: Places) -> Float[Tensor, " swaps"]:
        return self._of([self.members.index_fill(0, place, int(row)) for place, row in zip(places, rows, strict=True)])

    def swap(self, place: int, row: int) -> None:
        self.members[place] = row
        self._value = None

    def _of(self, sets: list[Tensor]) -> Tensor:
        found = [self.function(self.pool[members]) for members in sets]
        return torch.tensor(found, dtype=torch.float64, device=self.pool.device)


class KernelState:
    """Squared MMD of a set to a fixed reference from row sums of kernel matrices: one exchange costs O(1), all O(n).

    Attributes:
        gram: (rows, rows) kernel of the pool.
        across: (rows,) mean kernel of each row with the references.
        within: mean kernel of the references with one another; found here where it is not given.
        members: row in the pool of each member.
        unbiased: as in :func:`mmd_squared`.
    """

    def __init__(
        self,
        features: Points,
        members: Tensor,
        reference: Others,
        kernel: Kernel,
        *,
        unbiased: bool = True,
        within: float | None = None,
    ) -> None:
        pool, others = features.double(), reference.double()
        self.gram = kernel(pool, pool)
        self.across = kernel(pool, others).mean(1)
        self.within = float(mean_within(kernel(others, others), unbiased)) if within is None else within
        self.members = members.clone()
        self.unbiased = unbiased
        self._own = self.gram.diagonal() * (0 if unbiased else 1)
        # of every row of the pool with all members, itself included if it is one
        self._sums = self.gram[:, self.members].sum(1)

    @property
    def value(self) -> float:
        return float(self._distance(*self._totals(), len(self.members)))

    def leave_one_out(self) -> Float[Tensor, " members"]:
        pairs, across = self._totals()
        rows = self.members
        pairs = pairs - 2 * self._apart(rows) - self._own[rows]
        return self._distance(pairs, across - self.across[rows], len(rows) - 1)

    def swapped(self, places: Places, rows: Places) -> Float[Tensor, " swaps"]:
        pairs, across = self._totals()
        old = self.members[places]
        joined = self._sums[rows] - self.gram[rows, old]
        pairs = pairs - 2 * self._apart(old) - self._own[old] + 2 * joined + self._own[rows]
        return self._distance(pairs, across - self.across[old] + self.across[rows], len(self.members))

    def swap(self, place: int, row: int) -> None:
        self._sums = self._sums - self.gram[:, self.members[place]] + self.gram[:, row]
        self.members[place] = row

    def _apart(self, rows: Tensor) -> Tensor:
        """Sum of the kernel of each member with the other members."""
        return self._sums[rows] - self.gram[rows, rows]

    def _totals(self) -> tuple[Tensor, Tensor]:
        """Sum over the pairs of members that count, and over the members of their mean kernel with the references."""
        rows = self.members
        return self._apart(rows).sum() + self._own[rows].sum(), self.across[rows].sum()

    def _distance(self, pairs: Tensor, across: Tensor, count: int) -> Tensor:
        size = count * (count - 1) if self.unbiased else count**2
        return pairs / size + self.within - 2 * across / count


class CoverageState:
    """Coverage of the references by a set, from counts of the members that cover each: distances are taken once.

    Attributes:
        covers: (references, rows) whether a row of the pool lies within the radius of a reference.
        members: row in the pool of each member.
    """

    def __init__(self, features: Points, members: Tensor, reference: Others, radius: Float[Tensor, " others"]) -> None:
        self.covers = covered(reference, features, radius)
        self.members = members.clone()
        self._counts = self.covers[:, members].sum(1)

    @property
    def value(self) -> float:
        return float((self._counts > 0).double().mean())

    def leave_one_out(self) -> Float[Tensor, " members"]:
        left = self._counts[:, None] - self.covers[:, self.members].long()
        return (left > 0).double().mean(0)

    def swapped(self, places: Places, rows: Places) -> Float[Tensor, " swaps"]:
        old = self.covers[:, self.members[places]].long()
        return (self._counts[:, None] - old + self.covers[:, rows] > 0).double().mean(0)

    def swap(self, place: int, row: int) -> None:
        self._counts = self._counts - self.covers[:, self.members[place]].long() + self.covers[:, row].long()
        self.members[place] = row


class MeanState:
    """The mean of a number over a set of rows of a pool.

    Attributes:
        pool: (rows,).
        members: row in the pool of each member.
    """

    def __init__(self, pool: Float[Tensor, " rows"], members: Members) -> None:
        self.pool = pool
        self.members = members.clone()

    @property
    def value(self) -> float:
        return float(self.pool[self.members].mean())

    def leave_one_out(self) -> Float[Tensor, " members"]:
        own = self.pool[self.members]
        return (own.sum() - own) / (len(own) - 1)

    def swapped(self, places: Places, rows: Places) -> Float[Tensor, " swaps"]:
        return self.value + (self.pool[rows] - self.pool[self.members[places]]) / len(self.members)

    def swap(self, place: int, row: int) -> None:
        self.members[place] = row


@dataclass
class Negated:
    """The state of a distance as one of a score."""

    state: SetState

    @property
    def members(self) -> Members:
        return self.state.members

    @property
    def value(self) -> float:
        return -self.state.value

    def leave_one_out(self) -> Float[Tensor, " members"]:
        return -self.state.leave_one_out()

    def swapped(self, places: Places, rows: Places) -> Float[Tensor, " swaps"]:
        return -self.state.swapped(places, rows)

    def swap(self, place: int, row: int) -> None:
        self.state.swap(place, row)
