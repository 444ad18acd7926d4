"""Weights of a sum of rewards that agrees best with an oracle on samples that both have scored (arXiv 2501.19252)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.errors import UserError
from difftilt.statistics.correlation import correlation

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The weights that the paper tries."""
_MOST = 1_000_000


@dataclass(frozen=True)
class Calibration:
    """The outcome of :func:`calibrate`.

    Attributes:
        weights: of every reward, for ``WeightedSum``; their common scale says nothing.
        correlation: Pearson's, between the weighted sum and the oracle.
        alone: reward -> its own correlation with the oracle; NaN for one that does not vary.
    """

    weights: dict[str, float]
    correlation: float
    alone: dict[str, float]


def calibrate(
    scores: Mapping[str, Float[Tensor, " samples"]],
    oracle: Float[Tensor, " samples"],
    grid: Sequence[float] = QUARTERS,
) -> Calibration:
    """The weights on a grid whose sum Σ w_i·r_i has the largest correlation with the oracle.

    With c_i = cov(r_i, o) and C = cov(r_i, r_j) it is w·c / sqrt(wᵀ C w · var o), so no sample is looked at twice. Of
    equally good weights, which differ by a factor, the largest are returned. Fit apart what should be weighed apart
    (prompts that ask for motion and others, say).

    Args:
        scores: reward -> its score of every sample.
        oracle: what to agree with, e.g. a judge's rating.
        grid: weights that each reward may have, not negative.

    Raises:
        UserError: for scores that are not finite, of unequal numbers or fewer than 3, an oracle that does not vary, no
            varying reward, or a grid of too many points.
    """
    names, weight = list(scores), torch.tensor(sorted(set(grid)), dtype=torch.float64)
    if not names or len(weight) ** len(names) > _MOST or bool((weight < 0).any()):
        raise UserError(
            f"{len(names)} rewards with the weights {weight.tolist()} cannot be searched: give at least one "
            f"reward, weights that are not negative, and at most {_MOST} combinations"
        )
    table = _table(scores, oracle)
    covariance = torch.cov(table)
    with_oracle, among, spread = covariance[:-1, -1], covariance[:-1, :-1], covariance[-1, -1]
    every = torch.cartesian_prod(*[weight] * len(names)).reshape(-1, len(names))
    variance = ((every @ among) * every).sum(-1)
    known = variance > 1e-12 * every.square().sum(-1) * among.diagonal().max()
    found = torch.where(known, every @ with_oracle / (variance * spread).sqrt(), -torch.inf)
    if not bool(known.any()):
        raise UserError("no reward varies over these samples, so no weight can be fitted: give other samples")
    equal = found >= found.max() - 1e-9
    best = int(torch.where(equal, every.sum(-1), -1.0).argmax())
    alone = correlation(table[:-1], table[-1:].expand_as(table[:-1])).tolist()
    weights = dict(zip(names, every[best].tolist(), strict=True))
    return Calibration(weights, float(found[best]), dict(zip(names, alone, strict=True)))


def _table(scores: Mapping[str, Tensor], oracle: Tensor) -> Float[Tensor, "columns samples"]:
    """Rewards and oracle, float64, or why they cannot be used."""
    columns = {**scores, "the oracle": oracle}
    if len(oracle) < 3 or any(column.shape != (len(oracle),) for column in columns.values()):
        told = ", ".join(f"{name} {tuple(column.shape)}" for name, column in columns.items())
        raise UserError(f"calibration needs one score per sample from every reward, of at least 3 samples; got {told}")
    for name, column in columns.items():
        if not bool(column.isfinite().all()):
            raise UserError(f"the scores of {name} are not all finite: leave those samples out")
    if float(oracle.double().var()) == 0:
        raise UserError("the oracle gives every sample the same score, so nothing can be fitted to it")
    return torch.stack([column.double().cpu() for column in columns.values()])
