"""What a rollout keeps: edges, and the states they run between, each state once.

A state that ends one recorded step and starts the next is one entry, and so is one that siblings start from: a tree of
203 evaluated nodes and 16 leaves is 203 + 16 latents, whatever the number of its edges.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from difftilt.sampling.protocol import Edges
from difftilt.statistics.folds import distinct
from difftilt.trees import Pooled, join


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
