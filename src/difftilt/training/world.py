"""The processes of a run: one alone, or several under ``torchrun``, with equal results."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.shards import in_parts
from difftilt.trees import tree_map


def _nothing() -> None:
    """There is nothing to wait for."""


@dataclass(frozen=True)
class World:
    """Rank and number of processes.

    Attributes:
        rank: of this process.
        size: number of processes.
        meet: called before every message, where processes must come together first
            (:class:`~difftilt.training.lockstep.Lockstep`).
    """

    rank: int = 0
    size: int = 1
    meet: Callable[[], None] = field(default=_nothing, compare=False)

    @property
    def main(self) -> bool:
        """True for the one process that writes files."""
        return self.rank == 0

    def share(self, count: int, what: str) -> range:
        """This process's part of ``count`` things in equal contiguous parts.

        Raises:
            UserError: if they do not divide.
        """
        if count % self.size:
            raise UserError(
                f"{what} = {count} does not divide among {self.size} processes: use a multiple of {self.size}"
            )
        part = count // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def gather(self, column: Tensor) -> Tensor:
        """The rows of all processes in order of rank; processes may hold different numbers of rows. No gradient."""
        if self.size == 1:
            return column
        lengths = self.lengths(len(column))
        padded = column.new_zeros((max(lengths), *column.shape[1:]))
        padded[: len(column)] = column.detach()
        self.meet()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def lengths(self, length: int) -> list[int]:
        """The given length of every process."""
        if self.size == 1:
            return [length]
        self.meet()
        own = torch.tensor([length])
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return [int(one) for one in every]

    def jointly(self, function: Callable[..., Any], *columns: Tensor) -> Any:
        """``function`` of the gathered columns; of every tensor in its result this process's rows."""
        if self.size == 1:
            return function(*columns)
        lengths = self.lengths(len(columns[0]))
        start = sum(lengths[: self.rank])
        result = function(*(self.gather(column) for column in columns))
        return tree_map(lambda rows: rows[start : start + lengths[self.rank]], result)

    def total(self, numbers: Tensor) -> Tensor:
        """Sum over processes."""
        if self.size == 1:
            return numbers
        self.meet()
        summed = numbers.clone()
        dist.all_reduce(summed)
        return summed

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes in one message, in place.

        A gradient that only some processes lack counts as zero there; one that all lack stays missing, so that the
        optimiser leaves its parameter alone, as it does in a single process. Those of weights that the processes hold
        in parts were added up by the backward pass.
        """
        parameters = [parameter for parameter in parameters if not in_parts(parameter)]
        if self.size == 1 or not parameters:
            return
        held = self.total(torch.tensor([parameter.grad is not None for parameter in parameters]).long())
        for parameter, holders in zip(parameters, held.tolist(), strict=True):
            if parameter.grad is None and holders:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not grads:
            return
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        self.meet()
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def names(self, own: Iterable[str]) -> list[str]:
        """All names that any process holds, sorted: a process without rows still takes part in every sum."""
        if self.size == 1:
            return sorted(own)
        self.meet()
        every: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(every, sorted(own))
        return sorted({name for names in every for name in names})

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            self.meet()
            dist.barrier()


def join_world() -> World:
    """The world that ``torchrun`` set up in the environment, or a single process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        # counts and rewards may live on the CPU while weights live on a GPU, so both kinds need a backend
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return World(dist.get_rank(), dist.get_world_size())
