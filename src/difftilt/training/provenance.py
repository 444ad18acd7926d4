"""How samples were drawn, beside weights and times: what a data set and the task that learns from it must agree on."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from difftilt.config import Config
from difftilt.process.gaussian import GaussianProcess
from difftilt.process.protocol import Condition, Process
from difftilt.training.protocol import Task
from difftilt.trees import tree_map

PROBED = 64
"""Prompts whose conditions are compared, at most."""
CLOSE = 1e-3
"""Relative and absolute difference of numbers that are taken for equal: another device rounds otherwise."""


class Drawn(Config):
    """What fixes samples besides the weights, the times and the guidance."""

    process: str
    """The kind of corruption and, where it is one of code without settings, its kind alone."""
    scales: tuple[float, ...]
    """Signal and noise scale of a Gaussian process at four times; empty for tokens."""
    output: str
    """What the network predicts."""
    by: str
    """The solver, or the kernel where there is none."""
    conditions: tuple[float, ...]
    """One number of the condition of each of the first prompts: a fingerprint of the encoder of texts."""

    def differences(self, task: "Drawn") -> list[str]:
        """A sentence for everything that is otherwise in the task."""
        found: list[str] = []
        if self.process != task.process or not _close(self.scales, task.scales):
            found.append(f"the samples were drawn under {self._law()}, the task's is {task._law()}")
        if self.output != task.output:
            found.append(f"the network was read as {self.output}, the task's as {task.output}")
        if self.by != task.by:
            found.append(f"the samples were drawn by {self.by}, the task's sampler is {task.by}")
        if not _close(self.conditions, task.conditions):
            found.append("the prompts were encoded otherwise: the encoder of texts, or its weights, differ")
        return found

    def _law(self) -> str:
        return f"{self.process} {' '.join(f'{scale:.3g}' for scale in self.scales)}".strip()


def drawn_by(task: Task, prompts: Sequence[str]) -> Drawn:
    """How the plain sampler of a task draws samples for prompts."""
    sampler, process = task.sampler, task.model.process
    with torch.no_grad():
        numbers = _numbers(task.model.encode(list(prompts[:PROBED])))
    by = _named(sampler.solver) if sampler.solver is not None else _named(sampler.kernel)
    if sampler.solver is None and sampler.clean_end:
        by += " with a clean end"
    kind = type(process).__name__ if isinstance(process, GaussianProcess) else _named(process)
    return Drawn(process=kind, scales=_scales(process), output=task.model.output, by=by, conditions=numbers)


def _scales(process: Process) -> tuple[float, ...]:
    if not isinstance(process, GaussianProcess):
        return ()
    t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    return (*process.alpha(t).tolist(), *process.sigma(t).tolist())


def _named(thing: object) -> str:
    """A data class with its values; of anything else, and of one that holds code, only the kind."""
    text = repr(thing) if dataclasses.is_dataclass(thing) else ""
    return text if text and " at 0x" not in text else type(thing).__name__


def _numbers(condition: Condition) -> tuple[float, ...]:
    """Per row the sum of all values of all tensors, each value with a weight of its own."""
    rows: list[Tensor] = []

    def add(leaf: Tensor) -> Tensor:
        flat = leaf.detach().cpu().double().reshape(len(leaf), -1)
        rows.append(flat @ torch.arange(1, flat.shape[1] + 1).double().cos())
        return leaf

    tree_map(add, condition)
    return tuple(torch.stack(rows).sum(0).tolist()) if rows else ()


def _close(there: Sequence[float], here: Sequence[float]) -> bool:
    return len(there) == len(here) and torch.allclose(
        torch.tensor(there).double(), torch.tensor(here).double(), rtol=CLOSE, atol=CLOSE
    )
