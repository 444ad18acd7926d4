"""FIND: fine-tuning the initial noise distribution (Chen, Yang et al. 2024, arXiv 2407.19453).

A sampler that misses a prompt is often one that good initial noise would have helped. FIND takes the whole sampling run
for one action: its policy is a Gaussian over the initial noise of one prompt, with a mean and a standard deviation for
every element, which learns from the rewards of the samples alone. The generator is a black box; nothing is
differentiated but the density of the noise.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from difftilt.card import Card
from difftilt.models.ledger import Ledger
from difftilt.models.side_by_side import SideBySide
from difftilt.objectives.policy_gradient import surrogate_of_ratio
from difftilt.rewards.protocol import Reward
from difftilt.sampling.diagonal import DiagonalGaussian, radius
from difftilt.sampling.protocol import NoiseSource, Reduction
from difftilt.steering.generator import Generator, sampled_by
from difftilt.steering.noise_laws import LearnsNoise, RoundsConfig
from difftilt.steering.protocol import Lesson
from difftilt.steering.replay import Draws
from difftilt.training.protocol import Task
from difftilt.trees import take

CARD = Card(
    name="find",
    entry="FIND",
    paper="Chen, Yang et al. 2024, Fine-tuning initial noise distribution with policy optimization, arXiv 2407.19453",
    needs=("gaussian process", "per-sample reward"),
)


class FINDConfig(RoundsConfig):
    """Settings of FIND; its iterations are rounds of sampling and learning."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Of mean and standard deviation (Adam)."""
    reward_weight: float = Field(default=10.0, gt=0)
    """Of the surrogate of the reward."""
    kl_weight: float = Field(default=0.01, ge=0)
    """Of the penalty, reduced over elements as the log-density is; with the exact one the temperature is therefore
    kl_weight / reward_weight."""
    penalty: Literal["quadratic", "exact"] = "quadratic"
    """mean² + (std - 1)², which lets std fall to 0, or the KL to N(0, I), which does not."""
    penalty_from: int = Field(default=0, ge=0)
    """First iteration with a penalty."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Half-width of the trusted interval of ratios about 1."""
    clip: Literal["clamp", "pessimistic"] = "clamp"
    """The clipped ratio alone, without gradient outside the interval, or the worse of it and the plain one."""
    reference: Literal["sampling", "prior"] = "sampling"
    """Density in the denominator of a ratio: the one that drew, or N(0, I), which makes the clip a trust region."""
    reduce: Reduction = "mean"
    """Of log-density and penalty over elements; ratios of a ``sum``, the density itself, leave the interval at once."""
    policy_steps: int = Field(default=1, ge=1)
    """Updates of the policy in each iteration."""
    reused: int = Field(default=0, ge=0)
    """Earlier draws, at random, that join the newest in each update of each prompt."""
    history: int = Field(default=1000, ge=1)
    """Draws of each prompt that are remembered."""
    baseline: Literal["network", "none"] = "network"
    """What is subtracted from a reward: the expected one, learned as a function of the policy, or nothing."""
    value_learning_rate: float = Field(default=1e-4, gt=0)
    """Of that network (Adam)."""
    value_steps: int = Field(default=5, ge=1)
    """Updates of that network in each iteration."""
    value_hidden: int = Field(default=256, ge=1)
    """Its width."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Largest norm of one prompt's gradient."""
    smallest_std: float = Field(default=1e-4, gt=0)
    """Floor of the standard deviation of every element."""


class Learner:
    """The policies of a call while they learn: prompts side by side, each as if it were alone.

    Args:
        config: settings.
        shape: of one noise.
        index: global index of each prompt: keys its draws and the first weights of its baseline.
        context: what the baseline knows of each prompt beside its policy.
        noise: of the draws.
        ledger: where evaluations of the baseline are counted.
    """

    def __init__(
        self,
        config: FINDConfig,
        shape: tuple[int, ...],
        index: Int[Tensor, " prompts"],
        context: Float[Tensor, "prompts features"],
        noise: NoiseSource,
        ledger: Ledger,
    ) -> None:
        self.config, self.index, self.context, self.noise, self.ledger = config, index, context, noise, ledger
        prior = DiagonalGaussian.prior(len(index), shape, index.device)
        self.mean, self.std = nn.Parameter(prior.mean), nn.Parameter(prior.std)
        inputs = 2 * prior.mean[0].numel() + context.shape[1]
        self.value = SideBySide(inputs, config.value_hidden, index).to(index.device)
        # without weight decay AdamW is Adam: the penalty is a term of its own
        self.moves = torch.optim.Adam([self.mean, self.std], lr=config.learning_rate, fused=True)
        self.lessons = torch.optim.Adam(self.value.parameters(), lr=config.value_learning_rate, fused=True)
        self.begun = torch.zeros_like(index, dtype=torch.bool)
        self.memory: Draws | None = None
        self.iteration = 0

    @property
    def policy(self) -> DiagonalGaussian:
        """The laws as they are; gradients flow to mean and std."""
        return DiagonalGaussian(self.mean, self.std)

    @torch.no_grad()
    def draw(self, count: int) -> Float[Tensor, "prompts draws *shape"]:
        """``count`` noises for every prompt."""
        return self.policy.draws(self.index, count, self.noise, "policy", self.iteration)

    @torch.enable_grad()
    def learn(
        self, z: Float[Tensor, "prompts draws *shape"], reward: Float[Tensor, "prompts draws"]
    ) -> dict[str, Float[Tensor, " prompts"]]:
        """One iteration on what :meth:`draw` has just returned; returns metrics of each prompt.

        Args:
            z: draws.
            reward: of each; NaN is missing and teaches nothing.
        """
        newest, earlier = self._rollout(z, reward), self.memory
        told = {"reward": reward.nanmean(1), "radius": radius(z.flatten(0, 1)).reshape(reward.shape).mean(1)}
        told |= {"std": self.std.detach().flatten(1).mean(1), "baseline": self._calibrate(newest)}
        for step in range(self.config.policy_steps):
            used = newest
            if earlier is not None:
                place = self.iteration * self.config.policy_steps + step
                used = newest.beside(earlier.picked(self.config.reused, self.index, self.noise, place))
            told["clipped"] = self._improve(used, told["baseline"])
        self._remember(newest)
        self.iteration += 1
        return told | {"kl": self.policy.kl_to_prior(reduce="sum").detach()}

    @torch.no_grad()
    def _rollout(self, z: Tensor, reward: Tensor) -> Draws:
        """Draws with their rewards and the density that ratios will have in their denominator."""
        prior = DiagonalGaussian.prior(len(z), tuple(z.shape[2:]), z.device)
        reference = prior if self.config.reference == "prior" else self.policy
        first = self.iteration * z.shape[1]
        number = torch.arange(first, first + z.shape[1], device=z.device).expand(len(z), -1)
        return Draws(z, reward.float(), self._log_prob(reference, z), ~reward.isnan(), number)

    def _calibrate(self, draws: Draws) -> Float[Tensor, " prompts"]:
        """V(mean, std, e), the expected reward as it was known before these draws, which V then learns from.

        Taught first, V would follow the very draws that it judges. It begins at the mean of the first rewards that its
        prompt has; NaN before there is one.
        """
        reward = torch.where(draws.live, draws.reward, 0.0)
        if self.config.baseline == "none":
            return torch.zeros_like(reward[:, 0])
        live = draws.live.any(1)
        self.value.begin_at(_mean(reward, draws.live), live & ~self.begun)
        self.begun |= live
        state = torch.cat([self.mean.flatten(1), self.std.flatten(1), self.context], 1).detach()
        expected: list[Tensor] = []
        for _ in range(self.config.value_steps):
            expected.append(self.value(state))
            self.lessons.zero_grad()
            _mean((expected[-1][:, None] - reward).square(), draws.live).sum().backward()
            self.lessons.step()
        self.ledger.auxiliary_calls += len(reward) * self.config.value_steps
        return torch.where(self.begun, expected[0].detach(), torch.nan)

    def _improve(self, draws: Draws, baseline: Float[Tensor, " prompts"]) -> Float[Tensor, " prompts"]:
        """One step on -w·mean[A·clip(ratio)] + k·penalty, A = r - V; returns the share of draws that are clipped."""
        config, policy = self.config, self.policy
        advantage = torch.where(draws.live, draws.reward - baseline[:, None], 0.0)
        log_ratio = self._log_prob(policy, draws.z) - draws.log_prob
        surrogate = surrogate_of_ratio(
            log_ratio.flatten(), advantage.flatten(), config.clip_range, pessimistic=config.clip == "pessimistic"
        )
        loss = config.reward_weight * _mean(surrogate.value.reshape(advantage.shape), draws.live)
        if self.iteration >= config.penalty_from:
            gap = policy.kl_to_prior if config.penalty == "exact" else policy.gap_to_prior
            loss = loss + config.kl_weight * gap(reduce=config.reduce)
        self.moves.zero_grad()
        loss.sum().backward()
        self._bound_gradient()
        self.moves.step()
        with torch.no_grad():
            self.std.clamp_(min=config.smallest_std)
        return _mean(surrogate.clipped.reshape(advantage.shape).float(), draws.live)

    def _log_prob(
        self, law: DiagonalGaussian, z: Float[Tensor, "prompts draws *shape"]
    ) -> Float[Tensor, "prompts draws"]:
        rows = torch.arange(len(z), device=z.device).repeat_interleave(z.shape[1])
        return take(law, rows).log_prob(z.flatten(0, 1), reduce=self.config.reduce).reshape(z.shape[:2])

    def _bound_gradient(self) -> None:
        """Hold each prompt's gradient to its norm."""
        if self.config.max_grad_norm is None or self.mean.grad is None or self.std.grad is None:
            return
        norm = torch.cat([self.mean.grad.flatten(1), self.std.grad.flatten(1)], 1).norm(dim=1)
        factor = (self.config.max_grad_norm / norm.clamp(min=1e-30)).clamp(max=1)
        for grad in (self.mean.grad, self.std.grad):
            grad.mul_(factor.reshape(-1, *[1] * (grad.dim() - 1)))

    @torch.no_grad()
    def _remember(self, newest: Draws) -> None:
        """Keep the draws whose ratio the policies, as they now are, have left in the interval."""
        if not self.config.reused:
            return
        memory = newest if self.memory is None else self.memory.beside(newest)
        memory = memory.newest(self.config.history)
        ratio = (self._log_prob(self.policy, memory.z) - memory.log_prob).exp()
        self.memory = memory.only((ratio - 1).abs() <= self.config.clip_range)


class FIND(LearnsNoise):
    """A law of the initial noise for every prompt, learned at test time.

    Args:
        config: settings.
    """

    Config = FINDConfig

    def __init__(self, config: FINDConfig) -> None:
        super().__init__(config)
        self.config = config

    def learner(self, generator: Generator) -> Learner:
        """The policies of a call, at the prior."""
        shape, ledger = generator.task.model.shape, generator.denoise.ledger
        return Learner(self.config, shape, generator.index, generator.context(), generator.noise, ledger)

    def lesson(self, task: Task, reward: Reward) -> Lesson:
        """The reward, the sampler, which is part of the black box, and the weights that make the temperature."""
        config = self.config
        weights = {"reward_weight": config.reward_weight, "kl_weight": config.kl_weight, "penalty": config.penalty}
        return Lesson({reward.name: reward}, sampled_by(task.sampler) | weights)


def _mean(value: Float[Tensor, "prompts draws"], live: Bool[Tensor, "prompts draws"]) -> Float[Tensor, " prompts"]:
    """Mean over the live draws of each prompt; 0 where there is none."""
    return torch.where(live, value, 0.0).sum(1) / live.sum(1).clamp(min=1)
