"""Plain functions as rewards."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast, get_type_hints

import numpy as np
import torch
from torch import Tensor

from difftilt.errors import UserError
from difftilt.rewards.protocol import Capabilities, Reward, Samples

ScoreFunction = Callable[[Samples], Any]
"""Samples -> one score per sample: a tensor, an array, or a sequence of numbers or of scalar tensors."""


@dataclass(frozen=True)
class FunctionReward:
    """A function of samples with the name and the capabilities that its author vouches for."""

    name: str
    function: ScoreFunction
    capabilities: Capabilities = field(default_factory=Capabilities)

    def score(self, samples: Samples) -> Tensor:
        """What the function returned as a float32 tensor; its shape and values are checked by ``evaluate``."""
        return as_scores(self.function(samples)).to(samples.media.device)


@dataclass(frozen=True)
class Unrewarded:
    """Stands where a task has no reward of its own; scoring with it is an error."""

    name: str = "none"
    capabilities: Capabilities = field(default_factory=Capabilities)

    def score(self, samples: Samples) -> Tensor:
        """Refused."""
        raise UserError("this task has no reward of its own: name one, as in reward: {name: my_module:my_function}")


def as_scores(values: Any) -> Tensor:
    """A tensor, an array, or a sequence of numbers or scalar tensors as a float32 tensor; gradients are kept.

    Raises:
        TypeError: if these are not real numbers: text and None are not scores.
    """
    if isinstance(values, list | tuple) and values and all(isinstance(value, Tensor) for value in values):
        values = torch.stack(list(cast(list[Tensor], values)))
    if not isinstance(values, Tensor):
        array = np.array(values)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"scores must be real numbers, not {type(values).__name__} of {array.dtype}")
        values = torch.from_numpy(array.astype(np.float64))
    if values.is_complex():
        raise TypeError("scores must be real numbers, not complex ones")
    return values.float()


def scores_samples(entry: Callable[..., Any]) -> bool:
    """True for a plain reward function, as against a class or function that makes a reward."""
    if isinstance(entry, type):
        return False
    first = next(iter(inspect.signature(entry).parameters), None)
    return first == "samples" or (first is not None and get_type_hints(entry).get(first) is Samples)


def as_reward(
    reward: Reward | ScoreFunction, name: str | None = None, capabilities: Capabilities | None = None
) -> Reward:
    """A reward as it is, or a function of :class:`Samples` as a reward.

    Args:
        reward: either.
        name: shown in reports; by default that of the function. A reward has its own and takes no other.
        capabilities: of the function; by default black-box and per sample. A reward declares its own.

    >>> brightness = as_reward(lambda samples: samples.media.mean(dim=1), "brightness")
    >>> brightness.name
    'brightness'
    """
    if isinstance(reward, Reward):
        if name not in (None, reward.name) or capabilities is not None:
            raise ValueError(f"the reward {reward.name!r} has a name and capabilities of its own: give it no others")
        return reward
    if not callable(reward):
        raise TypeError(f"a reward is a function of Samples or has name, capabilities and score, not {reward!r}")
    own = getattr(reward, "__name__", type(reward).__name__)
    return FunctionReward(name or ("reward" if own == "<lambda>" else own), reward, capabilities or Capabilities())
