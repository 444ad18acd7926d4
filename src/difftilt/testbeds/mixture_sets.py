"""Rewards of sets of vectors: closeness to a Gaussian, and variety over the modes of a mixture."""

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.models.mixture import GaussianMixture
from difftilt.rewards import FrechetReward, ReferenceSet, VendiReward
from difftilt.statistics import rbf_kernel


def closeness(centre: Float[Tensor, " dim"], std: float) -> FrechetReward:
    """Minus the squared Fréchet distance of the samples to N(centre, std²·I), whose moments are known."""
    return FrechetReward(ReferenceSet.gaussian(centre, std**2 * torch.eye(len(centre))))


def variety(mixture: GaussianMixture | None) -> VendiReward:
    """Vendi score of the membership in the modes, at most their number; None is an RBF kernel on the coordinates."""
    if mixture is None:
        return VendiReward(kernel=rbf_kernel(1.0))
    return VendiReward(lambda media: membership(media, mixture))


def membership(x: Float[Tensor, "batch dim"], mixture: GaussianMixture) -> Float[Tensor, "batch modes"]:
    """Softmax over the modes of -|x - mode|²/(2·(3·std)²), float64: bounded, so leaving the data is worth little."""
    gap = torch.cdist(x.double(), mixture.means.double()).square()
    return torch.softmax(-gap / (2 * (3 * mixture.std) ** 2), dim=1)
