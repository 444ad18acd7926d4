"""The gradient of log h, by which DOIT corrects a score: simulated, and in closed form.

On one Gaussian, r(x) = x and weights exp(r/β), log h has the slope (1/β)·alpha·s²/(alpha²s² + sigma²) at every state, s
the standard deviation of the data. The ring has eight modes and a chain of 40 DDIM steps: r = x_1, β = 1/0.6.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from difftilt.checks.closed_forms import GaussianData
from difftilt.models.denoiser import denoiser
from difftilt.models.mixture import GaussianMixture
from difftilt.models.protocol import GenerativeModel
from difftilt.process.gaussian import GaussianProcess, linear_schedule
from difftilt.process.grid import uniform_grid
from difftilt.rewards.base import FunctionReward
from difftilt.sampling.kernels import DDIM
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.steering.doit import DOIT, DOITConfig
from difftilt.steering.particles import bind, start
from difftilt.testbeds.exact_chain import exact_chain, ring_mixture
from difftilt.training.protocol import Task
from difftilt.values.estimates import ClosedForm

STEPS, BETA, FIRST = 40, 1 / 0.6, torch.tensor([1.0, 0.0])
ROWS = 200
GAUSSIAN, GAUSSIAN_STEPS, PLACE = GaussianData(1.0, 0.5), 10, 5


def gradient_of(doit: DOIT, task: Task, x: Tensor, position: int) -> Tensor:
    """What DOIT takes for the gradient of log h at states ``x`` of grid point ``position``."""
    model = denoiser(task.model)
    chain, particles = start(task, model, [""], len(x), Noise(0))
    simulator = doit.simulator(chain, bind(task.reward, task, [""], model))
    with torch.no_grad():
        return simulator.look(chain, replace(particles, x=x), chain.slots, position).gradient


def settings_of(**settings: Any) -> DOITConfig:
    """Settings that correct every step at β, but for what is given."""
    return DOITConfig.model_validate({"temperature": BETA, "first": 0, "last": STEPS - 1, **settings})


@cache
def gaussian_task() -> Task:
    """One Gaussian in one dimension, ten steps of DDIM with eta 1."""
    process = linear_schedule()
    model = GenerativeModel(
        lambda x, t, condition: GAUSSIAN.x0(process, x, t), process, "x0", (1,), lambda prompts: None, lambda x: x
    )
    reward = FunctionReward("first", lambda samples: samples.media[:, 0])
    return Task("gaussian", model, reward, ("",), ("",), Sampler(uniform_grid(GAUSSIAN_STEPS), DDIM(1.0)))


@cache
def slopes(surrogate: str, draws: int) -> Tensor:
    """Estimates of the slope of log h over its closed form, β = 1, at 400 states all over the marginal."""
    task, rows = gaussian_task(), 400
    process, grid = task.model.process, task.sampler.grid
    assert isinstance(process, GaussianProcess)
    t = grid[PLACE].float().expand(rows)
    mean, std = GAUSSIAN.law(process, t)
    x = mean[:, None] + std[:, None] * Noise(2).normal(torch.arange(rows), (1,), purpose="states")
    exact = process.alpha(t) * GAUSSIAN.std**2 / std**2
    doit = DOIT(settings_of(surrogate=surrogate, simulations=draws, temperature=1.0))
    return gradient_of(doit, task, x, PLACE)[:, 0].double() / exact


def reuse_factor() -> float:
    """1 + sigma_s²/(alpha_s²·std²) at the end s of the step."""
    task = gaussian_task()
    process, s = task.model.process, task.sampler.grid[PLACE + 1].reshape(1)
    assert isinstance(process, GaussianProcess)
    return 1 + float(process.sigma(s) ** 2 / (process.alpha(s) * GAUSSIAN.std) ** 2)


@cache
def ring_task(eta: float = 1.0) -> tuple[Task, GaussianMixture]:
    """The ring with DDIM steps."""
    mixture = ring_mixture()
    task = exact_chain(mixture, lambda x: x[:, 0], STEPS)
    return replace(task, sampler=replace(task.sampler, kernel=DDIM(eta))), mixture


def soft_value(x: Tensor, t: Tensor) -> Tensor:
    """β·log h on the ring, in closed form."""
    task, mixture = ring_task()
    process = task.model.process
    assert isinstance(process, GaussianProcess)
    return mixture.soft_value_linear(process, x, t, FIRST, BETA)


def exact_gradient(x: Tensor, t: Tensor) -> Tensor:
    """Gradient of log h on the ring."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(soft_value(x, t).sum() / BETA, x)
    return gradient


@cache
def ring_error(surrogate: str, draws: int) -> float:
    """Mean |error| of the gradient over mean |gradient| at the middle of the chain; ``exact`` weighs by h itself."""
    task, mixture = ring_task()
    process, t = task.model.process, torch.full((ROWS,), 0.5)
    assert isinstance(process, GaussianProcess)
    x = mixture.sample_marginal(process, t, Noise(5).normal(torch.arange(ROWS), (3,), purpose="states"))
    value = ClosedForm(lambda x, t, condition: soft_value(x, t)) if surrogate == "exact" else None
    config = settings_of(simulations=draws, **({} if value else {"surrogate": surrogate}))
    truth = exact_gradient(x, t)
    error = gradient_of(DOIT(config, value=value), task, x, STEPS // 2) - truth
    return float(error.norm(dim=1).mean() / truth.norm(dim=1).mean())
