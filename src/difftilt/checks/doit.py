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

from difftilt.checks.log_h import (
    BETA,
    FIRST,
    exact_gradient,
    reuse_factor,
    ring_error,
    ring_task,
    settings_of,
    slopes,
)
from difftilt.checks.proof import Proof
from difftilt.checks.tilted_truths import slope, steer
from difftilt.models.denoiser import denoiser
from difftilt.process.gaussian import as_gaussian
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.kernels import DDIM
from difftilt.sampling.noise import Noise
from difftilt.statistics.discrete import histogram, total_variation
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.chain import Chain
from difftilt.steering.doit import DOIT, DOITConfig
from difftilt.steering.loop import search
from difftilt.steering.particles import bind, predicted, propose, start
from difftilt.steering.protocol import Particles, Steered
from difftilt.steering.rule import Unselective
from difftilt.testbeds.exact_chain import exact_chain, nearest_mode, ring_mixture
from difftilt.testbeds.mixtures import Config, Mixtures
from difftilt.values.estimates import PosteriorMean

DRAWS = (16, 64, 256, 1024)


def _identity_slope(surrogate: str) -> float:
    return slope(DRAWS[:3], [float((slopes(surrogate, draws) - 1).square().mean().sqrt()) for draws in DRAWS[:3]])


def _bias(surrogate: str, draws: int) -> float:
    """Standard errors between the mean estimate, in units of the closed form, and 1."""
    found = slopes(surrogate, draws)
    return float((found.mean() - 1).abs() / (found.std() / len(found) ** 0.5))


def _error_slope(surrogate: str) -> float:
    return slope(DRAWS, [ring_error(surrogate, draws) for draws in DRAWS])


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
    return steer(DOIT(settings_of(particles=count, **chosen, **settings)), task, 1).x_0


def ring_distance(surrogate: str, eta: float = 1.0, count: int = 1000, **settings: Any) -> float:
    """Total variation between the shares of the modes and the tilted weights."""
    mixture = ring_task()[1]
    target = mixture.tilted_linear(FIRST, BETA).mixture.weights
    samples = ring_samples(surrogate, eta, count, **settings)
    return float(total_variation(histogram(nearest_mode(mixture, samples), len(target)), target))


def _flow_distance(**settings: Any) -> float:
    """The same on the testbed ``mixtures``: a rectified flow, 20 steps of Flow-SDE, β = 1, 1000 samples."""
    testbed = Mixtures(Config(reward="linear", steps=20, shift=1.0))
    doit = DOIT(settings_of(temperature=1.0, particles=1000, last=19, surrogate="one_step", simulations=32, **settings))
    return testbed.mode_distance(steer(doit, testbed.task(), 1).x_0)


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
        lambda: float(slopes("reuse", 1024).mean()) / reuse_factor(),
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
