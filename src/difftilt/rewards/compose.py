"""Weighted sums of rewards, each brought to a common scale first where asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.rewards.protocol import Capabilities, Reward, Samples
from difftilt.statistics.folds import compact, segment_mean

Normalisation = Literal["group", "batch", "running"]
"""Mean and std that a component is standardised by: of its group, of the batch, or of all scores observed so far."""

EPS = 1e-6
"""Added to every std, in units of the reward."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of all scores observed."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def push(self, scores: Float[Tensor, " scores"]) -> "Moments":
        """The moments with a batch added (Chan et al. 1979)."""
        if len(scores) == 0:
            return self
        batch = scores.detach().double()
        mean = batch.mean().item()
        count = self.count + len(batch)
        gap = mean - self.mean
        squares = self.squares + (batch - mean).square().sum().item() + gap**2 * self.count * len(batch) / count
        return Moments(count, self.mean + gap * len(batch) / count, squares)

    @property
    def std(self) -> float:
        """Population std; 0 before two scores were observed."""
        return (self.squares / self.count) ** 0.5 if self.count else 0.0


class WeightedSum:
    """Σ weight·reward, with every reward standardised first if ``normalise`` says so.

    ``evaluate`` reports each component as it came, before normalisation and weight. Statistics carry no gradient, so
    a gradient has the direction of the weighted rewards. With ``batch`` the statistics are those of the rows at hand:
    hand ``combine`` the rows of all processes. With ``running`` the sum is a trained reward: scoring changes nothing,
    ``update`` (or ``observe``) moves the statistics, and before the first one those of the batch stand in.

    Attributes:
        name: shown in reports.
        rewards: component name -> reward.
        weights: component name -> weight.
        normalise: None sums the scores as they are.
        moments: component name -> what ``running`` has observed.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        normalise: Normalisation | None = None,
        name: str = "weighted_sum",
    ) -> None:
        if not rewards or set(rewards) != set(weights):
            raise ValueError(f"weights name {sorted(weights)}, the rewards are {sorted(rewards)}: name each once")
        sets = [reward.capabilities.set_valued for reward in rewards.values()]
        if normalise == "group" and any(sets):
            raise ValueError("a set-valued reward has one score per group, so its group has no std: use batch")
        self.name = name
        self.rewards = dict(rewards)
        self.weights = {key: float(weights[key]) for key in rewards}
        self.normalise: Normalisation | None = normalise
        self.moments = {key: Moments() for key in rewards}

    @property
    def capabilities(self) -> Capabilities:
        """Differentiable if all are; set-valued only if all are, and mixed if some are."""
        parts = [reward.capabilities for reward in self.rewards.values()]
        return Capabilities(
            differentiable=all(part.differentiable for part in parts),
            set_valued=all(part.set_valued for part in parts),
            mixed=any(part.of_sets for part in parts) and not all(part.set_valued for part in parts),
            pooled=all(part.pooled for part in parts),
            trained=self.normalise == "running",
            missing=any(part.missing for part in parts),
            background=any(part.background for part in parts),
            cost=sum(part.cost for part in parts),
        )

    def score(self, samples: Samples) -> Float[Tensor, " scores"]:
        """The sum; (groups,) if every reward is set-valued, else (batch,)."""
        raw = {key: reward.score(samples) for key, reward in self.rewards.items()}
        if self.capabilities.set_valued:
            return self.combine(raw, torch.unique(samples.group))
        spread = {key: self._per_sample(key, scores, samples.group) for key, scores in raw.items()}
        return self.combine(spread, samples.group)

    def _per_sample(self, key: str, scores: Tensor, group: Tensor) -> Tensor:
        return to_members(scores, group) if self.rewards[key].capabilities.set_valued else scores

    def combine(self, components: Mapping[str, Tensor], group: Int[Tensor, " scores"]) -> Float[Tensor, " scores"]:
        """The sum of given scores, one row per score; a pure function of its arguments and the moments."""
        parts = [self.weights[key] * self._scaled(key, components[key], group) for key in self.rewards]
        return torch.stack(parts).sum(0)

    def _scaled(self, key: str, scores: Float[Tensor, " scores"], group: Tensor) -> Float[Tensor, " scores"]:
        if self.normalise is None:
            return scores
        moments = self.moments[key]
        if self.normalise == "running" and moments.count > 0:
            return standardised(scores, moments.mean, moments.std)
        index = compact(group if self.normalise == "group" else torch.zeros_like(group))[0]
        held = scores.detach().double()
        count = int(index.max()) + 1
        mean = segment_mean(held, index, count)[index]
        return standardised(scores, mean, segment_mean((held - mean).square(), index, count)[index].sqrt())

    def observe(self, components: Mapping[str, Tensor]) -> None:
        """Add scores to the running statistics: those of all processes, in one order, once per iteration."""
        self.moments = {key: moments.push(components[key]) for key, moments in self.moments.items()}

    def update(self, samples: Samples) -> dict[str, float]:
        """Score every component and observe; returns the running mean and std of each."""
        self.observe({key: reward.score(samples) for key, reward in self.rewards.items()})
        means = {f"{key}/mean": moments.mean for key, moments in self.moments.items()}
        return means | {f"{key}/std": moments.std for key, moments in self.moments.items()}

    def snapshot(self) -> "WeightedSum":
        """A copy whose statistics later updates do not touch."""
        copy = WeightedSum(self.rewards, self.weights, self.normalise, self.name)
        copy.moments = dict(self.moments)
        return copy

    def state_dict(self) -> dict[str, Tensor]:
        """Component -> (count, mean, squared deviations), float64."""
        rows = {key: [m.count, m.mean, m.squares] for key, m in self.moments.items()}
        return {key: torch.tensor(row, dtype=torch.float64) for key, row in rows.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        if set(state) != set(self.moments):
            raise ValueError(f"the state is of rewards {sorted(state)}, these are {sorted(self.moments)}")
        self.moments = {key: Moments(*state[key].tolist()) for key in self.moments}


def standardised(scores: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """(score - mean) / (std + EPS) in float64, back in the dtype of the scores; equal scores give about 0."""
    return ((scores.double() - mean) / (std + EPS)).to(scores)


def to_members(scores: Float[Tensor, " groups"], group: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The score of each sample's set; scores stand in ascending order of group index."""
    return scores[compact(group)[0]]
