"""DTS* (Jain et al. 2025): the tree of DTS as a search for one sample of high reward.

Boltzmann selection gives way to an upper confidence bound. What comes out is a search, not the tilted law.
"""

from dataclasses import replace

import torch
from pydantic import Field

from difftilt.card import Card
from difftilt.steering.protocol import Steered
from difftilt.steering.rollout_tree import Search, TreeConfig
from difftilt.steering.tree_rules import UCT
from difftilt.steering.tree_steerer import TreeSteerer

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


class DTSStar(TreeSteerer[DTSStarConfig, UCT]):
    """Select by value and visit count, complete, back up by log mean exp; keep the best sample ever seen.

    Two samples of every prompt come out: the best one, which has all the weight, and the one that the values lead to.
    """

    Config = DTSStarConfig

    def __init__(self, config: DTSStarConfig) -> None:
        super().__init__(config, UCT(config.exploration))

    def harvest(self, search: Search) -> Steered:
        """The best and the greedy sample of each tree."""
        count = len(search.prompts)
        greedy = search.descend(UCT(0.0), torch.zeros(count, 1, search.forest.last + 1))
        leaves = torch.cat([torch.from_numpy(search.best)[:, None], greedy], 1)
        outcome = search.outcome(
            leaves,
            torch.tensor([1.0, 0.0], dtype=torch.float64).expand(count, 2),
            log_z=torch.full((count,), torch.nan, dtype=torch.float64),  # of a search, no estimate of Z
            ess=torch.zeros(0, count, dtype=torch.float64),
        )
        return replace(outcome, search=True)
