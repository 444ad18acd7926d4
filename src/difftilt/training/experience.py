"""The one record from rollout to loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Scores
from difftilt.sampling.protocol import Edges
from difftilt.sampling.recording import shifted
from difftilt.trees import Batched, gathered, join, pooled, take

T = TypeVar("T")


class Gathered:
    """A field of a record that may be stored as pools (:class:`~difftilt.trees.Pooled`): it is read as their rows.

    They are gathered anew at every reading.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, record: object, owner: type) -> Any:
        return gathered(vars(record)[self.name])

    def __set__(self, record: object, value: Any) -> None:
        vars(record)[self.name] = value


def gathering(*names: str) -> Callable[[type[T]], type[T]]:
    """Decorates a dataclass some fields of which may be stored as pools."""

    def decorate(record: type[T]) -> type[T]:
        for name in names:
            setattr(record, name, Gathered(name))
        return record

    return decorate


@dataclass(frozen=True)
class PromptBatch(Batched):
    """This process's share of the prompts of one iteration, one row per sample to draw.

    Attributes:
        index: global sample index within the iteration: with seed and iteration it fixes all noise of the sample.
        group: global group index; samples of one group share their prompt.
        prompt: index into the task's prompts.
        condition: encoded, one row per sample.
    """

    index: Int[Tensor, " samples"]
    group: Int[Tensor, " samples"]
    prompt: Int[Tensor, " samples"]
    condition: Condition


@gathering("condition", "x_0", "media")
@dataclass(frozen=True)
class Experience:
    """The one record from rollout to loss: fields per sample, and ``edges`` with one row per term of a loss.

    An edge is a transition, or for forward-process methods one noise level of one sample. Offline methods load the
    same record from disk. For environments a sample is one executed action (chunk): its group is the episode.

    Attributes:
        index, group, prompt, condition: as in :class:`PromptBatch`.
        x_0: clean latents; None for methods that sample inside their loss.
        rewards, components: as in :class:`Scores`; None where the loss scores its own samples.
        edges: terms of the loss; ``edges.sample`` points to rows of this record.
        weight: importance of each sample; None means 1.
        pair: row of the other member of a preference pair, or -1.
        label: method's own target in [0, 1] or {-1, +1} (an optimality probability, membership of D+ or D-).
        media: decoded samples; the loop looks at them when they have been collected, and lets them go.
        value, terminated, truncated: environment steps only.
        extras: further trees per sample (tensors, conditions), indexed and saved with the rest.

    A sample has many edges, so the rows of a whole update must not hold a copy of what is large: ``rows(edge,
    share=True)`` leaves ``condition``, ``x_0``, ``media`` and the large trees of ``extras`` where they are, and keeps a
    pointer for each row. Reading one of the first three gathers all rows anew; :meth:`rows` gathers the few that a
    microbatch needs, :meth:`changed` leaves pointers alone, and a large tree of ``extras`` is a pool.
    """

    index: Int[Tensor, " samples"]
    group: Int[Tensor, " samples"]
    prompt: Int[Tensor, " samples"]
    condition: Condition
    x_0: Shaped[Tensor, "samples *shape"] | None
    rewards: Float[Tensor, " samples"] | None
    components: dict[str, Tensor]
    edges: Edges
    weight: Float[Tensor, " samples"] | None = None
    pair: Int[Tensor, " samples"] | None = None
    label: Float[Tensor, " samples"] | None = None
    media: Tensor | None = None
    value: Float[Tensor, " samples"] | None = None
    terminated: Tensor | None = None
    truncated: Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict[str, Any])

    def rows(self, edge: Int[Tensor, " rows"], *, share: bool = False) -> "Experience":
        """The given edges with per-sample fields repeated, so that row i of every field belongs to edge i.

        ``pair`` points to the row of the partner at the same step within the result, or is -1 if it is not there;
        ``edges.parent`` means nothing after this.

        Args:
            edge: rows of ``edges``.
            share: point to what is large (more than a number per sample) in place of copying it.
        """
        edges = take(self.edges, edge)
        stored = self._stored()
        fields = take(pooled(stored), edges.sample) if share else gathered(take(stored, edges.sample))
        if self.pair is not None:
            fields["pair"] = _partner_rows(edges, self.pair[edges.sample])
        rows = torch.arange(len(edge), device=edge.device)
        return replace(self, **fields, edges=replace(edges, sample=rows, parent=torch.full_like(rows, -1)))

    def take(self, sample: Int[Tensor, " kept"]) -> "Experience":
        """The record restricted to the given samples and their edges, with all pointers renumbered; -1 where cut."""
        place = torch.full((len(self.index),), -1, dtype=torch.int64, device=sample.device)
        place[sample] = torch.arange(len(sample), device=sample.device)
        kept = (place[self.edges.sample] >= 0).nonzero()[:, 0]
        edges = take(self.edges, kept)
        edges = replace(edges, sample=place[edges.sample])
        if edges.parent is not None:
            edge_place = torch.full_like(self.edges.sample, -1)
            edge_place[kept] = torch.arange(len(kept), device=kept.device)
            edges = replace(edges, parent=_follow(edge_place, edges.parent))
        fields = take(self._stored(), sample)
        if self.pair is not None:
            fields["pair"] = _follow(place, self.pair[sample])
        return replace(self, **fields, edges=edges)

    def changed(self, **changes: Any) -> Self:
        """The record with some fields changed; unlike ``replace``, it gathers nothing that is shared."""
        return replace(self, **(vars(self) | changes))

    def _stored(self) -> dict[str, Any]:
        """What is kept of every sample, pools as they are."""
        return {name: stored for name, stored in vars(self).items() if name != "edges"}


def scored_experience(
    batch: PromptBatch, x_0: Tensor, edges: Edges, scores: Scores | None, media: Tensor | None = None
) -> Experience:
    """The record of finished samples, not yet credited.

    Args:
        batch: what they were drawn for.
        x_0: the samples.
        edges: what a loss sums over.
        scores: None where the reward has no number for a single sample.
        media: the samples as they were scored, so that the loop need not decode them again.
    """
    return Experience(
        index=batch.index,
        group=batch.group,
        prompt=batch.prompt,
        condition=batch.condition,
        x_0=x_0,
        rewards=None if scores is None else scores.total,
        components={} if scores is None else scores.components,
        edges=edges,
        media=media,
    )


def _follow(place: Int[Tensor, " old"], pointer: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """New places of old pointers; -1 stays -1."""
    return torch.where(pointer >= 0, place[pointer.clamp(min=0)], -1)


def _partner_rows(edges: Edges, partner: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """For each row the first row that holds its partner sample at the same step, or -1."""
    if len(partner) == 0:
        return partner
    steps = int(edges.step.max()) + 1
    held, wanted = edges.sample * steps + edges.step, partner * steps + edges.step
    order = held.argsort(stable=True)
    place = torch.searchsorted(held[order], wanted).clamp(max=len(held) - 1)
    row = order[place]
    return torch.where((partner >= 0) & (held[row] == wanted), row, -1)


def join_experience(parts: Sequence[Experience]) -> Experience:
    """One record of several, with pointers shifted; all parts must fill the same fields."""
    samples, edges = 0, 0
    behind: list[Experience] = []
    for part in parts:
        moved = shifted(part.edges, samples, edges)
        pair = None if part.pair is None else torch.where(part.pair >= 0, part.pair + samples, -1)
        behind.append(replace(part, edges=moved, pair=pair))
        samples, edges = samples + len(part.index), edges + len(part.edges.step)
    return replace(behind[0], **{name: join([vars(part)[name] for part in behind]) for name in vars(behind[0])})
