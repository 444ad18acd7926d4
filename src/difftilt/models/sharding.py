"""Weights in parts: every process keeps a slice of each tensor, and a block is whole only while it computes.

Fully sharded data parallel (Zhao et al. 2023, arXiv 2304.11277) by ``fully_shard`` of torch: before a block is
evaluated its slices are gathered from all processes, afterwards they are let go; the gradient of a block is summed over
the processes and each keeps its slice of the sum. With n processes a weight, its gradient and the two moments of AdamW
take 1/n of their memory in each.

A copy of a network is in parts as well. Adapters (LoRA) stay whole: they are small, and are then neither gathered in
every call nor reduced in every backward pass. All functions here are called by all processes together.
"""

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from difftilt.errors import UserError
from difftilt.models.lora import Adapted
from difftilt.models.roles import CopiedRoles, Held
from difftilt.models.shards import COMPUTES_ON, local, whole

DECLARED = ("_no_split_modules", "_repeated_blocks")
"""Attributes by which a network names the classes of its blocks; ``diffusers`` has both."""


@dataclass(frozen=True)
class Sharding:
    """How weights are cut.

    Attributes:
        mesh: processes that share them. Of two dimensions, each row holds all slices and the rows are copies.
        offload: slices rest on the CPU, and so do gradients and the optimiser's step.
    """

    mesh: DeviceMesh
    offload: bool = False

    @classmethod
    def among(cls, processes: int, kind: str, hybrid: bool = False, offload: bool = False) -> "Sharding":
        """Among all processes of a run, or among those of one machine where it is ``hybrid``.

        Args:
            processes: of the run, on equal machines.
            kind: of device that they compute on.
            hybrid: every machine then holds all slices.
            offload: see the class.

        Raises:
            UserError: if the processes do not make whole machines.
        """
        each = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if hybrid else processes
        if processes % each:
            raise UserError(
                f"training.sharding = hybrid: {processes} processes do not make whole machines of {each}: use full"
            )
        shape = (processes // each, each) if hybrid else (each,)
        return cls(init_device_mesh(kind, shape, mesh_dim_names=("copy", "part") if hybrid else None), offload)

    @property
    def device(self) -> torch.device:
        """Where blocks are whole, and computed."""
        kind = self.mesh.device_type
        return (
            torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
        )

    def shard(self, network: nn.Module, uncut: Sequence[nn.Parameter] = ()) -> None:
        """Cut the network in place: each block by itself, then what lies outside blocks.

        Args:
            network: called as a whole, by its ``forward``.
            uncut: parameters that every process keeps; a number alone cannot be cut and is kept as well.

        Raises:
            UserError: for a network that computes outside ``forward``, or is trained in several precisions.
        """
        if hasattr(network, "prepare"):
            raise UserError(
                "training.sharding: this network makes state for a trajectory outside of its forward pass, where its "
                "weights are not gathered: use training.sharding = none"
            )
        dtypes = {one.dtype for one in network.parameters() if one.requires_grad and one not in {*uncut}}
        if len(dtypes) > 1:
            raise UserError(
                f"training.sharding: the trained weights are in {' and '.join(sorted(map(str, dtypes)))}, and only one "
                "precision can be cut: load the model with one dtype, or train adapters (training.lora)"
            )
        kept = {*uncut, *(one for one in network.parameters() if one.dim() == 0)}
        policy = CPUOffloadPolicy(pin_memory=self.mesh.device_type == "cuda") if self.offload else OffloadPolicy()
        for module in [*blocks_of(network), network]:
            # the parts outside blocks are let go as well: nothing may hold weights that an optimiser has moved on from
            fully_shard(
                module,
                mesh=self.mesh,
                reshard_after_forward=True,
                mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),  # as gradients of many are added up
                offload_policy=policy,
                ignored_params=kept,
            )
        for module in network.modules():
            if isinstance(module, FSDPModule):
                # the loop divides by the rows of all processes itself, so gradients are added up and not averaged
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        setattr(network, COMPUTES_ON, self.device)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network declares, inner ones before those they lie in; none if it declares none."""
    names: set[str] = set()
    for module in network.modules():
        declared = next((found for name in DECLARED if (found := getattr(module, name, None)) is not None), ())
        names |= set(cast(Sequence[str], declared))
    found = [module for module in network.modules() if type(module).__name__ in names and module is not network]
    return found[::-1]


@dataclass
class Sharded(Held):
    """A role whose module is in parts.

    Attributes:
        sharding: how.
        form: the module without its weights, for further copies.
        slices: its parameters in the order of the module; between calls the module may show others.
    """

    sharding: Sharding
    form: nn.Module
    slices: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, network: nn.Module, sharding: Sharding) -> "Sharded":
        """Cut a network in place, as role ``current``."""
        form = _form(network)
        sharding.shard(network)
        return cls(network, 0, True, sharding, form, tuple(network.parameters()))

    def parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(one for one in self.slices if one.requires_grad)

    def assembled(self, keep: bool = True) -> Held:
        """The role on the CPU, with whole weights; itself where they are not kept."""
        tensors = whole(self.tensors(), keep)
        if not keep:
            return self
        network = _form(self.form)
        network.load_state_dict(tensors, assign=True)
        return Held(network, self.version, self.trained)

    def copy(self, role: str, version: int, like: Held | None = None) -> Held:
        """The same weights again; no process ever holds more than its slices of them."""
        network = _form(self.form)
        network.requires_grad_(False)
        trainable = {name for name, value in like.module.named_parameters() if value.requires_grad} if like else set()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trainable)
        self.sharding.shard(network)
        rests = torch.device("cpu") if self.sharding.offload else self.sharding.device
        kept = {name: value.clone() for name, value in network.named_buffers()}
        network.to_empty(device=rests)
        copied = Sharded(network, version, like is not None, self.sharding, self.form, tuple(network.parameters()))
        with torch.no_grad():
            for name, value in network.named_buffers():
                value.copy_(kept[name])
            mine = copied.tensors()
            for name, value in self.tensors().items():
                local(mine[name]).copy_(local(value))
        return copied


def _form(network: nn.Module) -> nn.Module:
    """A copy without memory for its parameters; everything else is copied."""
    memo: dict[int, Any] = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=one.requires_grad)
        for one in network.parameters()
    }
    return deepcopy(network, memo)


def shard_backbone(roles: CopiedRoles, sharding: Sharding) -> None:
    """Cut the backbone under the adapters of all roles, which stay whole."""
    held = roles.held("current")
    assert isinstance(held, Adapted)
    held.base = held.constants()  # read while it is whole: a frozen backbone keeps its fingerprint
    adapters = [one for name, one in held.module.named_parameters() if ".lora_" in name]
    sharding.shard(held.module, adapters)
    for one in adapters:
        one.data = one.data.to(sharding.device)
