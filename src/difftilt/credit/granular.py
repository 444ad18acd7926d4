"""One advantage from several views of a sample: what each completion of one perturbed state was worth."""

from collections.abc import Mapping, Sequence

import torch

from difftilt.credit.group import Group, Normaliser, Rewards, aggregate


def multi_view_advantage(
    views: Sequence[Mapping[str, Rewards]],
    weights: Mapping[str, float],
    group: Group,
    *,
    normaliser: Normaliser,
    clip: float | None = None,
) -> Rewards:
    """Σ_view Σ_component w·A(r of the view), clipped once, at the end (G2RPO, arXiv 2510.01982, MGAI).

    Every component of every view is compared within its groups on its own, so an offset or a positive scale of one of
    them changes nothing. The sum is not divided by the number of views: J views that agree give J times the advantage.

    Args:
        views: components of the reward under each view, each (samples,).
        weights: of the components.
        group: of each sample.
        normaliser: of each block; in the paper the sample std with eps 1e-8, and no clip.
        clip: bound of the absolute sum; None leaves it.
    """
    total = torch.stack([aggregate(view, weights, group, normaliser=normaliser) for view in views]).sum(0)
    return total if clip is None else total.clamp(-clip, clip)
