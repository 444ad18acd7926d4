"""Who goes on, from scores: one child per parent, the best of all, a share, the sum of ranks. Pure functions.

``resampling`` draws ancestors from carried log-weights; these rules choose by the scores themselves.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.process.masked import gumbel


def categorical(
    scores: Float[Tensor, "parents children"], temperature: float, uniform: Float[Tensor, "parents children"]
) -> Int[Tensor, " parents"]:
    """One child of every parent, drawn in proportion to exp(score/temperature) by Gumbel-max; 0 takes the best.

    Args:
        scores: -inf for a child that must not be chosen.
        temperature: in units of the scores, not negative.
        uniform: in (0, 1), one for every child.
    """
    if temperature == 0:
        return scores.argmax(-1)
    return (scores.double() / temperature + gumbel(uniform.double())).argmax(-1)


def top(
    scores: Float[Tensor, "groups size"], keep: int, children: int = 1, most: int | None = None
) -> Int[Tensor, "groups keep"]:
    """The ``keep`` highest of each group, best first; of equal scores the first.

    Args:
        scores: -inf for those that must come last.
        keep: at most the size of a group.
        children: the rows of one parent stand together, so many each.
        most: children of one parent that may be kept while others are left; None is no limit.
    """
    if most is not None and most < children:
        family = scores.unflatten(-1, (-1, children))
        order = family.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(children).to(order).expand_as(order))
        # those beyond the limit come after all others, in their own order
        late = (rank >= most).flatten(-2)
        by_score = scores.argsort(dim=-1, descending=True, stable=True)
        again = late.gather(-1, by_score).int().argsort(dim=-1, stable=True)
        return by_score.gather(-1, again)[:, :keep]
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :keep]


def kept(count: int, fraction: float) -> int:
    """Max(1, round(fraction·count)), halves to even (TTSnap, arXiv 2511.22242)."""
    return max(1, round(count * fraction))


def survivors(scores: Float[Tensor, "groups size"], fraction: float) -> Int[Tensor, "groups kept"]:
    """Places of the best ``kept(size, fraction)`` of each group, in ascending order; of equal scores the first."""
    return top(scores, kept(scores.shape[-1], fraction)).sort(-1).values


def rank_sum(scores: Float[Tensor, "terms groups size"]) -> Float[Tensor, "groups size"]:
    """Sum over the terms of each row's rank in its group, 0 for the lowest; of equal scores the later ranks higher.

    It fuses rewards whose scales have nothing in common.
    """
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1).sum(0).double()


def fused(scores: Float[Tensor, "terms groups size"]) -> Float[Tensor, "groups size"]:
    """One term as it is, several by the sum of their ranks; a row that misses one score (NaN) is missing, float64."""
    if len(scores) == 1:
        return scores[0].double()
    missing = scores.isnan()
    return torch.where(missing.any(0), torch.nan, rank_sum(torch.where(missing, -torch.inf, scores)))
