"""What rewards of sets share: a sample is encoded once, and sets of feature vectors are scored."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import UserError
from difftilt.rewards.protocol import Capabilities, Samples
from difftilt.rewards.reference import Encoder, flattened
from difftilt.statistics.states import RecomputedState, SetState

Features = Float[Tensor, "batch dim"]
Members = Int[Tensor, " members"]


class OfSets(ABC):
    """A reward of sets by features; a subclass has :meth:`score_features` and :meth:`begin`.

    Attributes:
        name: in reports.
        encoder: media -> (batch, dim).
        capabilities: ``pooled`` makes all samples of a batch or of an evaluation one set, over all processes; otherwise
            every group is a set of its own.
        smallest: fewest samples that have a score.
        dim: features of a reference, and so of a sample; None where there is no reference.
    """

    smallest: int = 2
    dim: int | None = None

    def __init__(self, name: str, encoder: Encoder = flattened, *, pooled: bool = True) -> None:
        self.name = name
        self.encoder = encoder
        self.capabilities = Capabilities(set_valued=True, pooled=pooled, features=True)

    def features(self, samples: Samples) -> Features:
        """Embedding of each sample, without gradient, on the device of the samples."""
        with torch.no_grad():
            return self.encoder(samples.media).to(samples.group.device)

    def score(self, samples: Samples) -> Float[Tensor, " groups"]:
        """The score of each group."""
        features = self.features(samples)
        groups = torch.unique(samples.group)
        scores = [self.score_features(features[samples.group == group]) for group in groups]
        return torch.tensor(scores, dtype=torch.float32, device=features.device)

    @abstractmethod
    def score_features(self, features: Features) -> float:
        """Score of the set with these embeddings."""

    def begin(self, features: Features, members: Members) -> SetState:
        """The state of a search: every set is scored anew unless a subclass knows better."""
        return RecomputedState(features, members, self.score_features)

    def _whole(self, features: Features) -> float:
        """The score of all rows, from the state that begins with them."""
        return self.begin(features, torch.arange(len(features), device=features.device)).value

    def _enough(self, features: Features) -> None:
        if len(features) < self.smallest:
            raise UserError(f"{self.name} scores sets of at least {self.smallest} samples, got {len(features)}")
