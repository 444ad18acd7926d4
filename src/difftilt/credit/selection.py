"""Which samples of a group form a contrast: the best and the worst, each only if it is good or bad enough."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.statistics.folds import compact, segment_rank


@dataclass(frozen=True)
class Contrast:
    """Of each sample.

    Attributes:
        best: it is the best of its group and passes.
        worst: it is the worst of its group and passes.
        partner: row of the other one where both of its group pass, else -1.
    """

    best: Bool[Tensor, " samples"]
    worst: Bool[Tensor, " samples"]
    partner: Int[Tensor, " samples"]

    @property
    def kept(self) -> Bool[Tensor, " samples"]:
        """Either of the two."""
        return self.best | self.worst


def contrast(
    score: Float[Tensor, " samples"], group: Int[Tensor, " samples"], least: float = 0.5, most: float = -0.5
) -> Contrast:
    """The best of each group if its score is at least ``least``, the worst if its is below ``most``.

    A group gives none, one or two samples (B²-DiffuRL, arXiv 2503.11240). Of equal scores the first is the best and
    the worst; a NaN passes nothing.

    Args:
        score: comparable between groups: normalised per prompt, never within the group.
        group: of each sample.
        least: from which the best passes, in standard deviations of the prompt.
        most: below which the worst passes; at most ``least``.
    """
    if most > least:
        raise ValueError(f"the worst of a group would pass below {most} and the best from {least}: exchange them")
    index, count = compact(group)
    best = (segment_rank(-score, index, count) == 0) & (score >= least)
    worst = (segment_rank(score, index, count) == 0) & (score < most)
    rows = torch.arange(len(score), device=score.device)
    none = torch.full((count,), -1, device=score.device)
    of_best = none.scatter(0, index[best], rows[best])[index]
    of_worst = none.scatter(0, index[worst], rows[worst])[index]
    return Contrast(best, worst, torch.where(best, of_worst, torch.where(worst, of_best, -1)))
