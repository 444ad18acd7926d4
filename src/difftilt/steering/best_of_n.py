"""Best-of-n: draw n samples and keep the one with the highest reward.

It is the particle loop with no selection before the end. The law of the kept sample is a search, not the tilted law:
its drift from the base is at most log n - (n - 1)/n nats (Beirami et al. 2024, arXiv 2401.01879).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.loop import search
from difftilt.steering.particles import bind, start
from difftilt.steering.protocol import Progress, Steered
from difftilt.steering.rule import Unselective
from difftilt.training.protocol import Task
from difftilt.values.estimates import PosteriorMean

CARD = Card(
    name="best-of-n",
    entry="BestOfN",
    paper="folklore; as a baseline in arXiv 2501.06848",
)


class BestOfNConfig(Config):
    """Settings of best-of-n."""

    particles: int = Field(default=4, ge=1)
    """Samples per prompt, the n of the name."""


class BestOfN:
    """All n samples come out; the weight of each prompt lies on its best one."""

    Config = BestOfNConfig

    def __init__(self, config: BestOfNConfig) -> None:
        self.config = config

    def price(self, steps: int) -> Ledger:
        """Every particle is sampled and scored once."""
        return Ledger(nfe=steps, reward_calls=1) * self.config.particles

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
    ) -> Steered:
        """Sample n times for every prompt; arguments as in the protocol."""
        scorer = bind(reward, task, prompts, denoise)
        chain, particles = start(task, denoise, prompts, self.config.particles, noise, index)
        return search(Unselective(), chain, particles, scorer, PosteriorMean(scorer), progress=progress)
