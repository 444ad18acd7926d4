"""The exact reverse step of a Gaussian mixture: a chain without discretisation error, whatever its grid.

p(x_s | x_t) = Σ_k r_k(x_t) ∫ q(x_s | x_t, x_0) p_k(x_0 | x_t) dx_0. The Gaussian posterior of the corruption is
q(x_s | x_t, x_0) = N(c_0·x_0 + c_t·x_t, τ² I) with a = alpha_t/alpha_s, c_t = a·sigma_s²/sigma_t²,
c_0 = alpha_s·(1 - a·c_t), τ² = sigma_s²·(1 - a·c_t); and p_k(x_0 | x_t) = N(mu_k, u I). So component k of the step has
mean c_0·mu_k + c_t·x_t and variance τ² + c_0²·u, equal for all k (FK steering, arXiv 2501.06848, uses such a chain).
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from difftilt.models.mixture import MixturePrediction
from difftilt.process.gaussian import expand
from difftilt.process.protocol import Prediction
from difftilt.sampling.steps import MixtureStep


@dataclass(frozen=True)
class ExactAncestral:
    """Draws x_s from p(x_s | x_t) of a mixture model.

    If x_1 comes from the exact marginal (``GaussianMixture.sample_marginal`` at t = 1), every state of the chain has
    its exact marginal and x_0 the clean law, for any grid. The draw consumes dim + 1 normals per sample.
    """

    def __call__(
        self,
        prediction: Prediction,
        x_t: Float[Tensor, "batch dim"],
        t: Float[Tensor, " batch"],
        s: Float[Tensor, " batch"],
    ) -> MixtureStep:
        if not isinstance(prediction, MixturePrediction):
            raise TypeError(
                "the exact reverse step needs the components of a mixture model, evaluated at guidance 0 or 1; "
                f"it was given a {type(prediction).__name__}: use another kernel"
            )
        process = prediction.process
        ratio = process.alpha(t) / process.alpha(s)
        keep = ratio * process.sigma(s) ** 2 / process.sigma(t) ** 2
        fresh = 1 - ratio * keep
        reach = process.alpha(s) * fresh
        means, variance = prediction.posterior()
        centres = expand(reach, means) * means + expand(keep, means) * prediction.x_t[:, None]
        spread = process.sigma(s) ** 2 * fresh + reach**2 * variance[:, 0].to(reach)
        return MixtureStep(prediction.log_responsibility, centres, spread.sqrt().to(centres))
