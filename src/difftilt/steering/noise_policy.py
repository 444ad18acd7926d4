"""Learning laws of initial noise by policy gradient: several prompts side by side, each as if it were alone.

A policy is a Gaussian with a mean and a standard deviation for every element. Its log-density is the only thing that is
differentiated: what makes samples of the noise is a black box.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from difftilt.config import Config
from difftilt.models.ledger import Ledger
from difftilt.models.side_by_side import SideBySide
from difftilt.objectives.policy_gradient import Surrogate, surrogate_of_ratio
from difftilt.sampling.diagonal import DiagonalGaussian
from difftilt.sampling.noise import copies
from difftilt.sampling.protocol import NoiseSource, Reduction
from difftilt.steering.replay import Draws
from difftilt.trees import take


class PolicyConfig(Config):
    """How a law of noise learns."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Of mean and standard deviation (Adam)."""
    reward_weight: float = Field(default=10.0, gt=0)
    """Of the surrogate of the reward."""
    kl_weight: float = Field(default=0.01, ge=0)
    """Of the penalty, which is a mean over elements as the log-density is; with the exact one the temperature is
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
    """Of the log-density over elements; ``sum`` is the density itself, whose ratios leave the interval at once."""
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
    """The policies of a call while they learn.

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
        config: PolicyConfig,
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
        # Adam without weight decay: the penalty is a term of its own
        self.moves = torch.optim.AdamW([self.mean, self.std], lr=config.learning_rate, weight_decay=0.0)
        self.learns = torch.optim.AdamW(self.value.parameters(), lr=config.value_learning_rate, weight_decay=0.0)
        self.memory: Draws | None = None
        self.iteration = 0

    @property
    def policy(self) -> DiagonalGaussian:
        """The laws as they are; gradients flow to mean and std."""
        return DiagonalGaussian(self.mean, self.std)

    def draw(self, count: int) -> Float[Tensor, "prompts draws *shape"]:
        """``count`` noises for every prompt."""
        with torch.no_grad():
            return draw(self.policy, self.index, count, self.noise, "policy", self.iteration)

    @torch.enable_grad()
    def learn(
        self, z: Float[Tensor, "prompts draws *shape"], reward: Float[Tensor, "prompts draws"]
    ) -> dict[str, Float[Tensor, " prompts"]]:
        """One iteration on what :meth:`draw` has just returned; returns metrics of each prompt.

        Args:
            z: draws.
            reward: of each; NaN is missing and teaches nothing.
        """
        with torch.no_grad():
            law = self.policy
            if self.config.reference == "prior":
                law = DiagonalGaussian.prior(len(z), tuple(z.shape[2:]), z.device)
            first = self.iteration * z.shape[1]
            number = torch.arange(first, first + z.shape[1], device=z.device).expand(len(z), -1)
            newest = Draws(z, reward.float(), self._log_prob(law, z), ~reward.isnan(), number)
            earlier = self.memory
            before = {"radius": self._radius(z), "std": self.std.flatten(1).mean(1)}
        baseline, clipped = self._baseline(newest), z.new_zeros(len(z))
        for step in range(self.config.policy_steps):
            used = newest
            if earlier is not None:
                place = self.iteration * self.config.policy_steps + step
                used = newest.beside(earlier.picked(self.config.reused, self.index, self.noise, place))
            clipped = self._update(used, baseline)
        self._remember(newest)
        self.iteration += 1
        kl = self.policy.kl_to_prior(reduce="sum").detach()
        return {"reward": reward.nanmean(1), **before, "baseline": baseline, "clipped": clipped, "kl": kl}

    def _baseline(self, draws: Draws) -> Float[Tensor, " prompts"]:
        """The expected reward as it was known before these draws, which the network then learns from.

        Learning from a draw before its own advantage is taken would make the advantage depend on the draw.
        """
        if self.config.baseline == "none":
            return draws.reward.new_zeros(len(draws.reward))
        reward = torch.where(draws.live, draws.reward, 0.0)
        if self.iteration == 0:
            self.value.begin_at(reward.sum(1) / draws.live.sum(1).clamp(min=1))
        state = torch.cat([self.mean.flatten(1), self.std.flatten(1), self.context], 1).detach()
        known = self.value(state).detach()
        for _ in range(self.config.value_steps):
            error = (self.value(state)[:, None] - reward).square()
            self._step(self.learns, _mean(error, draws.live).sum())
        self.ledger.auxiliary_calls += len(reward) * (1 + self.config.value_steps)
        return known

    def _update(self, draws: Draws, baseline: Float[Tensor, " prompts"]) -> Float[Tensor, " prompts"]:
        """One step of the policies; returns the share of draws outside the interval."""
        config = self.config
        advantage = torch.where(draws.live, draws.reward - baseline[:, None], 0.0)
        surrogate = self._surrogate(draws, advantage)
        loss = config.reward_weight * _mean(surrogate.value.reshape(advantage.shape), draws.live)
        if self.iteration >= config.penalty_from:
            policy = self.policy
            gap = policy.kl_to_prior if config.penalty == "exact" else policy.gap_to_prior
            loss = loss + config.kl_weight * gap(reduce="mean")
        self._step(self.moves, loss.sum(), self._clip)
        with torch.no_grad():
            self.std.clamp_(min=config.smallest_std)
        return _mean(surrogate.clipped.reshape(advantage.shape).float(), draws.live)

    def _surrogate(self, draws: Draws, advantage: Float[Tensor, "prompts draws"]) -> Surrogate:
        log_ratio = self._log_prob(self.policy, draws.z) - draws.log_prob
        config = self.config
        return surrogate_of_ratio(
            log_ratio.flatten(), advantage.flatten(), config.clip_range, config.clip == "pessimistic"
        )

    def _log_prob(
        self, law: DiagonalGaussian, z: Float[Tensor, "prompts draws *shape"]
    ) -> Float[Tensor, "prompts draws"]:
        rows = torch.arange(len(z), device=z.device).repeat_interleave(z.shape[1])
        return take(law, rows).log_prob(z.flatten(0, 1), reduce=self.config.reduce).reshape(z.shape[:2])

    def _clip(self) -> None:
        """Hold each prompt's gradient to its norm."""
        if self.config.max_grad_norm is None or self.mean.grad is None or self.std.grad is None:
            return
        both = torch.cat([self.mean.grad.flatten(1), self.std.grad.flatten(1)], 1)
        factor = (self.config.max_grad_norm / both.norm(dim=1).clamp(min=1e-30)).clamp(max=1)
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

    def _radius(self, z: Float[Tensor, "prompts draws *shape"]) -> Float[Tensor, " prompts"]:
        return radius(z.flatten(0, 1)).reshape(z.shape[:2]).mean(1)

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor, before: Callable[[], None] | None = None) -> None:
        optimizer.zero_grad()
        loss.backward()
        if before is not None:
            before()
        optimizer.step()


def _mean(value: Float[Tensor, "prompts draws"], live: Bool[Tensor, "prompts draws"]) -> Float[Tensor, " prompts"]:
    """Mean over the live draws of each prompt; 0 where there is none."""
    return torch.where(live, value, 0.0).sum(1) / live.sum(1).clamp(min=1)


def radius(z: Float[Tensor, "rows *shape"]) -> Float[Tensor, " rows"]:
    """|z|/sqrt(elements), 1 ± 1/sqrt(2·elements) under N(0, I): far from 1 no generator has seen such noise."""
    return z.flatten(1).norm(dim=1) / z[0].numel() ** 0.5


def draw(
    policy: DiagonalGaussian,
    index: Int[Tensor, " prompts"],
    count: int,
    noise: NoiseSource,
    purpose: str,
    step: int = 0,
) -> Float[Tensor, "prompts draws *shape"]:
    """``count`` draws of every law; draw j of the prompt with index i has the noise index i·count + j."""
    rows, numbers = copies(index, count)
    normal = noise.normal(numbers, tuple(policy.mean.shape[1:]), purpose=purpose, step=step)
    return take(policy, rows).draw(normal).unflatten(0, (len(index), count))
