"""Gaussian corruption x_t = alpha_t·x_0 + sigma_t·eps, and every conversion between the names of its denoiser.

t = 0 is data, t = 1 is noise. ``alpha`` and ``sigma`` are the signal and noise scale; ``alpha_dot``, ``sigma_dot``
their derivatives with respect to t. Coefficients are computed in the dtype of t, states in float32 or better.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self, cast

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.process.protocol import NoiseLaw, PredictionKind
from difftilt.trees import Batched

NO_LOGITS = "a Gaussian process has no logits: its predictions are epsilon, x0, v, velocity or score"


def expand(coefficient: Float[Tensor, " batch"], like: Tensor) -> Tensor:
    """(batch,) -> (batch, 1, ..., 1) in the dtype and on the device of ``like``, to broadcast over its dimensions."""
    return coefficient.to(like).reshape(-1, *[1] * (like.dim() - 1))


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it came in half precision; densities and conversions need that much."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class GaussianProcess:
    """Base of the Gaussian processes: subclasses give the four coefficients, everything else follows from them."""

    noise_law: NoiseLaw = "normal"
    point_prior: bool = False

    def alpha(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Signal scale."""
        raise NotImplementedError

    def sigma(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Noise scale."""
        raise NotImplementedError

    def alpha_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """D alpha / dt."""
        raise NotImplementedError

    def sigma_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """D sigma / dt."""
        raise NotImplementedError

    def scales(self, t: Float[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Signal and noise scale together."""
        return self.alpha(t), self.sigma(t)

    def rates(self, t: Float[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Their derivatives with respect to t."""
        return self.alpha_dot(t), self.sigma_dot(t)

    def prior(self, noise: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """x_1 = sigma(1)·noise: the law of pure noise, without the trace of data that a finite schedule leaves."""
        return expand(self.sigma(torch.ones(len(noise), device=noise.device)), noise) * noise

    def corrupt(
        self, x_0: Float[Tensor, "batch *shape"], t: Float[Tensor, " batch"], noise: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        """x_t = alpha_t·x_0 + sigma_t·noise."""
        return expand(self.alpha(t), x_0) * x_0 + expand(self.sigma(t), x_0) * noise

    def renoise(
        self,
        x_s: Float[Tensor, "batch *shape"],
        s: Float[Tensor, " batch"],
        tau: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch *shape"],
    ) -> Float[Tensor, "batch *shape"]:
        """x_tau = a·x_s + b·noise with a = alpha_tau/alpha_s and b² = sigma_tau² - (a·sigma_s)², for tau >= s."""
        a, b = self.renoise_scales(s, tau)
        return expand(a, x_s) * x_s + expand(b, x_s) * noise

    def renoise_scales(self, s: Float[Tensor, " batch"], tau: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The pair (a, b) of :meth:`renoise`, each (batch,)."""
        a = self.alpha(tau) / self.alpha(s)
        b = (self.sigma(tau) ** 2 - (a * self.sigma(s)) ** 2).clamp(min=0).sqrt()
        return a, b

    def renoise_velocity(
        self,
        x_s: Float[Tensor, "batch *shape"],
        s: Float[Tensor, " batch"],
        tau: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch *shape"],
    ) -> Float[Tensor, "batch *shape"]:
        """The derivative d x_tau / d tau of :meth:`renoise` at fixed x_s and noise: a'·x_s + b'·noise, for tau > s.

        Its mean given x_tau is the marginal velocity at tau, so a network that sees x_tau can regress it.
        """
        a, b = self.renoise_scales(s, tau)
        a_dot = self.alpha_dot(tau) / self.alpha(s)
        b_dot = (self.sigma(tau) * self.sigma_dot(tau) - a * a_dot * self.sigma(s) ** 2) / b
        return expand(a_dot, x_s) * x_s + expand(b_dot, x_s) * noise

    def target(
        self,
        kind: PredictionKind,
        x_0: Float[Tensor, "batch *shape"],
        t: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch *shape"],
    ) -> Float[Tensor, "batch *shape"]:
        """What a network of the named kind should say at ``corrupt(x_0, t, noise)``.

        Written from the pair (x_0, noise), so it is exact where conversions are singular (v at t = 0).
        """
        if kind == "epsilon":
            return noise
        if kind == "x0":
            return x_0
        alpha, sigma = expand(self.alpha(t), x_0), expand(self.sigma(t), x_0)
        if kind == "v":
            return alpha * noise - sigma * x_0
        if kind == "velocity":
            return expand(self.alpha_dot(t), x_0) * x_0 + expand(self.sigma_dot(t), x_0) * noise
        if kind == "score":
            return -noise / sigma
        raise ValueError(NO_LOGITS)

    def predict(
        self,
        output: Float[Tensor, "batch *shape"],
        x_t: Float[Tensor, "batch *shape"],
        t: Float[Tensor, " batch"],
        kind: PredictionKind,
    ) -> "GaussianPrediction":
        """The prediction that ``output`` stands for; half precision is raised to float32 here.

        Raises:
            ValueError: if ``kind`` is not a continuous one.
        """
        if kind == "logits":
            raise ValueError(NO_LOGITS)
        return GaussianPrediction(self, at_least_float32(output), kind, at_least_float32(x_t), t)


@dataclass(frozen=True)
class RectifiedFlow(GaussianProcess):
    """alpha = 1 - t, sigma = t; the velocity is eps - x_0 (Liu et al. 2022, Lipman et al. 2022)."""

    def alpha(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return 1 - t

    def sigma(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return t

    def alpha_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return torch.ones_like(t)


@dataclass(frozen=True, eq=False)
class VariancePreserving(GaussianProcess):
    """alpha² = abar, sigma² = 1 - abar, from a table of ``alphas_cumprod`` (Ho et al. 2020).

    Table entry k stands at t = (k + 1)/N and t = 0 is exactly clean, so the network's own clock is t·N - 1
    (:meth:`timestep`). Between entries log abar is linear in t.

    Attributes:
        alphas_cumprod: (N,) decreasing values in (0, 1).
        prior_std: standard deviation of the state that sampling starts from; None is sigma(1). Samplers that start from
            N(0, I) on a schedule that keeps a trace of data have 1.
        knots: (N + 1,) log abar at t = 0, 1/N, ..., 1, made from it.
    """

    alphas_cumprod: Tensor
    prior_std: float | None = field(default=None, kw_only=True)
    knots: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.double().cpu()
        falling = bool((table[1:] <= table[:-1]).all())
        if table.dim() != 1 or not falling or bool((table <= 0).any()) or bool((table >= 1).any()):
            raise ValueError("alphas_cumprod must be a non-increasing vector of values in (0, 1)")
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "knots", torch.cat([torch.zeros(1, dtype=torch.float64), table.log()]))

    @property
    def steps(self) -> int:
        """N, the number of training noise levels."""
        return len(self.alphas_cumprod)

    def prior(self, noise: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        return super().prior(noise) if self.prior_std is None else self.prior_std * noise

    def timestep(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The network's own clock, 0..N-1, for times on the table."""
        return t * self.steps - 1

    def time(self, timestep: Tensor) -> Tensor:
        """Inverse of :meth:`timestep`, float64."""
        return (timestep.double() + 1) / self.steps

    def log_abar(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """Log abar and its derivative with respect to t, each (batch,)."""
        knots = self.knots.to(t)
        place = t * self.steps
        # a time on the table belongs to the interval below, which a falling step crosses; the slack is float32 rounding
        left = (place - self.steps * 2.0**-23).floor().clamp(0, self.steps - 1).long()
        slope = knots[left + 1] - knots[left]
        return knots[left] + slope * (place - left), slope * self.steps

    def scales(self, t: Float[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        level, _ = self.log_abar(t)  # looked up once for both
        return (0.5 * level).exp(), (-torch.expm1(level)).clamp(min=0).sqrt()

    def rates(self, t: Float[Tensor, " batch"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        (alpha, sigma), (_, slope) = self.scales(t), self.log_abar(t)
        alpha_dot = 0.5 * alpha * slope
        # sigma² = 1 - alpha², hence sigma·sigma_dot = -alpha·alpha_dot
        return alpha_dot, -alpha * alpha_dot / sigma

    def alpha(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return self.scales(t)[0]

    def sigma(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return self.scales(t)[1]

    def alpha_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return self.rates(t)[0]

    def sigma_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return self.rates(t)[1]


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> VariancePreserving:
    """Betas linear from ``first`` to ``last`` (Ho et al. 2020)."""
    betas = torch.linspace(first, last, steps, dtype=torch.float64)
    return VariancePreserving((1 - betas).cumprod(0))


def scaled_linear_schedule(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> VariancePreserving:
    """Square roots of the betas linear (Rombach et al. 2022)."""
    betas = torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64) ** 2
    return VariancePreserving((1 - betas).cumprod(0))


def cosine_schedule(steps: int = 1000, offset: float = 0.008, largest_beta: float = 0.999) -> VariancePreserving:
    """Abar proportional to cos², betas capped (Nichol and Dhariwal 2021)."""
    place = (torch.arange(steps + 1, dtype=torch.float64) / steps + offset) / (1 + offset)
    level = (place * math.pi / 2).cos() ** 2
    betas = (1 - level[1:] / level[:-1]).clamp(max=largest_beta)
    return VariancePreserving((1 - betas).cumprod(0))


@dataclass(frozen=True)
class GaussianPrediction(Batched):
    """What one evaluation says of x_0, whatever the network's own parametrisation.

    The pair (x0, epsilon) with x_t = alpha·x0 + sigma·epsilon is the hub of all conversions; the name that the network
    itself predicts is returned untouched. Where the algebra is singular (epsilon at alpha = 0, x0 at sigma = 0) the
    result is not finite: kernels are not evaluated there.
    """

    process: GaussianProcess
    output: Float[Tensor, "batch *shape"]
    kind: PredictionKind
    x_t: Float[Tensor, "batch *shape"]
    t: Float[Tensor, " batch"]

    @cached_property
    def _scales(self) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.process.scales(self.t)
        return expand(alpha, self.x_t), expand(sigma, self.x_t)

    @cached_property
    def _rates(self) -> tuple[Tensor, Tensor]:
        alpha_dot, sigma_dot = self.process.rates(self.t)
        return expand(alpha_dot, self.x_t), expand(sigma_dot, self.x_t)

    @property
    def x0(self) -> Float[Tensor, "batch *shape"]:
        """E[x_0 | x_t]."""
        alpha, sigma = self._scales
        if self.kind == "x0":
            return self.output
        if self.kind == "v":
            return (alpha * self.x_t - sigma * self.output) / (alpha**2 + sigma**2)
        if self.kind == "velocity":
            alpha_dot, sigma_dot = self._rates
            return (sigma_dot * self.x_t - sigma * self.output) / (alpha * sigma_dot - sigma * alpha_dot)
        return (self.x_t - sigma * self.epsilon) / alpha

    @property
    def epsilon(self) -> Float[Tensor, "batch *shape"]:
        """E[eps | x_t]."""
        alpha, sigma = self._scales
        if self.kind == "epsilon":
            return self.output
        if self.kind == "score":
            return -sigma * self.output
        if self.kind == "v":
            return (sigma * self.x_t + alpha * self.output) / (alpha**2 + sigma**2)
        if self.kind == "velocity":
            alpha_dot, sigma_dot = self._rates
            return (alpha * self.output - alpha_dot * self.x_t) / (alpha * sigma_dot - sigma * alpha_dot)
        return (self.x_t - alpha * self.output) / sigma

    @property
    def velocity(self) -> Float[Tensor, "batch *shape"]:
        """alpha_dot·x0 + sigma_dot·epsilon: the probability-flow ODE is dx/dt = velocity."""
        if self.kind == "velocity":
            return self.output
        alpha_dot, sigma_dot = self._rates
        return alpha_dot * self.x0 + sigma_dot * self.epsilon

    @property
    def v(self) -> Float[Tensor, "batch *shape"]:
        """alpha·epsilon - sigma·x0 (Salimans and Ho 2022)."""
        if self.kind == "v":
            return self.output
        alpha, sigma = self._scales
        return alpha * self.epsilon - sigma * self.x0

    @property
    def score(self) -> Float[Tensor, "batch *shape"]:
        """Gradient of log p_t(x_t): -epsilon/sigma."""
        if self.kind == "score":
            return self.output
        return -self.epsilon / self._scales[1]

    def as_kind(self, kind: PredictionKind) -> Float[Tensor, "batch *shape"]:
        """The prediction under the named parametrisation."""
        if kind == "logits":
            raise ValueError(NO_LOGITS)
        return getattr(self, kind)

    def tilted(self, gradient: Float[Tensor, "batch *shape"]) -> Self:
        """What is predicted of a law whose score is larger by ``gradient``: epsilon - sigma·gradient, and x0 with it.

        For p_t(x)·h(x) the gradient is that of log h. A row whose gradient is 0 keeps its output bit for bit. Not
        finite where alpha is 0, as the conversion from epsilon to x0.
        """
        # conversions are linear in (x_t, output): what the output moves by is the conversion of what epsilon moves by
        moved = -self._scales[1] * gradient
        difference = GaussianPrediction(self.process, moved, "epsilon", torch.zeros_like(self.x_t), self.t)
        return replace(self, output=self.output + difference.as_kind(self.kind))

    def x0_noise_shape(self) -> tuple[int, ...]:
        raise TypeError("a continuous prediction is a point, not a law: draw x_0 by completing the chain")

    def draw_x0(self, noise: Tensor) -> Tensor:
        raise TypeError("a continuous prediction is a point, not a law: draw x_0 by completing the chain")


def as_gaussian(prediction: object) -> GaussianPrediction:
    """``prediction`` if it is one of a Gaussian process.

    Raises:
        TypeError: for the prediction of another process, e.g. tokens handed to a continuous kernel.
    """
    if not hasattr(type(prediction), "velocity"):  # of the object it would be computed
        raise TypeError(f"this kernel needs a Gaussian process; it was given a {type(prediction).__name__}")
    return cast(GaussianPrediction, prediction)
