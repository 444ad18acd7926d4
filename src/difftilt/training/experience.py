"""The one record from rollout to loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Scores
from difftilt.sampling.protocol import Edges
from difftilt.trees import Batched, join, take


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
        media: decoded samples, kept only when asked for.
        value, terminated, truncated: environment steps only.
        extras: further trees per sample (tensors, conditions), indexed and saved with the rest.
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

    def rows(self, edge: Int[Tensor, " rows"]) -> "Experience":
        """The given edges with per-sample fields repeated, so that row i of every field belongs to edge i.

        ``pair`` points to the row of the partner at the same step within the result, or is -1 if it is not there;
        ``edges.parent`` means nothing after this.
        """
        edges = take(self.edges, edge)
        fields = self._samples(edges.sample)
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
        fields = self._samples(sample)
        if self.pair is not None:
            fields["pair"] = _follow(place, self.pair[sample])
        return replace(self, **fields, edges=edges)

    def _samples(self, index: Tensor) -> dict[str, Any]:
        names = [name for name in self.__dataclass_fields__ if name != "edges"]
        return {name: take(getattr(self, name), index) for name in names}


def scored_experience(batch: PromptBatch, x_0: Tensor, edges: Edges, scores: Scores | None) -> Experience:
    """The record of finished samples, not yet credited; None where the reward has no number for a single sample."""
    return Experience(
        index=batch.index,
        group=batch.group,
        prompt=batch.prompt,
        condition=batch.condition,
        x_0=x_0,
        rewards=None if scores is None else scores.total,
        components={} if scores is None else scores.components,
        edges=edges,
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
    shifted: list[Experience] = []
    for part in parts:
        moved = replace(part.edges, sample=part.edges.sample + samples)
        if moved.parent is not None:
            moved = replace(moved, parent=torch.where(moved.parent >= 0, moved.parent + edges, -1))
        pair = None if part.pair is None else torch.where(part.pair >= 0, part.pair + samples, -1)
        shifted.append(replace(part, edges=moved, pair=pair))
        samples, edges = samples + len(part.index), edges + len(part.edges.step)
    names = list(shifted[0].__dataclass_fields__)
    return replace(shifted[0], **{name: join([getattr(part, name) for part in shifted]) for name in names})
