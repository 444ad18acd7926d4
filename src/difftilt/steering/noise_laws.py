"""Steerers that learn a law of the initial noise for every prompt: rounds of sampling and learning, then fresh samples.

What makes samples of the noise is a black box; how a law learns is the steerer's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.errors import RewardError, quoted
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.diagonal import DiagonalGaussian, radius
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.budget import Meter, metered, spend
from difftilt.steering.generator import Generator, generator_of
from difftilt.steering.learned_noise import Learned
from difftilt.steering.protocol import Progress, Steered
from difftilt.training.protocol import Task
from difftilt.trees import to_device, tree_map


class RoundsConfig(Config):
    """How much is sampled."""

    iterations: int = Field(default=150, ge=0)
    """Most rounds of sampling and learning; 0 samples from pure noise."""
    rollouts: int = Field(default=1, ge=1)
    """Samples per prompt in each of them."""
    samples: int = Field(default=4, ge=1)
    """Fresh samples per prompt at the end."""


class NoiseLearner(Protocol):
    """Laws while they learn."""

    @property
    def policy(self) -> DiagonalGaussian:
        """The laws as they are, one row per prompt."""
        ...

    def draw(self, count: int) -> Float[Tensor, "prompts draws *shape"]:
        """``count`` noises for every prompt."""
        ...

    def learn(
        self, z: Float[Tensor, "prompts draws *shape"], reward: Float[Tensor, "prompts draws"]
    ) -> dict[str, Float[Tensor, " prompts"]]:
        """One iteration on what was drawn last; a reward that is missing is NaN. Returns metrics of each prompt."""
        ...


class LearnsNoise(ABC):
    """What such a steerer shares: ``Anytime`` and ``Fitted`` of the protocol."""

    def __init__(self, rounds: RoundsConfig) -> None:
        self.rounds = rounds
        self.fitted: Learned | None = None
        self.latest: Learned | None = None

    @abstractmethod
    def learner(self, generator: Generator) -> NoiseLearner:
        """The laws of a call before they have learned."""

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
        """Fresh samples from the laws that were fitted, or else from laws that this call learns, and pays for.

        Arguments as in the protocol. What was used stays in ``latest``.

        Raises:
            UserError: if the budget has no room for the fresh samples, and one round if there is something to learn.
            RewardError: if every fresh sample of a prompt is without a reward.
        """
        generator = generator_of(task, denoise, reward, prompts, noise, index)
        before = denoise.ledger.copy()
        missing, complete = torch.zeros_like(generator.index), True
        learned = self.fitted
        if learned is None:
            learned, missing, complete = self._learn(generator, meter, progress)
        cost = generator.price(self.rounds.samples)
        if meter is not None and not meter.allows(cost, late=True):
            raise meter.too_small("the fresh samples", cost)
        self.latest = learned
        fresh = self._fresh(generator, to_device(learned.law(prompts, task.model.shape), generator.index.device))
        invalid = missing + fresh.rewards.isnan().reshape(len(prompts), -1).sum(1)
        return replace(fresh, invalid=invalid, complete=complete, ledger=denoise.ledger - before)

    def fit(
        self,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
    ) -> Mapping[str, float]:
        """Learn a law of the noise for each of these prompts; Ctrl-C ends it after its present round.

        Returns:
            The last round's numbers, averaged over the prompts, ``first_reward``, and the number of ``rounds``.
        """
        with metered(None, denoise.ledger, len(prompts)) as meter:
            generator = generator_of(task, denoise, reward, prompts, noise, None)
            self.fitted, _, _ = self._learn(generator, meter, progress)
        self.latest, history = self.fitted, self.fitted.history
        metrics = {name: float(column[-1].nanmean()) for name, column in history.items()}
        first = {"first_reward": float(history["reward"][0].nanmean())} if history else {}
        return metrics | first | {"rounds": float(max(map(len, history.values()), default=0))}

    def _learn(
        self, generator: Generator, meter: Meter | None, progress: Progress | None
    ) -> tuple[Learned, Int[Tensor, " prompts"], bool]:
        """Rounds of sampling and learning; what was learned, missing rewards, and whether the call ran its course."""
        config, learner = self.rounds, self.learner(generator)
        told: list[dict[str, Tensor]] = []
        missing = torch.zeros_like(generator.index)

        def advance(units: int) -> bool:
            for _ in range(units):
                z = learner.draw(config.rollouts)
                _, _, rewards = generator(z, f"round {len(told)}")
                missing.add_(rewards.isnan().sum(1))
                told.append(learner.learn(z, rewards))
            return True

        def cost(units: int) -> Ledger:
            return generator.price(units * config.rollouts + config.samples)  # leaves room for the fresh samples

        complete = True
        if config.iterations:
            _, complete = spend(config.iterations, 1, cost, advance, meter, progress)
        history = {name: torch.stack([one[name] for one in told]) for name in (told[0] if told else ())}
        policy = tree_map(lambda leaf: leaf.detach().clone(), learner.policy)
        return Learned(tuple(generator.reward.prompts), policy, history), missing, complete

    def _fresh(self, generator: Generator, law: DiagonalGaussian) -> Steered:
        """Samples of the laws, of one weight each; those without a reward have none."""
        size, prompts = self.rounds.samples, generator.reward.prompts
        z = law.draws(generator.index, size, generator.noise, "fresh")
        x_0, samples, rewards = generator(z, "fresh")
        known = torch.where(rewards.isnan(), -torch.inf, rewards.double())
        missing, count = rewards.isnan().sum(1), len(prompts)
        for prompt in [prompt for prompt, lost in zip(prompts, missing.tolist(), strict=True) if lost == size]:
            raise RewardError(f"all {size} fresh samples of prompt {quoted(prompt)} have no reward: mend the reward")
        return Steered(
            x_0=x_0,
            media=samples.media,
            group=samples.group,
            weight=(~rewards.isnan()).double().div(size - missing[:, None]).flatten(),
            rewards=rewards.flatten(),
            best=known.argmax(1) + torch.arange(count, device=known.device) * size,
            log_z=known.new_full((count,), torch.nan),
            ess=known.new_zeros(0, count),
            ancestors=missing.new_zeros(0, count),
            ledger=generator.denoise.ledger.copy(),
            components={"radius": radius(z.flatten(0, 1))},
        )

    def state_dict(self) -> Mapping[str, Tensor]:
        """The laws that were fitted, or else those that the latest call learned; empty before."""
        learned = self.fitted or self.latest
        return {} if learned is None else learned.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take laws back; whether they have the shape of a model is known when steering.

        Raises:
            UserError: if these are no laws of noise.
        """
        self.fitted = Learned.of_state(state) if state else None
