"""Pure functions on features and samples: distances between sets, diversity, transport, folds over groups.

First of the rooms: it knows no model and no reward, and every other room may use it. It exists so that a test, a
monitor and a comparison measure the same thing. To extend it, add a function of tensors with its equation and its
source.

Traps: a distance between two finite sets of one law is not 0, so compare at one number of samples. ``segment_*`` folds
take an explicit index; a negative one belongs to no segment. Long sums run in float64.
"""

from difftilt.statistics.correlation import correlation
from difftilt.statistics.discrete import (
    empirical,
    enumerate_sequences,
    histogram,
    kl_divergence,
    sequence_codes,
    tilted,
    total_variation,
)
from difftilt.statistics.diversity import group_diversity, mean_group_diversity
from difftilt.statistics.folds import (
    compact,
    segment_count,
    segment_logmeanexp,
    segment_max,
    segment_mean,
    segment_min,
    segment_rank,
    segment_softmax,
    segment_sum,
)
from difftilt.statistics.moments import FrechetReference, FrechetState, SetMoments
from difftilt.statistics.ranking import TopKeep, kendall_tau, relative_increase, top_keep
from difftilt.statistics.sets import (
    coverage,
    covered,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    mmd_squared,
    mode_shares,
    neighbour_radius,
    polynomial_kernel,
    rbf_kernel,
    vendi_score,
)
from difftilt.statistics.states import CoverageState, KernelState, MeanState, Negated, RecomputedState, SetState
from difftilt.statistics.transport import energy_distance, random_directions, sliced_wasserstein, wasserstein_1d

__all__ = [
    "CoverageState",
    "FrechetReference",
    "FrechetState",
    "KernelState",
    "MeanState",
    "Negated",
    "RecomputedState",
    "SetMoments",
    "SetState",
    "TopKeep",
    "compact",
    "correlation",
    "coverage",
    "covered",
    "empirical",
    "energy_distance",
    "enumerate_sequences",
    "frechet_distance",
    "frechet_from_moments",
    "group_diversity",
    "histogram",
    "kendall_tau",
    "kernel_distance",
    "kl_divergence",
    "mean_group_diversity",
    "mmd_squared",
    "mode_shares",
    "neighbour_radius",
    "polynomial_kernel",
    "random_directions",
    "rbf_kernel",
    "relative_increase",
    "segment_count",
    "segment_logmeanexp",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_rank",
    "segment_softmax",
    "segment_sum",
    "sequence_codes",
    "sliced_wasserstein",
    "tilted",
    "top_keep",
    "total_variation",
    "vendi_score",
    "wasserstein_1d",
]
