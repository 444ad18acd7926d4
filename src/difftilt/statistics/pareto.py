"""Dominance between vectors of scores, larger is better in every column: fronts, ranks and archives."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scores = Float[Tensor, "rows objectives"]


def dominates(
    a: Float[Tensor, "rows objectives"], b: Float[Tensor, "others objectives"]
) -> Bool[Tensor, "rows others"]:
    """Whether row i of ``a`` is at least as good as row j of ``b`` in every objective, and better in one."""
    gap = a[:, None] - b
    return (gap >= 0).all(-1) & (gap > 0).any(-1)


def front(scores: Scores) -> Bool[Tensor, " rows"]:
    """Rows that no other row dominates; equal rows are all in or all out.

    >>> front(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])).tolist()
    [True, True, False, True]
    """
    return ~dominates(scores, scores).any(0)


def pareto_rank(scores: Scores, archive: Float[Tensor, "members objectives"]) -> Float[Tensor, "rows objectives"]:
    """For each objective the share of the archive that a row is at least as good as, in [0, 1]; 1 if it is empty.

    The vector reward of PepTune (arXiv 2412.17780).
    """
    if len(archive) == 0:
        return torch.ones_like(scores, dtype=torch.float64)
    return (scores[:, None] >= archive).double().mean(1)


def insert(
    archive: Float[Tensor, "members objectives"], scores: Scores
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " entering"]]:
    """Members of the archive that stay, and rows of ``scores`` that enter: together the front of both.

    Rows that equal a member or one another are not told apart: whoever keeps samples beside their scores looks for
    copies among these.
    """
    good = front(torch.cat([archive, scores])).nonzero()[:, 0]
    members = len(archive)
    return good[good < members], good[good >= members] - members
