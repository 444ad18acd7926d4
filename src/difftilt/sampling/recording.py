"""What a rollout keeps: edges, and the states they run between, each state once.

A state that ends one recorded step and starts the next is one entry, and so is one that siblings start from: a tree of
203 evaluated nodes and 16 leaves is 203 + 16 latents, whatever the number of its edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from difftilt.models.ledger import Ledger
from difftilt.sampling.protocol import Edges, Trajectory
from difftilt.statistics.folds import distinct
from difftilt.trees import Pooled, join, take


@dataclass
class Recorder:
    """Edges and states recorded so far; a state is named by its place in the order of recording."""

    edges: list[Edges] = field(default_factory=list[Edges])
    starts: list[Int[Tensor, " rows"]] = field(default_factory=list[Tensor])
    ends: list[Int[Tensor, " rows"]] = field(default_factory=list[Tensor])
    states: list[Tensor] = field(default_factory=list[Tensor])

    def add(
        self,
        edges: Edges,
        x_t: Shaped[Tensor, "rows *shape"],
        x_s: Shaped[Tensor, "rows *shape"],
        stored: Int[Tensor, " rows"],
        parent: Int[Tensor, " rows"],
    ) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Record the edges of one step; returns their numbers, and the places of the states they end in.

        Args:
            edges: without states.
            x_t: where each starts; rows of one ``parent`` start from one state.
            x_s: where each ends.
            stored: place of x_t if an earlier edge ended there, else -1.
            parent: label of the state that was split, if it was.
        """
        first = sum(len(part.step) for part in self.edges)
        new = (stored < 0).nonzero()[:, 0]
        once, again = distinct(parent[new])
        self.starts.append(stored.index_copy(0, new, self._keep(x_t[new[once]])[again]))
        self.ends.append(self._keep(x_s))
        self.edges.append(edges)
        return torch.arange(first, first + len(x_s), device=x_s.device), self.ends[-1]

    def _keep(self, states: Shaped[Tensor, "rows *shape"]) -> Int[Tensor, " rows"]:
        first = sum(len(part) for part in self.states)
        self.states.append(states)
        return torch.arange(first, first + len(states), device=states.device)

    def collected(self, last_edge: Int[Tensor, " leaves"]) -> Edges:
        """All edges in order of step, each with the first leaf whose path holds it."""
        if not self.edges:
            none = torch.zeros(0, dtype=torch.int64, device=last_edge.device)
            return Edges(none, none, torch.zeros(0, device=last_edge.device))
        edges, states = join(self.edges), torch.cat(self.states)
        start, end = Pooled(states, torch.cat(self.starts)), Pooled(states, torch.cat(self.ends))
        assert edges.parent is not None
        owner = torch.full_like(edges.parent, len(last_edge))
        samples = torch.arange(len(last_edge), device=last_edge.device)
        at = last_edge
        while bool((at >= 0).any()):
            live = at >= 0
            owner.scatter_reduce_(0, at[live], samples[live], "amin")
            at = torch.where(live, edges.parent[at.clamp(min=0)], at)
        return replace(edges, sample=owner, start=start, end=end)


def shifted(edges: Edges, samples: int, before: int) -> Edges:
    """Edges behind ``before`` others, of samples behind ``samples`` others."""
    parent = edges.parent
    moved = None if parent is None else torch.where(parent >= 0, parent + before, -1)
    return replace(edges, sample=edges.sample + samples, parent=moved)


def join_trajectories(parts: Sequence[Trajectory]) -> Trajectory:
    """One trajectory of several, rolled out on one grid with whole trees in each: what one rollout of all would be."""
    if len(parts) == 1:
        return parts[0]
    samples, roots, before = 0, 0, 0
    edges: list[Edges] = []
    root: list[Tensor] = []
    last: list[Tensor] = []
    for part in parts:
        edges.append(shifted(part.edges, samples, before))
        root.append(part.root + roots)
        last.append(torch.where(part.last_edge >= 0, part.last_edge + before, -1))
        samples += len(part.x_0)
        roots += int(part.root.max()) + 1
        before += len(part.edges.step)
    joined, order = _by_step(join(edges))
    return Trajectory(
        x_0=torch.cat([part.x_0 for part in parts]),
        root=torch.cat(root),
        condition=join([part.condition for part in parts]),
        edges=joined,
        last_edge=_follow(order, torch.cat(last)),
        ledger=sum((part.ledger for part in parts), Ledger()),
    )


def _by_step(edges: Edges) -> tuple[Edges, Int[Tensor, " edges"]]:
    """Edges in order of step, those of one step as they were; and the new place of each."""
    order = edges.step.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    sorted_edges = take(edges, order)
    parent = None if sorted_edges.parent is None else _follow(place, sorted_edges.parent)
    return replace(sorted_edges, parent=parent), place


def _follow(place: Int[Tensor, " edges"], pointer: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """New places of old pointers; -1 stays -1."""
    if len(place) == 0:
        return pointer
    return torch.where(pointer >= 0, place[pointer.clamp(min=0)], -1)
