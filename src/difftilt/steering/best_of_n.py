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
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.particles import Outcome, best_rows, bind, finish, propose, start
from difftilt.steering.protocol import Progress, Steered
from difftilt.training.protocol import Task

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
        for position in range(chain.steps):
            particles = propose(chain, particles, position)
            if progress is not None:
                progress(position + 1, chain.steps, None)
        samples = scorer.samples(particles.x, particles.group)
        rewards = scorer.score(samples)
        weight = torch.zeros_like(particles.log_weight)
        weight[best_rows(chain, rewards)] = 1.0
        log_z = particles.log_weight.new_full((len(prompts),), torch.nan)
        return finish(chain, Outcome(particles, rewards, weight, log_z, ()), samples.media)
