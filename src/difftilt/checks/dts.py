"""DTS: trees come near the tilted law of an exact chain and of enumerable sequences; a sum in the backup does not.

The ring chain has eight modes, few exact steps and r = tanh(x_1/3) at temperature 1/2. The law of a tree is that of its
free samples: exact probabilities of its finished samples, no sampling error. Runs are prompts of one flat batch.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.tilted_truths import steer
from difftilt.checks.tree_runs import (
    TEMPERATURE,
    Backup,
    Snapshot,
    Trees,
    planted,
    ring_runs,
    ring_truth,
    sequence_trees,
)
from difftilt.models.denoiser import denoiser
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.dts import DTS, DTSConfig
from difftilt.steering.dts_star import DTSStar, DTSStarConfig
from difftilt.testbeds.exact_chain import ExactStart, exact_chain, ring_levels, ring_mixture
from difftilt.training.protocol import Task


@cache
def _short(backup: Backup) -> dict[int, Snapshot]:
    return ring_runs(3, (50, 200, 800) if backup == "mean" else (50, 200), backup=backup)


@cache
def _long(steps: int, backup: Backup) -> dict[int, Snapshot]:
    return ring_runs(steps, (50, 200, 800, 3200), backup=backup)


def _bias(snapshot: Snapshot) -> float:
    return float(snapshot.root.mean()) - ring_truth().value


@dataclass(frozen=True, eq=False)
class FixedStart(ExactStart):
    """The ring whose x_1 is always one given point: the root of every tree is this noisy state."""

    point: Tensor
    point_prior: bool = True

    def prior(self, noise: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        return self.point.expand_as(noise)


@cache
@torch.no_grad()
def value_errors() -> dict[str, float]:
    """Root mean square error of the soft value of four states of pure noise, r = x_1/3, four steps, 32 runs each.

    Of the reward of the posterior mean, of one rollout, and of trees of 8, 64 and 512 rollouts; the truth is closed.
    """
    mixture, steps, runs = ring_mixture(), 4, 32
    task = exact_chain(mixture, lambda x: x[:, 0] / 3, steps)
    squares: dict[str, list[float]] = {}
    for x in torch.tensor([[1.2, 0.3], [-0.8, 0.9], [0.1, -1.0], [0.0, 0.4]]):
        process = FixedStart(ring_levels(steps), mixture, x)
        one = replace(task, model=replace(task.model, process=process, network=task.model.network))
        prediction = denoiser(one.model)(x[None], torch.ones(1), None)
        log_share = mixture.log_responsibility(process, x[None], torch.ones(1))[0].double()
        means, variance = mixture.posterior(process, x[None], torch.ones(1))
        slope = 1 / (3 * TEMPERATURE)
        exponent = log_share + slope * means[0, :, 0].double() + slope**2 * float(variance[0, 0]) / 2
        truth = TEMPERATURE * float(exponent.logsumexp(0))
        squares.setdefault("posterior mean", []).append((float(prediction.x0[0, 0]) / 3 - truth) ** 2)
        search = planted(DTS(DTSConfig(rollouts=512, temperature=TEMPERATURE)), one, runs)
        for rollouts in (1, 8, 64, 512):
            while search.done < rollouts:
                search.advance(min(8, rollouts - search.done))
            error = torch.from_numpy(search.forest.value[:runs, 0]) - truth
            squares.setdefault(str(rollouts), []).append(float(error.square().mean()))
    return {name: math.sqrt(sum(each) / len(each)) for name, each in squares.items()}


def _error_ratio(name: str, other: str) -> float:
    return value_errors()[name] / value_errors()[other]


RUNS, CALLS = 20, (400, 800, 1600, 3200)


@cache
def _rare_task() -> Task:
    """The mode at angle 0 has mass 0.004; the reward is a bump of width 2.5 about it; 16 steps."""
    mixture = ring_mixture([0.004] + [0.996 / 7] * 7)
    peak = mixture.means[0]
    return exact_chain(mixture, lambda x: (-(x - peak).square().sum(-1) / (2 * 2.5**2)).exp())


@cache
def rare_plain() -> dict[int, float]:
    """Mean best reward of best-of-n with so many network calls, 20 runs."""
    found = steer(BestOfN(BestOfNConfig(particles=CALLS[-1] // 16)), _rare_task(), RUNS)
    best = found.rewards.reshape(RUNS, -1).cummax(1).values.mean(0)
    return {calls: float(best[calls // 16 - 1]) for calls in CALLS}


@cache
@torch.no_grad()
def rare_tree() -> dict[int, float]:
    """Mean best reward of DTS* with so many network calls, 20 runs, one rollout at a time.

    Every node that is not finished was evaluated once, so the nodes of a tree count its calls.
    """
    steerer = DTSStar(DTSStarConfig(rollouts=CALLS[-1], batch=1, temperature=0.1, exploration=1.0))
    search = planted(steerer, _rare_task(), RUNS)
    forest, spent, owner = search.forest, np.zeros(RUNS, np.int64), np.arange(RUNS)
    best = {calls: np.zeros(RUNS) for calls in CALLS}
    while spent.min() < CALLS[-1]:
        begin = forest.size
        search.advance(1)
        new = np.arange(begin, forest.size)
        # every node is numbered after its parent, and a chain in one piece
        for node in new[forest.parent[new] < begin].tolist():
            end = node + forest.last - int(forest.depth[node]) + 1
            owner = np.append(owner, np.full(end - node, owner[forest.parent[node]]))
            spent[owner[node]] += end - node - 1
        for calls, reward in best.items():
            reward[spent <= calls] = forest.value[search.best[spent <= calls], 0]
    return {calls: float(reward.mean()) for calls, reward in best.items()}


@cache
def sequence_runs() -> dict[int, Trees]:
    """Five trees."""
    at = (50, 200, 800, 3200)
    return dict(zip(at, sequence_trees(at, 5), strict=True))


def same_law(batch: int, other: int, backup: Backup = "mean", runs: int = 40, rollouts: int = 200) -> float:
    """Probability of a larger distance between the mean laws of two sets of trees if all had one law.

    A permutation test: if batches made no difference, it would not matter which trees belong to which set. 1000
    relabellings; the sets have noise of their own.
    """
    (first,) = sequence_trees((rollouts,), runs, batch)
    (second,) = sequence_trees((rollouts,), runs, other, seed=1, backup=backup)
    every = torch.cat([first.laws, second.laws])
    order = torch.rand(1000, 2 * runs, generator=torch.Generator().manual_seed(0)).argsort(1)
    order[0] = torch.arange(2 * runs)  # as they are: a permutation like the others
    half = torch.zeros(1000, 2 * runs, dtype=torch.float64).scatter_(1, order[:, :runs], 1.0) / runs
    distance = ((2 * half - 1 / runs) @ every).abs().sum(1)  # twice the total variation between the means
    return float((distance >= distance[0] - 1e-12).double().mean())


PROOFS = (
    Proof(
        "ring, 3 steps, 800 rollouts, mean of 5 trees: distance (TV) of the modes to the tilted law (the base: 0.47)",
        lambda: _short("mean")[800].distance,
        at_most=0.14,
    ),
    Proof(
        "ring, 3 steps: the distance falls with the rollouts (800 over 50)",
        lambda: _short("mean")[800].distance / _short("mean")[50].distance,
        at_most=0.6,
    ),
    Proof(
        "ring, 3 steps, 800 rollouts: the root's value minus the true one: unlucky branches are not tried again",
        lambda: _bias(_short("mean")[800]),
        at_least=-0.2,
        at_most=-0.03,
    ),
    Proof(
        "ablation: log sum exp in the backup lifts the root's value far above 0.379 (200 rollouts)",
        lambda: float(_short("sum")[200].root.mean()),
        at_least=2,
    ),
    Proof(
        "ablation: log sum exp makes it run away (root's value after 200 rollouts minus after 50)",
        lambda: float(_short("sum")[200].root.mean() - _short("sum")[50].root.mean()),
        at_least=0.3,
    ),
    Proof(
        "ablation: with log sum exp the mean reward settles above the target's, 0.639",
        lambda: _short("sum")[200].reward - ring_truth().reward,
        at_least=0.05,
    ),
    Proof(
        "ring, 3 steps: the bias of the root's value shrinks with the rollouts (3200 over 50)",
        lambda: _bias(_long(3, "mean")[3200]) / _bias(_long(3, "mean")[50]),
        at_most=0.7,
        long=True,
    ),
    Proof(
        "ring, 3 steps, 3200 rollouts: distance (TV) to the tilted law",
        lambda: _long(3, "mean")[3200].distance,
        at_most=0.09,
        long=True,
    ),
    Proof(
        "ring, 8 steps: the distance falls with the rollouts (3200 over 200)",
        lambda: _long(8, "mean")[3200].distance / _long(8, "mean")[200].distance,
        at_most=0.8,
        long=True,
    ),
    Proof(
        "ring, 8 steps, 3200 rollouts: distance (TV) to the tilted law (the base: 0.47)",
        lambda: _long(8, "mean")[3200].distance,
        at_most=0.14,
        long=True,
    ),
    Proof(
        "ablation: at 8 steps log sum exp does not come nearer (distance at 3200 rollouts over that at 200)",
        lambda: _long(8, "sum")[3200].distance / _long(8, "sum")[200].distance,
        at_least=0.9,
        long=True,
    ),
    Proof(
        "states of pure noise, linear reward: the error of the soft value falls with the rollouts (512 over 8)",
        lambda: _error_ratio("512", "8"),
        at_most=0.5,
        long=True,
    ),
    Proof(
        "the same states: the error of the posterior mean's reward over that of a tree of 64 rollouts",
        lambda: _error_ratio("posterior mean", "64"),
        at_least=1.5,
        long=True,
    ),
    Proof(
        "rare mode, DTS*: mean best reward after 1600 network calls minus that of best-of-n (20 runs)",
        lambda: rare_tree()[1600] - rare_plain()[1600],
        at_least=0.03,
        long=True,
    ),
    Proof(
        "rare mode, mean best reward of DTS* after 1600 network calls minus that of best-of-n after 3200",
        lambda: rare_tree()[1600] - rare_plain()[3200],
        at_least=-0.05,
        long=True,
    ),
    Proof(
        "six tokens over three symbols, all mask as the root: the distance to the enumerated law falls (3200 over 200)",
        lambda: sequence_runs()[3200].distance / sequence_runs()[200].distance,
        at_most=0.6,
        long=True,
    ),
    Proof(
        "six tokens, 3200 rollouts: distance (TV) of one tree to the enumerated law (the base, without tree: 0.438)",
        lambda: sequence_runs()[3200].distance,
        at_most=0.438,
        long=True,
    ),
    Proof(
        "six tokens, 3200 rollouts: that distance over the one expected of as many independent samples of the law as "
        "the tree has effective ones",
        lambda: sequence_runs()[3200].distance / sequence_runs()[3200].independent,
        at_most=1.0,
        long=True,
    ),
    Proof(
        "six tokens, 200 rollouts, 40 trees each, one rollout at a time against 8 under way: probability of a larger "
        "distance between their mean laws if both had one law",
        lambda: same_law(1, 8),
        at_least=0.01,
        long=True,
    ),
    Proof(
        "ablation: the same test tells trees with log sum exp in the backup from the others",
        lambda: same_law(8, 8, "sum"),
        at_most=0.01,
        long=True,
    ),
)
