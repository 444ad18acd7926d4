"""DOIT: Doob's h-transform by simulation (Zhu et al. 2026, arXiv 2602.16198).

The sampler of p(x_0)·w(x_0) is the sampler of p with the score raised by grad log h_t, h_t(x) = E[w(x_0) | x_t = x].
DOIT estimates this gradient at every step from M simulated next states: the reward weighs them and is only evaluated,
and the one derivative is that of the step's mean (``values.likelihood_ratio``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.process.gaussian import GaussianProcess, expand
from difftilt.rewards.protocol import Reward
from difftilt.sampling.kernels import DDIM
from difftilt.sampling.noise import Apart
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.chain import Chain
from difftilt.steering.loop import search
from difftilt.steering.particles import bind, propose, start
from difftilt.steering.protocol import Particles, Progress, Steered
from difftilt.steering.rule import Unselective
from difftilt.steering.simulating import Look, Simulator, informed_steps, noisy_steps
from difftilt.training.protocol import Task
from difftilt.trees import join, take
from difftilt.values.estimates import LatentReward, PosteriorMean, Rollout
from difftilt.values.likelihood_ratio import WeightLaw, draw_weights
from difftilt.values.protocol import Value

CARD = Card(
    name="doit",
    entry="DOIT",
    paper="Zhu, Ye, Liu, Wang and Chen 2026, Training-free adaptation via Doob's h-transform, arXiv 2602.16198",
    needs=("gaussian process", "per-sample reward"),
)


class DOITConfig(Config):
    """Settings of DOIT."""

    particles: int = Field(default=4, ge=1)
    """Samples per prompt, P."""
    simulations: int = Field(default=16, ge=2)
    """Simulated next states of each particle at each corrected step, M; even if antithetic."""
    antithetic: bool = True
    """The noise of one half of them is minus that of the other."""
    surrogate: Literal["full", "one_step", "reuse"] = "full"
    """Whose reward a simulated state has: the end of a completed chain, the network's x_0 there, or x_0 by the noise
    that the network sees at the particle (no evaluation, and biased by a factor at any M)."""
    simulate_eta: float | None = Field(default=1.0, gt=0, le=1)
    """Simulations step by DDIM with this eta; h is that of the corruption at 1 only. Null is the sampler's kernel."""
    weights: WeightLaw = "plain"
    """exp(r/β), or of the reward in units of its spread over the simulations (a heuristic), or r >= ``threshold``."""
    temperature: float = Field(default=0.5, gt=0)
    """β, in units of the reward; in its standard deviations for ``standardised``."""
    threshold: float | None = None
    """Of the event, in units of the reward."""
    floor: float = Field(default=1e-3, gt=0, le=1)
    """Least share of the simulations that the event is taken to have."""
    strength: float = Field(default=1.0, ge=0)
    """γ, what the gradient is multiplied by; 0 is plain sampling."""
    first: int = Field(default=1, ge=0)
    """First corrected step, 0 at the noise end."""
    last: int | None = Field(default=None, ge=0)
    """Last corrected step; null is two thirds of the grid (10 of the paper's 15)."""
    smallest_std: float = Field(default=1e-4, gt=0)
    """Steps of a smaller standard deviation, in units of the state, are not corrected."""
    gate: float | None = None
    """No correction where the mean simulated reward is lower."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient of log h of one particle."""
    greedy_from: int | None = Field(default=None, ge=0)
    """From this step on a particle jumps to its best simulated state, and nothing is differentiated."""
    chunk: int | None = Field(default=None, ge=1)
    """Particles that are simulated and differentiated at a time; null is all."""
    output: Literal["samples", "best"] = "samples"
    """What the weights say: all particles alike, or the best of each prompt alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.antithetic and self.simulations % 2:
            raise ValueError(f"simulations must be even where antithetic is on, got {self.simulations}")
        if (self.threshold is None) == (self.weights == "event"):
            raise ValueError("threshold belongs to weights = event, and is needed there")
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last must not come before first, got {self.last} and {self.first}")
        return self


class DOIT:
    """Plain sampling whose predictions are raised by the estimated gradient of log h.

    Args:
        config: settings.
        value: scores of simulated states (learned, closed form) in place of ``config.surrogate``.
    """

    Config = DOITConfig

    def __init__(self, config: DOITConfig, *, value: Value | None = None) -> None:
        self.config, self.value = config, value

    def price(self, steps: int) -> Ledger:
        """A gradient pass for each corrected step, an evaluation for each other, and the simulations; at most."""
        config, one = self.config, Ledger(reward_calls=1)
        greedy = steps if config.greedy_from is None else config.greedy_from
        for step in range(steps):
            if step < greedy and step not in self.window(steps):
                one = one + Ledger(nfe=1)
                continue
            left = steps - step - 1
            each = left if self.value is None and config.surrogate == "full" else min(left, 1)
            nfe = 0 if self.value is None and config.surrogate == "reuse" else config.simulations * each
            # greedy steps evaluate without gradient, and so does a step that has no noise to simulate with
            one = one + Ledger(max(nfe + (step >= greedy), 1), config.simulations, int(step < greedy))
        return one * config.particles

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
        if not isinstance(denoise.process, GaussianProcess):
            raise UserError(f"doit corrects Gaussian steps; {task.name!r} samples tokens: use svdd or fk-steering")
        scorer = bind(reward, task, prompts, denoise)
        chain, particles = start(task, denoise, prompts, self.config.particles, noise, index)
        move = self.corrected(chain, scorer, task.model.shape)
        rule = Unselective(best=self.config.output == "best")
        steered = search(rule, chain, particles, scorer, PosteriorMean(scorer), move=move, progress=progress)
        if not move.looks:
            return steered
        ess, missing = (torch.stack(columns) for columns in zip(*move.looks, strict=True))
        invalid = torch.zeros_like(steered.best).index_add(0, chain.group, missing.sum(0))
        invalid = invalid if steered.invalid is None else invalid + steered.invalid
        return replace(steered, components={"simulated_ess": ess.mean(0)}, invalid=invalid)

    def corrected(self, chain: Chain, reward: LatentReward, shape: tuple[int, ...]) -> "Corrected":
        """How particles of this chain move.

        Raises:
            UserError: if the window or the greedy steps do not lie on its grid, or the simulated steps have no noise.
        """
        config, steps = self.config, chain.steps
        for name in ("first", "last", "greedy_from"):
            step = getattr(config, name)
            if step is not None and step >= steps:
                raise UserError(f"{name} = {step} is no step of this sampler, which has steps 0 to {steps - 1}")
        simulator = self.simulator(chain, reward)
        noisy = noisy_steps(chain, simulator.preset, config.smallest_std, shape)
        greedy = noisy - frozenset(range(steps if config.greedy_from is None else config.greedy_from))
        return Corrected(config, simulator, (self.window(steps) & noisy & informed_steps(chain)) - greedy, greedy)

    def window(self, steps: int) -> frozenset[int]:
        """The steps that the settings have corrected, on a grid of ``steps``."""
        last = round(2 * steps / 3) if self.config.last is None else self.config.last
        return frozenset(range(self.config.first, last + 1)) if self.config.strength else frozenset()

    def simulator(self, chain: Chain, reward: LatentReward) -> Simulator:
        """What looks ahead for the particles of a chain."""
        config = self.config
        eta, reuse = config.simulate_eta, self.value is None and config.surrogate == "reuse"
        preset = chain.preset if eta is None else Preset("simulation", DDIM(eta))
        value = self.value
        if value is None and config.surrogate == "full":
            value = Rollout(reward, chain.denoise, preset, chain.grid, 1, 1.0, Apart(chain.noise, "simulate"))
        weigh = partial(
            draw_weights,
            law=config.weights,
            temperature=config.temperature,
            threshold=config.threshold or 0.0,
            floor=config.floor,
        )
        return Simulator(preset, value or PosteriorMean(reward), config.simulations, config.antithetic, reuse, weigh)


@dataclass
class Corrected:
    """The moves of one call: ``propose`` from predictions raised by the gradient of log h.

    Attributes:
        config: settings.
        simulator: looks ahead.
        window: steps that are corrected.
        greedy: steps that jump to the best simulated state.
        looks: of each step that simulated: effective number of simulations of each particle, and missing scores.
    """

    config: DOITConfig
    simulator: Simulator
    window: frozenset[int]
    greedy: frozenset[int]
    looks: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def __call__(self, chain: Chain, particles: Particles, position: int) -> tuple[Chain, Particles]:
        """The particles at grid point ``position + 1``."""
        greedy = position in self.greedy
        if not greedy and position not in self.window:
            return propose(chain, particles, position)
        rows = torch.arange(len(particles.x), device=particles.x.device)
        parts = [
            self.simulator.look(chain, take(particles, part), chain.slots[part], position, slope=not greedy)
            for part in rows.split(self.config.chunk or len(rows))
        ]
        look = join(parts)
        self.looks.append((look.ess, look.scores.isnan().sum(1)))
        particles = replace(particles, condition=look.condition, prediction=None)
        if greedy:
            return chain, replace(particles, x=look.best)
        prediction = look.prediction.tilted(self.config.strength * self._limited(look))
        return propose(chain, replace(particles, prediction=prediction), position)

    def _limited(self, look: Look) -> Float[Tensor, "particles *shape"]:
        """The gradient, no longer than the clip, and 0 where the gate is shut."""
        gradient = look.gradient
        if self.config.clip is not None:
            norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)
            gradient = gradient * expand((self.config.clip / norm).clamp(max=1), gradient)
        if self.config.gate is None:
            return gradient
        open_ = look.scores.nanmean(1) >= self.config.gate  # False where no score is known
        return torch.where(open_.reshape(-1, *[1] * (gradient.dim() - 1)), gradient, 0.0)
