"""Conditions that bring state with them: every method and steerer begins where they say, and can go on from there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import difftilt
from difftilt.models.denoiser import denoiser
from difftilt.models.protocol import START, START_TIME, Stateful
from difftilt.process.grid import uniform_grid
from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Samples
from difftilt.sampling.completion import ODE, Start, complete
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import Plan, rollout
from difftilt.training.loop import assemble
from difftilt.training.measure import drift_of, quick_drift
from difftilt.training.protocol import Task
from difftilt.training.world import World
from training_runs import CASES, METHODS, make_case, make_config, make_loop, make_method, make_task

FAR, FIRST = 40.0, 0.1
"""Where samples begin, and at which time: noise of size 0.1 upon 36."""
OTHERS = [case for case in CASES if case not in (*METHODS, "euphonium", "gardo", "gardo-nft")]
"""``euphonium`` needs a class or a vector to read; ``gardo`` is one of the two."""


class Still(nn.Module):
    """No velocity: a sample ends near where it began. Calls and their times are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))
        self.times: list[float] = []
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Stateful)
        assert len(condition.state[START]) == len(x_t)
        self.times += t.tolist()
        self.calls += 1
        return 0 * x_t + self.bias


def encode(prompts: Sequence[str]) -> Stateful:
    start = torch.full((len(prompts), 2), FAR)
    time = torch.full((len(prompts),), FIRST, dtype=torch.float64)
    return Stateful({"row": torch.zeros(len(prompts), 1)}, {START: start, START_TIME: time})


def null_condition(rows: int) -> Condition:
    return {"row": torch.zeros(rows, 1)}


def beginning() -> Task:
    task = make_task(classes=4)
    model = replace(task.model, network=Still(), encode=encode, null_condition=null_condition)
    sampler = replace(task.sampler, grid=FIRST * uniform_grid(4), begins=True)
    return replace(task, model=model, sampler=sampler)


@pytest.mark.parametrize("case", [*METHODS, *(pytest.param(case, marks=pytest.mark.long) for case in OTHERS)])
def test_every_method_learns_from_samples_that_begin_where_the_condition_says(case: str) -> None:
    task = beginning()
    method = make_case(case, task)
    loop = assemble(task, method, make_config(), None, (), (), World())
    loop.run.begin(0)
    with torch.no_grad():
        experience = method.collect(loop.run)
    assert experience.x_0 is not None
    assert float(experience.x_0.min()) > FAR / 2
    if experience.edges.x_t is not None:
        assert float(experience.edges.x_t.min()) > FAR / 2
    loop.iterate(1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fk-steering", {"particles": 4, "resample_at": 2, "temperature": 0.1}),
        ("svdd", {"children": 3, "particles": 2, "temperature": 0.1}),
        ("dlbs", {"children": 2, "particles": 2}),
        ("dts", {"budget": {"nfe": 80}}),
        ("dts-star", {"budget": {"nfe": 80}}),
        ("doit", {"budget": {"nfe": 80}}),
        ("find", {"budget": {"nfe": 400}}),
        ("best-of-n", {"particles": 4}),
    ],
)
def test_every_steerer_begins_where_the_condition_says(method: str, settings: dict[str, Any]) -> None:
    def right(samples: Samples) -> Tensor:
        return samples.media[:, 0]

    steered = difftilt.steer(beginning(), right, ["class 0"], method=method, **settings).steered
    assert float(steered.x_0.min()) > FAR / 2


@torch.no_grad()
def test_rows_that_begin_later_may_have_known_pixels() -> None:
    """Nothing is renewed along the trajectory, so rows of several times go together, as each would alone."""
    task = beginning()
    model, grid, index = denoiser(task.model), task.sampler.grid, torch.arange(4)
    x, condition = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), encode([""] * 4)
    plan = Plan(first=torch.tensor([0, 0, 2, 2]))
    path = rollout(model, ODE, grid, x, condition, noise=Noise(0), index=index, plan=plan)
    alone = rollout(model, ODE, grid[2:], x, condition, noise=Noise(0), index=index)
    assert torch.equal(path.x_0[2:], alone.x_0[2:])
    starts = [Start(x, condition, tuple(grid[first:].tolist())) for first in (0, 2)]
    network = task.model.network
    assert isinstance(network, Still)
    network.calls = 0
    assert torch.equal(complete(model, starts)[1], alone.x_0)
    assert network.calls == 4  # of the longer one, which the shorter joins


def test_drift_is_summed_over_times_that_are_sampled() -> None:
    task = beginning()
    loop = make_loop(make_method("flow-grpo", task), task)
    network = task.model.network
    assert isinstance(network, Still)
    loop.run.roles.stepped("current")
    with torch.no_grad():
        network.bias.add_(1.0)
        batch = loop.run.prompts(2, 4)
        network.times.clear()
        drift_of(loop.run, "current", torch.zeros(8, 2), batch, Noise(0))
        quick_drift(loop.run, "current", torch.zeros(8, 2), batch.condition, batch.index)
    assert network.times
    assert max(network.times) <= FIRST + 1e-6
