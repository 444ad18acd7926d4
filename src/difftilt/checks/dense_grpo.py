"""DenseGRPO on the ring: gains telescope, belong to the noise of their step, and learn from small batches."""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.attribution import chance, cosine, explained, gradient_at, signal_to_noise, unrelated
from difftilt.checks.calibration import calibrated, coin_drift, growth_spread, worst_imbalance
from difftilt.checks.proof import Proof
from difftilt.checks.trial import loop_of, trained
from difftilt.credit.gains import gains
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.sampling.completion import Schedule, Strides, remaining
from difftilt.sampling.kernels import StepwiseSDE
from difftilt.sampling.rollout import start_state
from difftilt.sampling.solvers import EulerSolver
from difftilt.statistics.folds import distinct
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.completions import ScoredChains, score_along
from difftilt.training.loop import Loop
from difftilt.training.policy_gradient import ChainPolicyGradient
from difftilt.training.protocol import Task

STEPS, SHIFT, GROUP = 10, 3.0, 24
FREE: dict[str, Any] = {"kl_weight": 0.0, "updates": 1, "ema": 0.0, "clip_range": 0.2}
UNCALIBRATED: dict[str, Any] = {"calibration_rounds": 0}


def ring_task() -> Task:
    """Eight modes, reward -|x - (2, 0)|."""
    return Mixtures(MixturesConfig(steps=STEPS, shift=SHIFT)).task()


def scored(
    groups: int, size: int, schedule: Schedule = remaining, task: Task | None = None
) -> tuple[Loop, ScoredChains]:
    """Chains, on the ring if not told otherwise, from one start per group, all states completed."""
    settings = {"groups": groups, "group_size": size, "share_start": True, "objective": "guard"}
    loop = loop_of("flow-grpo", task or ring_task(), 1024, **settings)
    run, method = loop.run, loop.method
    assert isinstance(method, ChainPolicyGradient)
    with torch.no_grad():
        batch = run.prompts(groups, size)
        roll = lambda observe: method.roll(run, batch, observe=observe)  # noqa: E731
        return loop, score_along(run, batch, roll, method.grid, None, schedule=schedule, one_first_state=True)


def telescoping() -> float:
    """Largest |Σ d_k - (reward of the sample - reward of the plain ODE sample of its start)|."""
    loop, chains = scored(8, 8)
    run, first = loop.run, distinct(chains.batch.group)[0]
    with torch.no_grad():
        x = start_state(run.task.model.process, run.noise, chains.batch.group[first], (2,))
        x_0 = EulerSolver()(run.denoiser("current"), x, None, run.task.sampler.grid)
    ode = -(x_0 - torch.tensor([2.0, 0.0])).norm(dim=1)
    end = -(chains.trajectory.x_0 - torch.tensor([2.0, 0.0])).norm(dim=1)
    return float((gains(chains.rewards).sum(1) - (end - ode[chains.batch.group])).abs().max())


@cache
def attribution(kind: str) -> tuple[float, ...]:
    """R² of every trained step's credit in its own noise; ``chance`` takes the noise of other samples."""
    _, chains = scored(64, GROUP)
    edges, rewards = chains.trajectory.edges, chains.rewards
    assert edges.x_s is not None
    assert edges.mean is not None
    table = {"gain": gains(rewards), "next": rewards[:, 1:], "terminal": rewards[:, -1:].expand(-1, STEPS)}
    credit = table["gain" if kind == "chance" else kind].reshape(64, GROUP, STEPS)
    shares: list[float] = []
    for step in range(STEPS - 1):
        noise = (edges.x_s - edges.mean)[edges.step == step].reshape(64, GROUP, 2)
        shares.append(explained(credit[..., step], unrelated(noise) if kind == "chance" else noise))
    return tuple(shares)


def smallest_lead(more: str, less: str, first: int) -> float:
    """Smallest difference of two attributions over the steps from ``first`` on."""
    return min(a - b for a, b in zip(attribution(more)[first:], attribution(less)[first:], strict=True))


@cache
def gradients(name: str, count: int = 32) -> Float[Tensor, "count parameters"]:
    """Gradients of independent iterations at the base weights: 4 groups of 24."""
    more = {} if name == "flow-grpo" else UNCALIBRATED
    loop = loop_of(name, ring_task(), 1024, **FREE, groups=4, group_size=GROUP, share_start=True, **more)
    return torch.stack([gradient_at(loop, iteration) for iteration in range(count)])


@cache
def learnt(name: str, iterations: int, repeats: int = 6, **settings: Any) -> float:
    """Mean reward of the ODE's samples after training on one group of 8 per update, over seeds; -2.49 before."""
    more = {} if name == "flow-grpo" else settings
    total = 0.0
    for seed in range(repeats):
        run = trained(name, ring_task(), iterations, 1e-3, seed=seed, groups=1, group_size=8, **FREE, **more)
        total += run.after["reward"]
    return total / repeats


def final_variance(steps: int, width: float = 0.5) -> float:
    """Variance of x_0 along the exact chain of N(0, width²), rates 0.5 + |sin 9t|, over width²."""
    process, grid = RectifiedFlow(), uniform_grid(steps)
    kernel = StepwiseSDE(tuple(grid[:-1].tolist()), tuple((0.5 + (9 * grid[:-1]).sin().abs()).tolist()))
    variance, x = 1.0, torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, s in pairwise(grid):
        spread = ((1 - t) * width) ** 2 + t**2
        velocity = (t - (1 - t) * width**2) / spread * x
        step = kernel(process.predict(velocity, x, t.expand(2), "velocity"), x, t.expand(2), s.expand(2))
        variance = float(step.mean[1] - step.mean[0]) ** 2 * variance + float(step.std[0]) ** 2
    return variance / width**2


def spearman(schedule: Schedule, state: int) -> float:
    """Rank correlation of the reward of an early state's completion with the reward of the sample."""
    _, chains = scored(512, 2, schedule)
    ranks = [chains.rewards[:, place].double().argsort().argsort().double() for place in (state, -1)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


CHANCE = chance(GROUP, 2)

PROOFS = (
    Proof(
        "gains add up to the reward of the sample less that of the plain ODE from its noise: largest error",
        telescoping,
        at_most=2e-6,
    ),
    Proof(
        "chance: share of a gain's variance that is linear in the noise of another sample, 2/23 in expectation",
        lambda: sum(attribution("chance")) / (STEPS - 1),
        at_least=CHANCE - 0.01,
        at_most=CHANCE + 0.01,
    ),
    Proof(
        "attribution: the same of its own noise, at the worst step; chance is 0.087",
        lambda: min(attribution("gain")),
        at_least=0.3,
    ),
    Proof(
        "ablation: the terminal reward in place of the gain, at its best step",
        lambda: max(attribution("terminal")),
        at_most=0.25,
    ),
    Proof(
        "ablation: the reward of the state reached in place of the gain, at the last trained step",
        lambda: attribution("next")[-1],
        at_most=0.2,
    ),
    Proof(
        "at every step after the first a gain is explained better than the reward of the state reached: smallest lead",
        lambda: smallest_lead("gain", "next", 1),
        at_least=0.0,
    ),
    Proof(
        "signal to noise of the gradient over that of flow-grpo, at the base weights, 4 groups of 24",
        lambda: signal_to_noise(gradients("dense-grpo")) / signal_to_noise(gradients("flow-grpo")),
        at_least=1.5,
        long=True,
    ),
    Proof(
        "and both point the same way: cosine of the expected gradients",
        lambda: cosine(gradients("dense-grpo"), gradients("flow-grpo")),
        at_least=0.95,
        long=True,
    ),
    Proof(
        "one group of 8 per update: reward after 60 updates less that of flow-grpo, mean of 3 seeds; spread 0.1",
        lambda: learnt("dense-grpo", 60, 3, **UNCALIBRATED) - learnt("flow-grpo", 60, 3),
        at_least=0.0,
        long=True,
    ),
    Proof(
        "rates 0.5 + |sin 9t| keep the variance of a Gaussian: error of 200 steps over that of 400, 2 at first order",
        lambda: (final_variance(200) - 1) / (final_variance(400) - 1),
        at_least=1.8,
        at_most=2.2,
    ),
    Proof(
        "calibrated under guidance 3: of nine steps, those that stop below nine tenths of their largest rate",
        lambda: float(calibrated(True).below.sum()),
        at_least=3.0,
        long=True,
    ),
    Proof(
        "largest imbalance of new chains under these rates: 0.25 tolerated, and 3 standard errors",
        worst_imbalance,
        at_most=0.25 + 3 / 1024**0.5,
        long=True,
    ),
    Proof(
        "growth of the rates of those steps is no common factor: largest over smallest",
        growth_spread,
        at_least=1.5,
        long=True,
    ),
    Proof(
        "ablation, every round measured under the first rates: steps below nine tenths of their largest rate",
        lambda: float(calibrated(False).below.sum()),
        at_most=0.0,
        long=True,
    ),
    Proof(
        "and the imbalance that this leaves",
        lambda: worst_imbalance(False),
        at_least=0.5,
        long=True,
    ),
    Proof(
        "fair coins, 24 to a step: the proportional rule raises the rate, on average per round",
        lambda: coin_drift(0.25),
        at_least=0.2,
    ),
    Proof("ablation: the fixed tolerance of 2 lets it fall to its floor", lambda: coin_drift(2 / 24), at_most=-0.2),
    Proof(
        "the ODE from pure noise ranks samples better than the x0-prediction from it: difference of rank correlations",
        lambda: spearman(remaining, 0) - spearman(Strides(1), 0),
        at_least=0.05,
    ),
)
