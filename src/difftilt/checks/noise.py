"""Noise as a pure function: its law, its independence over every coordinate, and its indifference to batching."""

import math
from itertools import combinations

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.sampling.noise import Noise, siblings

COUNT = 200_000
ROWS = torch.arange(200)
SHAPE = (COUNT // 200,)


def _streams() -> list[Tensor]:
    """Draws that differ in one coordinate each."""
    base = Noise(1, 0)
    return [
        base.normal(ROWS, SHAPE, purpose="a", step=0),
        base.normal(ROWS + 200, SHAPE, purpose="a", step=0),
        base.normal(ROWS + 1, SHAPE, purpose="a", step=0),
        base.normal(ROWS, SHAPE, purpose="a", step=1),
        base.normal(ROWS, SHAPE, purpose="b", step=0),
        base.at(1).normal(ROWS, SHAPE, purpose="a", step=0),
        Noise(2, 0).normal(ROWS, SHAPE, purpose="a", step=0),
    ]


def moments() -> float:
    """Largest standardised error of the first four moments of all streams."""
    worst = 0.0
    # mean, variance, third and fourth moment of a normal, and their variances per draw
    truth = ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0))
    for x in _streams():
        for power, value, variance in truth:
            error = float((x.double() ** power).mean()) - value
            worst = max(worst, abs(error) / math.sqrt(variance / COUNT))
    return worst


def kolmogorov() -> float:
    """sqrt(n) times the largest gap between the empirical and the uniform distribution function."""
    u = Noise(3).uniform(ROWS, SHAPE, purpose="a").flatten().double().sort().values
    gap = (u - (torch.arange(COUNT) + 0.5) / COUNT).abs().max() + 0.5 / COUNT
    return float(gap) * math.sqrt(COUNT)


def independence() -> float:
    """Largest standardised correlation, of values and of squares, between two streams, and of neighbours in one."""
    streams = [x.flatten().double() for x in _streams()]
    pairs = list(combinations(streams, 2)) + [(x[1:], x[:-1]) for x in streams]
    # the second half of a row is made of the same words as the first half
    halves = [x.reshape(len(ROWS), 2, -1) for x in streams]
    pairs += [(x[:, 0].flatten(), x[:, 1].flatten()) for x in halves]
    worst = 0.0
    for x, y in pairs:
        for a, b in ((x, y), ((x**2 - 1) / math.sqrt(2), (y**2 - 1) / math.sqrt(2))):
            worst = max(worst, abs(float((a * b).mean())) * math.sqrt(len(a)))
    return worst


def batching() -> float:
    """Number of values that differ when the batch is split, shuffled, or given one step per row."""
    noise, index = Noise(5, 7), torch.tensor([3, 1, 4, 159, 26])
    whole = noise.normal(index, (3, 2), purpose="x", step=2)
    split = torch.cat([noise.normal(part, (3, 2), purpose="x", step=2) for part in index.split(2)])
    order = torch.tensor([4, 2, 0, 1, 3])
    shuffled = noise.normal(index[order], (3, 2), purpose="x", step=2)
    each = noise.normal(index, (3, 2), purpose="x", step=torch.full((5,), 2))
    return float((whole != split).sum() + (whole[order] != shuffled).sum() + (whole != each).sum())


def sibling_covariance() -> float:
    """Largest standardised error of variance and covariance of siblings, over spreads."""
    shared, one, two, *_ = (x.flatten().double() for x in _streams())
    worst = 0.0
    for spread in (0.0, 0.5, 2.0):
        a, b = siblings(shared, one, spread), siblings(shared, two, spread)
        correlation = 1 / (1 + spread**2)
        for product, value in ((a * a, 1.0), (a * b, correlation)):
            # var(ab) = 1 + correlation² for standard normals
            error = abs(float(product.mean()) - value) / math.sqrt((1 + value**2) / COUNT)
            worst = max(worst, error)
    return worst


def permutations() -> float:
    """Largest standardised deviation of the frequency of (position, value) over 400 permutations of 6."""
    drawn = torch.stack([Noise(9).permutation(6, purpose="p", step=step) for step in range(400)])
    if not bool((drawn.sort(-1).values == torch.arange(6)).all()):
        return math.inf
    frequency = (drawn[..., None] == torch.arange(6)).double().mean(0)
    return float((frequency - 1 / 6).abs().max()) / math.sqrt(1 / 6 * 5 / 6 / len(drawn))


PROOFS = (
    # 28 and 126 standardised errors: 4.5 sigma has probability below 1e-3 over all of them
    Proof("normal noise has the first four moments of N(0, 1), in standard errors", moments, at_most=4.5),
    # the 0.999 quantile of Kolmogorov's law
    Proof("uniform noise has the uniform distribution function, sqrt(n) x largest gap", kolmogorov, at_most=1.95),
    Proof(
        "noise is uncorrelated over index, step, purpose, iteration, seed and element, in standard errors",
        independence,
        at_most=4.5,
    ),
    Proof("noise is bit-identical for any split or order of the batch, values that differ", batching, at_most=0),
    Proof(
        "siblings have unit variance and covariance 1/(1 + spread²), in standard errors", sibling_covariance, at_most=4
    ),
    # 36 frequencies
    Proof(
        "every value stands at every place of a permutation equally often, in standard errors", permutations, at_most=4
    ),
)
