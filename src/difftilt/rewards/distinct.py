"""How many samples of a set are different from one another."""

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.rewards.of_sets import OfSets
from difftilt.rewards.reference import Encoder


class DistinctReward(OfSets):
    """Different samples over all samples of a set, in [0, 1]: 1 if no two are equal.

    Args:
        encoder: media -> (batch, dim) codes, equal for equal samples and different for different ones. A row of zeros
            stands for a sample that counts as none.
        pooled: whether all samples are one set.
        name: in reports.
    """

    smallest = 1

    def __init__(self, encoder: Encoder, *, pooled: bool = True, name: str = "distinct") -> None:
        super().__init__(name, encoder, pooled=pooled)

    def score_features(self, features: Float[Tensor, "batch dim"]) -> float:
        self._enough(features)
        found = torch.unique(features[(features != 0).any(1)], dim=0)
        return len(found) / len(features)
