"""Feynman-Kac steering (Singhal, Horvitz et al. 2025): sequential Monte Carlo over denoising trajectories.

Particles run side by side; at chosen grid points each is weighted by a potential of its intermediate reward and
particles are resampled in proportion. The product of the potentials along a line is exp(r(x_0)/β), so the weighted
particles follow p(x_0 | c)·exp(r(x_0, c)/β)/Z whatever the intermediate reward, which only decides how fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import Guide, NoiseSource
from difftilt.steering.chain import Chain
from difftilt.steering.guides import value_guide
from difftilt.steering.learning import LearnsValue
from difftilt.steering.loop import search
from difftilt.steering.particles import bind, gather, start, weighted
from difftilt.steering.potentials import Lineage, PotentialName, begin, gain, offset
from difftilt.steering.protocol import Particles, Progress, Steered
from difftilt.steering.resampling import RESAMPLERS, ResamplerName, effective_sample_size, log_mean_exp
from difftilt.steering.rule import Selected, Visit, best_alone
from difftilt.steering.valuing import Valued, value_price
from difftilt.training.protocol import Task
from difftilt.values.estimates import LatentReward
from difftilt.values.protocol import Value

CARD = Card(
    name="fk-steering",
    entry="FKSteering",
    paper="Singhal et al. 2025, A General Framework for Inference-time Scaling and Steering of Diffusion Models, "
    "arXiv 2501.06848",
)


class FKSteeringConfig(Valued):
    """Settings of Feynman-Kac steering."""

    particles: int = Field(default=4, ge=1)
    """Particles per prompt, k."""
    temperature: float = Field(default=0.1, gt=0)
    """β of the target p·exp(r/β), in units of the reward; the paper's lambda is its inverse, 10."""
    potential: PotentialName = "difference"
    """How intermediate rewards become weights; ``max`` needs r_min below the range of the reward."""
    r_min: float = 0.0
    """Reward that the first weighting of ``difference`` and ``max`` compares with."""
    resample_at: int | tuple[int, ...] | None = None
    """Grid points that weigh, 0 at the noise end, besides the end; n is every n-th, null every fifth of the grid."""
    resample: Literal["always", "ess"] = "ess"
    """Resample at each of these points, or where the effective sample size is low; weights are carried on elsewhere."""
    ess_threshold: float = Field(default=0.5, ge=0, le=1)
    """``ess`` resamples below this share of the particles."""
    resampler: ResamplerName = "systematic"
    """How ancestors are drawn; the reference draws ``multinomial``."""
    guide_scale: float = Field(default=0.0, ge=0)
    """Moves each Gaussian proposal by scale·std²·∇r(x0hat)/β; its weight pays the kernel ratio."""
    output: Literal["weighted", "resampled", "best"] = "weighted"
    """What the final weights say: all particles with weights, a last resampling, or the best particle alone."""
    compat: Literal["reference"] | None = None
    """``reference`` drops the weights where it does not resample, as the published code does; biased."""


class FKSteering(LearnsValue):
    """Propose, value, weigh, gather.

    Args:
        config: settings.
        value: an intermediate reward of one's own (closed form, say) in place of ``config.value``.
        guide: a proposal of one's own in place of ``config.guide_scale``.
    """

    Config = FKSteeringConfig

    def __init__(self, config: FKSteeringConfig, *, value: Value | None = None, guide: Guide | None = None) -> None:
        if guide is not None and config.guide_scale > 0:
            raise UserError(f"give either a guide or guide_scale, not both (guide_scale is {config.guide_scale:g})")
        super().__init__(config, config.temperature, value)
        self.config, self.guide = config, guide

    def price(self, steps: int) -> Ledger:
        """Every particle is evaluated at every step, valued at the chosen points and scored; guides cost a gradient."""
        config, valued = self.config, [value_price(self.config, steps - position) for position in self.times(steps)]
        guided = Ledger(gradient_passes=steps, reward_calls=steps) if config.guide_scale > 0 else Ledger()
        particle = Ledger(nfe=steps, reward_calls=1) + guided + sum(valued, Ledger())
        return particle * config.particles

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
        scorer = bind(reward, task, prompts, denoise)
        chain, particles = start(task, denoise, prompts, self.config.particles, noise, index)
        rule = FeynmanKac(
            self.config, self.times(chain.steps), chain.steps, particles.log_weight.new_zeros(len(prompts))
        )
        particles = rule.begin(particles)
        value = self.value_in(task, prompts, scorer, chain)
        guide = self._guide(scorer, chain)
        return search(rule, chain, particles, scorer, value, guide=guide, progress=progress)

    def times(self, steps: int) -> frozenset[int]:
        """The weighting points before the end, on a grid of ``steps`` steps.

        Raises:
            UserError: if a point is not on the grid.
        """
        chosen = self.config.resample_at
        if chosen is None:
            # 20, 40, 60 and 80 of the 100 image steps of the paper
            return frozenset(round(steps * fifth / 5) for fifth in range(1, 5)) - {0, steps}
        if isinstance(chosen, int):
            if chosen < 1:
                raise UserError(f"resample_at must be at least 1 (every n-th grid point), got {chosen}")
            return frozenset(range(chosen, steps, chosen))
        outside = [point for point in chosen if not 0 <= point <= steps]
        if outside:
            raise UserError(f"resample_at names grid points {outside}; this sampler's grid runs from 0 to {steps}")
        return frozenset(chosen) - {steps}

    def _guide(self, scorer: LatentReward, chain: Chain) -> Guide | None:
        if self.config.guide_scale == 0:
            return self.guide
        return value_guide(scorer, chain, self.config.guide_scale / self.config.temperature)


@dataclass
class FeynmanKac:
    """Weigh by the potential, resample where the rule says so, carry the weights elsewhere.

    Attributes:
        config: settings.
        times: grid points before the end that weigh.
        steps: of the grid.
        log_z: collected at resamplings.
    """

    config: FKSteeringConfig
    times: frozenset[int]
    steps: int
    log_z: Float[Tensor, " prompts"]

    @property
    def copies(self) -> bool:
        """Resampling copies particles, where there are several."""
        return self.config.particles > 1

    @property
    def searches(self) -> bool:
        """Where the best alone comes out."""
        return self.config.output == "best"

    def begin(self, particles: Particles) -> Particles:
        """With the memory that the potential needs."""
        lineage = begin(self.config.potential, len(particles.group), self.config.r_min, particles.log_weight.device)
        memory = {**particles.memory, "record": lineage.record, "total": lineage.total}
        return replace(particles, memory=memory)

    def branch(self, position: int, size: int) -> int:
        """One child each: copies are made by resampling."""
        return 1

    def visits(self, position: int) -> bool:
        """At the chosen points and at the end."""
        return position in self.times or position == self.steps

    def select(self, visit: Visit) -> Selected:
        """Weigh; before the end resample the prompts whose effective sample size is low."""
        chain, config = visit.chain, self.config
        particles = self._weighed(visit)
        log_weight = chain.by_group(particles.log_weight)
        ess = effective_sample_size(log_weight)
        if visit.final:
            self.log_z = self.log_z + offset(config.potential, config.r_min) / config.temperature
            if config.output == "resampled":
                particles = self._resampled(chain, particles, torch.ones_like(ess, dtype=torch.bool), visit.position)
        else:
            low = ess < config.ess_threshold * chain.size
            selecting = low if config.resample == "ess" else torch.ones_like(low)
            particles = self._resampled(chain, particles, selecting, visit.position)
        return Selected(chain, particles, ess)

    def _weighed(self, visit: Visit) -> Particles:
        memory = visit.particles.memory
        lineage = Lineage(memory["record"], memory["total"])
        step, lineage = gain(self.config.potential, lineage, visit.scores, visit.final)
        particles = weighted(visit.chain, visit.particles, step / self.config.temperature)
        return replace(particles, memory={**memory, "record": lineage.record, "total": lineage.total})

    def _resampled(
        self, chain: Chain, particles: Particles, selecting: Bool[Tensor, " prompts"], position: int
    ) -> Particles:
        """Draw ancestors for the prompts that resample; the others keep their particles and carry their weights."""
        log_weight = chain.by_group(particles.log_weight)
        drawn = RESAMPLERS[self.config.resampler](log_weight, chain.uniform("resample", position))
        stay = torch.arange(chain.size, device=drawn.device).expand_as(drawn)
        particles = gather(chain, particles, torch.where(selecting[:, None], drawn, stay))
        self.log_z = self.log_z + torch.where(selecting, log_mean_exp(log_weight), 0.0)
        keep = ~selecting if self.config.compat is None else torch.zeros_like(selecting)
        carried = torch.where(keep[:, None], log_weight, 0.0).flatten()
        return replace(particles, log_weight=carried)

    def weigh(
        self, chain: Chain, particles: Particles, rewards: Float[Tensor, " particles"]
    ) -> tuple[Float[Tensor, " particles"], Float[Tensor, " prompts"]]:
        """The chosen form of the output; after a last resampling the log-weights are 0."""
        log_weight = chain.by_group(particles.log_weight)
        log_z = self.log_z + log_mean_exp(log_weight)
        if self.config.output == "best":
            return best_alone(chain, rewards)[0], log_z
        return log_weight.softmax(-1).flatten(), log_z
