"""Guidance put into the velocity itself, so that sampling needs no reward (Euphonium, arXiv 2602.04928, reconstructed).

For every Gaussian process and every kernel whose mean is linear in the velocity. With alpha, sigma the scales,
w = alpha·sigma' - sigma·alpha' (1 for rectified flow) and h the process reward, there are two targets:

- ``finite_target``: the velocity whose unguided step has the mean of the guided one, v + shift/slope with
  slope = d mean/d velocity. For a rectified flow and an SDE of coefficient g it is v - rate/(1 + g²(1 - t)/(2t))·∇h
  where the shift is rate·(t - s)·∇h.
- ``limit_target``: v - sigma·w/(alpha·temperature)·∇h, the probability flow of the law tilted by exp(h/temperature)
  at every t; for a rectified flow v - t/((1 - t)·temperature)·∇h. With rate = g²/(2·temperature) the finite target
  tends to it as g grows.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.process.gaussian import GaussianProcess, at_least_float32, expand
from difftilt.sampling.protocol import Kernel
from difftilt.sampling.steps import GaussianStep, reduce_dims

Rows = Float[Tensor, " rows"]
States = Float[Tensor, "rows *shape"]


def velocity_slope(kernel: Kernel, process: GaussianProcess, t: Rows, s: Rows) -> Rows:
    """D mean/d velocity of the step from t to s, negative: its mean at x = 0 under velocity 1, as it is linear."""
    still = torch.zeros(len(t), 1, dtype=t.dtype, device=t.device)
    prediction = process.predict(torch.ones_like(still), still, t, "velocity")
    return cast(GaussianStep, kernel(prediction, still, t, s)).mean[:, 0]


def finite_target(velocity: States, shift: States, slope: Rows) -> States:
    """V + shift/slope: the velocity whose step has its mean moved by ``shift``."""
    return velocity + shift / expand(slope, shift)


def limit_target(
    process: GaussianProcess,
    velocity: States,
    gradient: States,
    t: Rows,
    temperature: float,
    bound: float | None = None,
) -> States:
    """V - sigma·w/(alpha·temperature)·gradient.

    Args:
        process: gives the scales.
        velocity: of the base, a fixed one: tilting what is tilted already multiplies the tilt.
        gradient: of the soft value, ∇h, in the space of x_t.
        t: where alpha is positive; at alpha = 0 the coefficient is infinite.
        temperature: of the tilt.
        bound: of sigma·w/alpha; None leaves it.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    coefficient = sigma * (alpha * process.sigma_dot(t) - sigma * process.alpha_dot(t)) / alpha
    if bound is not None:
        coefficient = coefficient.clamp(max=bound)
    return velocity - expand(coefficient / temperature, gradient) * gradient


def step_weight(slope: Rows, std: Rows) -> Rows:
    """slope²/(2·std²): it makes a squared gap of velocities the KL of the two steps; 0 where a step has no noise."""
    return torch.where(std > 0, slope**2 / (2 * std.clamp(min=1e-30) ** 2), 0.0)


def distillation_loss(velocity: States, target: States, weight: Rows | None = None) -> Rows:
    """Weight·|v - target|², the mean over dimensions; the target carries no gradient."""
    gap = reduce_dims((at_least_float32(velocity) - at_least_float32(target).detach()) ** 2, "mean")
    return gap if weight is None else weight.to(gap) * gap
