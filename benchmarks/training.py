"""Updates: one phase of an iteration over the passes that its ledger counts."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.paired import Subject
from benchmarks.workload import Size, forwards, gradient_passes, make_inputs, make_task, shapes_of
from difftilt.methods.forward_process.crd import CRD
from difftilt.methods.forward_process.crd import Config as CRDConfig
from difftilt.methods.forward_process.diffusion_nft import Config as NFTConfig
from difftilt.methods.forward_process.diffusion_nft import DiffusionNFT
from difftilt.methods.forward_process.dragon import Config as DragonConfig
from difftilt.methods.forward_process.dragon import Dragon
from difftilt.methods.forward_process.gdro import GDRO
from difftilt.methods.forward_process.gdro import Config as GDROConfig
from difftilt.methods.forward_process.prdp import PRDP
from difftilt.methods.forward_process.prdp import Config as PRDPConfig
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
    task, method = _method(GRPOConfig, FlowGRPO, size, size.batch)
    return _update("update_flow_grpo", task, method, size, GRPOConfig().updates)


def nft_overhead(size: Size) -> Subject:
    """DiffusionNFT while behaviour = current: one forward pass serves both, the reference needs the other."""
    size = replace(size, steps=STEPS)
    task, method = _method(NFTConfig, DiffusionNFT, size, size.batch, behaviour_decay=0)
    # two forwards per row, not three: one with gradient, and one of the reference
    return _per_row(_update("update_diffusion_nft", task, method, size, NFTConfig().updates), 1)


def crd_overhead(size: Size) -> Subject:
    """CRD: a lagging copy and the guided reference, which is two evaluations, beside the pass with gradient."""
    size = replace(size, steps=STEPS)
    task, method = _method(CRDConfig, CRD, size, size.batch)
    return _per_row(_update("update_crd", task, method, size, CRDConfig().updates), 3)


def gdro_overhead(size: Size) -> Subject:
    """GDRO on groups that were drawn before: the reference beside the pass with gradient."""
    task, method = _method(GDROConfig, GDRO, size, 2 * size.batch, collect=size.batch // 2)
    return _per_row(_update("update_gdro", task, method, size, GDROConfig().updates), 1)


def prdp_overhead(size: Size) -> Subject:
    """PRDP: a first pass without gradient, a second one with; two passes over the chains. The reference is recorded."""
    size = replace(size, steps=STEPS)
    task, method = _method(PRDPConfig, PRDP, size, size.batch, epochs=2)
    return _per_row(_update("update_prdp", task, method, size, 2), 2)


def dragon_overhead(size: Size) -> Subject:
    """DRAGON with KTO, whose offset needs the current gains of all rows before any of them is learned from."""
    task, method = _method(DragonConfig, Dragon, size, size.batch, levels=2)
    return _per_row(_update("update_dragon", task, method, size, DragonConfig().updates), 2)


def _per_row(subject: Subject, forwards: int) -> Subject:
    """The subject, if every row costs so many evaluations without gradient."""
    assert subject.extra["nfe"] == forwards * int(str(subject.extra["rows"]))
    return subject


def _method(config: Any, entry: Any, size: Size, samples: int, **settings: Any) -> tuple[Task, Method]:
    task = make_task(size)
    group_size = 4
    return task, entry(config(groups=samples // group_size, group_size=group_size, **settings), task)


def _update(name: str, task: Task, method: Method, size: Size, updates: int) -> Subject:
    loop = assembled(task, method, size)
    began = time.perf_counter()
    experience = collected(loop, 0)
    scored = loop.run.reward_seconds
    sampled = time.perf_counter() - began - scored
    once(loop, experience)  # from now on a lagging role and what it follows are two networks
    cost, calls = _counted(loop, experience)
    passes, plain = cost.gradient_passes // size.batch, cost.nfe // size.batch
    assert calls == passes + plain, "the rows must fill every network call: filling is no overhead of the update"
    network, inputs = loop.run.roles.module("current"), make_inputs(size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=STILL.lr)
    taken: list[float] = []

    def program() -> None:
        start = time.perf_counter()
        assert once(loop, experience) == cost, "the floor must be what every update costs"
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
        program=f"the learning of one iteration: {len(experience.edges.step)} rows, {updates} optimiser steps, "
        "the roles that follow included",
        floor=f"{plain} forwards without gradient, {passes} forward and backward passes, {updates} AdamW steps",
        run_program=program,
        run_floor=floor,
        shapes=shapes_of(size, network) | {"rows": len(experience.edges.step), "updates": updates},
        extra={"nfe": cost.nfe, "gradient_passes": cost.gradient_passes, "rows": len(experience.edges.step)},
        phases={"update": taken},
        once={"rollout": sampled, "reward": scored},
    )


def assembled(task: Task, method: Method, size: Size) -> Loop:
    """A loop at its beginning, whose steps are too small to move anything."""
    config = TrainingConfig(forward_batch=size.batch, optimizer=STILL)
    return assemble(task, method, config, None, ("ratio_one",), (), World())


def collected(loop: Loop, iteration: int) -> Experience:
    """The first half of an iteration."""
    loop.run.begin(iteration)
    with torch.no_grad():
        return loop.method.collect(loop.run)


def _counted(loop: Loop, experience: Experience) -> tuple[Ledger, int]:
    """One update: what its ledger says, and how often a network of any role was called."""
    calls = [0]

    def count(module: nn.Module, given: object, output: object) -> None:
        calls[0] += 1

    hooks = [loop.run.roles.module(role).register_forward_hook(count) for role in loop.run.roles.names]
    cost = once(loop, experience)
    for hook in hooks:
        hook.remove()
    return cost, calls[0]


def once(loop: Loop, experience: Experience) -> Ledger:
    """The learning part of an iteration, as the loop runs it; returns its cost."""
    before = loop.run.ledger.copy()
    loop.updater.fresh = False  # the ratio is only 1 in the first of these
    for place, phase in enumerate(loop.method.phases(loop.run)):
        loop.updater.run_phase(phase, experience, loop.run.noise.named(f"phase{place}"))
    loop.updater.follow()
    return loop.run.ledger - before
