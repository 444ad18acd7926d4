"""FIND: fine-tuning the initial noise distribution (Chen, Yang et al. 2024, arXiv 2407.19453).

A sampler that misses a prompt is often one that good initial noise would have helped. FIND takes the whole sampling run
for one action: its policy is a Gaussian over the initial noise, one per prompt, which learns from the rewards of the
samples alone. The generator is a black box; nothing is differentiated but the density of the noise.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.errors import RewardError, UserError
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.diagonal import DiagonalGaussian
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.budget import Meter, spend
from difftilt.steering.generator import Generator, generator_of
from difftilt.steering.noise_policy import Learner, PolicyConfig, draw, radius
from difftilt.steering.protocol import Progress, Steered
from difftilt.training.protocol import Task
from difftilt.trees import take, tree_map

CARD = Card(
    name="find",
    entry="FIND",
    paper="Chen, Yang et al. 2024, Fine-tuning initial noise distribution with policy optimization, arXiv 2407.19453",
    needs=("gaussian process", "per-sample reward"),
)


class FINDConfig(PolicyConfig):
    """Settings of FIND."""

    iterations: int = Field(default=150, ge=0)
    """Most rounds of sampling and learning; 0 samples from pure noise."""
    rollouts: int = Field(default=1, ge=1)
    """Samples per prompt in each of them."""
    samples: int = Field(default=4, ge=1)
    """Fresh samples per prompt at the end."""


@dataclass(frozen=True)
class Learned:
    """What was learned: the artefact.

    Attributes:
        prompts: whose laws they are.
        policy: of the initial noise of each, unscaled: the prior is N(0, I).
        history: name -> (iterations, prompts): ``reward``, the mean of an iteration's samples; ``radius``, |z|/sqrt(D);
            ``std``, ``baseline``, ``clipped``, ``kl`` (nats to the prior).
    """

    prompts: tuple[str, ...]
    policy: DiagonalGaussian
    history: dict[str, Tensor]

    def rows(self, prompts: Sequence[str]) -> Int[Tensor, " prompts"]:
        """Where the laws of these prompts stand; repeated prompts take turns among equal ones.

        Raises:
            UserError: for a prompt that nothing was learned of.
        """
        found: list[int] = []
        for place, prompt in enumerate(prompts):
            mine = [row for row, known in enumerate(self.prompts) if known == prompt]
            if not mine:
                raise UserError(f"no noise was learned for the prompt {prompt!r}: fit it, or steer without a fit")
            found.append(mine[prompts[:place].count(prompt) % len(mine)])
        return torch.tensor(found)


class FIND:
    """A law of the initial noise for every prompt, learned at test time.

    Args:
        config: settings.
    """

    Config = FINDConfig

    def __init__(self, config: FINDConfig) -> None:
        self.config = config
        self.fitted: Learned | None = None
        self.latest: Learned | None = None

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
            UserError: if the budget has no room for one round and the fresh samples.
            RewardError: if every fresh sample of a prompt is without a reward.
        """
        before = denoise.ledger.copy()
        generator = generator_of(task, denoise, reward, prompts, noise, index)
        if self.fitted is None:
            learned, invalid, complete = self._learn(generator, meter, progress)
            law = learned.policy
        else:
            learned, invalid, complete = self.fitted, torch.zeros_like(generator.index), True
            law = take(learned.policy, learned.rows(prompts))
        self.latest = learned
        if law.mean.shape[1:] != task.model.shape:
            shapes = f"{tuple(law.mean.shape[1:])}, and {task.name!r} starts from {tuple(task.model.shape)}"
            raise UserError(f"the noise that was fitted has the shape {shapes}: fit it for this model")
        z = draw(law, generator.index, self.config.samples, noise, "fresh")
        x_0, samples, rewards = generator(z, "fresh")
        known = torch.where(rewards.isnan(), -torch.inf, rewards.double())
        lost = (known == -torch.inf).all(1)
        invalid = invalid + rewards.isnan().sum(1)
        if bool(lost.any()):
            raise RewardError(
                f"all {self.config.samples} fresh samples of prompt {prompts[int(lost.int().argmax())]!r} have no "
                f"reward ({int(invalid.sum())} were missing in this call): mend the reward"
            )
        count = len(prompts)
        return Steered(
            x_0=x_0,
            media=samples.media,
            group=samples.group,
            weight=torch.full_like(known.flatten(), 1 / self.config.samples),
            rewards=rewards.flatten(),
            best=known.argmax(1) + torch.arange(count, device=known.device) * self.config.samples,
            log_z=known.new_full((count,), torch.nan),
            ess=known.new_zeros(0, count),
            ancestors=invalid.new_zeros(0, count),
            ledger=denoise.ledger - before,
            components={"radius": radius(z.flatten(0, 1))},
            invalid=invalid,
            complete=complete,
        )

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
        """Learn a law of the noise for each of these prompts, and keep it for :meth:`steer`.

        Returns:
            The last iteration's numbers, averaged over the prompts, and ``first_reward``.
        """
        generator = generator_of(task, denoise, reward, prompts, noise, None)
        self.fitted, _, _ = self._learn(generator, None, progress)
        self.latest = self.fitted
        metrics = {name: float(column[-1].nanmean()) for name, column in self.fitted.history.items() if len(column)}
        return metrics | {
            f"first_{name}": float(self.fitted.history[name][0].nanmean()) for name in ["reward"] if metrics
        }

    def _learn(
        self, generator: Generator, meter: Meter | None, progress: Progress | None
    ) -> tuple[Learned, Int[Tensor, " prompts"], bool]:
        """Rounds of sampling and learning; what was learned, missing rewards, and whether the call ran its course."""
        config, task = self.config, generator.task
        learner = Learner(
            config, task.model.shape, generator.index, generator.context(), generator.noise, generator.denoise.ledger
        )
        rounds: list[dict[str, Tensor]] = []
        missing = torch.zeros_like(generator.index)

        def advance(units: int) -> bool:
            for _ in range(units):
                z = learner.draw(config.rollouts)
                _, _, rewards = generator(z, f"round {len(rounds)}")
                missing.add_(rewards.isnan().sum(1))
                rounds.append(learner.learn(z, rewards))
            return True

        complete = True
        if config.iterations:  # the price of a round leaves room for the fresh samples
            cost = lambda units: generator.price(units * config.rollouts + config.samples)  # noqa: E731
            _, complete = spend(config.iterations, 1, cost, advance, meter, progress)
        history = {name: torch.stack([one[name] for one in rounds]) for name in (rounds[0] if rounds else ())}
        policy = tree_map(Tensor.detach, learner.policy)
        return Learned(tuple(generator.reward.prompts), policy, history), missing, complete

    def state_dict(self) -> Mapping[str, Tensor]:
        """The laws that were fitted, or else those that the latest call learned; empty before."""
        learned = self.fitted or self.latest
        if learned is None:
            return {}
        text = torch.frombuffer(bytearray(json.dumps(learned.prompts).encode()), dtype=torch.uint8)
        history = {f"history/{name}": column for name, column in learned.history.items()}
        return {"mean": learned.policy.mean, "std": learned.policy.std, "prompts": text, **history}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take laws back; whether they have the shape of a model is known when steering.

        Raises:
            UserError: if these are no laws of noise.
        """
        absent = [name for name in ("mean", "std", "prompts") if name not in state]
        if absent:
            raise UserError(f"this is no fitted noise: {', '.join(absent)} is missing")
        prompts = tuple(json.loads(bytes(state["prompts"].cpu().tolist()).decode()))
        history = {name.removeprefix("history/"): leaf for name, leaf in state.items() if name.startswith("history/")}
        self.fitted = Learned(prompts, DiagonalGaussian(state["mean"], state["std"]), history)
