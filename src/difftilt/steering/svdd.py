"""Soft value-based decoding (Li, Zhao, Uehara et al. 2024, arXiv 2408.08252): M children per step, one of them goes on.

From every state M next states are drawn from the pretrained kernel, each is valued at its own time, and one is taken in
proportion to exp(value/β): nested importance sampling of the policy p(x_s | x_t)·exp(v(x_s)/β), whose samples follow
p·exp(r/β) where v is the soft value and M is large. At temperature 0 it is greedy decoding, which the published code
always does. SVDD-R also resamples the batch by exp(v/β) after every step, the last one included, a search heuristic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.chain import Chain
from difftilt.steering.learning import LearnsValue
from difftilt.steering.loop import search
from difftilt.steering.particles import bind, gather, start
from difftilt.steering.protocol import Particles, Progress, Steered
from difftilt.steering.resampling import effective_sample_size, multinomial
from difftilt.steering.rule import Selected, Visit, all_alike, settle
from difftilt.steering.selection import categorical
from difftilt.steering.valuing import Valued, branching_price
from difftilt.training.protocol import Task
from difftilt.values.protocol import Value

CARD = Card(
    name="svdd",
    entry="SVDD",
    paper="Li et al. 2024, Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based "
    "Decoding, arXiv 2408.08252",
)


class SVDDConfig(Valued):
    """Settings of soft value-based decoding."""

    SCALED_BY: ClassVar[str] = "children"

    particles: int = Field(default=1, ge=1)
    """Samples per prompt; they do not know of one another, but for ``resample_batch``."""
    children: int = Field(default=10, ge=1)
    """M, next states per state and step; the paper draws 20 for images and 10 elsewhere."""
    temperature: float = Field(default=0.1, ge=0)
    """β of the target p·exp(r/β), in units of the reward; 0 takes the best child, as the published code does."""
    resample_batch: bool = False
    """SVDD-R: after every step, the last included, the samples of a prompt are drawn anew by exp(value/β)."""


class SVDD(LearnsValue):
    """Branch, value, take one child of each.

    Args:
        config: settings.
        value: an intermediate reward of one's own (closed form, say) in place of ``config.value``.
    """

    Config = SVDDConfig

    def __init__(self, config: SVDDConfig, *, value: Value | None = None) -> None:
        super().__init__(config, config.temperature, value)
        self.config = config

    def price(self, steps: int) -> Ledger:
        """Every child is valued."""
        config = self.config
        if config.children == 1 and not (config.resample_batch and config.particles > 1):
            return Ledger(nfe=steps, reward_calls=1) * config.particles  # nothing is valued before the end
        return branching_price(config, config.children, steps) * config.particles

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
        """Sample for every prompt; arguments as in the protocol."""
        config, scorer = self.config, bind(reward, task, prompts, denoise)
        chain, particles = start(task, denoise, prompts, config.particles, noise, index)
        value = self.value_in(task, prompts, scorer, chain)
        return search(SoftValue(config, chain.steps), chain, particles, scorer, value, progress=progress)


@dataclass
class SoftValue:
    """One child of every parent, by exp(value/β).

    Attributes:
        config: settings.
        steps: of the grid.
        copies: samples of a prompt may become equal, in SVDD-R.
    """

    config: SVDDConfig
    steps: int

    @property
    def copies(self) -> bool:
        """SVDD-R copies samples."""
        return self.config.resample_batch and self.config.particles > 1

    @property
    def searches(self) -> bool:
        """It samples."""
        return False

    def branch(self, position: int, size: int) -> int:
        """M children."""
        return self.config.children

    def visits(self, position: int) -> bool:
        """After every step; the first state is not weighed, for it says almost nothing of x_0."""
        return position > 0 and (self.config.children > 1 or self.copies)

    def select(self, visit: Visit) -> Selected:
        """The child that each parent takes, then, in SVDD-R, the batch anew."""
        chain, config = visit.chain, self.config
        table = visit.scores.reshape(-1, chain.branch)
        uniform = chain.uniform("child", visit.position).reshape(table.shape)
        child = categorical(table, config.temperature, uniform)
        kept = torch.arange(len(table), device=child.device) * chain.branch + child
        within = kept.reshape(len(chain.home), -1) % chain.size
        scores = visit.scores[kept].reshape(within.shape)
        chain, particles = settle(chain, visit.particles, within)
        if self.copies:
            particles = self._anew(chain, particles, scores, visit.position)
        # a parent without one judged child counts none
        counted = effective_sample_size(table / (config.temperature or 1e-12)).nan_to_num(0.0)
        return Selected(chain, particles, counted.reshape(within.shape).mean(-1))

    def _anew(
        self, chain: Chain, particles: Particles, scores: Float[Tensor, "groups size"], position: int
    ) -> Particles:
        if self.config.temperature == 0:
            best = scores.argmax(-1, keepdim=True).expand(scores.shape)
            return gather(chain, particles, best)
        drawn = multinomial(scores / self.config.temperature, chain.uniform("batch", position))
        return gather(chain, particles, drawn)

    def weigh(
        self, chain: Chain, particles: Particles, rewards: Float[Tensor, " particles"]
    ) -> tuple[Float[Tensor, " particles"], Float[Tensor, " prompts"]]:
        """Equal weights; no estimate of Z."""
        return all_alike(chain, rewards)
