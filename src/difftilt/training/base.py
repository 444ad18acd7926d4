"""Defaults of a training method: everything but ``collect`` and ``phases``."""

from collections.abc import Mapping
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar

from torch import Tensor

from difftilt.models.protocol import GenerativeModel, Lagging, RoleSpec
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


class Averaging(Protocol):
    """Settings that name how far weights are averaged."""

    @property
    def ema(self) -> float:
        """Largest decay of the average; 0 is none."""
        ...


AveragingConfig = TypeVar("AveragingConfig", bound=Averaging)


class AveragedMethod(MethodBase, Generic[AveragingConfig]):
    """Averaged weights are evaluated, where the settings ask for them.

    Attributes:
        config: of the method.
        average_every: when the average follows: after each iteration, or after so many optimiser steps.
    """

    config: AveragingConfig
    average_every: Literal["iteration"] | int = "iteration"

    @property
    def evaluated_role(self) -> str:
        return "ema" if self.config.ema else "current"

    def roles(self) -> Mapping[str, RoleSpec]:
        """``ema``, where it is evaluated."""
        if not self.config.ema:
            return {}
        return {"ema": Lagging("current", partial(warm_decay, largest=self.config.ema), every=self.average_every)}


def warm_decay(n: int, largest: float) -> float:
    """min((1 + n)/(10 + n), largest) after n optimiser steps."""
    return min((1 + n) / (10 + n), largest)
