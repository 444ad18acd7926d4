"""Gaussian data N(mean, std²) in one dimension: every denoiser, flow and affine kernel is then known exactly.

All in float64, so that what is measured is the method's error and not rounding.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.models.denoiser import NetworkDenoiser
from difftilt.models.ledger import Ledger
from difftilt.process import GaussianProcess, RectifiedFlow, cosine_schedule, linear_schedule, uniform_grid
from difftilt.process.protocol import Condition
from difftilt.sampling.protocol import Kernel
from difftilt.sampling.steps import GaussianStep

FLOW = RectifiedFlow()
PROCESSES: tuple[GaussianProcess, ...] = (FLOW, linear_schedule(), cosine_schedule())


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, std²)."""

    mean: float = 1.0
    std: float = 0.5

    def law(self, process: GaussianProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * self.mean, ((alpha * self.std) ** 2 + sigma**2).sqrt()

    def x0(self, process: GaussianProcess, x: Float[Tensor, "batch one"], t: Tensor) -> Float[Tensor, "batch one"]:
        """E[x_0 | x_t] = mean + alpha·std²/var(x_t)·(x_t - E[x_t])."""
        mean, std = self.law(process, t)
        return self.mean + (process.alpha(t) * self.std**2 / std**2)[:, None] * (x - mean[:, None])

    def denoiser(self, process: GaussianProcess) -> NetworkDenoiser:
        """The exact denoiser."""

        def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return self.x0(process, x, t)

        return NetworkDenoiser(network, process, "x0", Ledger())

    def flow(self, process: GaussianProcess, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability flow takes x from t to s: the standardised state is constant."""
        (mean_t, std_t), (mean_s, std_s) = self.law(process, t), self.law(process, s)
        return mean_s + std_s * (x - mean_t) / std_t

    def chain(
        self, process: GaussianProcess, kernel: Kernel, grid: Tensor, mean: float, std: float
    ) -> tuple[float, float]:
        """Mean and standard deviation after all steps of ``grid``, from N(mean, std²) at its start, without sampling.

        Every kernel is affine in x here, so two states, 0 and 1, give its slope and intercept; all steps in one batch.
        """
        t, s = grid[:-1].repeat(2), grid[1:].repeat(2)
        x = torch.cat([torch.zeros_like(grid[1:]), torch.ones_like(grid[1:])])[:, None]
        step = kernel(process.predict(self.x0(process, x, t), x, t, "x0"), x, t, s)
        assert isinstance(step, GaussianStep)
        intercepts, ones = step.mean[:, 0].chunk(2)
        variance = std**2
        columns = torch.stack([ones - intercepts, intercepts, step.std.chunk(2)[0]], -1)
        for slope, intercept, fresh in columns.tolist():
            mean = slope * mean + intercept
            variance = slope**2 * variance + fresh**2
        return mean, math.sqrt(variance)

    def chain_error(self, process: GaussianProcess, kernel: Kernel, grid: Tensor) -> float:
        """Largest error of mean and standard deviation at the end of ``grid``, started from the exact law."""
        mean, std = self.law(process, grid[:1])
        exact_mean, exact_std = self.law(process, grid[-1:])
        got = self.chain(process, kernel, grid, float(mean), float(std))
        return max(abs(got[0] - float(exact_mean)), abs(got[1] - float(exact_std)))


def interior(steps: int) -> Float[Tensor, " times"]:
    """From 0.9 to 0.1: away from both ends, where orders are those of smooth problems."""
    return 0.1 + 0.8 * uniform_grid(steps)


def order(coarse: float, fine: float, refinement: float) -> float:
    """P of an error that falls as steps^-p, from the errors of two grids."""
    return math.log(coarse / fine) / math.log(refinement)
