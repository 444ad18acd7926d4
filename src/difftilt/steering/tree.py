"""Persistent trees in flat arrays: one root for each prompt, in one forest, with no recursion anywhere.

A tree search differs from another one in four small things: the statistic of a node and how it is backed up, the rule
that chooses a child, the rule that lets a node have another child, and what a new child starts. The first three are
arguments here; the last belongs to the search. Depth is the place on the time grid: 0 at the noise end, ``last`` at the
data; a root that stands before the first draw has depth -1.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Entry = TypeVar("Entry", bound=np.generic)
Ids = NDArray[np.int64]
"""Nodes, by number."""
Reals = NDArray[np.float64]
Rule = Callable[["Forest", Ids, float], int]
"""``(forest, children, u) -> child``: chooses one of at least two children; u is uniform on (0, 1)."""
Statistic = Callable[[Tensor, Tensor, int], Tensor]
"""``(values of children, place of their parent, parents) -> values of parents``, (rows, width) float64."""


class Forest:
    """Nodes of all trees; every array has one entry per node, and room for more behind ``size``.

    Attributes:
        size: nodes so far.
        last: depth of a finished sample.
        parent: -1 for a root.
        depth: place on the grid.
        visits: rollouts that went through the node.
        virtual: visits of selections whose rollouts are not back yet.
        pending: children under way.
        value: statistic, (nodes, width).
        prior: probability of a node among its siblings, where a search has one.
        single: never more than one child, as all would be equal.
        closed: left out of the selection.
    """

    NODE: tuple[str, ...] = ("parent", "depth", "visits", "virtual", "pending", "value", "prior", "single", "closed")
    BLOCK: tuple[str, ...] = ("_start", "_count", "_room")

    def __init__(self, roots: int, first: int, last: int, width: int = 1) -> None:
        self.last = last
        self.size = 0
        self.parent, self.depth = np.empty(0, np.int64), np.empty(0, np.int64)
        self.visits, self.virtual, self.pending = (np.empty(0, np.int64) for _ in range(3))
        self.value, self.prior = np.empty((0, width)), np.empty(0)
        self.single, self.closed = np.empty(0, np.bool_), np.empty(0, np.bool_)
        # the children of a node stand together in one array, in a block that moves to the end when it is full
        self._start, self._count, self._room = (np.empty(0, np.int64) for _ in range(3))
        self._slots, self._used = np.empty(0, np.int64), 0
        self._add(np.full(roots, -1), np.full(roots, first))

    def children(self, node: int) -> Ids:
        """Children in the order in which they came."""
        start = self._start[node]
        return self._slots[start : start + self._count[node]]

    def children_of(self, nodes: Ids) -> tuple[Ids, Ids]:
        """All children of some nodes, and the place of each one's parent among these."""
        count = self._count[nodes]
        place = np.repeat(np.arange(len(nodes)), count)
        within = np.arange(len(place)) - np.repeat(count.cumsum() - count, count)
        return self._slots[self._start[nodes][place] + within], place

    def count(self, nodes: Ids) -> Ids:
        """Children of each node."""
        return self._count[nodes]

    def grow(self, at: Ids, lengths: Ids) -> Ids:
        """Hang a chain of single children below each node; returns the first of each, the others follow it in number.

        Args:
            at: nodes; one may come several times and gets so many children.
            lengths: nodes of each chain, at least 1.
        """
        first = self.size + lengths.cumsum() - lengths
        total = int(lengths.sum())
        which = np.repeat(np.arange(len(at)), lengths)
        ids = self.size + np.arange(total)
        parent = ids - 1
        parent[first - self.size] = at
        self._add(parent, self.depth[at][which] + ids - first[which] + 1)
        inner = np.setdiff1d(ids, first, assume_unique=True)
        self._slots = _longer(self._slots, self._used + len(inner))
        self._slots[self._used : self._used + len(inner)] = inner
        self._start[inner - 1] = self._used + np.arange(len(inner))
        self._count[inner - 1] = self._room[inner - 1] = 1
        self._used += len(inner)
        for node, child in zip(at.tolist(), first.tolist(), strict=True):
            self._link(node, child)
        return first

    def descend(self, root: int, rule: Rule, levels: Sequence[float], stop: Callable[[int], bool] | None = None) -> int:
        """From a root to a finished sample, or to the first node where ``stop`` holds or no child is open.

        Args:
            root: where it begins.
            rule: chooses among open children.
            levels: a uniform for each choice.
            stop: asked at every node that is not finished.
        """
        node = root
        for u in levels:
            if self.depth[node] == self.last or (stop is not None and stop(node)):
                return node
            children = self.children(node)
            if len(children) > 1:
                children = children[~self.closed[children]]
                node = rule(self, children, u) if len(children) > 1 else _only(children, node)
            else:
                node = _only(children[~self.closed[children]], node)
        return node

    def select(self, root: int, rule: Rule, limit: Callable[[int], int], levels: Sequence[float]) -> int:
        """The node that the next child is drawn from, or a finished sample; leaves virtual visits along the way.

        A node with children under way alone is widened beyond its limit: there is nothing to descend to.
        """

        def widened(node: int) -> bool:
            have = int(self._count[node])
            return have == 0 or have + int(self.pending[node]) < limit(node)

        node = self.descend(root, rule, levels, widened)
        self.pending[node] += 1
        for way in self.climb(np.array([node])):
            self.virtual[way] += 1
        return node

    def climb(self, nodes: Ids) -> Generator[Ids]:
        """The nodes, then their parents, and so on up to the roots; a node comes as often as it is passed."""
        while len(nodes):
            yield nodes
            nodes = self.parent[nodes]
            nodes = nodes[nodes >= 0]

    def branch(self, nodes: Ids) -> Ids:
        """The child of its root that each node is, or descends from."""
        while True:
            above = self.parent[nodes]
            inner = (above >= 0) & (self.parent[np.maximum(above, 0)] >= 0)
            if not inner.any():
                return nodes
            nodes = np.where(inner, above, nodes)

    def settle(self, selected: Ids, visited: Ids) -> None:
        """Take the virtual visits of selected nodes back, and count a visit along the way to each visited one."""
        self.pending[selected] = 0
        for way in self.climb(selected):
            self.virtual[way] = 0
        for way in self.climb(visited):
            np.add.at(self.visits, way, 1)

    def close(self, nodes: Ids) -> None:
        """Leave nodes out of the selection, and every node above them whose children are all left out."""
        self.closed[nodes] = True
        for way in self.climb(np.unique(self.parent[nodes])):
            self.closed[way] = [bool(self.closed[self.children(node)].all()) for node in way.tolist()]

    def backup(self, nodes: Ids, statistic: Statistic) -> None:
        """Recompute the statistic of some nodes and of all above them from their children, deepest first."""
        front = np.unique(nodes)
        while len(front):
            deepest = self.depth[front] == self.depth[front].max()
            now, rest = front[deepest], front[~deepest]
            children, place = self.children_of(now)
            self.value[now] = statistic(torch.from_numpy(self.value[children]), torch.from_numpy(place), len(now))
            above = self.parent[now]
            front = np.unique(np.concatenate([rest, above[above >= 0]]))

    def _add(self, parent: Ids, depth: Ids) -> None:
        begin, self.size = self.size, self.size + len(parent)
        for name in (*self.NODE, *self.BLOCK):
            setattr(self, name, _longer(getattr(self, name), self.size))
        new = slice(begin, self.size)
        self.parent[new], self.depth[new], self.prior[new] = parent, depth, 1.0

    def _link(self, node: int, child: int) -> None:
        count, room, start = int(self._count[node]), int(self._room[node]), int(self._start[node])
        if count == room:
            room = max(1, 2 * room)
            self._slots = _longer(self._slots, self._used + room)
            self._slots[self._used : self._used + count] = self._slots[start : start + count]
            start, self._used = self._used, self._used + room
            self._start[node], self._room[node] = start, room
        self._slots[start + count] = child
        self._count[node] = count + 1


def _only(children: Ids, node: int) -> int:
    return int(children[0]) if len(children) else node


def _longer(array: NDArray[Entry], size: int) -> NDArray[Entry]:
    """The array with room for ``size`` entries, those behind the present ones 0."""
    if size <= len(array):
        return array
    longer = np.zeros((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer
