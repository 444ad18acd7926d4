"""Completion: the clean sample that the ODE reaches from a state on the way, along what is left of a grid.

The value of a state in dense-reward methods is the reward of its completion. Completions of different remaining lengths
run together, aligned at the data end, so that every network call holds all rows still under way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from difftilt.models.protocol import Denoiser, remembers
from difftilt.process.protocol import Condition
from difftilt.sampling.kernels import Euler
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import Moment
from difftilt.sampling.rollout import Plan, rollout
from difftilt.trees import Batched, join, take

Grid = Float[Tensor, " times"]
Times = Float[Tensor, " left"]
Schedule = Callable[[Grid, int], Times]
"""``(grid, position) -> times`` of a completion from the state at ``grid[position]``; the first is its own."""

ODE = Preset("ode", Euler())


def remaining(grid: Grid, position: int) -> Times:
    """Every time that is left."""
    return grid[position:]


@dataclass(frozen=True)
class Strides:
    """At most ``count`` nearly equal strides (by index) over what is left, ending at the end of the grid.

    1 is the x0-prediction.
    """

    count: int

    def __call__(self, grid: Grid, position: int) -> Times:
        left = len(grid) - 1 - position
        return grid[position + torch.linspace(0, left, min(self.count, left) + 1).round().long()]


@dataclass(frozen=True)
class Granularity:
    """One step of the grid, then every ``skip``-th time while there is one (arXiv 2510.01982).

    The last time may be short of the data: the sample is the x0-prediction of the last evaluation, at the time before
    it. From position p a grid of T steps costs ceil((T - p)/skip) evaluations.
    """

    skip: int

    def __call__(self, grid: Grid, position: int) -> Times:
        return grid[[position, *range(position + 1, len(grid), self.skip)]]


@dataclass(frozen=True)
class Start(Batched):
    """States at one time of a grid, to be completed.

    Attributes:
        x: (rows, *shape).
        condition: one row per state.
        times: of the completion, from the states' own time on; a single time is a finished sample.
    """

    x: Shaped[Tensor, "rows *shape"]
    condition: Condition
    times: tuple[float, ...]


@dataclass
class Ahead:
    """Watches a rollout and keeps, for every position asked for, the first step of the completion from there.

    That step is the ODE's, by the prediction that the rollout has paid for: a completion from position p of T steps
    then costs T - p - 1 evaluations.

    Attributes:
        grid: of the rollout.
        schedule: of the completions.
        positions: whose states are kept.
        starts: position -> what is left to do from there; filled by the rollout.
    """

    grid: Grid
    schedule: Schedule
    positions: frozenset[int]
    starts: dict[int, Start] = field(default_factory=dict[int, Start])

    def __call__(self, moment: Moment, x_s: Tensor) -> None:
        position = int(moment.position)
        if position not in self.positions:
            return
        times = self.schedule(self.grid, position)
        s = times[1].to(moment.t).expand(len(moment.t))
        x = Euler()(moment.prediction, moment.x_t, moment.t, s).mean
        self.starts[position] = Start(x, moment.condition, tuple(times[1:].tolist()))


def complete(
    denoise: Denoiser, starts: Sequence[Start], output: Literal["state", "x0"] = "state"
) -> list[Shaped[Tensor, "rows *shape"]]:
    """The clean samples that the ODE reaches from each of the starts.

    Args:
        denoise: counts its evaluations: one for every row and every step of its times. One that keeps state along a
            trajectory completes the starts one after the other.
        starts: states of one shape; their times may differ in number.
        output: the last state, or the x0-prediction of the last evaluation.
    """
    longest = max(len(start.times) for start in starts)
    if longest == 1:
        return [start.x for start in starts]
    if len(starts) > 1 and _keeps_state(denoise, starts[0]):
        return [complete(denoise, [start], output)[0] for start in starts]
    # filled up in front, where a step of length 0 does nothing, so that all end together
    times = [(*start.times[:1] * (longest - len(start.times)), *start.times) for start in starts]
    sizes = [len(start.x) for start in starts]
    grid = torch.tensor(times, dtype=torch.float64).repeat_interleave(torch.tensor(sizes), dim=0)
    x, condition = join([start.x for start in starts]), join([start.condition for start in starts])
    index = torch.arange(len(x), device=x.device)
    path = rollout(denoise, ODE, grid, x, condition, noise=Noise(0), index=index, plan=Plan(output=output))
    return list(path.x_0.split(sizes))


def _keeps_state(denoise: Denoiser, start: Start) -> bool:
    """Whether the model adds state of its own to a condition."""
    one = take(start, torch.zeros(1, dtype=torch.int64))
    prepared = denoise.prepare(one.x, one.x.new_full((1,), start.times[0]), one.condition)
    return remembers(one.condition, prepared)
