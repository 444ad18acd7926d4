"""A reward that is discounted by a quality which it does not see, to be reported beside it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from difftilt.rewards.protocol import Capabilities, Reward, Samples


@dataclass(frozen=True)
class Corrected:
    """r·(quality - floor) + constant, the evaluation score of GDRO (arXiv 2601.02036).

    A reward that is hacked at the cost of quality loses what it gains. For text rendering the paper takes as quality
    the mean of three scores of a judge, floor 3 and constant 0.2. Hand it to a task as a held-out reward.

    Attributes:
        reward: r, what is optimised; best in [0, 1].
        quality: per sample, of a judge that the reward does not shape.
        floor: quality at which the reward counts for nothing.
        constant: added to all, so that ordinary samples score near their reward.
        name: shown in reports.
    """

    reward: Reward
    quality: Reward
    floor: float = 3.0
    constant: float = 0.2
    name: str = "corrected"

    def __post_init__(self) -> None:
        if self.reward.capabilities.of_sets or self.quality.capabilities.of_sets:
            raise ValueError(
                "the corrected score is one of samples: give a reward and a quality of samples, not of sets"
            )

    @property
    def capabilities(self) -> Capabilities:
        """Differentiable if both are."""
        parts = (self.reward.capabilities, self.quality.capabilities)
        return Capabilities(differentiable=all(p.differentiable for p in parts), cost=sum(p.cost for p in parts))

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        """The product, (batch,) float32."""
        return self.reward.score(samples).float() * (self.quality.score(samples).float() - self.floor) + self.constant
