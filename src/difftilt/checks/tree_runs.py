"""Growing trees of rollouts on the ring and on short sequences, and what their free samples and values are worth.

The law of a tree is that of its free samples: exact probabilities of its finished samples, no sampling error. Runs are
prompts of one flat batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.tilted_truths import Law, sequence_truth
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.statistics.discrete import histogram, total_variation
from difftilt.statistics.folds import segment_count
from difftilt.steering.dts import DTS, DTSConfig
from difftilt.steering.dts_star import DTSStar
from difftilt.steering.rollout_tree import Search
from difftilt.steering.tree import Statistic
from difftilt.steering.tree_rules import Boltzmann, soft_value
from difftilt.testbeds.exact_chain import exact_chain, nearest_mode, ring_mixture
from difftilt.training.protocol import Task

TEMPERATURE = 0.5


Backup = Literal["mean", "sum"]


def ring_task(steps: int) -> Task:
    """The ring with r = tanh(x_1/3)."""
    return exact_chain(ring_mixture(), lambda x: (x[:, 0] / 3).tanh(), steps)


@dataclass(frozen=True)
class RingTruth:
    """Of the tilted ring, by quadrature: mass of each mode, soft value of the root, mean reward."""

    law: Law
    value: float
    reward: float


@cache
def ring_truth() -> RingTruth:
    """Gauss-Hermite quadrature over x_1 within each mode."""
    nodes, weights = (torch.from_numpy(one) for one in np.polynomial.hermite_e.hermegauss(60))
    mixture = ring_mixture()
    reward = ((mixture.means[:, :1].double() + mixture.std * nodes) / 3).tanh()
    mass = (reward / TEMPERATURE).exp() * weights / weights.sum()
    law = mass.sum(1) / mass.sum()
    value = TEMPERATURE * math.log(float(mass.sum() / len(law)))
    return RingTruth(law, value, float((mass * reward).sum() / mass.sum()))


def sum_value(temperature: float) -> Statistic:
    """The ablation: temperature·log *sum* exp(value/temperature) over the children."""
    mean = soft_value(temperature)

    def reduce(values: Tensor, place: Tensor, count: int) -> Tensor:
        return mean(values, place, count) + temperature * segment_count(place, count).double().log()[:, None]

    return reduce


def planted(steerer: DTS | DTSStar, task: Task, runs: int, seed: int = 0) -> Search:
    """So many trees that are roots alone."""
    rule, statistic, model = steerer.rule, steerer.statistic, denoiser(task.model)
    prompts = [task.heldout_prompts[0]] * runs
    return Search.begin(steerer.config, rule, statistic, task, model, task.reward, prompts, Noise(seed))


@dataclass(frozen=True)
class Snapshot:
    """Trees of several runs at one number of rollouts: distance to the truth, value of the root, mean reward."""

    distance: float
    root: Float[Tensor, " runs"]
    reward: float


def leaf_law(search: Search, root: int) -> tuple[Tensor, Law, Tensor]:
    """Finished samples of one tree, the probability of each under exp(value/β) descents, and their rewards."""
    leaves, law = Boltzmann(search.config.temperature).law(search.forest, root)
    return search.frontier.samples.get(leaves), torch.from_numpy(law), torch.from_numpy(search.forest.value[leaves, 0])


@torch.no_grad()
def ring_runs(
    steps: int, at: Sequence[int], batch: int = 8, backup: Backup = "mean", runs: int = 5
) -> dict[int, Snapshot]:
    """Snapshots of ``runs`` growing trees after each number of rollouts of ``at``."""
    task, truth = ring_task(steps), ring_truth()
    statistic = None if backup == "mean" else sum_value(TEMPERATURE)
    steerer = DTS(DTSConfig(rollouts=at[-1], batch=batch, temperature=TEMPERATURE), statistic=statistic)
    search = planted(steerer, task, runs)
    found: dict[int, Snapshot] = {}
    for rollouts in at:
        while search.done < rollouts:
            search.advance(min(batch, rollouts - search.done))
        laws = [leaf_law(search, root) for root in range(runs)]
        modes = [histogram(nearest_mode(ring_mixture(), x), 8, law) for x, law, _ in laws]
        distance = sum(float(total_variation(mode, truth.law)) for mode in modes) / runs
        reward = sum(float(law @ rewards) for _, law, rewards in laws) / runs
        found[rollouts] = Snapshot(distance, torch.from_numpy(search.forest.value[:runs, 0].copy()), reward)
    return found


@dataclass(frozen=True)
class Trees:
    """Trees of several runs on tokens: the law of each over all sequences, and its effective number of samples."""

    laws: Float[Tensor, "runs sequences"]
    effective: Float[Tensor, " runs"]

    @property
    def distance(self) -> float:
        """Mean total variation to the enumerated tilted law."""
        law = sequence_truth().law
        return sum(float(total_variation(one, law)) for one in self.laws) / len(self.laws)

    @property
    def independent(self) -> float:
        """The distance expected of as many independent samples of the tilted law."""
        law = sequence_truth().law
        return sum(sampled_distance(law, round(number)) for number in self.effective.tolist()) / len(self.laws)


def sampled_distance(law: Law, samples: int) -> float:
    """Expected total variation between a law and n samples of it, exact: half the sum of the mean deviations.

    That of a binomial is E|K/n - p| = 2·m·(1 - p)·P(K = m)/n with m = ⌊n·p⌋ + 1 (de Moivre).
    """
    n, m = float(samples), (samples * law).floor() + 1
    log_mass = torch.distributions.Binomial(samples, probs=law).log_prob(m.clamp(max=n))
    deviation = torch.where(m <= n, 2 * m * (1 - law) * log_mass.exp() / n, 0.0)
    return float(deviation.sum() / 2)


@torch.no_grad()
def sequence_trees(at: Sequence[int], runs: int, batch: int = 8, seed: int = 0, backup: Backup = "mean") -> list[Trees]:
    """Trees from all mask after each number of rollouts of ``at``."""
    truth = sequence_truth()
    config = DTSConfig(rollouts=at[-1], batch=batch, temperature=truth.temperature)
    statistic = None if backup == "mean" else sum_value(truth.temperature)
    search, found = planted(DTS(config, statistic=statistic), truth.task, runs, seed), list[Trees]()
    for rollouts in at:
        while search.done < rollouts:
            search.advance(min(batch, rollouts - search.done))
        leaves = [leaf_law(search, root) for root in range(runs)]
        laws = torch.stack([histogram(truth.outcome(x), len(truth.law), law) for x, law, _ in leaves])
        found.append(Trees(laws, torch.stack([1 / law.square().sum() for _, law, _ in leaves])))
    return found
