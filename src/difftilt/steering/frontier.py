"""The rollouts under way of a forest: children drawn from stored states, completed together, every state stored.

Rows join the rollout at their own depth, so one network call for each time step holds all that are under way. The noise
of a rollout is that of the plain sample of its index, wherever in a tree it begins.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.protocol import Stateful
from difftilt.process.protocol import Condition, Prediction
from difftilt.sampling.protocol import Moment
from difftilt.sampling.rollout import Plan, rollout, start_state, step_noise
from difftilt.sampling.windows import window_mask
from difftilt.steering.chain import Chain
from difftilt.steering.store import NodeStore
from difftilt.steering.tree import Forest, Ids
from difftilt.trees import take

Kept = Callable[[Ids], NDArray[np.bool_]]
"""Of which nodes the prediction is worth keeping."""


@dataclass
class Frontier:
    """What nodes carry, and how rollouts go on from them.

    Attributes:
        forest: the nodes.
        chain: kernel, grid and noise.
        condition: one row for each root.
        shape: of a latent.
        kept: tells whose prediction is stored; None stores none, and a branching then evaluates its state again.
        states: of the nodes on the way.
        samples: of the finished ones, as they were scored.
        predictions: of the nodes that may branch.
    """

    forest: Forest
    chain: Chain
    condition: Condition
    shape: tuple[int, ...]
    kept: Kept | None
    states: NodeStore[Tensor]
    predictions: NodeStore[Prediction]
    samples: NodeStore[Tensor] = field(default_factory=NodeStore[Tensor])

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return self.chain.slots.device

    def plant(self, index: Int[Tensor, " roots"]) -> None:
        """Store the states of roots that are states: processes whose x_1 is always the same."""
        roots = np.arange(len(index))
        if int(self.forest.depth[0]) == 0:
            self.states.put(roots, self._start(index, self.condition))

    def _start(self, index: Int[Tensor, " rows"], condition: Condition) -> Shaped[Tensor, "rows *shape"]:
        return start_state(self.chain.denoise.process, self.chain.noise, index, self.shape, condition)

    def complete(self, at: Ids, first: Ids, root: Ids, index: Int[Tensor, " rows"]) -> Shaped[Tensor, "rows *shape"]:
        """Draw a child of each node and complete it.

        Args:
            at: where the rollouts begin.
            first: the nodes grown for them, see :meth:`Forest.grow`.
            root: of each.
            index: noise index of each.
        """
        condition = take(self.condition, torch.from_numpy(root))
        x = self._start(index, condition)
        depth = self.forest.depth[at]
        begin, inner = depth + 1, (depth >= 0).nonzero()[0]
        self._store(first[depth < 0], x[_rows(depth < 0)])
        if len(inner):
            rows = torch.from_numpy(inner)
            again = self._unpredicted(at[inner], take(condition, rows))
            begin[inner] -= again
            began = self._draw(at[inner], first[inner], index[rows], again)
            x = x.index_copy(0, rows.to(x.device), began)
        chain, last = self.chain, self.forest.last
        kernel = torch.ones(last, dtype=torch.bool) if chain.last is None else window_mask(last, 0, last - 1)
        plan = Plan(stochastic=kernel, first=torch.from_numpy(begin))
        watch = _Watch(self, depth, first, begin)
        noise, grid = chain.noise, chain.grid
        path = rollout(
            chain.denoise, chain.preset, grid, x, condition, noise=noise, index=index, plan=plan, observe=watch
        )
        return path.x_0

    def _unpredicted(self, at: Ids, condition: Condition) -> NDArray[np.bool_]:
        """Which of these nodes have no prediction stored: their rollouts begin at the state, and evaluate it again."""
        if self.kept is None:
            return np.ones(len(at), np.bool_)
        self._evaluate_roots(at, condition)
        return ~self.predictions.has(at)

    def _draw(
        self, at: Ids, first: Ids, index: Int[Tensor, " rows"], again: NDArray[np.bool_]
    ) -> Shaped[Tensor, "rows *shape"]:
        """What the rollouts from stored states begin with: a new child, or the state where no prediction is stored."""
        state = self.states.get(at, self.device)
        if again.all():
            return state
        rows = _rows(~again)
        at, first, known = at[~again], first[~again], state[rows.to(self.device)]
        depth = torch.from_numpy(self.forest.depth[at])
        t, s = (self._time(depth + more, known) for more in (0, 1))
        step = self.chain.preset.step(self.predictions.get(at, self.device), known, t, s)
        child = step.draw(step_noise(step, self.chain.noise, index[rows], depth.to(self.device)))
        self._store(first, child)
        return state.index_copy(0, rows.to(self.device), child)

    def _evaluate_roots(self, at: Ids, condition: Condition) -> None:
        """A root that is a state is evaluated once, before its first children are drawn."""
        roots, rows = np.unique(at, return_index=True)
        new = (self.forest.parent[roots] < 0) & (self.forest.visits[roots] == 0)
        if new.any():
            x = self.states.get(roots[new], self.device)
            t = self._time(torch.zeros(len(x), dtype=torch.int64), x)
            condition = self.chain.denoise.prepare(x, t, take(condition, torch.from_numpy(rows[new])))
            self.predictions.put(roots[new], self.chain.denoise(x, t, condition))

    def _time(self, depth: Int[Tensor, " rows"], x: Tensor) -> Tensor:
        """Time of each row, in the precision that a rollout uses."""
        return self.chain.grid[depth].to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)

    def _store(self, nodes: Ids, x: Tensor) -> None:
        finished = self.forest.depth[nodes] == self.forest.last
        for store, which in ((self.samples, finished), (self.states, ~finished)):
            if which.any():
                store.put(nodes[which], x[_rows(which)])

    def attach(self, moment: Moment, x_s: Tensor, nodes: Ids, new: NDArray[np.bool_]) -> None:
        """Store what one step of the rollout has made.

        Args:
            moment: before the draw.
            x_s: the states drawn.
            nodes: of these states.
            new: rows whose step began at a node of the same rollout, the one numbered before.

        Raises:
            UserError: if no tree can grow from the task's kernel.
        """
        if moment.step.deterministic and int(moment.position) < self.forest.last - 1:
            raise UserError(
                "the task's kernel is deterministic, so a tree of its chains branches at the root alone: use "
                "best-of-n, or a stochastic kernel, such as DDIM with eta above 0 or FlowSDE"
            )
        # state that the conditions of prompts bring with them stays as it is
        if isinstance(moment.condition, Stateful) and not isinstance(self.condition, Stateful):
            raise UserError(
                "the model keeps state along a trajectory, and rollouts from stored states have none: use fk-steering"
            )
        self._store(nodes, x_s)
        before = nodes[new] - 1
        self.forest.single[before] = ~moment.step.varies.cpu().numpy()[new]
        if self.kept is not None:
            kept = self.kept(before)
            rows = new.nonzero()[0][kept]
            if len(rows):
                self.predictions.put(before[kept], take(moment.prediction, torch.from_numpy(rows)))


@dataclass(frozen=True)
class _Watch:
    """Tells the nodes of every step of a rollout: row i is at node ``first[i] + position - depth[i] - 1``."""

    frontier: Frontier
    depth: Ids
    first: Ids
    begin: Ids

    def __call__(self, moment: Moment, x_s: Tensor) -> None:
        position = int(moment.position)
        moving = self.begin <= position
        depth = self.depth[moving]
        self.frontier.attach(moment, x_s, self.first[moving] + position - depth, depth < position)


def _rows(which: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(which.nonzero()[0])
