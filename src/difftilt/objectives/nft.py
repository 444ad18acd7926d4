"""The loss of DiffusionNFT (arXiv 2509.16117): one implicit positive and one implicit negative branch of a network.

A row is one noise level of one finished sample. With r the probability that the sample is a good one,

    plus  = old + nft_beta·(current - old),    minus = old - nft_beta·(current - old),
    loss  = max_advantage/nft_beta · ( r·|plus - x_0|²/w_plus + (1 - r)·|minus - x_0|²/w_minus ).

Both branches are affine in the prediction with coefficients that add up to 1, so they may be mixed in any
parametrisation of a Gaussian process: x0 here, velocity as an option. For rectified flow x0 = x_t - t·v.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from difftilt.objectives.denoising import ErrorSpace, in_space, normalised_error, squared_error, true_in_space
from difftilt.process.gaussian import GaussianPrediction

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
    space: ErrorSpace = "x0",
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
        space: ``x0`` is the released code, errors over their own size, which takes the place of a weight of time;
            ``velocity`` the paper's equation, unweighted, whose minimiser is known in closed form.
    """
    if nft_beta <= 0:
        raise ValueError(f"nft_beta={nft_beta} must be positive: at 0 both branches are the old policy")
    anchor, target = in_space(old, space).detach(), true_in_space(current, x_0, space)
    move = nft_beta * (in_space(current, space) - anchor)
    # written as anchor ± move: both branches are then bit-equal to the anchor where the two networks agree
    error = normalised_error if space == "x0" else squared_error
    positive, negative = error(anchor + move, target), error(anchor - move, target)
    weighted = optimality * positive + (1 - optimality) * negative
    value = (max_advantage / nft_beta * weighted).to(anchor)
    return NFTLoss(value, positive.detach().to(anchor), negative.detach().to(anchor))
