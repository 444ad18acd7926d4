"""Sums, means, maxima and softmaxes of rows that share a group or a parent.

``index`` names the segment of each row, 0..count-1; a negative index (a row without parent) belongs to no segment.
Rows of one segment need not stand together. An empty segment has sum 0, mean NaN, maximum and logmeanexp -inf.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Rows = Float[Tensor, "rows *rest"]
Index = Int[Tensor, " rows"]
Segments = Float[Tensor, "count *rest"]


def compact(index: Index) -> tuple[Int[Tensor, " rows"], int]:
    """Arbitrary labels as 0..count-1 in ascending order of label, and count.

    >>> compact(torch.tensor([7, 3, 7]))
    (tensor([1, 0, 1]), 2)
    """
    labels, inverse = torch.unique(index, return_inverse=True)
    return inverse, len(labels)


def distinct(labels: Index) -> tuple[Int[Tensor, " count"], Int[Tensor, " rows"]]:
    """(first row of each distinct label, place of every row's label among them): one state for many rows.

    >>> distinct(torch.tensor([7, 3, 7]))
    (tensor([1, 0]), tensor([1, 0, 1]))
    """
    index, count = compact(labels)
    rows = torch.arange(len(labels), device=labels.device)
    return torch.full((count,), len(labels), device=labels.device).scatter_reduce(0, index, rows, "amin"), index


def _into(values: Rows, index: Index, count: int, start: float, reduce: str) -> Segments:
    # an extra last segment collects the rows without one
    place = torch.where(index < 0, count, index).reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    out = torch.full((count + 1, *values.shape[1:]), start, dtype=values.dtype, device=values.device)
    return out.scatter_reduce(0, place, values, reduce)[:count]


def _back(segments: Shaped[Tensor, "count *rest"], index: Index) -> Shaped[Tensor, "rows *rest"]:
    return segments[index.clamp(min=0)]


def segment_count(index: Index, count: int) -> Int[Tensor, " count"]:
    """Number of rows in each segment."""
    return torch.bincount(index[index >= 0], minlength=count)


def segment_sum(values: Rows, index: Index, count: int) -> Segments:
    """Sum of the rows of each segment."""
    return _into(values, index, count, 0.0, "sum")


def segment_mean(values: Rows, index: Index, count: int) -> Segments:
    """Mean of the rows of each segment; NaN for an empty one."""
    size = segment_count(index, count).to(values).reshape(-1, *[1] * (values.dim() - 1))
    return segment_sum(values, index, count) / size


def segment_max(values: Rows, index: Index, count: int) -> Segments:
    """Maximum of the rows of each segment; NaN wins over every number."""
    return _into(values, index, count, -torch.inf, "amax")


def segment_min(values: Rows, index: Index, count: int) -> Segments:
    """Minimum of the rows of each segment, +inf for an empty one; NaN wins over every number."""
    return _into(values, index, count, torch.inf, "amin")


def _finite_max(values: Rows, index: Index, count: int) -> Segments:
    # the shift cancels, so it carries no gradient; a segment of -inf is shifted by nothing
    top = segment_max(values.detach(), index, count)
    return torch.where(torch.isinf(top), 0.0, top)


def segment_softmax(values: Rows, index: Index, count: int) -> Rows:
    """exp(value) over the sum of exp in the row's own segment; 0 for rows without a segment."""
    weight = (values - _back(_finite_max(values, index, count), index)).exp()
    share = weight / _back(segment_sum(weight, index, count), index)
    outside = (index < 0).reshape(-1, *[1] * (values.dim() - 1))
    return torch.where(outside, 0.0, share)


def segment_logmeanexp(values: Rows, index: Index, count: int) -> Segments:
    """Log of the mean of exp(value) in each segment: the soft value of a parent from its children."""
    top = _finite_max(values, index, count)
    weight = (values - _back(top, index)).exp()
    size = segment_count(index, count).clamp(min=1).to(values).reshape(-1, *[1] * (values.dim() - 1))
    return (segment_sum(weight, index, count) / size).log() + top


def segment_rank(values: Float[Tensor, " rows"], index: Index, count: int) -> Int[Tensor, " rows"]:
    """Rank of each row among the rows of its segment, 0 the smallest value; equal values rank in order of row.

    Every row must have a segment.
    """
    order = values.argsort(stable=True)
    order = order[index[order].argsort(stable=True)]
    size = segment_count(index, count)
    start = size.cumsum(0) - size
    place = torch.arange(len(values), device=values.device) - start[index[order]]
    return torch.empty_like(place).scatter(0, order, place)
