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
from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.models.protocol import Denoiser
from difftilt.process.gaussian import GaussianProcess
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import Guide, NoiseSource
from difftilt.steering.guides import value_guide
from difftilt.steering.particles import (
    Chain,
    Outcome,
    Weighing,
    best_rows,
    bind,
    finish,
    gather,
    predicted,
    propose,
    start,
    weighted,
)
from difftilt.steering.potentials import Lineage, PotentialName, begin, gain, offset
from difftilt.steering.protocol import Particles, Progress, Steered
from difftilt.steering.resampling import RESAMPLERS, ResamplerName, distinct, effective_sample_size, log_mean_exp
from difftilt.training.protocol import Task
from difftilt.values.estimates import LatentReward, PosteriorMean, Rollout, SampledX0
from difftilt.values.protocol import Value

CARD = Card(
    name="fk-steering",
    entry="FKSteering",
    paper="Singhal et al. 2025, A General Framework for Inference-time Scaling and Steering of Diffusion Models, "
    "arXiv 2501.06848",
)


class FKSteeringConfig(Config):
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
    value: Literal["posterior_mean", "x0_samples", "rollout"] = "posterior_mean"
    """Intermediate reward: of the point prediction, of draws from it (tokens), or of completed chains (costly)."""
    x0_samples: int = Field(default=4, ge=1)
    """Clean samples per state for ``x0_samples`` and ``rollout``."""
    value_temperature: float | None = Field(default=None, gt=0)
    """Temperature of the log mean exp over them; None is ``temperature``, the soft value, and 1 the paper's form."""
    guide_scale: float = Field(default=0.0, ge=0)
    """Moves each Gaussian proposal by scale·std²·∇r(x0hat)/β; its weight pays the kernel ratio."""
    output: Literal["weighted", "resampled", "best"] = "weighted"
    """What the final weights say: all particles with weights, a last resampling, or the best particle alone."""
    compat: Literal["reference"] | None = None
    """``reference`` drops the weights where it does not resample, as the published code does; biased."""


class FKSteering:
    """Propose, value, weigh, gather.

    Args:
        config: settings.
        value: an intermediate reward of one's own (learned, closed form) in place of ``config.value``.
        guide: a proposal of one's own in place of ``config.guide_scale``.
    """

    Config = FKSteeringConfig

    def __init__(self, config: FKSteeringConfig, *, value: Value | None = None, guide: Guide | None = None) -> None:
        if guide is not None and config.guide_scale > 0:
            raise UserError(f"give either a guide or guide_scale, not both (guide_scale is {config.guide_scale:g})")
        self.config, self.value, self.guide = config, value, guide

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
        times = self.times(chain.steps)
        value, guide = self._value(scorer, chain), self._guide(scorer, chain)
        smc = _begin(particles, config, len(prompts))
        for position in range(chain.steps):
            smc, ess = self._visit(chain, smc, position, value) if position in times else (smc, None)
            if progress is not None and position:
                progress(position, chain.steps, ess)
            parting = config.particles > 1 and any(point <= position for point in times)
            smc = replace(smc, particles=propose(chain, smc.particles, position, guide, parting=parting))
        samples = scorer.samples(smc.particles.x, smc.particles.group)
        steered = self._end(chain, smc, scorer.score(samples), samples.media)
        if progress is not None:
            progress(chain.steps, chain.steps, steered.ess[-1])
        return steered

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

    def _value(self, scorer: LatentReward, chain: Chain) -> Value:
        config = self.config
        if self.value is not None:
            return self.value
        if config.value == "posterior_mean":
            return PosteriorMean(scorer)
        temperature = config.temperature if config.value_temperature is None else config.value_temperature
        if config.value == "x0_samples":
            if isinstance(chain.denoise.process, GaussianProcess):
                raise UserError(
                    "steerer.value = x0_samples draws tokens; this model is continuous: use rollout or posterior_mean"
                )
            return SampledX0(scorer, config.x0_samples, temperature, chain.noise)
        return Rollout(scorer, chain.denoise, chain.preset, chain.grid, config.x0_samples, temperature, chain.noise)

    def _guide(self, scorer: LatentReward, chain: Chain) -> Guide | None:
        if self.config.guide_scale == 0:
            return self.guide
        return value_guide(scorer, chain, self.config.guide_scale / self.config.temperature)

    def _visit(self, chain: Chain, smc: "_SMC", position: int, value: Value) -> "tuple[_SMC, Tensor]":
        """Value, weigh and, where the rule says so, select at one grid point before the end."""
        particles = predicted(chain, smc.particles, position)
        t = chain.time(position, particles.x)
        # the prediction is made with no gradient and stays with the particle: the next step uses it again
        scores = value(particles.x, t, particles.condition, particles.prediction, chain.rows(position))
        smc = self._weigh(replace(smc, particles=particles), chain, scores, final=False)
        log_weight = chain.by_group(smc.particles.log_weight)
        ess = effective_sample_size(log_weight)
        low = ess < self.config.ess_threshold * chain.size
        smc = self._select(chain, smc, low if self.config.resample == "ess" else torch.ones_like(low), position)
        return replace(smc, log=(*smc.log, _weighing(chain, smc.particles, ess))), ess

    def _weigh(self, smc: "_SMC", chain: Chain, scores: Float[Tensor, " particles"], final: bool) -> "_SMC":
        memory = smc.particles.memory
        lineage = Lineage(memory["record"], memory["total"])
        step, lineage = gain(self.config.potential, lineage, scores, final)
        particles = weighted(chain, smc.particles, step / self.config.temperature)
        memory = {**memory, "record": lineage.record, "total": lineage.total}
        return replace(smc, particles=replace(particles, memory=memory))

    def _select(self, chain: Chain, smc: "_SMC", selecting: Bool[Tensor, " prompts"], position: int) -> "_SMC":
        """Draw ancestors for the prompts that resample; the others keep their particles and carry their weights."""
        log_weight = chain.by_group(smc.particles.log_weight)
        drawn = RESAMPLERS[self.config.resampler](log_weight, chain.uniform("resample", position))
        stay = torch.arange(chain.size, device=drawn.device).expand_as(drawn)
        particles = gather(chain, smc.particles, torch.where(selecting[:, None], drawn, stay))
        log_z = smc.log_z + torch.where(selecting, log_mean_exp(log_weight), 0.0)
        keep = ~selecting if self.config.compat is None else torch.zeros_like(selecting)
        carried = torch.where(keep[:, None], log_weight, 0.0).flatten()
        return replace(smc, particles=replace(particles, log_weight=carried), log_z=log_z)

    def _end(self, chain: Chain, smc: "_SMC", rewards: Float[Tensor, " particles"], media: Tensor) -> Steered:
        """The last weighting, with r(x_0) itself, and the chosen form of the output."""
        smc = self._weigh(smc, chain, rewards, final=True)
        log_weight = chain.by_group(smc.particles.log_weight)
        ess = effective_sample_size(log_weight)
        log_z = (
            smc.log_z
            + log_mean_exp(log_weight)
            + offset(self.config.potential, self.config.r_min) / (self.config.temperature)
        )
        weight = log_weight.softmax(-1).flatten()
        particles = smc.particles
        if self.config.output == "resampled":
            every = torch.ones(len(log_z), dtype=torch.bool, device=log_z.device)
            tagged = replace(
                particles, memory={**particles.memory, "row": torch.arange(len(rewards), device=rewards.device)}
            )
            particles = self._select(chain, replace(smc, particles=tagged), every, chain.steps).particles
            rewards, media = rewards[particles.memory["row"]], media[particles.memory["row"]]
            weight = torch.full_like(weight, 1 / chain.size)
        elif self.config.output == "best":
            weight = torch.zeros_like(weight)
            weight[best_rows(chain, rewards)] = 1.0
        log = (*smc.log, _weighing(chain, particles, ess))
        return finish(chain, Outcome(particles, rewards, weight, log_z, log), media)


@dataclass(frozen=True)
class _SMC:
    """The state of the sampler: particles, the normaliser collected at resamplings, and the log."""

    particles: Particles
    log_z: Float[Tensor, " prompts"]
    log: tuple[Weighing, ...] = ()


def _begin(particles: Particles, config: FKSteeringConfig, prompts: int) -> _SMC:
    lineage = begin(config.potential, len(particles.group), config.r_min, particles.log_weight.device)
    memory = {**particles.memory, "record": lineage.record, "total": lineage.total}
    return _SMC(replace(particles, memory=memory), particles.log_weight.new_zeros(prompts))


def _weighing(chain: Chain, particles: Particles, ess: Float[Tensor, " prompts"]) -> Weighing:
    return Weighing(ess, distinct(chain.by_group(particles.memory["origin"])))
