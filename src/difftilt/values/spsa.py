"""Gradients of a black box from its values at random pairs of points (SPSA, Spall 1992)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.process.gaussian import expand


def spsa_gradient(
    score: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch *shape"],
    directions: Float[Tensor, "draws batch *shape"],
    size: float,
) -> Float[Tensor, "batch *shape"]:
    """Mean over draws j of (score(x + e·u_j) - score(x - e·u_j))/(2e) · u_j, e the size.

    With u ~ N(0, I) its mean is the gradient of the score smoothed by N(0, e² I): E[u uᵀ] = I. One draw has variance of
    order |gradient|²·dimensions.

    Args:
        score: states -> one number each; called twice per draw.
        x: states.
        directions: standard normal.
        size: e, in units of the state.
    """
    total = torch.zeros_like(x)
    for direction in directions:
        rise = score(x + size * direction) - score(x - size * direction)
        total = total + expand(rise / (2 * size), x) * direction
    return total / len(directions)
