"""What a tree search is made of besides the tree: how wide nodes grow, which child is chosen, what is backed up.

Each is a small value that :class:`~difftilt.steering.tree.Forest` takes as an argument.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from difftilt.statistics.folds import segment_logmeanexp, segment_softmax
from difftilt.statistics.pareto import front
from difftilt.steering.tree import Forest, Ids, Reals, Statistic


@dataclass(frozen=True)
class Widening:
    """Progressive widening: a node visited N times may have max(1, ceil(factor·max(1, N)^exponent)) children."""

    factor: float = 1.0
    exponent: float = 0.5

    def limit(self, visits: Ids) -> Ids:
        """Children that nodes with so many visits may have."""
        # a root such as 8^(1/3) may come out above the whole number that it is
        wide = np.ceil(self.factor * np.maximum(visits, 1.0) ** self.exponent - 1e-9)
        return np.maximum(wide, 1).astype(np.int64)


class Widths:
    """How many children the nodes of a forest may have now, and whether they may ever have another.

    Args:
        forest: the nodes; one with equal draws (``single``) has one child.
        inner: widening of nodes.
        root: widening of roots.
    """

    def __init__(self, forest: Forest, inner: Widening, root: Widening) -> None:
        self.forest, self._inner, self._root = forest, inner, root
        self._limits, self._root_limits = (one.limit(np.zeros(0, np.int64)) for one in (inner, root))

    def reach(self, visits: int) -> None:
        """Be ready for so many visits: settings may allow more rollouts than memory, so tables grow with the tree."""
        if visits >= len(self._limits):
            every = np.arange(2 * visits)
            self._limits, self._root_limits = self._inner.limit(every), self._root.limit(every)

    def now(self, node: int) -> int:
        """Children that a node may have now, virtual visits included."""
        forest = self.forest
        if forest.single[node]:
            return 1
        limits = self._limits if forest.parent[node] >= 0 else self._root_limits
        return int(limits[forest.visits[node] + forest.virtual[node]])

    def ever(self, nodes: Ids, left: int) -> NDArray[np.bool_]:
        """Whether nodes that are no roots can have another child within ``left`` more rollouts."""
        # the last selection sees what all but itself have visited; nodes of this round have one visit to come
        most = np.maximum(self.forest.visits[nodes], 1) + max(left - 1, 0)
        wide = self._inner.limit(most) > np.maximum(self.forest.count(nodes), 1)
        return wide & ~self.forest.single[nodes] & (left > 0)


@dataclass(frozen=True)
class Boltzmann:
    """Child i with probability ∝ exp(value_i/temperature).

    The kernel's density does not enter: the children are independent draws from it.
    """

    temperature: float

    def __call__(self, forest: Forest, children: Ids, u: float) -> int:
        value = forest.value[children, 0]
        top = value.max()
        if top == -np.inf:  # nothing valid below any of them
            return int(children[int(u * len(children))])
        mass = np.exp((value - top) / self.temperature).cumsum()
        return int(children[min(int(mass.searchsorted(u * mass[-1], side="right")), len(children) - 1)])

    def law(self, forest: Forest, root: int) -> tuple[Ids, Reals]:
        """The finished samples below a root, and the probability that a descent by this rule ends at each."""
        nodes, mass = np.array([root]), torch.ones(1, dtype=torch.float64)
        for _ in range(int(forest.depth[root]), forest.last):
            children, place = forest.children_of(nodes)
            at = torch.from_numpy(place)
            share = segment_softmax(torch.from_numpy(forest.value[children, 0]) / self.temperature, at, len(nodes))
            # of a node below which nothing is valid no child is chosen, nor is the node
            nodes, mass = children, mass[at] * share.nan_to_num(0.0)
        return nodes, mass.numpy()


@dataclass(frozen=True)
class UCT:
    """The child with the largest value_i + exploration·sqrt(ln N(parent)/N(i)); virtual visits count."""

    exploration: float

    def __call__(self, forest: Forest, children: Ids, u: float) -> int:
        parent = forest.parent[children[0]]
        visits = forest.visits[children] + forest.virtual[children]
        total = max(1, int(forest.visits[parent] + forest.virtual[parent]))
        return int(children[(forest.value[children, 0] + self.exploration * np.sqrt(np.log(total) / visits)).argmax()])


@dataclass(frozen=True)
class ParetoFront:
    """A child, all alike, from the front of U_i = W_i/N_i + exploration·p_i·sqrt(N(parent))/(1 + N_i).

    W is a vector, the second term is added to each of its components (PepTune, arXiv 2412.17780).

    Attributes:
        exploration: c.
        active: columns that dominance looks at; None is all.
    """

    exploration: float
    active: Ids | None = None

    def __call__(self, forest: Forest, children: Ids, u: float) -> int:
        bound = self.bounds(forest, children)
        seen = bound if self.active is None else bound[:, self.active]
        chosen = children[front(torch.from_numpy(seen)).numpy()]
        return int(chosen[int(u * len(chosen))])

    def bounds(self, forest: Forest, children: Ids) -> Reals:
        """U of each child, (children, objectives)."""
        visits = forest.visits[children]
        bonus = forest.prior[children] * np.sqrt(forest.visits[forest.parent[children[0]]]) / (1 + visits)
        return forest.value[children] / visits[:, None] + self.exploration * bonus[:, None]


def soft_value(temperature: float) -> Statistic:
    """The soft Bellman backup: temperature·log mean exp(value/temperature) over the children."""

    def reduce(values: Tensor, place: Tensor, count: int) -> Tensor:
        return temperature * segment_logmeanexp(values / temperature, place, count)

    return reduce
