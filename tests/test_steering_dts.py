"""Rollouts under way together against one at a time: the same selections by the method's own words, played by hand."""

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from difftilt.checks.tilted_truths import sequence_truth
from difftilt.checks.tree_runs import planted, ring_task
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.steering.budget import Budget, metered
from difftilt.steering.dts import DTS, DTSConfig
from difftilt.steering.protocol import Steered
from difftilt.steering.rollout_tree import Search
from difftilt.training.protocol import Task


def dts(**settings: float) -> DTS:
    return DTS(DTSConfig.model_validate({"temperature": 0.5, **settings}))


def ring() -> Task:
    return ring_task(3)


def sequences() -> Task:
    return sequence_truth().task


@dataclass
class ByHand:
    """One tree of finished rollouts, kept in dictionaries; nothing of ``steering.tree`` is used.

    A round knows the values of the rollouts that are back, and nothing of the other selections of the round but their
    number: how many passed a node, and how many new children they began at it.
    """

    temperature: float
    last: int
    children: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    visits: dict[int, int] = field(default_factory=dict[int, int])
    rewards: dict[int, float] = field(default_factory=dict[int, float])

    def value(self, node: int) -> float:
        if node in self.rewards:
            return self.rewards[node]
        below = [self.value(child) / self.temperature for child in self.children[node]]
        return self.temperature * math.log(sum(map(math.exp, below)) / len(below))

    def select(
        self, root: int, depth: int, levels: list[float], earlier: list[list[int]], single: set[int]
    ) -> list[int]:
        """The way from the root to the node that the next rollout begins at, or to a finished sample."""
        way = [root]
        for u in levels:
            node = way[-1]
            if depth == self.last:
                break
            have, began = self.children.get(node, []), sum(other[-1] == node for other in earlier)
            count = self.visits.get(node, 0) + sum(node in other for other in earlier)
            limit = 1 if node in single else max(1, math.ceil(math.sqrt(max(count, 1)) - 1e-9))
            if not have or len(have) + began < limit:
                break
            mass = np.exp(np.array([self.value(child) for child in have]) / self.temperature)
            way.append(have[int((mass.cumsum() / mass.sum() < u).sum())])
            depth += 1
        return way


def play(search: Search, batch: int, rounds: int) -> int:
    """Run both; every rollout must begin where it does by hand. Returns the number of children begun together."""
    forest, noise = search.forest, search.frontier.chain.noise
    hand, together = ByHand(search.config.temperature, forest.last), 0
    for _ in range(rounds):
        index = torch.arange(search.done, search.done + batch)
        levels: list[list[float]] = noise.uniform(index, (forest.last + 1,), purpose="select").tolist()
        single = set(forest.single.nonzero()[0].tolist())
        ways: list[list[int]] = []
        for level in levels:
            ways.append(hand.select(0, int(forest.depth[0]), level, ways, single))
        begin = forest.size
        with torch.no_grad():
            search.advance(batch)
        starts = [way[-1] for way in ways if forest.depth[way[-1]] < forest.last]
        # the chains of a round are numbered one after the other, each in one piece
        firsts = [node for node in range(begin, forest.size) if forest.parent[node] < begin]
        assert [int(forest.parent[node]) for node in firsts] == starts
        together += len(starts) - len(set(starts))
        fresh = iter(firsts)
        for way in ways:
            path = list(way)
            if forest.depth[way[-1]] < forest.last:
                first = next(fresh)
                path += range(first, first + forest.last - int(forest.depth[way[-1]]))
                hand.rewards[path[-1]] = float(forest.value[path[-1], 0])
                for node, child in zip(path[len(way) - 1 : -1], path[len(way) :], strict=True):
                    hand.children.setdefault(node, []).append(child)
            for node in path:
                hand.visits[node] = hand.visits.get(node, 0) + 1
        for node in hand.children:
            assert hand.value(node) == pytest.approx(float(forest.value[node, 0]), rel=1e-9, abs=1e-12)
    return together


@pytest.mark.parametrize("task", [ring, sequences])
@pytest.mark.parametrize(("batch", "rounds"), [(1, 24), (6, 5)])
def test_a_round_selects_as_the_method_says_with_values_as_old_as_the_round(
    task: Callable[[], Task], batch: int, rounds: int
) -> None:
    """At batch 1 that is the sequential method itself; nothing else differs in a larger batch."""
    together = play(planted(dts(rollouts=batch * rounds, batch=batch), task(), 1), batch, rounds)
    assert (together > 0) == (batch > 1)


@pytest.mark.parametrize("task", [ring, sequences])
def test_where_no_node_is_full_rounds_make_no_difference(task: Callable[[], Task]) -> None:
    """A root that takes every rollout asks for no value, so the trees are equal node for node."""
    grown: list[Search] = []
    for batch in (1, 4):
        search = planted(dts(rollouts=12, batch=batch, root_widening=100.0), task(), 2)
        with torch.no_grad():
            search.grow(None, None)
        grown.append(search)
    alone, beside = (search.forest for search in grown)
    # one after the other the nodes of both trees stand in another order
    for root in (0, 1):
        found = [np.sort(forest.value[forest.children(root), 0]) for forest in (alone, beside)]
        np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alone.value[:2], beside.value[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", [ring, sequences])
def test_few_predictions_are_kept_and_the_tree_is_the_same(task: Callable[[], Task]) -> None:
    """Beyond the most that are kept a branching evaluates its node again: the same tree for a few evaluations more."""
    free, most = planted(dts(rollouts=96, batch=4), task(), 1), 12
    tight = planted(dts(rollouts=96, batch=4, most_predictions=most), task(), 1)
    larger = 0
    with torch.no_grad():
        while free.done < 96:
            free.advance(4)
            tight.advance(4)
            larger = max(larger, free.frontier.predictions.rows)
            roots = int(tight.forest.depth[0] == 0)  # those of roots stay
            assert tight.frontier.predictions.rows <= most + roots
    assert larger > 4 * most
    size = free.forest.size
    assert np.array_equal(tight.forest.parent[: tight.forest.size], free.forest.parent[:size])
    np.testing.assert_allclose(tight.forest.value[:size], free.forest.value[:size], rtol=1e-5, atol=1e-6)
    spent, more = (search.frontier.chain.ledger.nfe for search in (free, tight))
    inner = free.forest.depth[:size] < free.forest.last
    branchings = int((free.forest.count(np.arange(size)[inner]) - 1).clip(0).sum())
    assert spent < more <= spent + branchings


def test_settings_that_allow_more_rollouts_than_memory_cost_what_the_budget_allows() -> None:
    """Nothing is made in advance for rollouts that the budget will end before: a number of each would be 80 MB."""
    one, steerer = ring(), dts(rollouts=10_000_000, batch=4, samples=2)
    model, prompts = denoiser(one.model), [""]
    steered: list[Steered] = []
    tracemalloc.start()
    try:
        with metered(Budget(nfe=60), model.ledger, 1) as meter:
            steered.append(steerer.steer(one, model, one.reward, prompts, Noise(0), meter=meter))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 30 < steered[0].ledger.nfe <= 60
    assert peak < 40e6
