"""Best-of-n: the reward of the kept sample has the law of the largest of n independent ones."""

import math
from functools import cache

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.tilted_truths import sequence_reward, sequence_truth, steer
from difftilt.statistics.discrete import enumerate_sequences, histogram, tilted, total_variation
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.protocol import Steered
from difftilt.testbeds.exact_chain import exact_chain, ring_mixture

PARTICLES = 8
RUNS = 2000


@cache
def _runs() -> Steered:
    return steer(BestOfN(BestOfNConfig(particles=PARTICLES)), sequence_truth().task, RUNS)


def _levels() -> tuple[Tensor, Tensor]:
    """Reward levels and their probabilities under the base chain, recovered from its tilted law."""
    truth, rewards = sequence_truth(), sequence_reward(enumerate_sequences(3, 6))
    base = tilted(truth.law, rewards, -truth.temperature)
    levels, code = rewards.unique(return_inverse=True)
    return levels, torch.zeros(len(levels), dtype=torch.float64).index_add(0, code, base)


def _level_distance() -> float:
    """TV between the histogram of the best reward and F(r)^n - F(r-)^n."""
    levels, law = _levels()
    below = torch.cat([torch.zeros(1, dtype=torch.float64), law.cumsum(0)])
    steered = _runs()
    best = torch.searchsorted(levels, steered.rewards[steered.best])
    return float(total_variation(histogram(best, len(levels)), below.pow(PARTICLES).diff()))


def _ring_gap() -> float:
    """Standard errors between the mean best x_1 and ∫ x d(F^n), F the distribution function of x_1 on the ring."""
    mixture = ring_mixture()
    steered = steer(BestOfN(BestOfNConfig(particles=16)), exact_chain(mixture, lambda x: x[:, 0]), 400)
    best = steered.rewards[steered.best].double()
    grid = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    below = torch.special.ndtr((grid[:, None] - mixture.means[:, 0].double()) / mixture.std).mean(-1)
    mean = 7 - torch.trapezoid(below**16, grid)
    return float((best.mean() - mean).abs() / (best.std() / math.sqrt(len(best))))


PROOFS = (
    Proof(
        "sequences, n = 8, 2000 runs: the best reward has the law F^n (TV; sampling alone leaves about 0.02)",
        _level_distance,
        at_most=0.035,
    ),
    Proof(
        "ring chain, n = 16, 400 runs: the mean best x_1 is that of the largest of 16 (in standard errors)",
        _ring_gap,
        at_most=3,
    ),
    Proof(
        "the ledger counts n evaluations per step and prompt, and n reward calls per prompt (sum of both deviations)",
        lambda: abs(_runs().ledger.nfe - 6 * PARTICLES * RUNS) + abs(_runs().ledger.reward_calls - PARTICLES * RUNS),
        at_most=0,
    ),
)
