"""Regression of centred implicit rewards on centred external ones (CRD, arXiv 2603.14128).

The optimum of reward maximisation under a KL penalty has r = beta·log(p/p_old) + beta·log Z(prompt). Subtracting an
average over samples of one prompt removes the unknown Z, so that the differences can be regressed on one another:

    s_c = s - Σ_j p_j s_j,   r_c = r - Σ_j p_j r_j,   loss = (beta·s_c - r_c)²,

where the average of s carries no gradient. A *cell* is the set of rows that one average is over: the samples of a
prompt at one noise level. Any weights p that add up to 1 in a cell will do; zero loss in all pairs is the same thing.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.statistics.folds import compact, segment_count, segment_max, segment_softmax, segment_sum
from difftilt.trees import Batched

Rows = Float[Tensor, " rows"]
Cell = Int[Tensor, " rows"]
Columns = Float[Tensor, "rows directions"]

Form = Literal["mse", "bce"]
"""Squared error of the two centred rewards, or binary cross entropy of beta·s_c as a logit with sigmoid(r_c)."""


@dataclass(frozen=True)
class Baselines(Batched):
    """What is subtracted in the cell of each row, one column per direction; no gradient.

    Attributes:
        implicit: Σ_j p_j s_j.
        external: Σ_j p_j r_j.
    """

    implicit: Columns
    external: Columns


def baseline_weights(external: Rows, advantage: Rows, cell: Cell, temperature: float | None) -> Columns:
    """Weight p of every row, which adds up to 1 in its cell: one column, or one for each of two directions; float64.

    None is uniform. A temperature T > 0 gives softmax(r/T) and softmax(-r/T): a baseline of good samples, one of bad.
    At 0 they are softmax(r) of the samples with A > 0, and of those with A < 0 (of all samples, equally, where
    there are none).

    Args:
        external: r, finite.
        advantage: A, whose sign tells good from bad: the sign of r does not where r is a probability.
        cell: label of the average that a row belongs to.
        temperature: in units of r.
    """
    index, count = compact(cell)
    r, a = external.double(), advantage.double()
    if temperature is None:
        return segment_softmax(torch.zeros_like(r), index, count)[:, None]
    if temperature > 0:
        directions = [segment_softmax(sign * r / temperature, index, count) for sign in (1, -1)]
    else:
        directions = [_softmax_of(r, sign * a > 0, index, count) for sign in (1, -1)]
    return torch.stack(directions, dim=1)


def _softmax_of(r: Tensor, kept: Tensor, index: Tensor, count: int) -> Tensor:
    """Softmax over the kept rows of each segment, uniform over a segment that keeps none."""
    some = segment_max(kept.double(), index, count)[index] > 0
    weight = segment_softmax(torch.where(kept, r, -torch.inf), index, count)
    return torch.where(some, weight, 1 / segment_count(index, count)[index].double())


def cell_baselines(
    implicit: Rows, external: Rows, advantage: Rows, cell: Cell, temperature: float | None = None
) -> Baselines:
    """Weighted averages of s and of r in the cell of every row; arguments as in :func:`baseline_weights`."""
    weights = baseline_weights(external, advantage, cell, temperature)
    index, count = compact(cell)

    def average(values: Tensor) -> Tensor:
        return segment_sum(weights * values.detach().double()[:, None], index, count)[index]

    return Baselines(average(implicit), average(external))


def centred_loss(implicit: Rows, external: Rows, baselines: Baselines, *, beta: float, form: Form = "mse") -> Rows:
    """The loss of each row, averaged over the directions of its baselines.

    With uniform weights and ``mse`` the gradient is the same whether or not the baseline carries one, because the
    residuals of a cell then add up to 0; with other weights, or ``bce``, it is not, and the method has none.

    Args:
        implicit: s, with gradient.
        external: r.
        baselines: of the cells that the rows belong to.
        beta: scale between the two, positive: at the optimum s_c = r_c/beta.
        form: see :data:`Form`.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta} must be positive: it divides the external reward")
    s = beta * (implicit.double()[:, None] - baselines.implicit)
    r = (external.detach().double()[:, None] - baselines.external).detach()
    if form == "mse":
        loss = (s - r).square()
    else:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(s, r.sigmoid(), reduction="none")
    return loss.mean(1).to(implicit)
