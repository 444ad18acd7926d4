"""PRDP on a chain of affine Gaussian steps, where the best policy of the class has a closed form.

With all pairs of fresh chains the gradient of PRDP's loss vanishes where that of E[r] - beta·KL does, since
log-likelihoods have mean gradient 0; for affine steps of fixed std that is a linear-quadratic control problem.
"""

import math
import statistics
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.trial import loop_of, make_method, scatter
from difftilt.errors import GuardError
from difftilt.methods.forward_process.prdp import PRDP
from difftilt.rewards.compose import WeightedSum
from difftilt.testbeds.affine_chain import TARGET, best_moments, linear_task, network_moments, unmoved
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.loop import TrainResult, train_task
from difftilt.training.protocol import Task

NOISY, SHORT = 1e-4, 0.3
"""Abar at t = 1 of a schedule that ends in noise, and of one that does not."""


def learned(task: Task, iterations: int, lr: float, name: str = "prdp", seed: int = 0, **settings: Any) -> TrainResult:
    """A run with one prompt, or two, and ``group_size`` chains of each."""
    config = TrainingConfig(
        seed=seed,
        iterations=iterations,
        forward_batch=128,
        evaluate_every=0,
        evaluation_samples=256,
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.0, betas=(0.9, 0.95)),
    )
    common: dict[str, Any] = {"groups": 1, "group_size": 128, "reduction": "sum", "clip_range": 0.05, "epochs": 1}
    own = {**common, **settings} if name == "prdp" else settings
    return train_task(task, make_method(name, task, **own), config, None)


@cache
def at_best(temperature: float, last: float) -> tuple[float, float, float]:
    """Mean, variance and final loss of a run of one gradient step per iteration."""
    task = linear_task(last)
    result = learned(task, 60, 0.02, temperature=temperature, start_signal=1.0)
    return *network_moments(result.run.roles.module("current"), last), sum(
        row["loss/pairs"] for row in result.rows[-20:]
    ) / 20


def tilted_mean(temperature: float, last: float) -> float:
    """Of the reference's own law N(0, v), tilted: 2·v/(v + beta)."""
    variance = unmoved(last)[1]
    return TARGET * variance / (variance + temperature)


def bias(last: float) -> float:
    """Distance of the mean from that of the tilted law, at beta 1."""
    return abs(at_best(1.0, last)[0] - tilted_mean(1.0, last))


def reward_gain(result: TrainResult) -> float:
    """Exact mean of -(x - 2)²/2 after training, less that of the reference."""

    def value(mean: float, variance: float) -> float:
        return -((mean - TARGET) ** 2 + variance) / 2

    return value(*network_moments(result.run.roles.module("current"))) - value(*unmoved())


def offset_gap() -> float:
    """Relative change of the weights after 10 iterations when the second prompt's rewards rise by 100."""
    ends: list[Tensor] = []
    for offset in (0.0, 100.0):
        result = learned(linear_task(offset=offset), 10, 0.02, groups=2, group_size=64, temperature=1.0)
        ends.append(torch.cat([p.detach().double() for p in result.run.roles.parameters("current")]))
    return float((ends[0] - ends[1]).norm() / ends[0].norm())


@cache
def batch_wide_gain(offset: float) -> float:
    """Gain of a policy gradient whose advantages are the rewards, standardised over the batch of both prompts."""
    task = linear_task(offset=offset)
    task = replace(task, reward=WeightedSum({"parabola": task.reward}, {"parabola": 1.0}, normalise="batch"))
    settings: dict[str, Any] = {"groups": 2, "group_size": 64, "kernel": "ddim", "noise_level": 1.0, "ema": 0.0}
    free: dict[str, Any] = {"advantage": "none", "kl_weight": 0.0, "clip_range": 0.2, "updates": 1}
    return reward_gain(learned(task, 20, 0.02, "flow-grpo", **settings, **free))


@cache
def far(clip_range: float) -> tuple[tuple[float, float], ...]:
    """Of three seeds, ten gradient steps with lr 0.2 per iteration: median loss of iterations 9 to 16, mean of x_0.

    The first steps throw the weights far away, so that single losses are chaotic. Infinite on overflow.
    """

    def run(seed: int) -> tuple[float, float]:
        try:
            result = learned(linear_task(), 16, 0.2, temperature=1.0, epochs=10, clip_range=clip_range, seed=seed)
        except GuardError:
            return math.inf, math.inf
        losses = [row["loss/pairs"] for row in result.rows[8:]]
        return statistics.median(losses), network_moments(result.run.roles.module("current"))[0]

    return tuple(run(seed) for seed in range(3))


def two_pass_gap() -> float:
    """Relative gap between the gradient in two passes and that of the whole graph, away from old and reference.

    The second pass takes 12 rows at a time, which cuts across the 32 chains of a step.
    """
    loop = loop_of("prdp", linear_task(), 12, groups=2, group_size=16, epochs=1, reduction="sum", temperature=1.0)
    method, run = loop.method, loop.run
    assert isinstance(method, PRDP)
    scatter(loop, "reference")
    with torch.no_grad():
        experience = method.collect(run)
    scatter(loop, "current")
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    weights = list(run.roles.parameters("current"))
    whole = torch.autograd.grad(method.share(run, method.log_prob(run, "current", rows), rows), weights)
    (phase,) = method.phases(run)
    loop.updater.run_phase(phase, experience, run.noise)
    both = [
        torch.cat([part.reshape(-1) for part in parts if part is not None]).double()
        for parts in (whole, [w.grad for w in weights])
    ]
    return float((both[0] - both[1]).norm() / both[0].norm())


PROOFS = (
    Proof(
        "the gradient in two passes is that of the whole graph: relative gap",
        two_pass_gap,
        at_most=1e-5,
    ),
    Proof(
        "affine DDPM chain, beta 1: mean of x_0 less that of the best policy of the class (0.896; the reference has 0)",
        lambda: at_best(1.0, NOISY)[0] - best_moments(1.0)[0],
        at_least=-0.05,
        at_most=0.05,
        long=True,
    ),
    Proof(
        "the same, variance (0.466; the reference has 0.812)",
        lambda: at_best(1.0, NOISY)[1] - best_moments(1.0)[1],
        at_least=-0.05,
        at_most=0.05,
        long=True,
    ),
    Proof(
        "beta 4, mean (0.337)",
        lambda: at_best(4.0, NOISY)[0] - best_moments(4.0)[0],
        at_least=-0.05,
        at_most=0.05,
        long=True,
    ),
    Proof(
        "beta 4, variance (0.683)",
        lambda: at_best(4.0, NOISY)[1] - best_moments(4.0)[1],
        at_least=-0.05,
        at_most=0.05,
        long=True,
    ),
    Proof(
        "that mean is the mean of the reference's own law tilted by exp(r/beta), beta 1: distance",
        lambda: bias(NOISY),
        at_most=0.05,
        long=True,
    ),
    Proof(
        "ablation: a schedule that ends at abar = 0.3 cannot be tilted at its start; the same distance",
        lambda: bias(SHORT),
        at_least=0.15,
        long=True,
    ),
    Proof(
        "and its loss keeps a floor: final loss over that of the schedule that ends in noise",
        lambda: at_best(1.0, SHORT)[2] / at_best(1.0, NOISY)[2],
        at_least=5.0,
        long=True,
    ),
    Proof(
        "rewards of one of two prompts raised by 100: relative change of the weights after 10 iterations",
        offset_gap,
        at_most=1e-4,
        long=True,
    ),
    Proof(
        "the same for a policy gradient with rewards standardised over the batch: share of its gain that is left",
        lambda: batch_wide_gain(100.0) / batch_wide_gain(0.0),
        at_most=0.7,
        long=True,
    ),
    Proof(
        "ten steps with lr 0.2 per iteration, step clip 0.05: median loss of iterations 9 to 16, highest of three "
        "seeds (of the reference 7.7)",
        lambda: max(loss for loss, _ in far(0.05)),
        at_most=7.7,
        long=True,
    ),
    Proof(
        "and its mean of x_0 less that of the best policy (0.896; the reference has 0), farthest of three seeds",
        lambda: max(abs(mean - best_moments(1.0)[0]) for _, mean in far(0.05)),
        at_most=0.3,
        long=True,
    ),
    Proof(
        "ablation: without the clip, lowest of three seeds",
        lambda: min(loss for loss, _ in far(1e9)),
        at_least=7.7,
        long=True,
    ),
)
