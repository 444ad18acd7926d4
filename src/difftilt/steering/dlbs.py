"""Diffusion latent beam search (Oshima et al. 2025, arXiv 2501.19252): B beams, K children of each, a lookahead.

Every beam is evaluated once and draws K next states; each of the B·K is scored on the clean sample that a few
deterministic steps from it lead to, and the best B of all go on, whoever their parents are. A wrong early decision can
then be taken back, and the score does not rest on a blurred prediction. The noisy candidate itself goes on; its
lookahead is dropped, but for its first evaluation, which is the next step's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.chain import Chain
from difftilt.steering.learning import LearnsValue
from difftilt.steering.loop import search
from difftilt.steering.particles import bind, start
from difftilt.steering.protocol import Particles, Progress, Steered
from difftilt.steering.resampling import distinct
from difftilt.steering.rule import Selected, Visit, best_alone, settle
from difftilt.steering.selection import top
from difftilt.steering.valuing import Valued, branching_price
from difftilt.training.protocol import Task
from difftilt.values.protocol import Value

CARD = Card(
    name="dlbs",
    entry="DLBS",
    paper="Oshima et al. 2025, Inference-Time Text-to-Video Alignment with Diffusion Latent Beam Search, "
    "arXiv 2501.19252",
)


class DLBSConfig(Valued):
    """Settings of the beam search; rewards enter through their order alone, so there is no temperature."""

    particles: int = Field(default=4, ge=1)
    """B, beams per prompt: candidates that go on after every step."""
    children: int = Field(default=2, ge=1)
    """K, next states that each beam draws; the paper studies B·K up to 64."""
    value: Literal["posterior_mean", "x0_samples", "lookahead", "rollout", "learned"] = "lookahead"
    """Score of a candidate; ``posterior_mean`` is a lookahead of one evaluation. Tokens have no lookahead."""
    per_parent: int | None = Field(default=None, ge=1)
    """Most children of one beam that go on while others are left; null is no limit."""
    search_high: float = Field(default=1.0, gt=0, le=1)
    """Search only steps that begin at t at most this. Before them one trajectory runs; the first draws all B·K."""
    search_low: float = Field(default=0.0, ge=0, lt=1)
    """Search only steps that begin at t at least this. After them the best beam runs alone."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.search_low >= self.search_high:
            raise ValueError(
                f"search_low = {self.search_low:g} must be below search_high = {self.search_high:g}: they bound the "
                "times at which searched steps begin"
            )
        return self


class DLBS(LearnsValue):
    """Branch every beam, score by lookahead, keep the best of all.

    Args:
        config: settings.
        value: a score of one's own in place of ``config.value``.
    """

    Config = DLBSConfig

    def __init__(self, config: DLBSConfig, *, value: Value | None = None) -> None:
        super().__init__(config, 1.0, value)
        self.config = config

    def price(self, steps: int) -> Ledger:
        """B + (steps - 1)·B·K·T' evaluations, a score for every candidate; less where the search range is shorter."""
        config = self.config
        # with one child of each nothing is scored before the end, unless the range ends before
        plain = config.children == 1 and config.search_low == 0
        beam = Ledger(nfe=steps, reward_calls=1) if plain else branching_price(config, config.children, steps)
        return beam * config.particles

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
        scorer, beams = bind(reward, task, prompts, denoise), self.beams(task)
        chain, particles = start(task, denoise, prompts, beams.width(0), noise, index, places=self.config.particles)
        value = self.value_in(task, prompts, scorer, chain)
        return search(beams, chain, particles, scorer, value, progress=progress)

    def beams(self, task: Task) -> "Beams":
        """The rule on the task's grid.

        Raises:
            UserError: if no step lies in the search range.
        """
        low, high = self.config.search_low, self.config.search_high
        times: list[float] = task.sampler.grid.tolist()[:-1]
        # a grid in single precision may miss the bound by its rounding
        searched = tuple(low - 1e-6 <= t <= high + 1e-6 for t in times)
        if not any(searched):
            raise UserError(
                f"no step begins between steerer.search_low = {low:g} and steerer.search_high = {high:g}; the "
                f"grid's begin at {', '.join(f'{t:.3g}' for t in times)}"
            )
        return Beams(self.config, searched)


@dataclass(frozen=True)
class Beams:
    """The best B of all children in the search range, one trajectory outside.

    Attributes:
        config: settings.
        searched: which steps of the grid lie in the range.
        copies: nobody goes on twice.
        searches: the best beam comes out.
    """

    config: DLBSConfig
    searched: tuple[bool, ...]
    copies: bool = False
    searches: bool = True

    def width(self, position: int) -> int:
        """Beams at a grid point once they are chosen.

        All of them begin where the first step is searched, and go on to a step that is, or to the end; a single
        trajectory enters the range and leaves it.
        """
        inside = self.searched[max(position - 1, 0)]
        onward = position == len(self.searched) or self.searched[position]
        return self.config.particles if inside and onward else 1

    def branch(self, position: int, size: int) -> int:
        """K children of every beam, B·K of a single trajectory that enters the range."""
        return self.config.particles * self.config.children // size if self.searched[position] else 1

    def visits(self, position: int) -> bool:
        """Where there are more candidates than beams."""
        if position == 0 or not self.searched[position - 1]:
            return False
        return self.config.particles * self.config.children > self.width(position)

    def select(self, visit: Visit) -> Selected:
        """The best of all candidates; how many beams they descend from is logged as ``ess``."""
        chain, keep = visit.chain, min(self.width(visit.position), visit.chain.size)
        kept = top(chain.by_group(visit.scores), keep, chain.branch, self.config.per_parent)
        chain, particles = settle(chain, visit.particles, kept)
        return Selected(chain, particles, distinct(kept // visit.chain.branch).double())

    def weigh(
        self, chain: Chain, particles: Particles, rewards: Float[Tensor, " particles"]
    ) -> tuple[Float[Tensor, " particles"], Float[Tensor, " prompts"]]:
        """All on the best beam."""
        return best_alone(chain, rewards)
