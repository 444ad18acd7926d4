"""What a sample is worth for being unlike the others of its group (GARDO, arXiv 2512.24138)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.statistics.folds import compact, segment_mean

SAME = 1e-12
"""Cosine distance below which two directions are the same: float32 features cannot tell them apart."""


def nearest_distance(
    features: Float[Tensor, "samples dim"], group: Int[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """d_i = min over the others j of the group of 1 - cos(e_i, e_j), float64, in [0, 2]; 0 in a group of one.

    It is computed as |e_i/|e_i| - e_j/|e_j||²/2, which is exactly 0 for a sample that stands twice. A vector of zeros
    has no direction; it counts as 1/2 from all others.
    """
    nearest = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    for label in group.unique():
        own = (group == label).nonzero()[:, 0]
        if len(own) == 1:
            continue
        unit = torch.nn.functional.normalize(features[own].double(), dim=1, eps=1e-300)
        gap = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
        least = gap.fill_diagonal_(torch.inf).amin(1)
        nearest[own] = torch.where(least < SAME, 0.0, least)
    return nearest


def favour_unlike(
    advantage: Float[Tensor, " samples"],
    distance: Float[Tensor, " samples"],
    group: Int[Tensor, " samples"],
    *,
    normalise: bool = True,
) -> Float[Tensor, " samples"]:
    """A·d where A > 0, else A: a bad sample gains nothing from being different.

    The advantages of a group no longer sum to 0.

    Args:
        advantage: (samples,), of any scale.
        distance: d of each sample.
        group: of each sample.
        normalise: divide d by its mean over the group, all members counted (released code), so that the factors
            average 1; without it, distances of 0.05 to 0.3 would slow down the learning of what is good. Where the mean
            is 0, no member is unlike the others and every factor is 1.
    """
    factor = distance.double()
    if normalise:
        index, count = compact(group)
        mean = segment_mean(factor, index, count)[index]
        factor = torch.where(mean > 0, factor / mean.where(mean > 0, 1.0), 1.0)
    return torch.where(advantage > 0, advantage * factor.to(advantage), advantage)
