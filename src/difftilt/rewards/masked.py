"""A reward that may have nothing to say about some samples."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Capabilities, Reward, Samples


@dataclass(frozen=True)
class Masked:
    """The reward with NaN where it has no finite score, for callers that count such samples and never choose them.

    Steerers do; training refuses NaN. Missing is not zero, and not the lowest score of the others either.

    Attributes:
        reward: scores samples one by one.
    """

    reward: Reward

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.reward.capabilities, missing=True)

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        scores = self.reward.score(samples)
        return torch.where(scores.isfinite(), scores, torch.nan)


def parts_masked(reward: Reward) -> Reward:
    """A masked sum as the sum of its masked parts, whose scores can then be told apart; any other reward as it is."""
    if not isinstance(reward, Masked) or not isinstance(reward.reward, WeightedSum):
        return reward
    total = reward.reward
    parts = {name: parts_masked(Masked(part)) for name, part in total.rewards.items()}
    return WeightedSum(parts, total.weights, total.normalise, total.name)
