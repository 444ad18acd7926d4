"""Denoising errors of finished samples, and the rewards that are implied by them.

A finished sample is re-noised to (x_t, t); how badly a network predicts its way back is, up to a weight of t, a bound
on its negative log-likelihood. The difference of two networks' errors on one and the same (x_t, t) is therefore an
estimate of a log-ratio, the implicit reward of preference learning on the forward process:

    s(x_0) = error_old - error_current   ~   log p_current(x_0)/p_old(x_0)   up to scale.

Sum or mean over dimensions is never implied: published scales (beta of Diffusion-DPO near 5000, of GDRO near 10) differ
by the number of dimensions and belong to one convention each.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from difftilt.process.gaussian import GaussianPrediction, at_least_float32, expand
from difftilt.sampling.protocol import Reduction
from difftilt.sampling.steps import reduce_dims

ErrorSpace = Literal["x0", "velocity"]
"""What the error is of: the clean latent, or the velocity (for rectified flow eps - x_0)."""

SMALLEST_WEIGHT = 1e-5
"""Floor of the self-normaliser: mean absolute error, in units of what is predicted."""

Rows = Float[Tensor, " rows"]
States = Float[Tensor, "rows *shape"]


def in_space(prediction: GaussianPrediction, space: ErrorSpace) -> States:
    """The prediction as clean latent or as velocity."""
    return prediction.x0 if space == "x0" else prediction.velocity


def true_in_space(at: GaussianPrediction, x_0: States, space: ErrorSpace) -> States:
    """x_0, or the velocity of the path from x_0 through x_t: what the network would say if it knew x_0."""
    known = at_least_float32(x_0)
    return in_space(GaussianPrediction(at.process, known, "x0", at.x_t, at.t), space)


def squared_error(guess: States, truth: States, *, reduce: Reduction = "mean") -> Rows:
    """|guess - truth|², summed or averaged over the dimensions of a row."""
    return reduce_dims((guess - truth) ** 2, reduce)


def normalised_error(guess: States, truth: States, *, reduce: Reduction = "mean") -> Rows:
    """Squared error over the row's own mean absolute error, which carries no gradient; float64."""
    gap = guess.double() - truth.double()
    weight = reduce_dims(gap.detach().abs(), "mean").clamp(min=SMALLEST_WEIGHT)
    return reduce_dims(gap**2 / expand(weight, gap), reduce)


def denoising_error(
    prediction: GaussianPrediction,
    x_0: States,
    *,
    space: ErrorSpace = "velocity",
    reduce: Reduction = "mean",
    normalised: bool = False,
) -> Rows:
    """Squared error of a prediction at (x_t, t) of a latent x_0 that x_t was made from; float64.

    Two such errors are subtracted: in float32 the difference of two sums over many dimensions would be rounding.

    Args:
        prediction: with or without gradient.
        x_0: clean latents.
        space: see :data:`ErrorSpace`.
        reduce: over the dimensions.
        normalised: divide by the row's own mean absolute error (the self-normaliser of DiffusionNFT and CRD).
    """
    error = normalised_error if normalised else squared_error
    guess, truth = in_space(prediction, space), true_in_space(prediction, x_0, space)
    return error(guess.double(), truth.double(), reduce=reduce)


def implicit_reward(
    current: GaussianPrediction,
    old: GaussianPrediction,
    x_0: States,
    *,
    space: ErrorSpace = "velocity",
    reduce: Reduction = "mean",
    normalised: bool = False,
) -> Rows:
    """Error of ``old`` minus error of ``current`` at the same (x_t, t): exactly 0 where both predict the same.

    Only ``current`` has a gradient. Arguments as in :func:`denoising_error`.
    """
    errors = [denoising_error(one, x_0, space=space, reduce=reduce, normalised=normalised) for one in (old, current)]
    return (errors[0].detach() - errors[1]).to(at_least_float32(x_0))
