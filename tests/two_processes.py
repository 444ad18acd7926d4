"""Trains every method for a few iterations and writes what happened: alone, or in two processes under ``torchrun``.

Usage: two_processes.py DIRECTORY PROCESSES SHARDING
"""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.protocol import RoleSpec, Trained
from difftilt.process.gaussian import as_gaussian
from difftilt.sampling.protocol import NoiseSource
from difftilt.training.base import MethodBase
from difftilt.training.config import TrainingConfig
from difftilt.training.experience import Experience
from difftilt.training.loop import assemble, train_task
from difftilt.training.protocol import Loss, Method, Phase, Run, Task, Term
from difftilt.training.world import World, join_world
from training_runs import (
    CASES,
    METHODS,
    gradient,
    make_case,
    make_config,
    make_experience,
    make_method,
    make_task,
    without_pictures,
)

ITERATIONS = 2


def task_of(name: str) -> Task:
    """One held-out prompt for both processes, or one for each."""
    task = make_task()
    return task if name == "flow-grpo" else replace(task, heldout_prompts=["class 3", "class 0"])


def first_iteration(
    method: Method, task: Task, world: World, config: TrainingConfig | None = None
) -> dict[str, Tensor]:
    """Samples, credit and gradients of a first iteration, of all processes."""
    loop = assemble(task, method, config or make_config(), None, ("ratio_one",), (), world)
    world = loop.run.world
    loop.run.begin(0)
    with torch.no_grad():
        experience = method.collect(loop.run)
    per_edge, per_sample = experience.edges.advantage, experience.label
    assert experience.x_0 is not None
    assert experience.rewards is not None
    # some methods compare rewards in their loss
    per_sample = experience.rewards.clone() if per_sample is None else per_sample
    credit = per_sample if per_edge is None else per_edge
    owner = experience.index if per_edge is None else experience.index[experience.edges.sample]
    names = ("x_0", "rewards", "group", "prompt", "credit", "owner")
    columns = (experience.x_0, experience.rewards, experience.group, experience.prompt, credit, owner)
    found = {name: world.gather(column) for name, column in zip(names, columns, strict=True)}
    for number, phase in enumerate(method.phases(loop.run)):
        loop.updater.run_phase(phase, experience, loop.run.noise)
        found[f"gradient{number}"] = gradient(loop)
    return found


class Uneven(MethodBase):
    """All edges belong to the first process, and one weight never meets the loss."""

    def roles(self) -> dict[str, RoleSpec]:
        return {"critic": Trained("current")}

    def collect(self, run: Run) -> Experience:
        experience = make_experience(8)
        (rank,) = run.jointly(lambda one: (torch.arange(len(one)),), torch.zeros(1))
        mask = torch.ones(len(experience.edges.step), dtype=torch.bool) & (rank == 0)
        return replace(experience, edges=replace(experience.edges, mask=mask))

    def phases(self, run: Run) -> list[Phase]:
        def loss(rows: Experience, noise: NoiseSource) -> Loss:
            assert rows.edges.x_t is not None
            prediction = as_gaussian(run.denoiser("current")(rows.edges.x_t, rows.edges.t, rows.condition))
            first = run.roles.parameters("critic")[0]
            both = prediction.velocity.square().sum(1) + first.square().sum()
            return Loss({"size": Term(both)}, {"step": rows.edges.step.float()})

        return [Phase(("current", "critic"), loss, unit="sample", updates=3)]


def uneven(world: World) -> dict[str, Tensor]:
    """Weights after updates of which one process holds no row."""
    loop = assemble(make_task(), Uneven(), make_config(), None, (), (), world)
    loop.iterate(0)
    weights = {f"uneven/{key}": value for key, value in loop.run.roles.state_dict().items()}
    return weights | {"uneven/step": torch.tensor(loop.rows[0]["step"], dtype=torch.float64)}


def gathered(world: World) -> dict[str, Tensor]:
    """Gather and jointly on columns of unequal length and every dtype."""
    own = torch.arange(3 + 2 * world.rank) + 10 * world.rank
    every = [world.gather(column) for column in (own, own > 3, own.double(), own[:, None].float())]
    ranks = world.jointly(lambda column: {"place": torch.arange(len(column)), "plain": 7}, own)
    assert ranks["plain"] == 7
    assert len(ranks["place"]) == len(own)
    return {f"gathered/{n}": column for n, column in enumerate([*every, world.gather(ranks["place"])])}


def main(directory: Path, processes: int, sharding: str) -> None:
    torch.set_num_threads(1)
    world = join_world()
    assert world.size == processes, f"{processes} processes asked for, {world.size} are there"
    found: dict[str, Tensor] = {}
    for name in CASES:
        task = task_of(name)
        first = first_iteration(make_case(name, task), task, world, make_config(sharding=sharding))
        found |= {f"{name}/{key}": value for key, value in first.items()}
        task = task_of(name)
        method = make_case(name, task)
        own = directory / name / f"rank{world.rank}"
        config = make_config(iterations=ITERATIONS, checkpoint_every=2, evaluate_every=2, sharding=sharding)
        with nullcontext() if name in METHODS else without_pictures():
            result = train_task(task, method, config, own, laws=("ratio_one",), world=world)
        weights = result.run.roles.state_dict()
        found |= {f"{name}/weights/{key}": value for key, value in weights.items()}
        found |= {f"{name}/state/{key}": value for key, value in method.state_dict().items()}
        same = [world.gather(value[None]) for value in weights.values()]
        assert all(torch.equal(part, part[:1].expand_as(part)) for part in same), "processes hold different weights"
    found |= uneven(world)
    if processes > 1:
        found |= gathered(world)
        task = make_task()
        with pytest.raises(UserError, match="multiple of 2"):
            first_iteration(make_method("flow-grpo", task, groups=3), task, world)
    if world.main:
        save_file({key: value.contiguous() for key, value in found.items()}, directory / "found.safetensors")
    world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
