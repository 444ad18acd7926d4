"""The loss of DiffusionNFT (arXiv 2509.16117): one implicit positive and one implicit negative branch of a network.

A row is one noise level of one finished sample. With r the probability that the sample is a good one,

    plus  = old + nft_beta·(current - old),    minus = old - nft_beta·(current - old),
    loss  = max_advantage/nft_beta · ( r·|plus - x_0|²/w_plus + (1 - r)·|minus - x_0|²/w_minus ).

Both branches are affine in the prediction with coefficients that add up to 1, so they may be mixed in any
parametrisation of a Gaussian process: x0 here, velocity as an option. For rectified flow x0 = x_t - t·v.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from difftilt.process.gaussian import GaussianPrediction, at_least_float32, expand
from difftilt.sampling.steps import reduce_dims

NFTSpace = Literal["x0", "velocity"]
"""``x0``: the released code, errors of x0 over their own size, which takes the place of a weight of time.
``velocity``: the paper's equation, unweighted, whose minimiser is known in closed form."""

SMALLEST_WEIGHT = 1e-5
"""Floor of the self-normaliser: mean absolute error of x0, in units of the latent."""

Rows = Float[Tensor, " rows"]


@dataclass(frozen=True)
class NFTLoss:
    """The loss of each row and its two errors.

    Attributes:
        value: to be minimised.
        positive: error of the positive branch, before r, detached.
        negative: error of the negative branch, before 1 - r, detached.
    """

    value: Rows
    positive: Rows
    negative: Rows


def nft_loss(
    current: GaussianPrediction,
    old: GaussianPrediction,
    x_0: Float[Tensor, "rows *shape"],
    optimality: Rows,
    *,
    nft_beta: float,
    max_advantage: float = 5.0,
    space: NFTSpace = "x0",
) -> NFTLoss:
    """The loss of each row; errors are means over the dimensions of the latent.

    In ``velocity`` the unique minimiser is v_old + (2/nft_beta)·E[r·(v - v_old) | x_t]; in ``x0`` it differs slightly,
    for the normalisers depend on the residuals. With r = 1/2 and current = old the gradient is exactly 0, row by row.

    Args:
        current: prediction of the trained weights at (x_t, t), with gradient.
        old: of the weights that sampled x_0, at the same (x_t, t); its gradient is cut.
        x_0: clean latents that x_t was made from.
        optimality: r in [0, 1].
        nft_beta: mixing of the branches, positive; smaller extrapolates further.
        max_advantage: the advantage at which r saturates.
        space: see :data:`NFTSpace`.
    """
    if nft_beta <= 0:
        raise ValueError(f"nft_beta={nft_beta} must be positive: at 0 both branches are the old policy")
    anchor, target = _of(old, space).detach(), _target(current, x_0, space)
    move = nft_beta * (_of(current, space) - anchor)
    # written as anchor ± move: both branches are then bit-equal to the anchor where the two networks agree
    error = _normalised_error if space == "x0" else _error
    positive, negative = error(anchor + move, target), error(anchor - move, target)
    weighted = optimality * positive + (1 - optimality) * negative
    value = (max_advantage / nft_beta * weighted).to(anchor)
    return NFTLoss(value, positive.detach().to(anchor), negative.detach().to(anchor))


def _of(prediction: GaussianPrediction, space: NFTSpace) -> Float[Tensor, "rows *shape"]:
    return prediction.x0 if space == "x0" else prediction.velocity


def _target(at: GaussianPrediction, x_0: Tensor, space: NFTSpace) -> Float[Tensor, "rows *shape"]:
    """x_0, or the velocity of the path from x_0 through x_t: what the network would say if it knew x_0."""
    known = at_least_float32(x_0)
    return _of(GaussianPrediction(at.process, known, "x0", at.x_t, at.t), space)


def _error(branch: Tensor, target: Tensor) -> Float[Tensor, " rows"]:
    return reduce_dims((branch - target) ** 2, "mean")


def _normalised_error(branch: Tensor, target: Tensor) -> Float[Tensor, " rows"]:
    """Mean squared error over the row's own mean absolute error, which carries no gradient; float64."""
    gap = branch.double() - target.double()
    weight = reduce_dims(gap.detach().abs(), "mean").clamp(min=SMALLEST_WEIGHT)
    return reduce_dims(gap**2 / expand(weight, gap), "mean")
