"""What methods on the forward process share: finished samples, noise levels, and predictions at re-noised states.

No trajectory and no likelihood: a sample is drawn by any sampler, re-noised to times of its own choice, and the network
is regressed there. A row of a loss is one noise level of one sample; its ``edges.step`` numbers the level, and keys the
noise together with the sample (or with its group, where a pair or a group shares its noise).
"""

import math
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor

from difftilt.errors import UserError
from difftilt.process.gaussian import GaussianPrediction, GaussianProcess, as_gaussian
from difftilt.process.protocol import Process
from difftilt.sampling.protocol import Edges, NoiseSource, Sampler
from difftilt.training.base import AveragedMethod
from difftilt.training.config import GroupSampling
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.grids import grid_of
from difftilt.training.plain import draw
from difftilt.training.protocol import Run, Task


class ForwardConfig(GroupSampling):
    """Sampling and updates of a method on the forward process."""

    steps: int | None = Field(default=None, ge=2)
    """Solver steps of a rollout; None follows the task's sampler."""
    shift: float = Field(default=1.0, gt=0)
    """Time shift of the grid when ``steps`` is given."""
    updates: int = Field(default=1, ge=1)
    """Optimiser steps per iteration."""
    ema: float = Field(default=0.9, ge=0, lt=1)
    """Largest decay of the averaged weights that are evaluated; 0 evaluates the trained weights themselves."""


C = TypeVar("C", bound=ForwardConfig)


class ForwardProcess(AveragedMethod[C], Generic[C]):
    """Unguided samples of one role, by the task's solver; averaged weights are evaluated.

    Attributes:
        config: of the method.
        grid: times of the solver, 1 to 0.
        sampled_role: whose samples are learned from.

    Raises:
        UserError: for tokens, which have no velocity.
    """

    sampled_role: str = "current"

    def __init__(self, config: C, task: Task, name: str) -> None:
        if not isinstance(task.model.process, GaussianProcess):
            raise UserError(f"{name} needs a Gaussian process: tokens have no velocity; use a discrete method")
        self.config = config
        self.grid = grid_of(task, config.steps, config.shift)

    def sampler(self, task: Task) -> Sampler:
        """The task's, without guidance: the improvement is trained in."""
        return replace(task.sampler, guidance=1.0)

    def finished(self, run: Run, batch: PromptBatch) -> Shaped[Tensor, "samples *shape"]:
        """Samples of ``sampled_role`` on the method's own grid."""
        return draw(run, self.sampled_role, replace(self.sampler(run.task), grid=self.grid), batch, run.noise)


def random_levels(
    noise: NoiseSource, grid: Float[Tensor, " times"], fraction: float, key: Int[Tensor, " samples"]
) -> Edges:
    """For every sample a random subset of the solver's own times but 0; ``step`` is the place on the grid.

    Args:
        noise: of the iteration.
        grid: decreasing, 1 to 0.
        fraction: share of the times that is kept, at least one of them.
        key: samples with one key share their times: the index, or the group.
    """
    times = grid[:-1].float().to(key.device)
    # the small term undoes rounding: 0.3·10 is 2.999… in floating point
    kept = max(1, math.floor(fraction * len(times) + 1e-9))
    order = noise.uniform(key, (len(times),), purpose="training times").argsort(1)[:, :kept]
    return levels(order, times[order])


def stratified_levels(
    noise: NoiseSource, grid: Float[Tensor, " times"], fraction: float, draws: int | None, key: Int[Tensor, " samples"]
) -> Edges:
    """Draws of a time that all samples share, one from each of as many equal parts of the noisiest times of the solver.

    ``step`` numbers the draws, not the places on the grid: a time that is drawn twice has noise of its own each time.

    Args:
        noise: of the iteration.
        grid: decreasing, 1 to 0; the end at 0 is never drawn.
        fraction: share of the times, from the noise end, that are drawn from; at least one of them.
        draws: more than there are times repeat some; None is as many as there are, so each of them once.
        key: one for each sample; its value does not matter.
    """
    times = grid[:-1].float().to(key.device)
    kept = max(1, math.floor(fraction * len(times) + 1e-9))
    count = kept if draws is None else draws
    # float64, in which number + within stays below count
    within = noise.uniform(key.new_zeros(1), (count,), purpose="training times").double()
    number = torch.arange(count, device=key.device)[None]
    place = ((number + within) * kept / count).floor().long()
    return levels(number.expand(len(key), count), times[place].expand(len(key), count))


def levels(step: Int[Tensor, "samples kept"], t: Float[Tensor, "samples kept"]) -> Edges:
    """One edge for each sample and each of its times; ``step`` numbers the levels, equal where samples share one."""
    sample = torch.arange(len(step), device=step.device).repeat_interleave(step.shape[1])
    return Edges(sample=sample, step=step.reshape(-1), t=t.reshape(-1))


def renoised(
    process: Process, rows: Experience, noise: NoiseSource, key: Int[Tensor, " rows"] | None = None
) -> Float[Tensor, "rows *shape"]:
    """x_t of every row, from its x_0 at its time; rows with one key and one level share their noise.

    Args:
        process: of the model.
        rows: with ``x_0``.
        noise: of the epoch.
        key: None is the sample's own index.
    """
    assert rows.x_0 is not None
    key = rows.index if key is None else key
    eps = noise.normal(key, tuple(rows.x_0.shape[1:]), purpose="renoise", step=rows.edges.step)
    return process.corrupt(rows.x_0, rows.edges.t, eps)


def predicted(run: Run, role: str, x_t: Tensor, rows: Experience, guidance: float = 1.0) -> GaussianPrediction:
    """What the weights of ``role`` predict at the states of the rows; with gradient where gradients are on."""
    return as_gaussian(run.denoiser(role, guidance=guidance)(x_t, rows.edges.t, rows.condition))


def frozen(run: Run, role: str, x_t: Tensor, rows: Experience, guidance: float = 1.0) -> GaussianPrediction:
    """The same without gradient."""
    with torch.no_grad():
        return predicted(run, role, x_t, rows, guidance)


def lagging(run: Run, role: str, x_t: Tensor, rows: Experience) -> GaussianPrediction | None:
    """What a lagging role predicts, without gradient; None while it equals ``current``, whose pass then serves both.

    A role that follows at the end of an iteration is evaluated as it was before the iteration's updates.
    """
    return None if run.roles.same(role, "current") else frozen(run, role, x_t, rows)
