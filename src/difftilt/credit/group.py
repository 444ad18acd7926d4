"""Advantages by comparison inside groups: the mean of the group is the baseline, no critic is needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.statistics.folds import (
    compact,
    segment_count,
    segment_max,
    segment_mean,
    segment_min,
    segment_rank,
    segment_sum,
)

Rewards = Float[Tensor, " samples"]
Group = Int[Tensor, " samples"]

Scale = Literal["group", "global", "pooled", "none"]
"""What a centred reward is divided by: the std of its group; of the whole batch about the batch's mean; the root of
the mean squared deviation from the group means; or nothing. All but ``global`` ignore an offset per prompt."""

Aggregation = Literal["sum", "normalised", "renormalised"]
"""How several rewards meet: summed before they are normalised, after, or after and then standardised as a whole."""


def _like(result: Tensor, rewards: Tensor) -> Tensor:
    return result.to(torch.promote_types(rewards.dtype, torch.float32))


def constant_groups(rewards: Rewards, group: Group) -> Bool[Tensor, " samples"]:
    """True for the samples of a group whose rewards are all equal: it says nothing of what is better."""
    index, count = compact(group)
    return (segment_max(rewards, index, count) == segment_min(rewards, index, count))[index]


def zero_std_fraction(rewards: Rewards, group: Group) -> Float[Tensor, ""]:
    """Share of the groups whose rewards are all equal."""
    index, count = compact(group)
    return (segment_max(rewards, index, count) == segment_min(rewards, index, count)).double().mean()


def group_advantage(
    rewards: Rewards,
    group: Group,
    *,
    std: Scale = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    clip: float | None = None,
) -> Rewards:
    """(r - mean of the group) / (std + eps), 0 for a group whose rewards are all equal.

    Flow-GRPO (arXiv 2505.05470): population std of the group or of the batch, eps 1e-4. DanceGRPO (arXiv 2505.07818):
    sample std, eps 1e-8. Both clip to 5 where they use the advantage.

    Args:
        rewards: (samples,).
        group: of each sample; groups may have any size.
        std: see :data:`Scale`; ``none`` divides by nothing, eps included.
        ddof: 0 is the population std, 1 the sample std.
        eps: added to the std, in units of the reward.
        clip: bound of the absolute advantage; None leaves it.
    """
    index, count = compact(group)
    r = rewards.double()
    centred = r - segment_mean(r, index, count)[index]
    scale = _scale(r, centred, index, count, std, ddof)
    advantage = centred if scale is None else centred / (scale + eps)
    # equality, not a small std: rounding of the mean must not be amplified; a NaN equals nothing and stays
    advantage = torch.where(constant_groups(rewards, group), 0.0, advantage)
    return _like(advantage if clip is None else advantage.clamp(-clip, clip), rewards)


def _scale(r: Tensor, centred: Tensor, index: Tensor, count: int, std: Scale, ddof: int) -> Tensor | None:
    """What to divide by, one value per sample or one for all; None for nothing."""
    if std == "none":
        return None
    if std == "global":
        return ((r - r.mean()).square().sum() / max(len(r) - ddof, 1)).sqrt()
    squares = segment_sum(centred.square(), index, count)
    freedom = (segment_count(index, count) - ddof).clamp(min=0).double()
    if std == "pooled":
        return (squares.sum() / freedom.sum().clamp(min=1)).sqrt()
    return (squares / freedom.clamp(min=1)).sqrt()[index]


def leave_one_out(rewards: Rewards, group: Group) -> Rewards:
    """R minus the mean of the other rewards of its group (RLOO, arXiv 2402.14740); 0 in a group of one.

    The baseline does not depend on the sample's own reward, so the policy gradient stays unbiased.
    """
    index, count = compact(group)
    r = rewards.double()
    size = segment_count(index, count).double()[index]
    centred = r - segment_mean(r, index, count)[index]
    return _like(torch.where(constant_groups(rewards, group), 0.0, centred * size / (size - 1).clamp(min=1)), rewards)


def standardise(values: Rewards, *, ddof: int = 0, eps: float = 1e-4) -> Rewards:
    """(value - mean) / (std + eps) over all rows: the group advantage of one group."""
    return group_advantage(values, torch.zeros_like(values, dtype=torch.int64), ddof=ddof, eps=eps)


def best_worst(advantage: Rewards, group: Group, keep: int) -> Bool[Tensor, " samples"]:
    """True for the keep/2 best and keep/2 worst samples of each group (``bestofn`` of DanceGRPO).

    Groups with at most ``keep`` samples are kept whole. Equal advantages rank in order of row.

    Raises:
        ValueError: if ``keep`` is odd or not positive.
    """
    if keep < 2 or keep % 2:
        raise ValueError(f"keep={keep} must be a positive even number: half of the best, half of the worst")
    index, count = compact(group)
    size = segment_count(index, count)[index]
    rank = segment_rank(advantage, index, count)
    return (rank < keep // 2) | (rank >= size - keep // 2)


@dataclass(frozen=True)
class Normaliser:
    """The settings of :func:`group_advantage`, bound together."""

    std: Scale = "group"
    ddof: int = 0
    eps: float = 1e-4
    clip: float | None = None

    def __call__(self, rewards: Rewards, group: Group) -> Rewards:
        return group_advantage(rewards, group, std=self.std, ddof=self.ddof, eps=self.eps, clip=self.clip)


def aggregate(
    components: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Group,
    mode: Aggregation = "normalised",
    *,
    normaliser: Normaliser = Normaliser(),
) -> Rewards:
    """One advantage from several rewards.

    ``sum``: A of Σ w·r, so the reward with the widest spread rules. ``normalised``: Σ w·A(r) (DanceGRPO, MixGRPO).
    ``renormalised``: that, standardised over the whole batch (GDPO). The clip of the normaliser acts on each A.

    Raises:
        ValueError: if ``weights`` does not name exactly the components.
    """
    if set(weights) != set(components):
        raise ValueError(f"weights name {sorted(weights)}, the rewards are {sorted(components)}: name each once")
    if mode == "sum":
        return normaliser(sum_of({name: weights[name] * r for name, r in components.items()}), group)
    total = sum_of({name: weights[name] * normaliser(r, group) for name, r in components.items()})
    return total if mode == "normalised" else standardise(total, ddof=normaliser.ddof, eps=normaliser.eps)


def sum_of(columns: Mapping[str, Tensor]) -> Tensor:
    """Sum of the columns, in order of name so that the order of a mapping cannot change a bit."""
    return torch.stack([columns[name] for name in sorted(columns)]).sum(0)


def broadcast(advantage: Rewards, edges_sample: Int[Tensor, " edges"]) -> Float[Tensor, "edges 1"]:
    """The advantage of the sample that each edge belongs to, as the one column of ``Edges.advantage``."""
    return advantage[edges_sample][:, None]
