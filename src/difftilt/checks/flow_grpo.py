"""Flow-GRPO on mixtures: it climbs, and its KL weight is the temperature of a closed-form tilt."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.trial import trained
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.sampling.kernels import FlowSDE
from difftilt.sampling.presets import flow_sde
from difftilt.sampling.rollout import Plan, replay, rollout, start_state
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.run import LoopRun

STEPS, SHIFT, NOISE = 10, 3.0, 0.7
WIDTH = 0.5


def ring_reward(**settings: Any) -> float:
    """Mean -|x - (2, 0)| of the SDE's samples after 60 iterations on the ring; -2.49 before."""
    return sum(row["reward_mean"] for row in _ring(**settings)[-5:]) / 5


def _ring(**settings: Any) -> list[dict[str, float]]:
    task = Mixtures(MixturesConfig(steps=STEPS, shift=SHIFT)).task()
    common: dict[str, Any] = {
        "groups": 8,
        "group_size": 16,
        "clip_range": 0.2,
        "updates": 1,
        "ema": 0.0,
        "kl_weight": 0.0,
    }
    return trained("flow-grpo", task, 60, 1e-3, **{**common, **settings}).rows


def diversity_left(kl_weight: float) -> float:
    """Mean distance between samples after training over before."""
    rows = _ring(kl_weight=kl_weight)
    return sum(row["diversity"] for row in rows[-5:]) / 5 / rows[0]["diversity"]


def largest_ratio_spread(clip_range: float) -> float:
    """Largest std of the ratio over 30 iterations of four updates: the clip is what holds it."""
    task = Mixtures(MixturesConfig(steps=STEPS, shift=SHIFT)).task()
    settings: dict[str, Any] = {"groups": 8, "group_size": 16, "updates": 4, "ema": 0.0, "kl_weight": 0.0}
    rows = trained("flow-grpo", task, 30, 1e-2, clip_range=clip_range, count=64, **settings).rows
    return max(row["ratio_std"] for row in rows)


def closed_chain() -> tuple[Tensor, Tensor]:
    """Gain C_k of each step's push on the mean of x_0, and its std, for the exact chain of N(0, WIDTH²); each (STEPS,).

    Every step is affine in x, x_s = c_k·x_t + noise, so C_k is the product of the later c.
    """
    process, grid = RectifiedFlow(), uniform_grid(STEPS, SHIFT)
    slopes: list[float] = []
    stds: list[float] = []
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, s in pairwise(grid):
        variance = ((1 - t) * WIDTH) ** 2 + t**2
        velocity = (t - (1 - t) * WIDTH**2) / variance * x
        step = FlowSDE(NOISE)(process.predict(velocity, x, t.expand(2), "velocity"), x, t.expand(2), s.expand(2))
        slopes.append(float(step.mean[1] - step.mean[0]))
        stds.append(float(step.std[0]))
    gains = torch.tensor([*slopes[1:], 1.0], dtype=torch.float64).flip(0).cumprod(0).flip(0)
    return gains, torch.tensor(stds, dtype=torch.float64)


def shift_ratio(temperature: float) -> float:
    """Measured over closed-form shift of the mean of x_0, from training with kl_weight = temperature.

    Maximising E[x_0] - temperature·(path KL) over pushes d_k with path KL Σ d_k²/(2·std_k²) gives
    d_k = C_k·std_k²/temperature, a total of Σ C_k²·std_k²/temperature. The sum leaves out the last step, which is not
    trained; so does the measurement, which adds up the pushes of the trained steps.
    """
    bed = MixturesConfig(means=((0.0,),), std=WIDTH, reward="linear", steps=STEPS, shift=SHIFT, noise_level=NOISE)
    settings: dict[str, Any] = {
        "groups": 1,
        "group_size": 256,
        "updates": 1,
        "ema": 0.0,
        "advantage_std": "none",
        "kl": "exact",
    }
    result = trained("flow-grpo", Mixtures(bed).task(), 120, 2e-3, kl_weight=temperature, **settings)
    gains, stds = closed_chain()
    pushes = _pushes(result.run)
    return float((gains * pushes)[:-1].sum() / ((gains * stds) ** 2)[:-1].sum() * temperature)


def _pushes(run: LoopRun) -> Tensor:
    """Mean difference between the steps of the trained and of the reference weights, on the trained chain, (STEPS,)."""
    index = torch.arange(2048)
    plan = Plan(record=torch.ones(STEPS, dtype=torch.bool))
    preset, grid = flow_sde(NOISE), uniform_grid(STEPS, SHIFT)
    with torch.no_grad():
        x = start_state(run.task.model.process, run.noise, index, (1,))
        current, reference = run.denoiser("current"), run.denoiser("reference")
        edges = rollout(current, preset, grid, x, None, noise=run.noise, index=index, plan=plan).edges
        means = [replay(denoise, preset, edges, None).step.mean for denoise in (current, reference)]  # type: ignore[attr-defined]
    return (means[0] - means[1]).double().reshape(STEPS, -1).mean(1)


PROOFS = (
    Proof(
        "on the ring of eight modes the reward -|x - (2, 0)| rises from -2.49 in 60 iterations",
        ring_reward,
        at_least=-1.2,
        long=True,
    ),
    Proof(
        "a very large KL weight keeps the reward of the ring at its base value -2.49",
        lambda: ring_reward(kl_weight=30.0),
        at_least=-2.7,
        at_most=-2.3,
        long=True,
    ),
    Proof(
        "the KL weight is the temperature of the tilt: shift of a Gaussian's mean over its closed form, weight 0.5",
        lambda: shift_ratio(0.5),
        at_least=0.85,
        at_most=1.15,
        long=True,
    ),
    Proof(
        "the same at weight 1: half the shift",
        lambda: shift_ratio(1.0),
        at_least=0.8,
        at_most=1.2,
        long=True,
    ),
    Proof(
        "without a KL weight the ring collapses to one mode: share of the distance between samples that is left",
        lambda: diversity_left(0.0),
        at_most=0.5,
        long=True,
    ),
    Proof(
        "off-policy, a tight clip holds the ratio: its largest spread over that of a clip that never acts",
        lambda: largest_ratio_spread(0.02) / largest_ratio_spread(1e6),
        at_most=0.7,
        long=True,
    ),
    Proof(
        "GRPO-Guard's corrected ratio climbs the ring as well, with four updates per rollout",
        lambda: ring_reward(objective="guard", updates=4),
        at_least=-1.6,
        long=True,
    ),
)
