"""What samples and rewards are. Higher is better; a reward knows nothing of training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.process.protocol import Condition
from difftilt.rewards.prompts import metadata_of
from difftilt.statistics.states import SetState
from difftilt.trees import join, take


@dataclass(frozen=True)
class Samples:
    """All that a reward may see. For differentiable rewards tokens may come relaxed, float (batch, position, vocab).

    Attributes:
        media: decoded samples. Floats in [0, 1]: images (batch, channel, height, width), video (batch, frame, channel,
            height, width); audio (batch, channel, time) in [-1, 1]; tokens (batch, position) int64; vectors
            (batch, dim).
        prompts: the user's prompts, one per sample.
        used_prompts: prompts after rewriting; equal to ``prompts`` where nothing rewrote them.
        group: index of the group that each sample is compared in; set rewards score one group at a time.
        condition: condition media (known pixels, a goal), one row per sample, or None.
        metadata: what else is known of the prompts, one entry per sample; None where nothing is.
    """

    media: Shaped[Tensor, "batch ..."]
    prompts: Sequence[str]
    used_prompts: Sequence[str]
    group: Int[Tensor, " batch"]
    condition: Condition = None
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])

    @staticmethod
    def of(
        media: Shaped[Tensor, "batch ..."],
        prompts: Sequence[str],
        group: Int[Tensor, " batch"],
        condition: Condition = None,
    ) -> "Samples":
        """Samples of prompts that nothing rewrote, with the metadata that the prompts carry."""
        return Samples(media, prompts, prompts, group, condition, metadata_of(prompts))

    def take(self, index: Int[Tensor, " rows"]) -> "Samples":
        """Rows ``index`` of everything, prompts and metadata included."""
        rows: list[int] = index.tolist()
        return Samples(
            self.media[index],
            [self.prompts[i] for i in rows],
            [self.used_prompts[i] for i in rows],
            self.group[index],
            take(self.condition, index),
            {key: [values[i] for i in rows] for key, values in self.metadata.items()},
        )

    @staticmethod
    def join(parts: "Sequence[Samples]") -> "Samples":
        """All rows of several, in their order; metadata that a part does not have is None there."""
        if len(parts) == 1:
            return parts[0]
        return Samples(
            torch.cat([part.media for part in parts]),
            [prompt for part in parts for prompt in part.prompts],
            [prompt for part in parts for prompt in part.used_prompts],
            torch.cat([part.group for part in parts]),
            join([part.condition for part in parts]),
            _joined([(part.metadata, len(part.prompts)) for part in parts]),
        )


def _joined(parts: Sequence[tuple[Mapping[str, Sequence[Any]], int]]) -> dict[str, Sequence[Any]]:
    names = dict.fromkeys(name for columns, _ in parts for name in columns)
    return {name: [value for columns, rows in parts for value in columns.get(name, [None] * rows)] for name in names}


@dataclass(frozen=True)
class Scores:
    """Rewards of samples, float32 (batch,): the total and each component before weighting.

    For a set-valued reward every sample carries the score of the set it belongs to.
    """

    total: Float[Tensor, " samples"]
    components: dict[str, Tensor]


@dataclass(frozen=True)
class Capabilities:
    """What a reward can do, so that a method it cannot serve is refused before any work.

    Attributes:
        differentiable: gradients flow from the score to ``samples.media``.
        set_valued: scores sets, not samples: ``score`` then returns one number per group.
        mixed: a sum in which some parts score sets and others samples. Every sample has a number of its own, but what
            the sets add to it says nothing of the sample.
        pooled: all samples of a batch or of an evaluation are one set, whatever their group, over all processes; such a
            reward is a :class:`SetReward`.
        features: offers ``features(samples)`` for diversity and set statistics.
        trained: has ``update`` and ``snapshot``.
        missing: NaN says that a sample has no score; only steerers, which never choose such a sample, take that.
        background: its time passes elsewhere (a server, another process, a device of its own), so one thread may score
            samples while another draws the next ones.
        cost: rough cost of one call in network evaluations; only ranks rewards.
        tolerance: fall of its mean at which a monitor speaks, where it is only watched; None is one standard deviation
            over samples.
    """

    differentiable: bool = False
    set_valued: bool = False
    mixed: bool = False
    pooled: bool = False
    features: bool = False
    trained: bool = False
    missing: bool = False
    background: bool = False
    cost: float = 0.0
    tolerance: float | None = None

    @property
    def of_sets(self) -> bool:
        """Whether any part of it scores sets: nothing that compares single samples can use that part."""
        return self.set_valued or self.mixed


@runtime_checkable
class Reward(Protocol):
    """Scores samples. A plain function of :class:`Samples` is made one by ``rewards.as_reward``."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def score(self, samples: Samples) -> Float[Tensor, " scores"]:
        """(batch,) scores in float32; (groups,) for a set-valued reward, in order of group index."""
        ...


@runtime_checkable
class SetReward(Reward, Protocol):
    """A reward of a set, split so that a search over sets encodes every sample once."""

    @property
    def smallest(self) -> int:
        """Fewest samples that have a score."""
        ...

    def features(self, samples: Samples) -> Float[Tensor, "batch dim"]:
        """Embedding of each sample, without gradient; counts as one reward call per sample."""
        ...

    def score_features(self, features: Float[Tensor, "batch dim"]) -> float:
        """Score of the set with these embeddings; free in the ledger."""
        ...

    def begin(self, features: Float[Tensor, "batch dim"], members: Int[Tensor, " members"]) -> SetState:
        """The scores of a set of rows of a pool, of the sets without one member and of those with one exchanged."""
        ...


class TrainedReward(Reward, Protocol):
    """A reward that learns beside the model."""

    def update(self, samples: Samples) -> Mapping[str, float]:
        """Learn from the newest samples; returns metrics."""
        ...

    def snapshot(self) -> Reward:
        """A frozen copy that later updates do not touch."""
        ...
