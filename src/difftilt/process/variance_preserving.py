"""Variance-preserving processes: alpha² + sigma² = 1, from a table of noise levels, with the three published tables."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.process.gaussian import GaussianProcess


@dataclass(frozen=True, eq=False)
class VariancePreserving(GaussianProcess):
    """alpha² = abar, sigma² = 1 - abar, from a table of ``alphas_cumprod`` (Ho et al. 2020).

    Table entry k stands at t = (k + 1)/N and t = 0 is exactly clean, so the network's own clock is t·N - 1
    (:meth:`timestep`). Between entries log abar is linear in t.

    Attributes:
        alphas_cumprod: (N,) decreasing values in (0, 1).
        knots: (N + 1,) log abar at t = 0, 1/N, ..., 1, made from it.
    """

    alphas_cumprod: Tensor
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

    def alpha(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return (0.5 * self.log_abar(t)[0]).exp()

    def sigma(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return (-torch.expm1(self.log_abar(t)[0])).clamp(min=0).sqrt()

    def alpha_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return 0.5 * self.alpha(t) * self.log_abar(t)[1]

    def sigma_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        # sigma² = 1 - alpha², hence sigma·sigma_dot = -alpha·alpha_dot
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)


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
