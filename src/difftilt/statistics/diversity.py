"""How different the samples of one group are from one another."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.statistics.folds import compact, segment_count, segment_sum


def group_diversity(
    features: Float[Tensor, "rows dim"], group: Int[Tensor, " rows"], *, chunk: int = 1024
) -> Float[Tensor, " groups"]:
    """Mean Euclidean distance over the pairs of different rows of each group, in order of group index, float64.

    NaN for a group of one, which has no pair.

    Args:
        features: (rows, dim).
        group: of each row.
        chunk: rows compared at a time; bounds the memory.
    """
    index, count = compact(group)
    x = features.double()
    totals = [
        (torch.cdist(x[rows], x) * (index[rows, None] == index)).sum(1)
        for rows in torch.arange(len(x), device=x.device).split(chunk)
    ]
    size = segment_count(index, count).double()
    return segment_sum(torch.cat(totals), index, count) / (size * (size - 1))


def mean_group_diversity(features: Float[Tensor, "rows dim"], group: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Mean of :func:`group_diversity` over the groups that have a pair; NaN if none has."""
    return group_diversity(features, group).nanmean()
