"""What of a run a checkpoint holds: all that decides its next iteration, as tensors by file and plain JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from difftilt.errors import GuardError, UserError
from difftilt.models.ledger import Ledger
from difftilt.models.shards import whole
from difftilt.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, same_bits
from difftilt.training.protocol import Method, Task
from difftilt.training.update import Updater

Parts = dict[str, dict[str, Tensor]]
"""File stem -> tensors."""


@runtime_checkable
class Remembering(Protocol):
    """A reward with a memory."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def state_of(method: Method, updater: Updater, iteration: int, *, keep: bool = True) -> tuple[Parts, dict[str, Any]]:
    """Weights of all roles, optimisers, memories of method and reward, random state; and counts.

    Processes that hold weights in parts call it together; those that do not ``keep`` what is made whole get no weights.
    """
    run = updater.run
    reward = _remembering(run.task)
    parts: Parts = {
        "weights": run.roles.state_dict(keep=keep),
        "method": dict(method.state_dict()),
        "reward": {} if reward is None else dict(reward.state_dict()),
        "random": {"torch": torch.get_rng_state()},
    }
    for role, optimizer in updater.optimizers.items():
        parts[f"optimizer_{role}"] = whole(optimizer_tensors(optimizer), keep)
    return parts, {"iteration": iteration, "steps": updater.steps, "ledger": asdict(run.ledger)}


def put_back(checkpoint: Path, method: Method, updater: Updater) -> int:
    """Restore everything from a checkpoint; returns the number of iterations it has seen.

    Raises:
        UserError: if it is damaged, or of another method.
    """
    run = updater.run
    parts, state = load_checkpoint(checkpoint)
    expected = {"weights", "method", "reward", "random"} | {f"optimizer_{role}" for role in updater.optimizers}
    if expected != parts.keys():
        raise UserError(
            f"checkpoint {checkpoint} holds {sorted(parts)}, this run needs {sorted(expected)}: it was begun with "
            "another method or version; resume with the same one, or start again in a new directory"
        )
    run.roles.load_state_dict(parts["weights"])
    method.load_state_dict(parts["method"])
    if (reward := _remembering(run.task)) is not None:
        reward.load_state_dict(parts["reward"])
    for role, optimizer in updater.optimizers.items():
        load_optimizer(optimizer, parts[f"optimizer_{role}"])
    torch.set_rng_state(parts["random"]["torch"])
    updater.steps.update(state["steps"])
    run.ledger = Ledger(**state["ledger"])
    return int(state["iteration"])


def check_saved(checkpoint: Path, parts: Parts) -> None:
    """Restored equals saved, bit for bit.

    Raises:
        GuardError: names the tensor that differs.
    """
    restored, _ = load_checkpoint(checkpoint)
    for stem, group in parts.items():
        for name, tensor in group.items():
            if not same_bits(restored[stem][name], tensor):
                raise GuardError(f"checkpoint {checkpoint}: {stem}/{name} does not read back as it was written")


def _remembering(task: Task) -> Remembering | None:
    """The task's reward if it learns during a run and can be saved."""
    reward = task.reward
    return reward if reward.capabilities.trained and isinstance(reward, Remembering) else None
