"""How far a reward ranks a sample above what other rewards say of it, and which few samples that makes suspect.

Only ranks are compared, so rewards of any scale meet without calibration (GARDO, arXiv 2512.24138, equation 7).
"""

from collections import deque
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.statistics.folds import compact, segment_count

Scores = Float[Tensor, " samples"]
Scope = Int[Tensor, " samples"]


def wins(scores: Scores, scope: Scope) -> Int[Tensor, " samples"]:
    """#{j of the same scope: score_i > score_j}.

    A tie is nobody's win, so that no arbitrary order of equal scores is read as an opinion.

    Args:
        scores: (samples,), of any scale.
        scope: label of the samples that are compared with each other: all, or those of one group.
    """
    count = torch.zeros_like(scope)
    for label in scope.unique():
        own = (scope == label).nonzero()[:, 0]
        count[own] = torch.searchsorted(scores[own].sort().values, scores[own])
    return count


def uncertainty(proxy: Scores, auxiliary: Float[Tensor, "samples rewards"], scope: Scope) -> Float[Tensor, " samples"]:
    """U_i = w(proxy_i) - mean_n w(auxiliary_n,i), float64, in (-1, 1): large where only the proxy is pleased.

    w is the win rate, wins over the size B of the scope. Without ties all w average (B - 1)/(2B), so U averages 0.
    """
    others = torch.stack([wins(column, scope) for column in auxiliary.unbind(1)], dim=1)
    index, count = compact(scope)
    # in whole numbers up to the one division: equal U are equal in every bit, and 0 is 0
    lead = wins(proxy, scope) * others.shape[1] - others.sum(1)
    return lead.double() / (segment_count(index, count)[index] * others.shape[1])


def suspects(
    doubt: Float[Tensor, " samples"], scope: Scope, fraction: float, *, positive_only: bool = False
) -> Bool[Tensor, " samples"]:
    """True where U exceeds the quantile of U at 1 - fraction (linear interpolation) of its scope; strictly.

    Equal values at the quantile are all spared, so a scope that says nothing (all U equal) has no suspect.

    Args:
        doubt: U of each sample.
        scope: as in :func:`wins`.
        fraction: share of the samples that is singled out where there are no ties.
        positive_only: take the quantile over the samples with U >= 0 only, as the released code does: about half as
            many are then singled out.
    """
    found = torch.zeros(len(doubt), dtype=torch.bool, device=doubt.device)
    for label in scope.unique():
        own = scope == label
        counted = doubt[own & (doubt >= 0)] if positive_only else doubt[own]
        if len(counted):
            found |= own & (doubt > counted.double().quantile(1 - fraction))
    return found


def mean_doubt(doubt: Float[Tensor, " samples"]) -> float | None:
    """Mean of U over the samples with U >= 0; None where there are none.

    The mean over all samples is 0 whatever the rewards do, and a rule that watched it would watch rounding.
    """
    positive = doubt[doubt >= 0]
    return float(positive.double().mean()) if len(positive) else None


@dataclass(frozen=True)
class Fraction:
    """The share of suspects, which grows while doubt rises above what was seen lately and shrinks while it falls.

    Attributes:
        value: k.
        seen: the newest mean doubts, oldest first.
        low, high: bounds of k.
        size: how many mean doubts are remembered.
    """

    value: float = 0.1
    seen: tuple[float, ...] = ()
    low: float = 0.02
    high: float = 0.2
    size: int = 20

    def after(self, doubt: float | None) -> "Fraction":
        """1.1·k above all that was seen, 0.9·k below, else k; then the doubt is remembered. None changes nothing."""
        if doubt is None:
            return self
        factor = 1.0
        if self.seen and doubt > max(self.seen):
            factor = 1.1
        elif self.seen and doubt < min(self.seen):
            factor = 0.9
        value = min(max(factor * self.value, self.low), self.high)
        return replace(self, value=value, seen=tuple(deque((*self.seen, doubt), self.size)))


def scope_of(group: Scope, whole_batch: bool) -> Scope:
    """One scope for all samples, or one for each group."""
    return torch.zeros_like(group) if whole_batch else compact(group)[0]
