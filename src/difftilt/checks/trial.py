"""Small training runs that proofs measure: one gradient, or a whole run on a testbed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftilt.leaves import find, load
from difftilt.recipes.parts import config_of
from difftilt.rewards.base import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.loop import Loop, TrainResult, assemble, train_task
from difftilt.training.protocol import Method, Task
from difftilt.training.world import World


def make_method(name: str, task: Task, **settings: Any) -> Method:
    """The named method with the given settings."""
    entry = load("methods", name)
    return entry(config_of(entry)(**settings), task)


def with_reward(task: Task, score: Callable[[Samples], Tensor]) -> Task:
    """The task with another reward."""
    return replace(task, reward=as_reward(score, name="proof"))


def minimise(parameter: Tensor, loss: Callable[[], Tensor], lr: float, steps: int) -> None:
    """Full-batch Adam in place, its rate falling to 0 by a cosine: at a constant one it circles the minimum."""
    optimizer = torch.optim.Adam([parameter], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def perturbed(task: Task, scale: float = 0.05) -> Task:
    """The task with every weight of its network moved at random, so that a gradient reaches all of them."""
    generator = torch.Generator().manual_seed(0)
    network = task.model.network
    assert isinstance(network, nn.Module)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return task


def scatter(loop: Loop, *roles: str, scale: float = 0.05) -> None:
    """Move the weights of every role by noise of its own, so that none of them can stand in for another."""
    for place, role in enumerate(roles):
        generator = torch.Generator().manual_seed(place + 1)
        with torch.no_grad():
            for parameter in loop.run.roles.module(role).parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    loop.run.roles.stepped("current")


def loop_of(name: str, task: Task, forward_batch: int = 64, **settings: Any) -> Loop:
    """A loop at its first iteration whose optimiser neither clips nor moves anything that can be seen."""
    still = OptimizerConfig(lr=1e-30, weight_decay=0.0, max_grad_norm=1e30)
    config = TrainingConfig(iterations=1, forward_batch=forward_batch, optimizer=still)
    loop = assemble(task, make_method(name, task, **settings), config, None, (), (), World())
    loop.run.begin(0)
    return loop


def gradient(name: str, task: Task, forward_batch: int = 64, **settings: Any) -> Float[Tensor, " parameters"]:
    """The gradient of a method's first update, flattened; zero where nothing flowed."""
    loop = loop_of(name, task, forward_batch, **settings)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    for phase in loop.method.phases(loop.run):
        loop.updater.run_phase(phase, experience, loop.run.noise)
    parameters = loop.run.roles.parameters("current")
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.reshape(-1) for part in parts]).double()


def trained(
    name: str, task: Task, iterations: int, lr: float, count: int = 1024, seed: int = 0, **settings: Any
) -> TrainResult:
    """A whole run in memory, held to the laws of its leaf and evaluated on ``count`` samples before and after."""
    optimizer = OptimizerConfig(lr=lr, weight_decay=0.0)
    config = TrainingConfig(
        iterations=iterations,
        seed=seed,
        forward_batch=1024,
        evaluate_every=0,
        evaluation_samples=count,
        optimizer=optimizer,
    )
    laws = find("methods", name).card.laws
    return train_task(task, make_method(name, task, **settings), config, None, laws=laws)
