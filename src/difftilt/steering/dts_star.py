"""DTS* (Jain et al. 2025): the tree of DTS as a search for one sample of high reward.

Boltzmann selection gives way to an upper confidence bound. What comes out is a search, not the tilted law.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.budget import Meter
from difftilt.steering.protocol import Progress, Steered
from difftilt.steering.rollout_tree import Search, TreeConfig
from difftilt.steering.tree_rules import UCT, soft_value
from difftilt.training.protocol import Task

CARD = Card(
    name="dts-star",
    entry="DTSStar",
    paper="Jain et al. 2025, Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models, "
    "arXiv 2506.20701",
    needs=("stochastic kernel", "per-sample reward"),
)


class DTSStarConfig(TreeConfig):
    """Settings of diffusion tree search."""

    exploration: float = Field(default=1.0, ge=0)
    """Weight of the bonus sqrt(ln N(parent)/N(child)), in units of the reward; the paper's c."""


class DTSStar:
    """Select by value and visit count, complete, back up by log mean exp; keep the best sample ever seen.

    Two samples of every prompt come out: the best one, which has all the weight, and the one that the values lead to.
    """

    Config = DTSStarConfig

    def __init__(self, config: DTSStarConfig) -> None:
        self.config = config
        self.rule, self.statistic = UCT(config.exploration), soft_value(config.temperature)

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
        """Search for every prompt; arguments as in the protocol."""
        search = Search.begin(self.config, self.rule, self.statistic, task, denoise, reward, prompts, noise, index)
        search.grow(meter, progress)
        count = len(prompts)
        greedy = search.descend(UCT(0.0), torch.zeros(count, 1, search.forest.last + 1))
        leaves = torch.cat([torch.from_numpy(search.best)[:, None], greedy], 1)
        outcome = search.outcome(
            leaves,
            torch.tensor([1.0, 0.0], dtype=torch.float64).expand(count, 2),
            log_z=torch.full((count,), torch.nan, dtype=torch.float64),  # of a search, no estimate of Z
            ess=torch.zeros(0, count, dtype=torch.float64),
        )
        return replace(outcome, search=True)
