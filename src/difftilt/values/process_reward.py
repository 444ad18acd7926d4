"""Process rewards: their gradient, the guide that follows it, and how a network is fitted to one (arXiv 2602.04928).

r(x_t, t, condition) scores a noisy state. Fitted to E[r(x_0) | x_t] or to the soft value β·log E[exp(r(x_0)/β) | x_t],
its gradient says where better samples lie.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from difftilt.errors import RewardError, UserError
from difftilt.models.denoiser import in_chunks
from difftilt.models.ledger import Ledger
from difftilt.models.process_reward import ProcessReward
from difftilt.process.gaussian import at_least_float32, expand
from difftilt.process.protocol import Condition, Process
from difftilt.sampling.protocol import Moment, NoiseSource
from difftilt.sampling.steps import GaussianStep
from difftilt.values.learned import Regression, ValueFunction, fit_value

CHUNK = 64
"""Rows of every call, filled up where there are fewer, so that a row's score does not depend on the batch it is in."""
PURPOSE = "process reward"
"""Of the noise that a process reward is fitted with."""

States = Float[Tensor, "batch *shape"]
Rows = Float[Tensor, " batch"]


@dataclass(frozen=True)
class Scorer:
    """A process reward with the ledger that its evaluations are counted in, as auxiliary calls.

    Attributes:
        network: (x_t, t, condition) -> (batch,).
        ledger: of the run.
    """

    network: ValueFunction
    ledger: Ledger

    def __call__(self, x_t: Shaped[Tensor, "batch *shape"], t: Rows, condition: Condition) -> Rows:
        """The score of every state, tokens too, without gradient.

        Raises:
            RewardError: if it is not one finite number per state.
        """
        self.ledger.auxiliary_calls += len(x_t)
        with torch.no_grad():
            return in_chunks(self._score, at_least_float32(x_t), t, condition, CHUNK)

    def gradient(self, x_t: States, t: Rows, condition: Condition) -> tuple[Rows, States]:
        """The score and its gradient with respect to the state, from one evaluation; both detached.

        Raises:
            RewardError: if one of them is not finite, or the score does not depend on the state.
        """
        self.ledger.auxiliary_calls += len(x_t)
        score, slope = in_chunks(self._gradient, at_least_float32(x_t.detach()), t, condition, CHUNK)
        return score, slope.to(x_t.dtype)

    def _score(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        score = self.network(x_t, t, condition)
        if score.shape != (len(x_t),) or not bool(score.isfinite().all()):
            raise RewardError(
                f"the process reward returned shape {tuple(score.shape)} for {len(x_t)} states, or scores that are not "
                "finite: fit it on all times, in float32"
            )
        return score

    def _gradient(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x_t.requires_grad_()
            score = self._score(x, t, condition)
            if not score.requires_grad:
                raise RewardError("the process reward has no gradient with respect to the state: guidance needs one")
            (slope,) = torch.autograd.grad(score.sum(), x)
        if not bool(slope.isfinite().all()):
            raise RewardError(
                f"the gradient of the process reward is not finite at times {float(t.min()):.3g} to "
                f"{float(t.max()):.3g}: guide later steps, or fit it on all times, in float32"
            )
        return score.detach(), slope


@dataclass(frozen=True)
class Strength:
    """What the gradient is multiplied by in a step from t to s; 0 where the step has no noise.

    Attributes:
        rate: lambda, or None for g²/(2·temperature), g = std/sqrt(t - s): the share of a reward-tilted score in the
            correction of the SDE.
        temperature: β of that form.
        by_length: multiply by t - s, so that the rate belongs to the drift.
    """

    rate: float | None
    temperature: float
    by_length: bool = True

    def __call__(self, std: Rows, t: Rows, s: Rows) -> Rows:
        """The factor of each row."""
        length = t - s
        rate = std**2 / length / (2 * self.temperature) if self.rate is None else torch.full_like(t, self.rate)
        return torch.where(std > 0, rate * length if self.by_length else rate, 0.0)

    def shift(self, gradient: States, std: Rows, t: Rows, s: Rows, unit: bool = False) -> States:
        """What is added to the mean; with ``unit`` the gradient of each row is first divided by its norm + 1e-8."""
        if unit:
            gradient = gradient / expand(gradient.flatten(1).norm(dim=1) + 1e-8, gradient)
        return expand(self(std, t, s), gradient) * gradient


Slope = Callable[[Moment], tuple[Tensor | None, Tensor]]
"""The score of each row where it is known, and the direction to follow."""


@dataclass(frozen=True)
class GradientGuide:
    """A guide that shifts the mean of the active steps along a gradient.

    Attributes:
        slope: of a process reward, or an estimate from a black box.
        strength: its factor.
        active: the steps that are guided, on the CPU.
        unit: divide the gradient of each row by its norm.
        scores: step -> scores of the states it began from, as far as the slope knew them; filled as it is called.
    """

    slope: Slope
    strength: Strength
    active: Bool[Tensor, " steps"]
    unit: bool = False
    scores: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def __call__(self, moment: Moment) -> Tensor | None:
        step = moment.step
        if not isinstance(step, GaussianStep):
            raise UserError(f"guidance moves the mean of Gaussian steps, not of a {type(step).__name__}")
        if not bool(self.active[int(moment.position)]) or step.deterministic:
            return None
        score, gradient = self.slope(moment)
        if score is not None:
            self.scores[int(moment.position)] = score
        return self.strength.shift(gradient, step.std, moment.t, moment.s, self.unit)


def fit_process_reward(
    network: ProcessReward,
    process: Process,
    x_0: Shaped[Tensor, "samples *shape"],
    reward: Float[Tensor, " samples"],
    condition: Condition,
    noise: NoiseSource,
    *,
    temperature: float,
    kind: Regression = "mean",
    updates: int,
    batch: int = 256,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Fit the network in place on samples noised at uniform times; returns the loss of each update.

    Args:
        network: calibrated to the rewards first; its parameters keep their ``requires_grad``.
        process: corrupts the samples.
        x_0: samples.
        reward: of each.
        condition: one row per sample.
        noise: of the choice of rows, the times and the corruption.
        temperature: of the soft value.
        kind: ``mean`` learns E[r | x_t], the others the soft value (``values.learned``).
        updates: optimiser steps (Adam, cosine decay of the learning rate).
        batch: rows per update.
        learning_rate: at the start.
    """
    network.calibrate(reward)
    parameters = list(network.parameters())
    trainable = [parameter.requires_grad for parameter in parameters]
    network.requires_grad_()
    losses = fit_value(
        network,
        process,
        x_0,
        reward,
        noise,
        condition=condition,
        temperature=temperature,
        kind=kind,
        updates=updates,
        batch=batch,
        learning_rate=learning_rate,
        unit=float(network.scale),
        purpose=PURPOSE,
    )
    for parameter, wanted in zip(parameters, trainable, strict=True):
        parameter.requires_grad_(wanted).grad = None
    return losses
