"""Guided rollouts as configured: which steps follow which gradient, how far, and what a regression makes of it."""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.models.protocol import Stateful
from difftilt.objectives.distillation import (
    distillation_loss,
    finite_target,
    limit_target,
    step_weight,
    velocity_slope,
)
from difftilt.process.gaussian import GaussianProcess, as_gaussian, expand
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import Moment, NoiseSource
from difftilt.sampling.rollout import replay
from difftilt.sampling.steps import GaussianStep
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.process_reward import scorer
from difftilt.training.protocol import Loss, Phase, Run, Term
from difftilt.values.process_reward import GradientGuide, Strength
from difftilt.values.spsa import spsa_gradient


class GuidanceConfig(Config):
    """Direction, strength and steps."""

    guidance: float | Literal["kl"] = 0.01
    """lambda, or ``kl``: g²/(2·temperature), g the diffusion coefficient of the step; 0 guides nothing."""
    scale_by_step: bool = True
    """Multiply lambda by the length of the step."""
    unit_gradient: bool = False
    """Divide the gradient of each sample by its norm."""
    gradient: Literal["model", "spsa"] = "model"
    """Of the process reward, or estimated from outcome rewards of perturbed x0-predictions."""
    spsa_size: float = Field(default=0.01, gt=0)
    """Size of the perturbation, in units of the latent."""
    spsa_draws: int = Field(default=1, ge=1)
    """Perturbations per step; each costs two reward calls per sample."""
    guide_from: int | None = Field(default=None, ge=0)
    """First guided step; null is three quarters of the grid (12 of the paper's 16 steps)."""
    guide_to: int | None = Field(default=None, ge=1)
    """End (exclusive) of the guided steps; null is the end of the grid."""
    guide_every: int = Field(default=1, ge=1)
    """Steps from one guided step to the next."""

    def active(self, steps: int) -> Bool[Tensor, " steps"]:
        """The steps at which the gradient is followed and the process reward asked.

        Raises:
            UserError: if there is none, or one beyond the grid.
        """
        first = (3 * steps) // 4 if self.guide_from is None else self.guide_from
        end = steps if self.guide_to is None else self.guide_to
        if not first < end <= steps:
            raise UserError(
                f"method.guide_from and guide_to = {first} and {end} hold no step of a grid of {steps}: "
                f"use 0 <= guide_from < guide_to <= {steps}"
            )
        place = torch.arange(steps)
        return (place >= first) & (place < end) & ((place - first) % self.guide_every == 0)

    def strength(self, temperature: float) -> Strength:
        """The factor of the gradient.

        Raises:
            UserError: for a negative lambda.
        """
        if self.guidance == "kl":
            return Strength(None, temperature, self.scale_by_step)
        if self.guidance < 0:
            raise UserError(
                f"method.guidance = {self.guidance} must be at least 0: turn the sign of the reward instead"
            )
        return Strength(self.guidance, temperature, self.scale_by_step)


class Distillation(Config):
    """A regression of the velocity to one that needs no guidance, on the states of the rollouts."""

    target: Literal["finite", "limit"] = "limit"
    """``finite``: its step has the mean of the guided step; ``limit``: the probability flow of the tilted law, for
    which the process reward must be the soft value of that temperature (``fit: stationary``)."""
    weight: float = Field(default=1.0, gt=0)
    """Of the loss."""
    kl_weighted: bool = False
    """Weigh each step so that the loss is the KL to the step of the target; else the plain squared gap."""
    bound: float | None = Field(default=None, gt=0)
    """Of t/(1 - t) in ``limit``, which is large at the noise end; null leaves it."""
    updates: int = Field(default=1, ge=1)
    """Optimiser steps per iteration."""
    first: int = Field(default=0, ge=0)
    """First iteration that distils."""
    alone: bool = False
    """From there on the surrogate is not trained."""


class Guided:
    """The strength and the steps of a guidance, and whether its gradient is a unit one."""

    def __init__(self, config: GuidanceConfig, temperature: float, steps: int) -> None:
        self.active = config.active(steps)
        self.strength = config.strength(temperature)
        self.unit = config.unit_gradient
        self.temperature = temperature

    def shift(self, gradient: Tensor, std: Tensor, t: Tensor, s: Tensor, step: Tensor) -> Tensor:
        """What it adds to the means of recorded steps; 0 where it is inactive."""
        active = expand(self.active.to(gradient)[step], gradient)
        return active * self.strength.shift(gradient, std, t, s, self.unit)


def guide_of(config: GuidanceConfig, guided: Guided, run: Run, batch: PromptBatch) -> GradientGuide | None:
    """What moves a rollout of these prompts; None under guidance 0, which leaves the base sampler bit for bit."""
    if config.guidance == 0:
        return None
    slope = partial(_estimate, config, run, batch) if config.gradient == "spsa" else partial(_slope, run)
    return GradientGuide(slope, guided.strength, guided.active, guided.unit)


def _slope(run: Run, moment: Moment) -> tuple[Tensor, Tensor]:
    condition = moment.condition.condition if isinstance(moment.condition, Stateful) else moment.condition
    return scorer(run).gradient(moment.x_t, moment.t, condition)


def _estimate(config: GuidanceConfig, run: Run, batch: PromptBatch, moment: Moment) -> tuple[None, Tensor]:
    """The SPSA gradient of the outcome reward at the x0-prediction; it knows no score of the state."""
    with torch.no_grad():
        x_0, place = moment.prediction.x0, int(moment.position)
        shape, draws = tuple(x_0.shape[1:]), range(config.spsa_draws)
        directions = [run.noise.normal(batch.index, shape, purpose=f"spsa {j}", step=place).to(x_0) for j in draws]
        return None, spsa_gradient(partial(_outcome, run, batch), x_0, torch.stack(directions), config.spsa_size)


def _outcome(run: Run, batch: PromptBatch, x_0: Tensor) -> Tensor:
    return run.score(run.samples(x_0, batch)).total


def distilling(config: Distillation, run: Run, preset: Preset, guided: Guided) -> Phase:
    """The phase that moves ``current`` to the guided velocity of the reference, which is a fixed target."""
    loss = partial(_distil, config, run, preset, guided)
    return Phase(
        "current",
        loss,
        unit="sample",
        updates=config.updates,
        select=partial(_defined, config, run),
        when=lambda iteration: iteration >= config.first,
        guided=True,
    )


def _distil(
    config: Distillation, run: Run, preset: Preset, guided: Guided, rows: Experience, noise: NoiseSource
) -> Loss:
    """Squared gap of the velocity to the guided velocity of the base."""
    edges, process = rows.edges, run.task.model.process
    assert edges.x_t is not None
    assert edges.s is not None
    assert isinstance(process, GaussianProcess)
    with torch.no_grad():
        base = as_gaussian(run.denoiser("reference")(edges.x_t, edges.t, rows.condition)).velocity
    _, gradient = scorer(run).gradient(edges.x_t, edges.t, rows.condition)
    moment = replay(run.denoiser("current"), preset, edges, rows.condition)
    assert isinstance(moment.step, GaussianStep)
    std, slope = moment.step.std, velocity_slope(preset.kernel, process, edges.t, edges.s)
    if config.target == "limit":
        target = limit_target(process, base, gradient, edges.t, guided.temperature, config.bound)
    else:
        target = finite_target(base, guided.shift(gradient, std, edges.t, edges.s, edges.step), slope)
    weight = step_weight(slope, std) if config.kl_weighted else None
    gap = distillation_loss(as_gaussian(moment.prediction).velocity, target, weight)
    return Loss({"distillation": Term(gap, config.weight)})


def _defined(config: Distillation, run: Run, experience: Experience) -> Int[Tensor, " chosen"]:
    """All edges, but for the limit not those at pure noise, where its coefficient is infinite."""
    edges, process = experience.edges, run.task.model.process
    assert isinstance(process, GaussianProcess)
    clean = process.alpha(edges.t) > 1e-6 if config.target == "limit" else torch.ones_like(edges.t, dtype=torch.bool)
    return clean.nonzero()[:, 0]
