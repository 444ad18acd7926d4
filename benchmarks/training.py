"""Updates: one phase of an iteration over the passes that its ledger counts."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.paired import Subject
from benchmarks.workload import Size, forwards, gradient_passes, make_inputs, make_task, shapes_of
from difftilt.methods.forward_process.diffusion_nft import Config as NFTConfig
from difftilt.methods.forward_process.diffusion_nft import DiffusionNFT
from difftilt.methods.policy_gradient.flow_grpo import Config as GRPOConfig
from difftilt.methods.policy_gradient.flow_grpo import FlowGRPO
from difftilt.models.ledger import Ledger
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop, assemble
from difftilt.training.protocol import Method, Task
from difftilt.training.world import World

STEPS = 3
"""Of the rollout, two of them trained: twice the batch in rows, so that every network call is full."""

STILL = OptimizerConfig(lr=1e-8)
"""Steps too small to take the network anywhere in the course of a benchmark."""


def grpo_overhead(size: Size) -> Subject:
    """Flow-GRPO as it is by default: clipped surrogate, exact KL to the reference, two optimiser steps."""
    size = replace(size, steps=STEPS)
    task, method = _method(GRPOConfig, FlowGRPO, size)
    return _update("update_flow_grpo", task, method, size, GRPOConfig().updates)


def nft_overhead(size: Size) -> Subject:
    """DiffusionNFT while behaviour = current: one forward pass serves both, the reference needs the other."""
    size = replace(size, steps=STEPS)
    task, method = _method(NFTConfig, DiffusionNFT, size, behaviour_decay=0)
    subject = _update("update_diffusion_nft", task, method, size, NFTConfig().updates)
    # two forwards per row, not three: one with gradient, and one of the reference
    assert subject.extra["nfe"] == subject.extra["gradient_passes"] == subject.extra["rows"]
    return subject


def _method(config: Any, entry: Any, size: Size, **settings: Any) -> tuple[Task, Method]:
    task = make_task(size)
    group_size = 4
    return task, entry(config(groups=size.batch // group_size, group_size=group_size, **settings), task)


def _update(name: str, task: Task, method: Method, size: Size, updates: int) -> Subject:
    config = TrainingConfig(forward_batch=size.batch, optimizer=STILL)
    loop = assemble(task, method, config, None, ("ratio_one",), (), World())
    began = time.perf_counter()
    loop.run.begin(0)
    with torch.no_grad():
        experience = method.collect(loop.run)
    scored = loop.run.reward_seconds
    sampled = time.perf_counter() - began - scored
    cost, calls = _counted(loop, experience)
    passes, plain = cost.gradient_passes // size.batch, cost.nfe // size.batch
    assert calls == passes + plain, "the rows must fill every network call: filling is no overhead of the update"
    network, inputs = loop.run.roles.module("current"), make_inputs(size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=STILL.lr)
    taken: list[float] = []

    def program() -> None:
        start = time.perf_counter()
        assert _once(loop, experience) == cost, "the floor must be what every update costs"
        taken.append(time.perf_counter() - start)

    def floor() -> None:
        forwards(network, inputs, plain)
        for part in range(updates):
            optimizer.zero_grad()
            gradient_passes(network, inputs, (part + 1) * passes // updates - part * passes // updates)
            optimizer.step()

    return Subject(
        name=name,
        bound=1.10,
        program=f"the update of one iteration: {len(experience.edges.step)} rows, {updates} optimiser steps, "
        "the roles that follow included",
        floor=f"{plain} forwards without gradient, {passes} forward and backward passes, {updates} AdamW steps",
        run_program=program,
        run_floor=floor,
        shapes=shapes_of(size, network) | {"rows": len(experience.edges.step), "updates": updates},
        extra={"nfe": cost.nfe, "gradient_passes": cost.gradient_passes, "rows": len(experience.edges.step)},
        phases={"update": taken},
        once={"rollout": sampled, "reward": scored},
    )


def _counted(loop: Loop, experience: Experience) -> tuple[Ledger, int]:
    """One update: what its ledger says, and how often a network of any role was called."""
    calls = [0]

    def count(module: nn.Module, given: object, output: object) -> None:
        calls[0] += 1

    hooks = [loop.run.roles.module(role).register_forward_hook(count) for role in loop.run.roles.names]
    cost = _once(loop, experience)
    for hook in hooks:
        hook.remove()
    return cost, calls[0]


def _once(loop: Loop, experience: Experience) -> Ledger:
    """The learning part of an iteration, as the loop runs it; returns its cost."""
    before = loop.run.ledger.copy()
    loop.updater.fresh = False  # the ratio is only 1 in the first of these
    for place, phase in enumerate(loop.method.phases(loop.run)):
        loop.updater.run_phase(phase, experience, loop.run.noise.named(f"phase{place}"))
    loop.updater.follow()
    return loop.run.ledger - before
