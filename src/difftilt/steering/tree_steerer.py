"""What DTS and DTS* are both: a rule of selection and a backup, by which one tree for each prompt grows."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.budget import Meter
from difftilt.steering.protocol import Progress, Steered
from difftilt.steering.rollout_tree import Search, TreeConfig
from difftilt.steering.tree import Rule, Statistic
from difftilt.steering.tree_rules import soft_value
from difftilt.training.protocol import Task

AnyConfig = TypeVar("AnyConfig", bound=TreeConfig)
AnyRule = TypeVar("AnyRule", bound=Rule)


class TreeSteerer(ABC, Generic[AnyConfig, AnyRule]):
    """Select, complete, back up by log mean exp, and :meth:`harvest`, which is a leaf's own.

    Args:
        config: settings.
        rule: chooses children.
        statistic: a backup of one's own in place of the soft Bellman equation.
    """

    def __init__(self, config: AnyConfig, rule: AnyRule, statistic: Statistic | None = None) -> None:
        self.config, self.rule = config, rule
        self.statistic = soft_value(config.temperature) if statistic is None else statistic

    @abstractmethod
    def harvest(self, search: Search) -> Steered:
        """What the grown trees give; no network evaluation, no reward call."""

    @torch.no_grad()
    def steer(
        self,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        *,
        index: Int[Tensor, " prompts"] | None = None,
        progress: Progress | None = None,
        meter: Meter | None = None,
    ) -> Steered:
        """Grow a tree for every prompt; arguments as in the protocol."""
        search = Search.begin(self.config, self.rule, self.statistic, task, denoise, reward, prompts, noise, index)
        search.grow(meter, progress)
        return self.harvest(search)
