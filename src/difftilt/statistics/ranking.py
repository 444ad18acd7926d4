"""How well early scores order candidates, and how much reward a search gains over a range of budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from scipy import integrate, stats
from torch import Tensor

Table = Float[Tensor, "groups size"]


def kendall_tau(predicted: Table, truth: Table) -> Float[Tensor, " groups"]:
    """Kendall's tau-b of each group, in [-1, 1], float64, of the rows that have both numbers (no NaN).

    NaN where one of the two is constant.
    """
    pairs = zip(predicted.double().cpu().numpy(), truth.double().cpu().numpy(), strict=True)
    # scipy is untyped here
    found = [cast(Any, stats.kendalltau(one, other, nan_policy="omit")).statistic for one, other in pairs]
    return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class TopKeep:
    """What happens to the best candidate of each group when only the highest predictions are kept.

    Attributes:
        accuracy: share of groups whose best candidate is kept, one for each number kept, float64.
        gap: reward of the best candidate minus that of the best one kept, averaged over the groups that lose it; NaN
            where none does.
    """

    accuracy: Float[Tensor, " counts"]
    gap: Float[Tensor, " counts"]


def top_keep(predicted: Table, truth: Table, counts: Sequence[int]) -> TopKeep:
    """Does the candidate with the highest truth survive keeping the ``count`` highest predictions?

    Args:
        predicted: early scores; of equal ones the first counts as higher.
        truth: final rewards.
        counts: how many are kept.
    """
    order = predicted.argsort(dim=-1, descending=True, stable=True)
    # the best reward among the first k of that order, for every k
    reached = truth.double().gather(-1, order).cummax(-1).values[:, [count - 1 for count in counts]]
    gap = truth.double().amax(-1, keepdim=True) - reached
    lost = gap > 0
    return TopKeep((~lost).double().mean(0), torch.where(lost, gap, torch.nan).nanmean(0))


def relative_increase(
    budgets: Float[Tensor, " budgets"], method: Float[Tensor, " budgets"], baseline: Float[Tensor, " budgets"]
) -> float:
    """(A(method) - A(baseline))/A(baseline), A the area under a curve of reward over budget by Simpson's rule.

    Both curves are measured from the baseline's value at the smallest budget (TTSnap, arXiv 2511.22242). NaN where the
    baseline does not rise.
    """
    x, first = budgets.double().cpu().numpy(), float(baseline[0])
    own, base = (float(integrate.simpson(curve.double().cpu().numpy() - first, x=x)) for curve in (method, baseline))
    return (own - base) / base if base else float("nan")
