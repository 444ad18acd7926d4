"""Diffusion tree sampling (Jain et al. 2025): one persistent tree of denoising trajectories for each prompt.

The reward of every finished rollout is backed up through the tree by the soft Bellman equation, so the early states
learn what they are worth, and later rollouts start where exp(value/β) says. Intermediate states are never scored.
"""

import torch
from pydantic import Field

from difftilt.card import Card
from difftilt.steering.protocol import Steered
from difftilt.steering.rollout_tree import Search, TreeConfig
from difftilt.steering.tree import Statistic
from difftilt.steering.tree_rules import Boltzmann
from difftilt.steering.tree_steerer import TreeSteerer

CARD = Card(
    name="dts",
    entry="DTS",
    paper="Jain et al. 2025, Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models, "
    "arXiv 2506.20701",
    needs=("stochastic kernel", "per-sample reward"),
)


class DTSConfig(TreeConfig):
    """Settings of diffusion tree sampling."""

    samples: int = Field(default=16, ge=1)
    """Drawn from each finished tree; free, and the same finished sample may come more than once."""


class DTS(TreeSteerer[DTSConfig, Boltzmann]):
    """Select by exp(value/β), complete, back up by log mean exp; then sample from the finished tree.

    Args:
        config: settings.
        statistic: a backup of one's own in place of the soft Bellman equation.
    """

    Config = DTSConfig

    def __init__(self, config: DTSConfig, *, statistic: Statistic | None = None) -> None:
        super().__init__(config, Boltzmann(config.temperature), statistic)

    def harvest(self, search: Search) -> Steered:
        """As many samples as the settings say."""
        return self.sample(search, self.config.samples)

    def sample(self, search: Search, samples: int) -> Steered:
        """Descend ``samples`` times from every root by exp(value/β); no network evaluation, no reward call.

        ``log_z`` is the value of the root over β; ``ess`` the effective number of finished samples under the law of
        these descents; ``ancestors`` the different children of the root among the samples.
        """
        forest, noise, device = search.forest, search.frontier.chain.noise, search.frontier.device
        count = len(search.prompts)
        index = (search.prompts[:, None] * samples + torch.arange(samples, device=device)).flatten()
        levels = noise.uniform(index, (forest.last + 1,), purpose="output").reshape(count, samples, -1)
        leaves = search.descend(self.rule, levels)
        laws = [self.rule.law(forest, root)[1] for root in range(count)]
        return search.outcome(
            leaves,
            torch.full(leaves.shape, 1 / samples, dtype=torch.float64),
            log_z=torch.from_numpy(forest.value[:count, 0] / self.config.temperature),
            ess=torch.tensor([[1 / float((law**2).sum()) for law in laws]], dtype=torch.float64),
        )
