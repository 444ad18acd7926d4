"""A reward of sets behind the door that samples pass: a search never meets an exception or a NaN of foreign code."""

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import RewardError
from difftilt.rewards.protocol import Capabilities, Samples, SetReward
from difftilt.rewards.scoring import blamed
from difftilt.statistics.states import SetState


@dataclass(frozen=True)
class CheckedSets:
    """The same reward; whatever it raises, and any score that is not finite, becomes a ``RewardError`` that names it.

    A NaN compares as no gain, so a search would end quietly where it should have ended with an error.

    Attributes:
        reward: of sets.
    """

    reward: SetReward

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def capabilities(self) -> Capabilities:
        return self.reward.capabilities

    @property
    def smallest(self) -> int:
        return self.reward.smallest

    def features(self, samples: Samples) -> Float[Tensor, "batch dim"]:
        return self.reward.features(samples)

    def score(self, samples: Samples) -> Float[Tensor, " groups"]:
        return self.reward.score(samples)

    def score_features(self, features: Float[Tensor, "batch dim"]) -> float:
        with blamed(self.name, len(features)):
            score = float(self.reward.score_features(features))
        return _finite(self.name, score, len(features))

    def begin(self, features: Float[Tensor, "batch dim"], members: Int[Tensor, " members"]) -> SetState:
        with blamed(self.name, len(members)):
            return _CheckedState(self.name, self.reward.begin(features, members))


@dataclass(frozen=True)
class _CheckedState:
    name: str
    state: SetState

    @property
    def members(self) -> Int[Tensor, " members"]:
        return self.state.members

    @property
    def value(self) -> float:
        with blamed(self.name, len(self.members)):
            value = float(self.state.value)
        return _finite(self.name, value, len(self.members))

    def leave_one_out(self) -> Float[Tensor, " members"]:
        with blamed(self.name, len(self.members)):
            scores = self.state.leave_one_out()
        return _all_finite(self.name, scores, len(self.members) - 1)

    def swapped(self, places: Int[Tensor, " swaps"], rows: Int[Tensor, " swaps"]) -> Float[Tensor, " swaps"]:
        with blamed(self.name, len(self.members)):
            scores = self.state.swapped(places, rows)
        return _all_finite(self.name, scores, len(self.members))

    def swap(self, place: int, row: int) -> None:
        with blamed(self.name, len(self.members)):
            self.state.swap(place, row)


def _finite(name: str, score: float, size: int) -> float:
    if math.isfinite(score):
        return score
    raise RewardError(
        f"reward {name!r} is {score} for a set of {size} samples; return a finite number, a low one for a set that "
        "cannot be judged"
    )


def _all_finite(name: str, scores: Tensor, size: int) -> Tensor:
    for bad in scores[~scores.isfinite()][:1].tolist():
        _finite(name, bad, size)
    return scores
