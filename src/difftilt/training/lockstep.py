"""Processes that hold a network in parts call it together, whatever each of them is doing.

Where weights are in parts, a call of the network is a message from every process to every other. Processes need not
make the same calls: one has more rows left in an update, only one draws the pictures of a run, a gate leaves some rows
without a reference. So before each step of one of three kinds - calling a network, a backward pass, or any other
message - every process says which one it has come to, and all do the largest that was named:

    call of role i, with or without gradient   >   backward pass   >   any other message

A process that has come to something else calls the network on rows of noise, or runs a backward pass from zero, and
asks again. It never waits for a message that another will not send, and nothing that it adds has any effect: outputs of
noise are thrown away, and gradients of them are zero. The price is one number per call, and idle calls where processes
have unequal work.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from difftilt.models.protocol import Network
from difftilt.trees import leaves

MEETING, BACKWARD, CALLS = 0, 1, 2
"""Steps in order of rank; from :data:`CALLS` on, three for each role."""
WITHOUT, WITH, THROUGH = 0, 1, 2
"""Gradients of a call: none, with respect to weights, with respect to the input too."""

Arguments = tuple[Tensor, Tensor, Any]


@dataclass
class Lockstep:
    """Brings processes together before each call, each backward pass and each other message.

    Attributes:
        network: role -> its network.
        names: all roles, in one order in all processes.
        idle: what a process calls a network with that it does not need: states, times and condition of one full batch.
        within: the context of such a call, as that of the others has it (precision).
        idle_calls: how often it had to, for those who wonder where time goes.
    """

    network: Callable[[str], Network]
    names: Sequence[str]
    idle: Callable[[], Arguments]
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    idle_calls: int = 0
    _outputs: list[Tensor] = field(default_factory=list[Tensor])

    def of(self, role: str) -> Network:
        """The network of a role, called by all processes together."""
        return _Together(self, role)

    def meet(self) -> None:
        """Before any other message: help until everybody has come to one."""
        self._until(MEETING)

    def call(self, role: str, arguments: Arguments) -> Tensor:
        """One call of the network of a role."""
        mode = WITHOUT
        if torch.is_grad_enabled():
            mode = THROUGH if any(leaf.requires_grad for leaf in leaves(arguments)) else WITH
        self._until(CALLS + 3 * self.names.index(role) + mode)
        return self._called(role, arguments)

    def backward(self, value: Tensor) -> None:
        """Backward pass from a number; every output since the last one takes part, so that all processes do the same.

        Args:
            value: whose gradient is added to that of the parameters.
        """
        self._until(BACKWARD)
        self._backward([value], [None])

    def _until(self, wanted: int) -> None:
        """Do what others have come to until all do what is wanted here."""
        while True:
            agreed = torch.tensor([wanted])
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            if int(agreed) == wanted:
                return
            self._follow(int(agreed))

    def _follow(self, step: int) -> None:
        if step == BACKWARD:
            self._backward([], [])
            return
        role, mode = divmod(step - CALLS, 3)
        states, times, condition = self.idle()
        self.idle_calls += 1
        with torch.set_grad_enabled(mode != WITHOUT), self.within():
            states = states.detach().requires_grad_() if mode == THROUGH else states
            self._called(self.names[role], (states, times, condition))

    def _called(self, role: str, arguments: Arguments) -> Tensor:
        output = self.network(role)(*arguments)
        if output.requires_grad:
            self._outputs.append(output)
        return output

    def _backward(self, values: list[Tensor], slopes: list[Tensor | None]) -> None:
        outputs, self._outputs = self._outputs, []
        values, slopes = values + outputs, slopes + [torch.zeros_like(output) for output in outputs]
        if values:
            torch.autograd.backward(values, slopes)


class _Together:
    """A network that is called in lockstep, and is itself in everything else."""

    def __init__(self, lockstep: Lockstep, role: str) -> None:
        self._lockstep, self._role = lockstep, role

    def __call__(self, *arguments: Any) -> Tensor:
        states, times, condition = arguments
        return self._lockstep.call(self._role, (states, times, condition))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lockstep.network(self._role), name)
