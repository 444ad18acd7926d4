"""ODE solvers of the probability flow dx = x0·d(alpha) + epsilon·d(sigma), from noise (t = 1) to data (t = 0).

In this form, by differences of alpha and sigma, no schedule has to be differentiated, so a step may begin at alpha = 0
and end at sigma = 0, where velocities of some processes are infinite. Schedule coefficients are computed in float64 on
the CPU; states and the times that a network sees are float32, or float64 if x is.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.models.protocol import Denoiser
from difftilt.process.gaussian import GaussianPrediction, GaussianProcess, as_gaussian, at_least_float32, expand
from difftilt.process.grid import check_grid
from difftilt.process.protocol import Condition

Grid = Float[Tensor, "*rows times"]
Times = Float[Tensor, " batch"]


def gaussian_process(denoise: Denoiser) -> GaussianProcess:
    """The process of ``denoise`` if it is Gaussian.

    Raises:
        TypeError: for tokens, which have no probability flow.
    """
    if not hasattr(denoise.process, "alpha"):
        raise TypeError(f"ODE solvers need a Gaussian process, not {type(denoise.process).__name__}: use a kernel")
    return cast(GaussianProcess, denoise.process)


def columns(grid: Grid, batch: int) -> list[Times]:
    """The times of ``grid``, one float64 CPU tensor (batch,) per position, for a shared grid or one per sample."""
    check_grid(grid)
    if grid.dim() == 2 and len(grid) != batch:
        raise ValueError(f"the grid has {len(grid)} rows for {batch} samples: give one row each, or one grid for all")
    return list(grid.detach().double().cpu().expand(batch, -1).unbind(-1))


def _evaluate(denoise: Denoiser, x: Tensor, t: Times, condition: Condition) -> GaussianPrediction:
    return as_gaussian(denoise(x, t.to(x), condition))


def _increment(prediction: GaussianPrediction, process: GaussianProcess, t: Times, s: Times) -> Tensor:
    """x0·(alpha_s - alpha_t) + epsilon·(sigma_s - sigma_t)."""
    x0, (alpha_s, sigma_s), (alpha_t, sigma_t) = prediction.x0, process.scales(s), process.scales(t)
    return expand(alpha_s - alpha_t, x0) * x0 + expand(sigma_s - sigma_t, x0) * prediction.epsilon


@dataclass(frozen=True)
class EulerSolver:
    """x_s = alpha_s·x0 + sigma_s·epsilon: first order; deterministic DDIM, and Euler's rule for rectified flow."""

    def __call__(
        self, denoise: Denoiser, x: Float[Tensor, "batch *shape"], condition: Condition, grid: Grid
    ) -> Float[Tensor, "batch *shape"]:
        process, x = gaussian_process(denoise), at_least_float32(x)
        times = columns(grid, len(x))
        for t, s in pairwise(times):
            condition = denoise.prepare(x, t.to(x), condition)
            x = x + _increment(_evaluate(denoise, x, t, condition), process, t, s)
        return x


@dataclass(frozen=True)
class Heun:
    """The trapezoidal rule with an Euler predictor (Karras et al. 2022, algorithm 1): second order.

    Two evaluations a step; one for a step to sigma = 0, where epsilon of some parametrisations is not defined. That one
    Euler step costs an error of the second order.
    """

    def __call__(
        self, denoise: Denoiser, x: Float[Tensor, "batch *shape"], condition: Condition, grid: Grid
    ) -> Float[Tensor, "batch *shape"]:
        process, x = gaussian_process(denoise), at_least_float32(x)
        times = columns(grid, len(x))
        for t, s in pairwise(times):
            condition = denoise.prepare(x, t.to(x), condition)
            first = _increment(_evaluate(denoise, x, t, condition), process, t, s)
            ends = process.sigma(s) <= 0
            if bool(ends.all()):
                x = x + first
                continue
            # a row that ends is evaluated at its start again, which makes the average its Euler step
            rows = ends.to(x.device).reshape(-1, *[1] * (x.dim() - 1))
            there = _evaluate(denoise, torch.where(rows, x, x + first), torch.where(ends, t, s), condition)
            x = x + (first + _increment(there, process, t, s)) / 2
        return x


@dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++(2M), data prediction (Lu et al. 2022, algorithm 2): second order with one evaluation a step.

    With lambda = log(alpha/sigma), h = lambda_s - lambda_t and r = h_previous/h,

        x_s = (sigma_s/sigma_t)·x_t + (alpha_s - alpha_t·sigma_s/sigma_t)·D,
        D   = x0 + (x0 - x0_previous)/(2r).

    The second coefficient is the paper's -alpha_s·(exp(-h) - 1) without the infinite h of a first step from alpha = 0
    or a last one to sigma = 0. In these limits: D = x0 on the first step and on one to sigma = 0, and after a step
    from alpha = 0 (1/r = 0). Steps of length zero leave the state and the memory as they are.

    Attributes:
        lower_order_final: take D = x0 on the last step of any grid, which is steadier with few steps.
    """

    lower_order_final: bool = True

    def __call__(
        self, denoise: Denoiser, x: Float[Tensor, "batch *shape"], condition: Condition, grid: Grid
    ) -> Float[Tensor, "batch *shape"]:
        process, x = gaussian_process(denoise), at_least_float32(x)
        times = columns(grid, len(x))
        memory: tuple[Tensor, Times] | None = None
        for position, (t, s) in enumerate(pairwise(times)):
            condition = denoise.prepare(x, t.to(x), condition)
            x0 = _evaluate(denoise, x, t, condition).x0
            last = self.lower_order_final and position == len(times) - 2
            estimate = x0 if memory is None or last else x0 + _slope(process, memory, t, s, x0)
            moved = s < t
            ratio = process.sigma(s) / process.sigma(t)
            gain = process.alpha(s) - process.alpha(t) * ratio
            rows = moved.to(x.device).reshape(-1, *[1] * (x.dim() - 1))
            x = torch.where(rows, expand(ratio, x) * x + expand(gain, x) * estimate, x)
            memory = (x0, t) if memory is None else (torch.where(rows, x0, memory[0]), torch.where(moved, t, memory[1]))
        return x


def _slope(process: GaussianProcess, memory: tuple[Tensor, Times], t: Times, s: Times, x0: Tensor) -> Tensor:
    """(x0 - x0_previous)/(2r), 0 where a limit makes the step first order."""
    h, h_previous = _log_snr(process, s) - _log_snr(process, t), _log_snr(process, t) - _log_snr(process, memory[1])
    usable = h.isfinite() & h_previous.isfinite() & (h_previous > 0)
    weight = torch.where(usable, h, 0.0) / torch.where(usable, 2 * h_previous, 1.0)
    return expand(weight, x0) * (x0 - memory[0])


def _log_snr(process: GaussianProcess, t: Times) -> Times:
    """Lambda = log(alpha/sigma), infinite at the ends."""
    return process.alpha(t).log() - process.sigma(t).log()
