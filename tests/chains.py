"""What the tests of per-step credit recompute by hand: the reward of the ODE's sample from every recorded state."""

from typing import Any

import torch
from torch import Tensor, nn

from difftilt.checks.trial import loop_of, perturbed
from difftilt.sampling.solvers import EulerSolver
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.protocol import Task

SMALL: dict[str, Any] = {"groups": 4, "group_size": 4, "updates": 1}


def task(**changes: Any) -> Task:
    return perturbed(Mixtures(MixturesConfig(**changes)).task())


def collected(name: str, on: Task | None = None, apart: bool = False, **settings: Any) -> tuple[Loop, Experience]:
    """A loop after its first collection; ``apart`` moves the reference away from the current weights before."""
    loop = loop_of(name, on or task(), **{**SMALL, **settings})
    with torch.no_grad():
        network = loop.run.roles.network("reference")
        assert isinstance(network, nn.Module)
        for parameter in network.parameters() if apart else ():
            parameter.add_(0.3)
        return loop, loop.method.collect(loop.run)


def by_hand(loop: Loop, experience: Experience) -> Tensor:
    """R_0..R_K, (samples, states), float64: the solver from each recorded x_t, and the reward of the sample."""
    edges, grid = experience.edges, loop.run.task.sampler.grid
    assert edges.x_t is not None
    assert experience.rewards is not None
    columns: list[Tensor] = []
    for step in edges.step.unique().tolist():
        rows = (edges.step == step).nonzero()[:, 0]
        rows = rows[edges.sample[rows].argsort()]
        with torch.no_grad():
            x_0 = EulerSolver()(loop.run.denoiser("current"), edges.x_t[rows], experience.condition, grid[step:])
            columns.append(loop.run.score(loop.run.samples(x_0, experience)).total.double())
    return torch.stack([*columns, experience.rewards.double()], 1)


def table(experience: Experience) -> Tensor:
    """The advantages as (samples, trained steps)."""
    edges = experience.edges
    assert edges.advantage is not None
    steps = edges.step - int(edges.step.min())
    found = torch.full((len(experience.index), int(steps.max()) + 1), torch.nan)
    found[edges.sample, steps] = edges.advantage[:, 0]
    return found


def standardised(values: Tensor, size: int) -> Tensor:
    """(value - mean)/(population std + 1e-4) of every column in consecutive groups, clipped to 5."""
    grouped = values.reshape(-1, size, values.shape[1])
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, correction=0, keepdim=True) + 1e-4)).clamp(-5, 5).reshape(values.shape)
