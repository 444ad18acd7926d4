"""What a calibration of the noise rates ends at, with its feedback and without (DenseGRPO)."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difftilt.checks.trial import loop_of, with_reward
from difftilt.methods.policy_gradient.dense_grpo import DenseGRPO
from difftilt.process.gaussian import RectifiedFlow
from difftilt.rewards.protocol import Samples
from difftilt.sampling.kernels import FlowSDE
from difftilt.sampling.presets import Preset
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures, ring
from difftilt.training.calibration import adjusted, calibrate, calibrated_preset, count_signs, draws, rate_bounds
from difftilt.training.experience import PromptBatch
from difftilt.training.protocol import Task
from difftilt.training.run import LoopRun

ROUNDS: dict[str, Any] = {"calibration_rounds": 24, "calibration_samples": 256, "calibration_change": 0.2}


def nearest_mode(samples: Samples) -> Tensor:
    """Minus the distance to the nearest mode: late noise can only hurt."""
    return -torch.cdist(samples.media, ring(8, 2.0, 2)).amin(1)


@dataclass(frozen=True)
class Calibrated:
    """What a calibration ends at, for the trained steps.

    Attributes:
        growth: rates over the first ones.
        room: rates over the largest ones.
        positive: share of positive gains, ties left out, of 1024 new chains under these rates.
    """

    growth: Float[Tensor, " trained"]
    room: Float[Tensor, " trained"]
    positive: Float[Tensor, " trained"]

    @property
    def below(self) -> Bool[Tensor, " trained"]:
        """Steps that stop below nine tenths of their largest rate."""
        return self.room < 0.9


@cache
def calibrated(feedback: bool = True) -> Calibrated:
    """Under :func:`nearest_mode`, with guidance 3, whose field no noise leaves alone.

    Without ``feedback`` every round measures under the first rates.
    """
    task = with_reward(Mixtures(MixturesConfig(steps=10, shift=3.0, classes=4)).task(), nearest_mode)
    task = replace(task, sampler=replace(task.sampler, guidance=3.0))
    run, method = _dense(task)
    kernel, grid = method.uncalibrated.kernel, method.grid
    assert isinstance(kernel, FlowSDE)

    def measure(batch: PromptBatch, preset: Preset) -> Float[Tensor, "samples gains"]:
        return method.gains_under(run, batch, preset if feedback else method.uncalibrated)

    with torch.no_grad():
        found = calibrate(run, method.config, grid, kernel, measure, 16)
        run.begin(1)
        (fresh,) = draws(run, 1, 1024, 16)
        signs = count_signs(method.gains_under(run, fresh, calibrated_preset(grid, found))).double()
    first, _, largest = rate_bounds(RectifiedFlow(), grid, kernel)
    return Calibrated((found.rates / first)[:-1], (found.rates / largest)[:-1], signs[:, 0] / signs[:, :2].sum(1))


def _dense(task: Task) -> tuple[LoopRun, DenseGRPO]:
    loop = loop_of("dense-grpo", task, 4096, groups=4, group_size=4, **ROUNDS)
    assert isinstance(loop.method, DenseGRPO)
    return loop.run, loop.method


def worst_imbalance(feedback: bool = True) -> float:
    """Largest |#positive - #negative|/(#positive + #negative) of a trained step of the new chains."""
    return float((2 * calibrated(feedback).positive - 1).abs().max())


def growth_spread() -> float:
    """Largest over smallest growth of a rate among the steps that are not at their largest rate."""
    found = calibrated(True)
    growth = found.growth[found.below]
    return float(growth.max() / growth.min())


def coin_drift(tolerance: float, size: int = 24, rounds: int = 200) -> float:
    """Mean change per round, in units of the change, of the rates of 200 steps whose gains are fair coins."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.zeros(200, dtype=torch.float64)
    for _ in range(rounds):
        coins = torch.randint(0, 2, (size, 200), generator=generator) * 2.0 - 1
        rates = adjusted(rates, count_signs(coins), tolerance, 1.0)
    return float(rates.mean()) / rounds
