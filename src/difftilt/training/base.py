"""Defaults of a training method: everything but ``collect`` and ``phases``."""

from collections.abc import Mapping

from torch import Tensor

from difftilt.models.protocol import GenerativeModel, RoleSpec
from difftilt.sampling.protocol import Sampler
from difftilt.training.protocol import Task


class MethodBase:
    """What most methods share: no further roles, no memory, the task's own sampler, ``current`` evaluated."""

    @property
    def evaluated_role(self) -> str:
        return "current"

    def adapt(self, model: GenerativeModel) -> GenerativeModel:
        """The model as it is."""
        return model

    def sampler(self, task: Task) -> Sampler:
        """The task's."""
        return task.sampler

    def roles(self) -> Mapping[str, RoleSpec]:
        """None."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


def warm_decay(n: int, largest: float) -> float:
    """min((1 + n)/(10 + n), largest) after n optimiser steps."""
    return min((1 + n) / (10 + n), largest)
