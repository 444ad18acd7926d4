"""Corruption, conversions, schedules and re-noising, against formulas written here a second time."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor

from difftilt.checks.closed_forms import FLOW, PROCESSES, GaussianData
from difftilt.checks.proof import Proof
from difftilt.process import MaskedProcess, cosine_schedule, linear_schedule, scaled_linear_schedule
from difftilt.process.protocol import PredictionKind
from difftilt.sampling.noise import Noise

KINDS: tuple[PredictionKind, ...] = ("epsilon", "x0", "v", "velocity", "score")
INTERIOR = torch.tensor([0.1, 0.3, 0.5, 0.7])


def _draws(purpose: str) -> Tensor:
    return Noise(0).normal(torch.arange(4), (64,), purpose=purpose)


def round_trips() -> float:
    """Largest relative error of kind -> other -> kind over processes, pairs and times, float32."""
    worst = 0.0
    x_t, output = _draws("state"), _draws("output")
    for process, kind, other in product(PROCESSES, KINDS, KINDS):
        there = process.predict(output, x_t, INTERIOR, kind).as_kind(other)
        back = process.predict(there, x_t, INTERIOR, other).as_kind(kind)
        worst = max(worst, float(((back - output).abs() / (1 + output.abs())).max()))
    return worst


def targets() -> float:
    """Largest error of x_0 read back from the target of each kind, float32."""
    worst = 0.0
    x_0, noise = _draws("x0"), _draws("eps")
    for process, kind in product(PROCESSES, KINDS):
        x_t = process.corrupt(x_0, INTERIOR, noise)
        got = process.predict(process.target(kind, x_0, INTERIOR, noise), x_t, INTERIOR, kind)
        worst = max(worst, float((got.x0 - x_0).abs().max()))
    return worst


def schedules() -> float:
    """Largest relative error of the three abar tables against their published formulas (numpy, by loops)."""
    n = 1000
    betas = {
        "linear": [1e-4 + (0.02 - 1e-4) * k / (n - 1) for k in range(n)],
        "scaled": [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * k / (n - 1)) ** 2 for k in range(n)],
    }
    tables = {name: np.exp(np.cumsum([math.log1p(-b) for b in beta])) for name, beta in betas.items()}
    # the cosine table is f(t)/f(0) wherever its cap on beta has not acted: all but the last entry
    tables["cosine"] = np.array([(math.cos(((k + 1) / n + 0.008) / 1.008 * math.pi / 2)) ** 2 for k in range(n - 1)])
    tables["cosine"] /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    own = {"linear": linear_schedule(), "scaled": scaled_linear_schedule(), "cosine": cosine_schedule()}
    worst = 0.0
    for name, table in tables.items():
        alpha = own[name].alpha(own[name].time(torch.arange(len(table))))
        worst = max(worst, float(np.abs(alpha.numpy() ** 2 / table - 1).max()))
    return worst


def clock() -> float:
    """Largest error of timestep(time(k)) - k, in float32 times."""
    process, k = linear_schedule(), torch.arange(1000)
    return float((process.timestep(process.time(k).float()) - k).abs().max())


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(t).sum(), t)
    return slope


def derivatives() -> float:
    """Largest relative error of alpha_dot and sigma_dot against autograd."""
    t = torch.linspace(0.0213, 0.9787, 50, dtype=torch.float64)
    worst = 0.0
    for process in PROCESSES:
        for value, rate in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
            worst = max(worst, float((rate(t) / _derivative(value, t) - 1).abs().max()))
    return worst


def _pairs() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.0, 0.2, 0.5, 0.1]).double(), torch.tensor([0.3, 0.6, 0.5, 1.0]).double()


def renoise_composes() -> float:
    """Largest error of the two moments of corrupt-then-renoise against corrupt, exact."""
    worst = 0.0
    s, tau = _pairs()
    one, zero = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    for process in PROCESSES:
        signal = process.renoise(process.corrupt(one, s, zero), s, tau, zero)
        first = process.renoise(process.corrupt(zero, s, one), s, tau, zero)
        second = process.renoise(zero, s, tau, one)
        worst = max(worst, float((signal[:, 0] - process.alpha(tau)).abs().max()))
        worst = max(worst, float((first**2 + second**2 - process.sigma(tau)[:, None] ** 2).abs().max()))
    return worst


def renoise_velocity() -> float:
    """Largest error of slope and intercept of the regression of the conditional on the marginal velocity."""
    data, worst = GaussianData(), 0.0
    s, tau = torch.tensor([0.1, 0.3]).double(), torch.tensor([0.5, 0.9]).double()
    one, zero = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    for process in PROCESSES:
        mean, std = data.law(process, s)
        x_state, x_noise = process.renoise(one, s, tau, zero)[:, 0], process.renoise(zero, s, tau, one)[:, 0]
        u_state = process.renoise_velocity(one, s, tau, zero)[:, 0]
        u_noise = process.renoise_velocity(zero, s, tau, one)[:, 0]
        slope = (x_state * u_state * std**2 + x_noise * u_noise) / ((x_state * std) ** 2 + x_noise**2)
        intercept = u_state * mean - slope * x_state * mean
        at = [process.predict(data.x0(process, x, tau), x, tau, "x0").velocity[:, 0] for x in (zero, one)]
        worst = max(worst, float((intercept - at[0]).abs().max()), float((slope - at[1] + at[0]).abs().max()))
    return worst


def masked_composes() -> float:
    """Largest error of the masked fraction after corrupt and after corrupt-then-renoise, on stratified noise."""
    n, worst = 1000, 0.0
    process = MaskedProcess(vocab=3, floor=1e-3)
    strata = (torch.arange(n) + 0.5) / n
    # all pairs of two stratified uniforms: the fraction is a product of two counts
    x_0 = torch.zeros(n, n, dtype=torch.int64)
    for s, tau in ((0.0, 0.4), (0.25, 0.7), (0.6, 1.0)):
        at_s = process.corrupt(x_0, torch.full((n,), s), strata[None].expand(n, n))
        later = process.renoise(at_s, torch.full((n,), s), torch.full((n,), tau), strata[:, None].expand(n, n))
        for x, level in ((at_s, s), (later, tau)):
            worst = max(worst, abs(float((x == process.mask).double().mean()) - (1 - 1e-3) * level))
    return worst


def flow_velocity() -> float:
    """Rectified flow: the target velocity minus (noise - x_0)."""
    x_0, noise = _draws("x0"), _draws("eps")
    return float((FLOW.target("velocity", x_0, INTERIOR, noise) - (noise - x_0)).abs().max())


PROOFS = (
    Proof("every prediction kind turns into every other and back, float32, t in 0.1..0.7", round_trips, at_most=1e-5),
    Proof("the target of every kind, read as a prediction, gives x_0 back, float32", targets, at_most=2e-5),
    Proof("rectified flow's target velocity is noise minus data", flow_velocity, at_most=1e-6),
    Proof("abar of linear, scaled-linear and cosine schedules is the published one", schedules, at_most=1e-10),
    # t·N in float32 is off by at most one unit in the last place of N = 1000
    Proof("the network's clock is the inverse of the time on the table, float32 times", clock, at_most=1.3e-4),
    Proof("alpha_dot and sigma_dot agree with autograd", derivatives, at_most=1e-9),
    Proof("re-noising a state at s to tau has the moments of corrupting data to tau", renoise_composes, at_most=1e-12),
    Proof(
        "the velocity of re-noising regresses to the marginal velocity, slope and intercept",
        renoise_velocity,
        at_most=1e-10,
    ),
    # counts of a stratified noise are exact to one stratum of 1000 per level
    Proof("masking to s and then to tau masks the fraction m(tau)", masked_composes, at_most=2e-3),
)
