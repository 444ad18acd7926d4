"""Between instance and set: an instance reward as a reward of sets, and a distance to a set as an instance reward."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.errors import UserError
from difftilt.rewards.of_sets import Features, Members, OfSets
from difftilt.rewards.protocol import Capabilities, Reward, Samples, SetReward
from difftilt.rewards.reference import ReferenceSet, refuse_singular, same_space
from difftilt.statistics.moments import FrechetReference, SetMoments, Spread
from difftilt.statistics.states import MeanState, SetState


class MeanReward(OfSets):
    """An instance reward as a reward of sets: the mean over the samples, whose one feature is their own score."""

    smallest = 1

    def __init__(self, reward: Reward, *, pooled: bool = True) -> None:
        super().__init__(reward.name, pooled=pooled)
        self.reward = reward

    def features(self, samples: Samples) -> Features:
        """(batch, 1): the score of each sample."""
        with torch.no_grad():
            return self.reward.score(samples)[:, None]

    def score_features(self, features: Features) -> float:
        return float(features.double().mean())

    def begin(self, features: Features, members: Members) -> SetState:
        return MeanState(features.double()[:, 0], members)


@dataclass(frozen=True)
class FrechetPerSample:
    """Minus the Fréchet distance of the windows of one sample to a reference: an instance reward from a distribution.

    Attributes:
        reference: what the windows should look like.
        windows: media -> (batch, frames, dim), the embeddings of the windows of each sample.
        spread, shrinkage: as in :class:`FrechetReward`; a sample has few windows.
        name: in reports.
    """

    reference: ReferenceSet
    windows: Callable[[Tensor], Tensor]
    spread: Spread = "full"
    shrinkage: float = 0.0
    name: str = "frechet_per_sample"
    capabilities: Capabilities = field(default_factory=Capabilities)
    _target: FrechetReference = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_target", self.reference.frechet(self.spread, self.shrinkage))

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        with torch.no_grad():
            windows = self.windows(samples.media)
        if windows.dim() != 3:
            raise UserError(f"{self.name}: windows must be (batch, frames, dim), not {tuple(windows.shape)}")
        same_space(self.name, windows, len(self._target.mean))
        refuse_singular("sample of windows", windows.shape[1], windows.shape[2], self.spread, self.shrinkage)
        scores = [-self._target.distance(SetMoments.of(frames)) for frames in windows]
        return torch.tensor(scores, dtype=torch.float32, device=windows.device)


def as_set(reward: Reward) -> SetReward:
    """The reward if it scores sets by features, else the mean of an instance reward.

    Raises:
        UserError: for a reward of sets without features, a sum in which only some parts score sets, or a reward of each
            group apart.
    """
    if not reward.capabilities.of_sets:
        return MeanReward(reward)
    if reward.capabilities.mixed:
        raise UserError(
            f"reward {reward.name!r} adds scores of samples to scores of sets, of which a search would see only one: "
            "use one member of the sum"
        )
    if reward.capabilities.features and isinstance(reward, SetReward):
        if reward.capabilities.pooled:
            return reward
        raise UserError(
            f"reward {reward.name!r} makes each group a set (pooled false), and a search makes sets across groups: set "
            "pooled to true"
        )
    raise UserError(
        f"reward {reward.name!r} scores sets but has no features to search them by: give it features, score_features "
        "and begin (rewards.SetReward), or use one member of the sum"
    )
