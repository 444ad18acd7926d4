"""Kernels: one reverse step from one network evaluation, as a distribution.

Every kernel is ``kernel(prediction, x_t, t, s) -> Step`` with s < t (t = 1 noise, t = 0 data), both of shape (batch,).
The flow kernels are written for any Gaussian process; for rectified flow they are the formulas of their papers. The
reverse SDE that keeps the marginals is dx = (velocity - g²/2·score) dt + g dw, run with dt = s - t < 0.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.process.gaussian import GaussianPrediction, GaussianProcess, as_gaussian, expand
from difftilt.process.masked import TokenPrediction
from difftilt.process.protocol import Prediction
from difftilt.sampling.steps import CategoricalStep, GaussianStep

Times = Float[Tensor, " batch"]


def _sde_step(prediction: GaussianPrediction, g: Times, t: Times, s: Times, score: bool = True) -> GaussianStep:
    """Euler-Maruyama: mean = x + (velocity - g²/2·score)·(s - t), std = g·sqrt(t - s)."""
    drift = prediction.velocity
    if score:
        drift = drift - expand(g**2 / 2, drift) * prediction.score
    mean = prediction.x_t + expand(s - t, drift) * drift
    return GaussianStep(mean, (g * (t - s).sqrt()).to(mean))


@dataclass(frozen=True)
class FlowSDE:
    """g² = a²·(sigma/alpha)·(alpha·sigma_dot - sigma·alpha_dot) (Flow-GRPO, arXiv 2505.05470).

    For rectified flow the last factor is 1 and g = a·sqrt(t/(1 - t)), the paper's form. The factor makes g² a rate for
    every Gaussian process, and g² at a = sqrt(2) the diffusion coefficient of the forward process itself: beta(t) of a
    variance-preserving one. Where alpha is 0, at t = 1, alpha at the end s of the step stands in for it, as in the
    paper's code. The rule is Euler's: where beta·(t - s) is large, as at t = 1 of the cosine schedule, it is unstable,
    and DDIM should be used.

    Attributes:
        a: noise level.
        score_term: False drops the score correction, which breaks the marginals; only to show that it does.
    """

    a: float = 0.7
    score_term: bool = True

    def __call__(self, prediction: Prediction, x_t: Tensor, t: Times, s: Times) -> GaussianStep:
        gaussian = as_gaussian(prediction)
        return _sde_step(gaussian, self.coefficient(gaussian.process, t, s), t, s, self.score_term)

    def coefficient(self, process: GaussianProcess, t: Times, s: Times) -> Times:
        """The diffusion coefficient g at t, (batch,)."""
        noisy, clean = process.sigma(t), process.alpha(t)
        turning = clean * process.sigma_dot(t) - noisy * process.alpha_dot(t)
        safe = torch.where(clean <= 1e-6, process.alpha(s), clean)
        return self.a * (noisy / safe * turning).sqrt()


@dataclass(frozen=True)
class DanceSDE:
    """g = eta, constant (DanceGRPO, arXiv 2505.07818)."""

    eta: float = 0.3
    score_term: bool = True

    def __call__(self, prediction: Prediction, x_t: Tensor, t: Times, s: Times) -> GaussianStep:
        gaussian = as_gaussian(prediction)
        return _sde_step(gaussian, self.coefficient(gaussian.process, t, s), t, s, self.score_term)

    def coefficient(self, process: GaussianProcess, t: Times, s: Times) -> Times:
        """Eta, (batch,)."""
        return torch.full_like(t, self.eta)


@dataclass(frozen=True)
class StepwiseSDE:
    """g = one free rate for every step of a grid (psi of DenseGRPO, arXiv 2601.20218).

    Any positive rates keep the marginals of an exact model: the score term of the drift follows g.

    Attributes:
        times: of the grid at which the steps start, falling, without the last.
        rates: g of each of these steps. A time between two of them has the rate of the nearest: rollout and replay see
            the times of the grid in float32.
    """

    times: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.times) != len(self.rates):
            raise ValueError(f"{len(self.times)} steps need as many rates, got {len(self.rates)}")

    def __call__(self, prediction: Prediction, x_t: Tensor, t: Times, s: Times) -> GaussianStep:
        times, rates = t.new_tensor(self.times), t.new_tensor(self.rates)
        g = rates[(t[:, None] - times).abs().argmin(1)]
        return _sde_step(as_gaussian(prediction), g, t, s)


def largest_rates(process: GaussianProcess, t: Times, s: Times) -> Times:
    """The rate g at which an SDE step keeps nothing of x_t, each (steps,); above it the rule overshoots.

    With the velocity held, the mean of a step is (1 - g²·|alpha_dot|·(t - s)/(2·sigma·turning))·x_t + ..., turning =
    alpha·sigma_dot - sigma·alpha_dot; for rectified flow the bracket is 1 - g²·(t - s)/(2t).
    """
    turning = process.alpha(t) * process.sigma_dot(t) - process.sigma(t) * process.alpha_dot(t)
    return (2 * process.sigma(t) * turning / (-process.alpha_dot(t) * (t - s))).sqrt()


@dataclass(frozen=True)
class CPS:
    """Coefficient-preserving sampling (arXiv 2509.05952): the total noise coefficient of x_s stays exactly sigma_s.

    std = sigma_s·sin(a·π/2), mean = alpha_s·x0 + sqrt(sigma_s² - std²)·epsilon. It does not preserve the marginals (the
    variance shrinks): it only leaves no surplus noise in the image. Scored by squared error, see the ``cps`` preset.
    """

    a: float = 0.7

    def __call__(self, prediction: Prediction, x_t: Tensor, t: Times, s: Times) -> GaussianStep:
        gaussian = as_gaussian(prediction)
        sigma_s = gaussian.process.sigma(s)
        std = sigma_s * math.sin(self.a * math.pi / 2)
        return _towards(gaussian, s, std)


@dataclass(frozen=True)
class DDIM:
    """DDIM with eta (Song et al. 2021); eta = 1 is DDPM's ancestral step, as DDPO uses it (arXiv 2305.13301).

    std = eta·(sigma_s/sigma_t)·sqrt(sigma_t² - (alpha_t/alpha_s)²·sigma_s²),
    mean = alpha_s·x0 + sqrt(sigma_s² - std²)·epsilon.
    For a variance-preserving process std²/eta² is (1 - abar_s)/(1 - abar_t)·(1 - abar_t/abar_s).
    A step to s = 0 has std 0.

    Attributes:
        eta: 0 is deterministic.
        clip_x0: bound of |x0|; epsilon is then recomputed from the clipped x0. None leaves it.
    """

    eta: float = 1.0
    clip_x0: float | None = None

    def __call__(self, prediction: Prediction, x_t: Tensor, t: Times, s: Times) -> GaussianStep:
        gaussian = as_gaussian(prediction)
        std = self.eta * ancestral_std(gaussian, t, s)
        if self.clip_x0 is not None:
            clipped = gaussian.x0.clamp(-self.clip_x0, self.clip_x0)
            gaussian = GaussianPrediction(gaussian.process, clipped, "x0", gaussian.x_t, t)
        step = _towards(gaussian, s, std)
        return step if self.eta > 0 else GaussianStep(step.mean, step.std, deterministic=True)


@dataclass(frozen=True)
class DDPM:
    """The ancestral posterior q(x_s | x_t, x0): DDIM with eta 1, its mean written by the posterior's two coefficients.

    Attributes:
        clip_x0: bound of |x0|, 1 for policies whose actions are normalised to [-1, 1]; None leaves it.
    """

    clip_x0: float | None = None

    def __call__(self, prediction: Prediction, x_t: Tensor, t: Times, s: Times) -> GaussianStep:
        gaussian = as_gaussian(prediction)
        process = gaussian.process
        ratio = process.alpha(t) / process.alpha(s)
        sigma_t2, sigma_s2 = process.sigma(t) ** 2, process.sigma(s) ** 2
        x0 = gaussian.x0 if self.clip_x0 is None else gaussian.x0.clamp(-self.clip_x0, self.clip_x0)
        from_x0 = process.alpha(s) * (1 - ratio**2 * sigma_s2 / sigma_t2)
        from_x_t = ratio * sigma_s2 / sigma_t2
        mean = expand(from_x0, x0) * x0 + expand(from_x_t, x0) * gaussian.x_t
        return GaussianStep(mean, ancestral_std(gaussian, t, s).to(mean))


def ancestral_std(prediction: GaussianPrediction, t: Times, s: Times) -> Times:
    """Standard deviation of q(x_s | x_t, x_0), (batch,)."""
    process = prediction.process
    ratio = process.alpha(t) / process.alpha(s)
    sigma_t, sigma_s = process.sigma(t), process.sigma(s)
    return sigma_s / sigma_t * (sigma_t**2 - (ratio * sigma_s) ** 2).clamp(min=0).sqrt()


def _towards(prediction: GaussianPrediction, s: Times, std: Times) -> GaussianStep:
    """alpha_s·x0 + sqrt(sigma_s² - std²)·epsilon with fresh noise std, so that the total noise is sigma_s."""
    process = prediction.process
    kept = (process.sigma(s) ** 2 - std**2).clamp(min=0).sqrt()
    x0 = prediction.x0
    mean = expand(process.alpha(s), x0) * x0 + expand(kept, x0) * prediction.epsilon
    return GaussianStep(mean, std.to(mean))


@dataclass(frozen=True)
class Euler:
    """x_s = alpha_s·x0 + sigma_s·epsilon: deterministic, first order.

    For rectified flow this is x_t + (s - t)·velocity, Euler's rule; for others DDIM's, which may end at sigma = 0.
    """

    def __call__(self, prediction: Prediction, x_t: Tensor, t: Times, s: Times) -> GaussianStep:
        step = _towards(as_gaussian(prediction), s, torch.zeros_like(s))
        return GaussianStep(step.mean, step.std, deterministic=True)


@dataclass(frozen=True)
class Unmasking:
    """Ancestral step of a masked model (MDLM): a masked token becomes v with p(v)·(m_t - m_s)/m_t, else stays masked.

    Where the process masks bonds later, m is that of v: a bond is revealed with (t^w - s^w)/t^w (PepTune). Visible
    tokens are kept. The step to s = 0 leaves no mask.
    """

    def __call__(self, prediction: Prediction, x_t: Tensor, t: Times, s: Times) -> CategoricalStep:
        if not isinstance(prediction, TokenPrediction):
            raise TypeError(f"unmasking needs a masked process; it was given a {type(prediction).__name__}")
        process = prediction.process
        if process.one_class:
            stay = (process.mask_probability(s) / process.mask_probability(t)).clamp(max=1)[:, None, None]
            remain = stay[..., 0].log()
        else:
            stay = (process.symbol_mask_probability(s) / process.symbol_mask_probability(t)).clamp(max=1)[:, None]
            left = (prediction.log_probs.exp() * stay).sum(-1)
            # the inner floor keeps the gradient finite where nothing is left
            remain = torch.where(left > 0, left.clamp(min=torch.finfo(left.dtype).tiny).log(), -torch.inf)
        masked = process.is_masked(prediction.x_t)
        tokens = prediction.log_probs + torch.where(masked[..., None], torch.log1p(-stay), 0.0)
        remain = torch.where(masked, remain, -torch.inf)
        relaxed = prediction.x_t if prediction.x_t.is_floating_point() else None
        return CategoricalStep(torch.cat([tokens, remain[..., None]], dim=-1), relaxed)
