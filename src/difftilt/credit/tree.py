"""Credit on trees: leaf rewards fused upwards to every node, compared with the nodes of one depth, edges pruned.

A node is named by the edge that leads to it. Nodes of one depth stand at the ends of edges of one step.
"""

import math
from typing import Literal, assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.credit.group import best_worst, group_advantage
from difftilt.statistics.folds import (
    compact,
    segment_count,
    segment_logmeanexp,
    segment_mean,
    segment_min,
    segment_rank,
    segment_softmax,
    segment_sum,
)

Edge = Float[Tensor, " edges"]
EdgeIndex = Int[Tensor, " edges"]

Width = Literal["none", "parent_top1", "extreme"]
"""Which chains after the last split are trained: all; the best child of each last split; the best and worst leaves."""


def path_fusion(
    rewards: Float[Tensor, " leaves"],
    last_edge: Int[Tensor, " leaves"],
    parent: EdgeIndex,
    step: EdgeIndex,
    log_prob: Edge,
    beta: float = 1.0,
) -> Edge:
    """Value of the node below each edge: Σ_l w_l·r_l over its leaves, w the softmax of beta·log p(l | node).

    The path softmax of BranchGRPO (arXiv 2509.06040): log p(l | node) is the sum of the log-probabilities of the edges
    from the node to the leaf. It is computed upwards: with Z = Σ_l p(l | node)^beta, log Z(leaf) = 0 and
    log Z(node) = logsumexp over its children c of beta·log p(c) + log Z(c), whose softmax weighs the children's values.

    Args:
        rewards: of the leaves.
        last_edge: the edge that leads to each leaf, each leaf its own.
        parent: the edge before each edge on its path, -1 at the root.
        step: of each edge; a parent has an earlier one.
        log_prob: of each edge. Per dimension: with sums over many dimensions the softmax is all one leaf.
        beta: 0 is the mean of the leaves, 1 the paper's weights.
    """
    value = rewards.new_zeros(len(parent), dtype=torch.float64).index_copy(0, last_edge, rewards.double())
    log_z = torch.zeros_like(value)
    for level in step.unique().flip(0):
        rows = ((step == level) & (parent >= 0)).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        above, place = parent[rows].unique(return_inverse=True)
        weight = beta * log_prob[rows].double() + log_z[rows]
        least = segment_min(value[rows], place, len(above))
        # written around the least child, so that equal values are passed on exactly
        gain = segment_softmax(weight, place, len(above)) * (value[rows] - least[place])
        value = value.index_copy(0, above, least + segment_sum(gain, place, len(above)))
        size = segment_count(place, len(above)).double()
        log_z = log_z.index_copy(0, above, segment_logmeanexp(weight, place, len(above)) + size.log())
    return value


def depth_advantage(
    value: Edge, tree: EdgeIndex, step: EdgeIndex, *, clip: float = 5.0, least: float = 1e-6
) -> Float[Tensor, " edges"]:
    """(value - mean) / (sample std + 1e-8) among the nodes of one depth of one tree, clipped; float32.

    0 where a depth has one node, or a std below ``least`` in units of the reward (BranchGRPO, arXiv 2509.06040).
    """
    level = compact(tree * (int(step.max()) + 1) + step)[0] if len(step) else step
    count = int(level.max()) + 1 if len(step) else 0
    squares = segment_sum((value - segment_mean(value, level, count)[level]).square(), level, count)
    std = (squares / (segment_count(level, count) - 1).clamp(min=1)).sqrt()
    advantage = group_advantage(value, level, ddof=1, eps=1e-8, clip=clip)
    # a NaN is no small std and stays
    return torch.where(std[level] < least, 0.0, advantage).float()


def kept_leaves(
    rewards: Float[Tensor, " leaves"], tree: Int[Tensor, " leaves"], width: Width, *, children: int, extreme: int
) -> Bool[Tensor, " leaves"]:
    """Leaves whose chain after the last split is trained.

    Args:
        rewards: of the leaves: below the last split a node has one leaf, whose reward is its value.
        tree: of each leaf; leaves of one tree stand together, those of one last split as well.
        width: see :data:`Width`. Equal rewards: the first is the best child.
        children: leaves of one last split.
        extreme: so many best and so many worst leaves of each tree are kept.
    """
    match width:
        case "none":
            return torch.ones_like(rewards, dtype=torch.bool)
        case "parent_top1":
            split = torch.arange(len(rewards), device=rewards.device) // children
            # ranks of equal values follow the row: the first of the largest is rank 0 of the negated ones
            return segment_rank(-rewards, split, math.ceil(len(rewards) / children)) == 0
        case "extreme":
            return best_worst(rewards, tree, 2 * extreme)
        case _:
            assert_never(width)


def width_mask(
    kept: Bool[Tensor, " leaves"], sample: EdgeIndex, step: EdgeIndex, last_split: int
) -> Bool[Tensor, " edges"]:
    """True for edges up to the last split, and after it for those of the leaves that are kept.

    Args:
        kept: see :func:`kept_leaves`.
        sample: the leaf of each edge; after the last split an edge has one.
        step: of each edge.
        last_split: its step.
    """
    return (step <= last_split) | kept[sample]
