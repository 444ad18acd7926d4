"""Losses on pairs of samples, of which one is preferred."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from difftilt.process.gaussian import at_least_float32

Rows = Float[Tensor, " rows"]


def step_preference(log_ratio: Rows, partner: Int[Tensor, " rows"], sign: Rows, beta: float) -> Rows:
    """-log sigmoid(beta·(log_ratio of the preferred - log_ratio of the other)), the same for both rows of a pair.

    The step-wise preference loss of D3PO (arXiv 2311.13231, eq. 15) with the sampling policy in the denominator of the
    ratio. At ratio 1 the gradient of the mean over rows is that of -beta·mean(sign·log p).

    Args:
        log_ratio: log of new over old probability of the step of each row.
        partner: row of the other member of its pair, at the same step.
        sign: 1 where the row is preferred, -1 where its partner is.
        beta: how sharply a difference of log-ratios counts as preference.
    """
    own = at_least_float32(log_ratio)
    return functional.softplus(-beta * sign.to(own) * (own - own[partner]))


def gain_preference(gain: Rows, partner: Int[Tensor, " rows"], sign: Rows, beta: float) -> Rows:
    """-log sigmoid((beta/2)·(gain of the preferred - gain of the other)), the same for both rows of a pair.

    The loss of Diffusion-DPO (arXiv 2311.12908, eq. 14) with its constants in beta.

    Args:
        gain: error of the reference minus error of the current weights at one and the same noise, see
            ``objectives.implicit_reward``.
        partner: row of the other member of its pair, at the same time and noise.
        sign: 1 where the row is preferred, -1 where its partner is.
        beta: belongs to one reduction of the errors: published values of 2000 to 5000 to a mean over dimensions.
    """
    return step_preference(gain, partner, sign, beta / 2)


def kto(gain: Rows, sign: Rows, offset: Rows, beta: float) -> Rows:
    """1 - sigmoid(sign·beta·(gain - offset)): no pair, concave in what is gained, convex in what is lost.

    The loss of Diffusion-KTO (arXiv 2404.04465). Its slope is largest at the offset and vanishes far from it, for a
    positive whose gain is large already as for a negative that was given up.

    Args:
        gain: as in :func:`gain_preference`.
        sign: 1 for what is wanted, -1 for what is not.
        offset: the gain that counts as neither, without gradient.
        beta: sharpness.
    """
    own = at_least_float32(gain)
    return torch.sigmoid(-beta * sign.to(own) * (own - offset.detach().to(own)))


def kto_offset(gain: Rows, sign: Rows, *, classes: bool = False) -> Float[Tensor, ""]:
    """max(0, mean gain), or with ``classes`` the mean of the mean gains of the wanted and of the unwanted rows.

    Gains and signs are those of all rows of an update. A class without rows leaves the mean of the other.
    """
    if not classes:
        return gain.mean().clamp(min=0)
    return torch.stack([gain[sign == one].mean() for one in torch.unique(sign)]).mean()
