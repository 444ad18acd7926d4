"""Losses on pairs of samples, of which one is preferred."""

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
