"""What the policy gradients through a denoising chain share: rollout, trained steps, surrogate, averaged weights.

A member of the family says how its rollouts branch, what each recorded step is credited with, and what holds the policy
back; everything else is here.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field
from torch import Tensor

from difftilt.config import Config as Settings
from difftilt.errors import UserError
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import Guide, NoiseSource, Observe, Trajectory
from difftilt.sampling.rollout import Plan, rollout, start_state
from difftilt.sampling.windows import Motion, moving_start, random_start, window_mask
from difftilt.training.base import AveragedMethod
from difftilt.training.config import GroupSampling
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.grids import grid_of
from difftilt.training.protocol import Loss, Phase, Run, Task
from difftilt.training.surrogate import SurrogateConfig, make_preset, surrogate_loss


class PolicyGradientConfig(GroupSampling, SurrogateConfig):
    """Rollout grid, surrogate and update."""

    steps: int | None = Field(default=None, ge=2)
    """Steps of a rollout; None follows the task's sampler."""
    shift: float = Field(default=3.0, gt=0)
    """Time shift of the grid when ``steps`` is given."""
    updates: int = Field(default=2, ge=1)
    """Optimiser steps per iteration."""
    ema: float = Field(default=0.9, ge=0, lt=1)
    """Largest decay of the averaged weights that are evaluated, updated every 8 steps; 0 evaluates the trained ones."""


class Window(Settings):
    """Steps that are stochastic and trained, inside others that follow the ODE."""

    width: int = Field(default=2, ge=1)
    """Number of steps."""
    motion: Motion = "random"
    """``random``: a new start in every rollout (Flow-GRPO-Fast); the others move as in MixGRPO."""
    low: int = Field(default=0, ge=0)
    """First start of a random window."""
    high: int | None = Field(default=None, ge=1)
    """End (exclusive) of the steps a random window may cover; None is half of the grid."""
    every: int = Field(default=25, ge=1)
    """Iterations that a moving window stays."""
    stride: int = Field(default=1, ge=1)
    """Steps that it moves by."""

    def start(self, steps: int, iteration: int, noise: NoiseSource) -> int:
        """Its first step on a grid of ``steps``."""
        if self.motion == "random":
            return random_start(noise, self.low, self.high or max(steps // 2, self.width), self.width)
        return moving_start(iteration, steps - self.width, self.every, self.stride, self.motion)

    def reach(self, steps: int) -> Bool[Tensor, " steps"]:
        """True for the steps that it covers in any iteration."""
        if self.motion == "random":
            return window_mask(steps, self.low, (self.high or max(steps // 2, self.width)) - self.low)
        starts = range(0, steps - self.width, self.stride)
        return torch.stack([window_mask(steps, start, self.width) for start in starts]).any(0)

    def check(self, steps: int) -> None:
        """Refuse a window that has no place before the last step of the grid, which is never trained."""
        if self.width >= steps:
            raise UserError(
                f"method.window.width = {self.width} leaves nothing of {steps} steps: the last is never trained"
            )
        if (self.high or 0) >= steps:
            raise UserError(
                f"method.window.high = {self.high} reaches the last of {steps} steps, which is never trained: "
                f"use at most {steps - 1}"
            )
        high = self.high or max(steps // 2, self.width)
        if self.motion == "random" and self.low + self.width > high:
            raise UserError(
                f"method.window: {self.width} steps do not fit into steps {self.low} to {high - 1}: "
                "lower window.low or width, or raise high"
            )


class ChainConfig(PolicyGradientConfig):
    """Groups of chains, each stochastic in all steps but the last, or in a window."""

    share_start: bool = False
    """One initial noise for all samples of a group (DanceGRPO, MixGRPO)."""
    output: Literal["state", "x0"] = "state"
    """Score the last state, or the x0-prediction of the last evaluation (DanceGRPO)."""
    window: Window | None = None
    """None: all steps but the last are stochastic and trained."""


AnyConfig = TypeVar("AnyConfig", bound=PolicyGradientConfig)
ChainsConfig = TypeVar("ChainsConfig", bound=ChainConfig)


class PolicyGradient(AveragedMethod[AnyConfig], Generic[AnyConfig]):
    """One surrogate phase over recorded steps; ``collect`` is the member's own.

    Args:
        config: rollout, surrogate and update.
        task: gives the grid and the model.
    """

    average_every = 8

    def __init__(self, config: AnyConfig, task: Task) -> None:
        _check_surrogate(config, task)
        self.config = config
        self.preset = make_preset(config)
        self.grid = grid_of(task, config.steps, config.shift)
        self.clean_end = task.sampler.clean_end

    def phases(self, run: Run) -> Sequence[Phase]:
        """The surrogate with its KL, on whole samples."""
        return [Phase("current", partial(self._loss, run), unit="sample", updates=self.config.updates, guided=True)]

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        return surrogate_loss(self.config, self.preset, run, rows)


class ChainPolicyGradient(PolicyGradient[ChainsConfig]):
    """The members whose rollouts are chains, with a window or without."""

    def __init__(self, config: ChainsConfig, task: Task) -> None:
        super().__init__(config, task)
        if config.window is None:
            return
        if isinstance(task.model.process, MaskedProcess):
            raise UserError(f"{task.name} has tokens: method.window needs a Gaussian process")
        config.window.check(len(self.grid) - 1)

    def plan(self, iteration: int, noise: NoiseSource) -> Plan:
        """Which steps are stochastic, and recorded: a window, or all but the last."""
        steps, config = len(self.grid) - 1, self.config
        plan = Plan(record=window_mask(steps, 0, steps - 1), means=config.objective == "guard", output=config.output)
        if config.window is None:
            # the last step is never trained; where its noise would stay in the sample it follows the ODE
            return replace(plan, stochastic=plan.record) if self.clean_end else plan
        start = config.window.start(steps, iteration, noise)
        return replace(plan, stochastic=window_mask(steps, start, config.window.width))

    def trainable(self) -> Bool[Tensor, " steps"]:
        """True for the steps that are stochastic and recorded in some iteration."""
        steps, window = len(self.grid) - 1, self.config.window
        return window_mask(steps, 0, steps - 1) if window is None else window.reach(steps)

    def start(self, run: Run, batch: PromptBatch) -> Shaped[Tensor, "samples *shape"]:
        """The first states, from noise for each sample or for each group."""
        key = batch.group if self.config.share_start else batch.index
        return start_state(run.task.model.process, run.noise, key, run.task.model.shape, batch.condition)

    def roll(
        self,
        run: Run,
        batch: PromptBatch,
        *,
        guide: Guide | None = None,
        observe: Observe | None = None,
        end: int | None = None,
        plan: Plan | None = None,
        preset: Preset | None = None,
    ) -> Trajectory:
        """Chains of the current weights along the grid, or along its first ``end`` steps.

        Under the plan and the preset of the method, unless others are given.
        """
        return rollout(
            run.denoiser("current"),
            preset or self.preset,
            self.grid[: None if end is None else end + 1],
            self.start(run, batch),
            batch.condition,
            noise=run.noise,
            index=batch.index,
            plan=plan or self.plan(run.iteration, run.noise),
            guide=guide,
            observe=observe,
        )


def with_advantage(experience: Experience, advantage: Float[Tensor, "edges terms"]) -> Experience:
    """The record with the advantage of every edge; edges whose advantages are all 0 teach nothing and are masked."""
    edges = experience.edges
    teaches = (advantage != 0).any(1)
    mask = teaches if edges.mask is None else edges.mask & teaches
    return replace(experience, edges=replace(edges, advantage=advantage, mask=mask))


def _check_surrogate(config: SurrogateConfig, task: Task) -> None:
    """Refuse a kernel that does not fit the process, and an objective that does not fit the kernel."""
    tokens = isinstance(task.model.process, MaskedProcess)
    if tokens != (config.kernel == "unmasking"):
        fitting = "unmasking" if tokens else "flow_sde, dance_sde, cps or ddim"
        raise UserError(f"method.kernel = {config.kernel} does not fit the process of {task.name}: use {fitting}")
    if config.kernel == "cps" and config.noise_level > 1:
        raise UserError(f"method.noise_level = {config.noise_level} of cps must be at most 1, where all noise is fresh")
    if tokens and (config.objective == "guard" or config.kl != "exact"):
        raise UserError(f"{task.name} has tokens: objective guard and inexact kl need a Gaussian process")
    if config.objective == "guard" and config.kernel == "cps":
        raise UserError(
            "method.objective = guard corrects a Gaussian density, and cps scores a squared error: use flow_sde"
        )
