"""The gradient of log E[w(x_0) | x_t] from simulations, without differentiating the weight (arXiv 2602.16198).

With a Gaussian step x_s = m(x_t) + v·z, h(x_t) = E_z[h(m(x_t) + v·z)], and differentiating the density of the step in
place of the integrand gives grad log h(x_t) = J_m(x_t)ᵀ E[w·z]/(v·E[w]): the score-function identity, of which only the
step's mean is differentiated.
"""

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from difftilt.process.gaussian import expand

WeightLaw = Literal["plain", "standardised", "event"]
"""w = exp(r/β); the same of rewards in units of their spread over the draws; or 1 where r reaches a threshold."""

SMALLEST_SPREAD = 1e-12
"""Of rewards, in their own units: less counts as none."""


def draw_weights(
    scores: Float[Tensor, "rows draws"],
    law: WeightLaw,
    temperature: float,
    threshold: float = 0.0,
    floor: float = 1e-3,
) -> Float[Tensor, "rows draws"]:
    """Self-normalised weights of the draws of each row, float64; a score that is NaN is missing and weighs nothing.

    Plain: softmax(r/β). Standardised: softmax((r - mean r)/(sd r·β)), mean and population standard deviation over the
    row's own draws; equal scores have equal weights. Event: 1{r >= threshold}/(draws·max(share, floor)) with ``share``
    that of the draws for which it holds; below the floor they sum to less than 1, and without such a draw to 0.

    Args:
        scores: of the draws.
        law: which of the three.
        temperature: β, in units of the reward; of its standard deviations for ``standardised``.
        threshold: of the event, in units of the reward.
        floor: least share of draws that an event is taken to have.
    """
    missing = scores.isnan()
    known = torch.where(missing, -torch.inf, scores.double())
    if law == "event":
        hit = (known >= threshold).double()
        return hit / (hit.shape[1] * hit.mean(1, keepdim=True).clamp(min=floor))
    # relative to the largest, so that equal scores differ by 0 exactly; a row without any has no largest one
    largest = known.amax(1, keepdim=True)
    gap = known - torch.where(largest.isfinite(), largest, 0.0)
    if law == "standardised":
        gap = gap / _spread(gap)
    return (gap / temperature).softmax(1).nan_to_num(nan=0.0)


def _spread(gap: Float[Tensor, "rows draws"]) -> Float[Tensor, "rows 1"]:
    """Population standard deviation over the finite entries of each row, at least ``SMALLEST_SPREAD``."""
    known = gap.isfinite()
    count = known.sum(1, keepdim=True)
    finite = torch.where(known, gap, 0.0)
    mean = finite.sum(1, keepdim=True) / count
    square = torch.where(known, finite - mean, 0.0).square().sum(1, keepdim=True) / count
    return square.sqrt().clamp(min=SMALLEST_SPREAD)


def noise_score(
    weight: Float[Tensor, "rows draws"], noise: Shaped[Tensor, "rows draws *shape"], std: Float[Tensor, " rows"]
) -> Float[Tensor, "rows *shape"]:
    """Σ_m W_m·z_m/v: what the Jacobian of the step's mean carries back to the gradient of log h.

    Args:
        weight: normalised over the draws of each row.
        noise: that made them, x_s = mean + std·noise.
        std: v, positive.
    """
    total = (expand_draws(weight, noise) * noise).sum(1)
    return total / expand(std, total)


def expand_draws(weight: Float[Tensor, "rows draws"], like: Tensor) -> Tensor:
    """(rows, draws) -> (rows, draws, 1, ...) in the dtype of ``like``."""
    return weight.to(like).reshape(*weight.shape, *[1] * (like.dim() - 2))


def antithetic(noise: Shaped[Tensor, "rows half *shape"]) -> Shaped[Tensor, "rows draws *shape"]:
    """The draws with their negatives in front: what is even in the noise then cancels exactly."""
    return torch.cat([-noise, noise], 1)
