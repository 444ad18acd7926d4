"""A run whose processes hold the weights in parts."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from difftilt.models.lora import roles_of
from difftilt.models.protocol import RoleSpec
from difftilt.sampling.noise import Noise
from difftilt.training.config import TrainingConfig
from difftilt.training.lockstep import Lockstep
from difftilt.training.protocol import Task
from difftilt.training.run import LoopRun
from difftilt.training.world import World


def sharded_run(task: Task, specs: Mapping[str, RoleSpec], config: TrainingConfig, world: World) -> LoopRun:
    """A run in which every process holds a part of the weights of the model and of their copies, and all keep step.

    Networks of their own that roles bring (critics, process reward models, teachers) are whole everywhere.

    Args:
        task: its model has been adapted, and lies wherever it was loaded.
        specs: declared by the method.
        config: of the run.
        world: processes.
    """
    from difftilt.models import sharding  # takes a second, and most runs do without

    assert isinstance(task.model.network, nn.Module)
    device = torch.device(config.device)
    chosen = sharding.Sharding.among(world.size, device.type, config.sharding == "hybrid", config.offload_weights)
    roles = roles_of(task.model, specs, config.lora, config.seed, lambda network: sharding.Sharded.of(network, chosen))
    if config.lora is not None:
        sharding.shard_backbone(roles, chosen)
    noise, execution = Noise(config.seed), config.execution
    run = LoopRun(task, roles, world, noise, config.forward_batch, device, execution)
    lockstep = Lockstep(roles.network, roles.names, run.idle)
    run.lockstep = lockstep
    run.world = replace(world, meet=lockstep.meet)
    return run
