"""Trains a tiny pipeline with its weights whole in every process and in parts: alone, or in two under ``torchrun``.

Usage: two_shards.py DIRECTORY PROCESSES CASE...

What a process alone leaves in DIRECTORY/alone is where two go on from, in DIRECTORY/together.
"""

import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from difftilt.leaves import load
from difftilt.models.dit import DiT
from difftilt.models.lora import LoraSettings
from difftilt.models.protocol import GenerativeModel
from difftilt.models.shards import in_parts, local
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.recipes.parts import config_of
from difftilt.rewards import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.kernels import FlowSDE
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.solvers import EulerSolver
from difftilt.testbeds.pipeline import TaskOptions, pipeline_task
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.experience import Experience
from difftilt.training.loop import TrainResult, train_task
from difftilt.training.protocol import Method, Run, Task
from difftilt.training.run import LoopRun
from difftilt.training.world import World, join_world
from pipelines import PROMPTS, stable_diffusion_3
from training_runs import without_pictures
from two_processes import first_iteration

Found = dict[str, Tensor]
METHODS = ("flow-grpo", "diffusion-nft", "lopsided")
LAYOUTS = ("none", "full", "hybrid", "offloaded")
SHORT = ("dit/flow-grpo/none/all", "dit/flow-grpo/full/all", "dit/diffusion-nft/full/lora", "dit/lopsided/full/all")
"""Model, method, where the weights are, and which of them are trained."""
DRAWN = SHORT[1]
"""A run that draws pictures."""
LONG = tuple(f"sd3/{method}/{layout}/{kind}" for method in METHODS for layout in LAYOUTS for kind in ("all", "lora"))
BLOCKS = {"dit": "Block", "sd3": "JointTransformerBlock"}


def brightness(samples: Samples) -> Tensor:
    return samples.media.mean((1, 2, 3))


def make_task(model: str) -> Task:
    """A network with two blocks, under guidance; always with the same first weights."""
    reward = as_reward(brightness)
    if model == "sd3":
        options = TaskOptions(steps=3, guidance=2.0, cache="off")
        return pipeline_task(stable_diffusion_3(t5=False), reward, PROMPTS, options=options)
    network = DiT(1, 8, 4, width=16, depth=2, heads=2, classes=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            # the last layer begins as 0, and nothing before it would have a gradient
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
            # attention does not see the bias of keys: its gradient is rounding error, of which Adam makes whole steps
            value.requires_grad_(not name.endswith("key_value.bias"))
    clean = GenerativeModel(
        network=network,
        process=RectifiedFlow(),
        output="velocity",
        shape=(1, 8, 8),
        encode=lambda prompts: torch.tensor([PROMPTS.index(prompt) for prompt in prompts]),
        decode=lambda latents: latents,
        null_condition=lambda rows: torch.full((rows,), 2),
    )
    sampler = Sampler(uniform_grid(3), FlowSDE(0.7), EulerSolver(), 2.0, clean_end=True)
    return Task(model, clean, reward, PROMPTS, PROMPTS, sampler)


def make_config(layout: str, kind: str, iterations: int) -> TrainingConfig:
    sharding: dict[str, Any] = {"sharding": layout}
    if layout == "offloaded":
        sharding = {"sharding": "full", "offload_weights": True, "offload_experience": True}
    return TrainingConfig(
        iterations=iterations,
        forward_batch=4,
        evaluate_every=0,
        evaluation_samples=6,  # three groups: one process measures two of them
        checkpoint_every=2,
        lora=LoraSettings(rank=2, alpha=4.0) if kind == "lora" else None,
        optimizer=OptimizerConfig(lr=1e-3),
        **sharding,
    )


class Lopsided:
    """A method that learns from the first samples alone: they belong to one process."""

    def __init__(self, inner: Method) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def collect(self, run: Run) -> Experience:
        experience = self.inner.collect(run)
        edges = experience.edges
        return replace(experience, edges=replace(edges, mask=experience.index[edges.sample] < 3))


def make_method(name: str, task: Task) -> Any:
    entry = load("methods", "flow-grpo" if name == "lopsided" else name)
    settings: dict[str, Any] = {"groups": 4, "group_size": 2, "updates": 2, "kl_weight": 0.1, "ema": 0.5}
    method = entry(config_of(entry)(**settings), task)
    return Lopsided(method) if name == "lopsided" else method


def trained(case: str, iterations: int, directory: Path, world: World, *, resume: bool = False) -> TrainResult:
    model, name, layout, kind = case.split("/")
    task = make_task(model)
    config = make_config(layout, kind, iterations)
    # one process draws them, while the other one may have come to something else
    with nullcontext() if case == DRAWN else without_pictures():
        return train_task(
            task, make_method(name, task), config, directory, laws=("ratio_one",), world=world, resume=resume
        )


def weights_of(result: TrainResult) -> Found:
    return {f"weights/{key}": value for key, value in result.run.roles.state_dict().items()}


def where(directory: Path, case: str) -> Path:
    return directory / case.replace("/", "-")


def go_on(case: str, begun: Path, directory: Path, world: World) -> Found:
    """The weights after a third iteration, from a copy of a run of two."""
    if world.main:
        shutil.copytree(begun, directory, symlinks=True)
    world.barrier()
    return {f"after/{key}": value for key, value in weights_of(trained(case, 3, directory, world, resume=True)).items()}


def check_parts(run: LoopRun, block: str, layout: str, kind: str) -> None:
    """Blocks of every copy are wrapped one by one, and a process holds its share of what is cut."""
    from torch.distributed.fsdp import FSDPModule

    for role in run.roles.names:
        module = run.roles.module(role)
        wrapped = [type(one).__name__ for one in module.modules() if isinstance(one, FSDPModule)]
        assert len(wrapped) == 3, wrapped
        assert wrapped.count(f"FSDP{block}") == 2, wrapped
        assert isinstance(module, FSDPModule)
        cut = [one for name, one in module.named_parameters() if ".lora_" not in name]
        assert all(in_parts(one) for one in cut)
        share = sum(local(one).numel() for one in cut) / sum(one.numel() for one in cut)
        assert 0.45 < share < 0.55 if layout == "full" else share == 1, share
    assert all(in_parts(one) == (kind == "all") for one in run.roles.parameters("current"))
    assembled = run.roles.held("current").assembled(keep=run.world.main)
    assert run.lockstep is not None
    if kind == "all" and run.world.main:
        assert not any(in_parts(one) for one in assembled.module.parameters())
        with torch.no_grad():  # the other process helps, from where it is by then
            assert torch.allclose(assembled.module(*run.idle()), run.lockstep.call("current", run.idle()), atol=1e-6)


def two_iterations(case: str, directory: Path, world: World) -> Found:
    """What a run is at its first update, and where it is after two iterations."""
    model, name, layout, kind = case.split("/")
    task = make_task(model)
    found = first_iteration(make_method(name, task), task, world, make_config(layout, kind, 2))
    result = trained(case, 2, directory, world)
    found |= weights_of(result)
    if world.size > 1 and layout != "none":
        check_parts(result.run, BLOCKS[model], "full" if layout == "offloaded" else layout, kind)
    found["grad_norms"] = torch.tensor([row["grad_norm"] for row in result.rows], dtype=torch.float64)
    lockstep = result.run.lockstep
    if lockstep is not None:
        found["idle"] = result.run.world.gather(torch.tensor([lockstep.idle_calls]))
    return found


def main(directory: Path, processes: int, cases: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    world = join_world()
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if each process had a machine of its own, with all parts
    assert world.size == processes, f"{processes} processes asked for, {world.size} are there"
    alone, together = directory / "alone", directory / "together"
    own = together if processes > 1 else alone
    found: Found = {}
    for case in cases if processes > 1 else dict.fromkeys(map(lonely, cases)):
        new = two_iterations(case, where(own, case), world)
        new |= go_on(case, where(alone, lonely(case)), where(own / "after", case), world)
        found |= {f"{case}/{key}": value for key, value in new.items()}
    if world.main:
        save_file({key: value.contiguous() for key, value in found.items()}, own / "found.safetensors")
    world.barrier()


def lonely(case: str) -> str:
    """The same run in one process, where nothing is cut."""
    model, name, _, kind = case.split("/")
    return f"{model}/{name}/none/{kind}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:]))
