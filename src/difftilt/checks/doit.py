"""DOIT: the simulated gradient of log h against its closed form, and the samples that it leads to.

On one Gaussian, r(x) = x and weights exp(r/β), log h has the slope (1/β)·alpha·s²/(alpha²s² + sigma²) at every state, s
the standard deviation of the data. The ring has eight modes and a chain of 40 DDIM steps from the exact marginal:
r = x_1, β = 1/0.6, corrected at every step.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from difftilt.checks.closed_forms import GaussianData
from difftilt.checks.fk_steering import slope
from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.models.mixture import GaussianMixture
from difftilt.models.protocol import GenerativeModel
from difftilt.process.gaussian import GaussianProcess, as_gaussian, linear_schedule
from difftilt.process.grid import uniform_grid
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.kernels import DDIM
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.statistics.discrete import histogram, total_variation
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.chain import Chain
from difftilt.steering.doit import DOIT, DOITConfig
from difftilt.steering.loop import search
from difftilt.steering.particles import bind, predicted, propose, start
from difftilt.steering.protocol import Particles, Steered, Steerer
from difftilt.steering.rule import Unselective
from difftilt.testbeds.exact_chain import exact_chain, nearest_mode, ring_mixture
from difftilt.testbeds.mixtures import Config, Mixtures
from difftilt.training.protocol import Task
from difftilt.values.estimates import ClosedForm, PosteriorMean

STEPS, BETA, FIRST = 40, 1 / 0.6, torch.tensor([1.0, 0.0])
DRAWS = (16, 64, 256, 1024)
ROWS = 200
GAUSSIAN, GAUSSIAN_STEPS, PLACE = GaussianData(1.0, 0.5), 10, 5


def gradient_of(doit: DOIT, task: Task, x: Tensor, position: int) -> Tensor:
    """What DOIT takes for the gradient of log h at states ``x`` of grid point ``position``."""
    model = denoiser(task.model)
    chain, particles = start(task, model, [""], len(x), Noise(0))
    simulator = doit.simulator(chain, bind(task.reward, task, [""], model))
    with torch.no_grad():
        return simulator.look(chain, replace(particles, x=x), chain.slots, position).gradient


def _config(**settings: Any) -> DOITConfig:
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
def _slopes(surrogate: str, draws: int) -> Tensor:
    """Estimates of the slope of log h over its closed form, β = 1, at 400 states all over the marginal."""
    task, rows = gaussian_task(), 400
    process, grid = task.model.process, task.sampler.grid
    assert isinstance(process, GaussianProcess)
    t = grid[PLACE].float().expand(rows)
    mean, std = GAUSSIAN.law(process, t)
    x = mean[:, None] + std[:, None] * Noise(2).normal(torch.arange(rows), (1,), purpose="states")
    exact = process.alpha(t) * GAUSSIAN.std**2 / std**2
    doit = DOIT(_config(surrogate=surrogate, simulations=draws, temperature=1.0))
    return gradient_of(doit, task, x, PLACE)[:, 0].double() / exact


def _identity_slope(surrogate: str) -> float:
    return slope(DRAWS[:3], [float((_slopes(surrogate, draws) - 1).square().mean().sqrt()) for draws in DRAWS[:3]])


def _bias(surrogate: str, draws: int) -> float:
    """Standard errors between the mean estimate, in units of the closed form, and 1."""
    found = _slopes(surrogate, draws)
    return float((found.mean() - 1).abs() / (found.std() / len(found) ** 0.5))


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


def _soft_value(x: Tensor, t: Tensor) -> Tensor:
    task, mixture = ring_task()
    process = task.model.process
    assert isinstance(process, GaussianProcess)
    return mixture.soft_value_linear(process, x, t, FIRST, BETA)


def exact_gradient(x: Tensor, t: Tensor) -> Tensor:
    """Gradient of log h on the ring."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_soft_value(x, t).sum() / BETA, x)
    return gradient


@cache
def ring_error(surrogate: str, draws: int) -> float:
    """Mean |error| of the gradient over mean |gradient| at the middle of the chain; ``exact`` weighs by h itself."""
    task, mixture = ring_task()
    process, t = task.model.process, torch.full((ROWS,), 0.5)
    assert isinstance(process, GaussianProcess)
    x = mixture.sample_marginal(process, t, Noise(5).normal(torch.arange(ROWS), (3,), purpose="states"))
    value = ClosedForm(lambda x, t, condition: _soft_value(x, t)) if surrogate == "exact" else None
    config = _config(simulations=draws, **({} if value else {"surrogate": surrogate}))
    truth = exact_gradient(x, t)
    error = gradient_of(DOIT(config, value=value), task, x, STEPS // 2) - truth
    return float(error.norm(dim=1).mean() / truth.norm(dim=1).mean())


def _error_slope(surrogate: str) -> float:
    return slope(DRAWS, [ring_error(surrogate, draws) for draws in DRAWS])


def steer(steerer: Steerer, task: Task, prompts: int = 1) -> Steered:
    """One call from a fixed seed."""
    return steerer.steer(task, denoiser(task.model), task.reward, [""] * prompts, Noise(0))


def exactly(chain: Chain, particles: Particles, position: int) -> tuple[Chain, Particles]:
    """The move of DOIT with the gradient of log h in closed form."""
    particles = predicted(chain, particles, position)
    gradient = exact_gradient(particles.x, chain.time(position, particles.x))
    raised = as_gaussian(particles.prediction).tilted(gradient)
    return propose(chain, replace(particles, prediction=raised), position)


@cache
def ring_samples(surrogate: str, eta: float, count: int, **settings: Any) -> Tensor:
    """Samples of DOIT on the ring; ``exact`` moves by the closed form, ``base`` does not correct."""
    task, _ = ring_task(eta)
    if surrogate == "exact":
        model = denoiser(task.model)
        chain, particles = start(task, model, [""], count, Noise(0))
        scorer = bind(task.reward, task, [""], model)
        with torch.no_grad():
            return search(Unselective(), chain, particles, scorer, PosteriorMean(scorer), move=exactly).x_0
    chosen = {"strength": 0.0} if surrogate == "base" else {"surrogate": surrogate}
    return steer(DOIT(_config(particles=count, **chosen, **settings)), task).x_0


def ring_distance(surrogate: str, eta: float = 1.0, count: int = 1000, **settings: Any) -> float:
    """Total variation between the shares of the modes and the tilted weights."""
    mixture = ring_task()[1]
    target = mixture.tilted_linear(FIRST, BETA).mixture.weights
    samples = ring_samples(surrogate, eta, count, **settings)
    return float(total_variation(histogram(nearest_mode(mixture, samples), len(target)), target))


def _flow_distance(**settings: Any) -> float:
    """The same on the testbed ``mixtures``: a rectified flow, 20 steps of Flow-SDE, β = 1, 1000 samples."""
    testbed = Mixtures(Config(reward="linear", steps=20, shift=1.0))
    doit = DOIT(_config(temperature=1.0, particles=1000, last=19, surrogate="one_step", simulations=32, **settings))
    return testbed.mode_distance(steer(doit, testbed.task()).x_0)


def stairs(samples: Samples) -> Tensor:
    """A value of actions that is flat almost everywhere: steps in both coordinates, the highest hard to reach."""
    x, y = samples.media[:, 0], samples.media[:, 1]
    return (x > 0).float() + (x > 2).float() + 2 * (x > 4.2).float() + (y > 0).float()


@cache
def _bandit(simulations: int, scale: float = 1.0, weights: str = "standardised") -> Steered:
    """60 states with four actions each, from eight modes of behaviour; ``simulations`` 0 is best-of-4."""
    task = exact_chain(ring_mixture(), lambda x: x[:, 0], 15)
    reward = FunctionReward("stairs", lambda samples: scale * stairs(samples))
    task = replace(task, reward=reward, sampler=replace(task.sampler, kernel=DDIM(0.7)))
    if not simulations:
        return steer(BestOfN(BestOfNConfig(particles=4)), task, 60)
    settings = {"simulations": simulations, "weights": weights, "surrogate": "one_step", "output": "best"}
    return steer(DOIT(DOITConfig.model_validate(settings)), task, 60)


def _bandit_gain(stage: str) -> float:
    """Standard errors by which the value of the kept actions (``best``), or of all (``all``), exceeds best-of-4's."""
    mine, theirs = (s.rewards[s.best] if stage == "best" else s.rewards for s in (_bandit(32), _bandit(0)))
    return float((mine.mean() - theirs.mean()) / ((mine.var() + theirs.var()) / len(mine)).sqrt())


def _moved(weights: str) -> float:
    """Share of actions that change when the reward is multiplied by 4."""
    first, second = (_bandit(32, scale, weights).x_0 for scale in (1.0, 4.0))
    return float(((first - second).abs().amax(1) > 1e-3).double().mean())


def _full(eta: float = 1.0, **settings: Any) -> float:
    return ring_distance("full", eta, 300, simulations=32, **settings)


def _one_step(eta: float = 1.0, **settings: Any) -> float:
    return ring_distance("one_step", eta, simulations=64, **settings)


PROOFS = (
    Proof(
        "one Gaussian, full rollouts: the error of the gradient falls as M^-1/2 (slope of log error on log M)",
        lambda: _identity_slope("full"),
        at_least=-0.58,
        at_most=-0.42,
    ),
    Proof(
        "one Gaussian, one step ahead: the error of the gradient falls as M^-1/2 (slope of log error on log M)",
        lambda: _identity_slope("one_step"),
        at_least=-0.58,
        at_most=-0.42,
    ),
    Proof(
        "one Gaussian, full rollouts, M = 256: mean estimate against the closed form (in standard errors)",
        lambda: _bias("full", 256),
        at_most=3,
    ),
    Proof(
        "one Gaussian, one step ahead, M = 1024: mean estimate against the closed form (in standard errors)",
        lambda: _bias("one_step", 1024),
        at_most=3,
    ),
    Proof(
        "ablation, one Gaussian: the re-used noise is too large by 1 + sigma²/(alpha²s²) (mean estimate over that)",
        lambda: float(_slopes("reuse", 1024).mean()) / reuse_factor(),
        at_least=0.97,
        at_most=1.03,
    ),
    Proof(
        "ablation, one Gaussian: so it does not converge (mean estimate against the closed form, in standard errors)",
        lambda: _bias("reuse", 1024),
        at_least=10,
    ),
    Proof(
        "ring, middle of the chain, weights by h itself: relative error of the gradient falls (slope on log M)",
        lambda: _error_slope("exact"),
        at_least=-0.6,
        at_most=-0.4,
    ),
    Proof(
        "ring, middle of the chain, full rollouts: error at M = 64 over error at M = 16 (theory 0.5)",
        lambda: ring_error("full", 64) / ring_error("full", 16),
        at_most=0.7,
    ),
    Proof(
        "ring, middle of the chain, full rollouts: relative error of the gradient falls on and on (slope on log M)",
        lambda: _error_slope("full"),
        at_least=-0.6,
        at_most=-0.35,
        long=True,
    ),
    Proof(
        "ring, middle of the chain, one step ahead, M = 1024: relative error of the gradient, a floor of bias",
        lambda: ring_error("one_step", 1024),
        at_least=0.15,
        at_most=0.35,
    ),
    Proof(
        "ablation, ring: with the re-used noise the error does not fall (relative error at M = 1024)",
        lambda: ring_error("reuse", 1024),
        at_least=0.8,
    ),
    Proof(
        "ablation, ring: with the re-used noise more simulations do not help (slope of log error on log M)",
        lambda: _error_slope("reuse"),
        at_least=-0.1,
    ),
    Proof(
        "ring, plain sampling: distance (TV) of the modes to the tilted weights",
        lambda: ring_distance("base"),
        at_least=0.45,
    ),
    Proof(
        "ring, the gradient in closed form: distance (TV), left by the steps of the chain",
        lambda: ring_distance("exact", count=2000),
        at_most=0.08,
    ),
    Proof(
        "ring, eta = 0.3, the gradient in closed form: distance (TV)",
        lambda: ring_distance("exact", 0.3, count=2000),
        at_most=0.06,
    ),
    Proof("ring, full rollouts, M = 32, 300 samples: distance (TV)", _full, at_most=0.1, long=True),
    Proof("ring, one step ahead, M = 64: distance (TV)", _one_step, at_most=0.15, long=True),
    Proof(
        "ring, eta = 0.3, simulated with its own kernel, full rollouts: distance (TV), for h is too sharp",
        lambda: _full(0.3, simulate_eta=None),
        at_least=0.2,
        long=True,
    ),
    Proof(
        "ring, eta = 0.3, simulated with eta = 1, full rollouts: distance (TV)",
        lambda: _full(0.3),
        at_most=0.12,
        long=True,
    ),
    Proof(
        "ring, eta = 0.3, simulated with its own kernel, one step ahead: distance (TV)",
        lambda: _one_step(0.3, simulate_eta=None),
        at_least=0.2,
        long=True,
    ),
    Proof(
        "ring, eta = 0.3, simulated with eta = 1, one step ahead: distance (TV)",
        lambda: _one_step(0.3),
        at_most=0.17,
        long=True,
    ),
    Proof(
        "ablation, ring: the re-used noise over-tilts (distance in TV)",
        lambda: ring_distance("reuse", simulations=64),
        at_least=0.3,
        long=True,
    ),
    Proof(
        "ablation, ring: the re-used noise over-tilts (mean reward; that of the target is 3.07)",
        lambda: float(ring_samples("reuse", 1.0, 1000, simulations=64)[:, 0].mean()),
        at_least=3.8,
        long=True,
    ),
    Proof(
        "rectified flow: distance (TV) of plain Flow-SDE samples", lambda: _flow_distance(strength=0.0), at_least=0.4
    ),
    Proof("rectified flow, Flow-SDE, one step ahead, M = 32: distance (TV)", _flow_distance, at_most=0.12, long=True),
    Proof(
        "bandit, four actions: value of the best one against best-of-4 (difference in standard errors)",
        lambda: _bandit_gain("best"),
        at_least=4,
    ),
    Proof(
        "bandit, before the best is taken: value of all actions against plain ones (difference in standard errors)",
        lambda: _bandit_gain("all"),
        at_least=4,
    ),
    Proof(
        "bandit, standardised weights: share of actions that change when the reward is multiplied by 4",
        lambda: _moved("standardised"),
        at_most=0.01,
    ),
    Proof(
        "bandit, plain weights: share of actions that change when the reward is multiplied by 4",
        lambda: _moved("plain"),
        at_least=0.5,
    ),
)
