"""The sequences testbed: the enumerated law of the sampler against closed forms, sampling and the published numbers."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample
from difftilt.statistics import empirical, total_variation
from difftilt.testbeds.sequences import Config, Sequences


def _distance_to_chain(steps: int) -> float:
    """Total variation between the law of the N-step sampler and the Markov chain."""
    bed = Sequences(Config(steps=steps))
    return float(total_variation(bed.base_law, bed.markov_law))


def _pair_law_gap() -> float:
    """Two tokens, N equal steps: both are revealed in one step with probability 1/N, and then independently.

    So the law is (1 - 1/N)·chain + (1/N)·product of its marginals, which are uniform.
    """
    worst = 0.0
    for steps in (1, 3, 8):
        bed = Sequences(Config(length=2, steps=steps))
        uniform = torch.full_like(bed.markov_law, 1 / len(bed.markov_law))
        exact = (1 - 1 / steps) * bed.markov_law + uniform / steps
        worst = max(worst, float((bed.base_law - exact).abs().max()))
    return worst


def _sampling_excess(config: Config) -> float:
    """Chi-squared of drawn sequences against the enumerated law, in standard deviations above its mean."""
    bed, rows = Sequences(config), 20_000
    task, index, noise = bed.task(), torch.arange(rows), Noise(0)
    start = bed.process.prior(torch.zeros(rows, config.length))
    with torch.no_grad():
        tokens = sample(denoiser(task.model), task.sampler, start, None, noise=noise, index=index)
    expected = rows * bed.base_law
    gap = rows * empirical(tokens, config.letters) - expected
    freedom = len(expected) - 1
    # the variance of Pearson's statistic exceeds 2·freedom by Σ(1/p)/n, which rare sequences make felt
    variance = 2 * freedom + float((1 / bed.base_law).sum()) / rows
    return (float((gap.square() / expected).sum()) - freedom) / math.sqrt(variance)


def _value_gap() -> float:
    """The backward recursion at the all-mask state against β·log Z from the forward law, at three temperatures."""
    bed = Sequences()
    start = bed.process.prior(torch.zeros(1, bed.config.length))
    gaps = [
        abs(float(bed.soft_value(start, torch.ones(1), beta)) - beta * bed.log_z(beta)) for beta in (0.02, 0.5, 10.0)
    ]
    return max(gaps)


def _limits_gap() -> float:
    """p* is the base at infinite temperature and the best sequence of the base at temperature 0."""
    bed = Sequences()
    hot = total_variation(bed.tilted(1e9), bed.base_law)
    cold = 1 - bed.tilted(1e-3)[bed.rewards == bed.rewards.max()].sum()
    return float(torch.stack([hot, cold]).max())


def _fine_law() -> Float[Tensor, " sequences"]:
    return Sequences(Config(steps=64)).base_law


def _order() -> float:
    """Distance to the chain at 32 steps over that at 64: 2 for an error of first order in 1/N."""
    bed = Sequences(Config(steps=64))
    return _distance_to_chain(32) / float(total_variation(_fine_law(), bed.markov_law))


_CHI = 4.0
_PROOFS_OF_STEPS = tuple(
    # the published values have two digits: half a unit of the last one
    Proof(
        f"the {steps}-step sampler is {published} from the Markov chain in total variation (DRAKES toy)",
        lambda steps=steps: _distance_to_chain(steps),
        at_least=published - 0.005,
        at_most=published + 0.005,
    )
    for steps, published in ((4, 0.15), (8, 0.08), (32, 0.02))
)

PROOFS = (
    *_PROOFS_OF_STEPS,
    Proof("the sampler's distance to the chain falls as 1/N: ratio of N = 32 and 64", _order, 1.9, 2.1),
    # float32 log-probabilities, a handful of factors
    Proof("the law of two tokens is the mixture that the step of revelation says", _pair_law_gap, at_most=1e-6),
    Proof("the soft value of the empty state is beta·log Z", _value_gap, at_most=1e-9),
    Proof("the tilted law tends to the base and to the best sequence", _limits_gap, at_most=1e-6),
    Proof(
        "20 000 drawn sequences of 4 tokens over 4 letters fit the enumerated law (chi-squared, standard deviations)",
        lambda: _sampling_excess(Config()),
        at_most=_CHI,
    ),
    Proof(
        "so do sequences of 6 tokens over 3 letters",
        lambda: _sampling_excess(Config(length=6, letters=3)),
        at_most=_CHI,
    ),
)
