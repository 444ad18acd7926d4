"""Fusion and comparison on trees made by hand, and what pruning keeps."""

import itertools

import pytest
import torch
from torch import Tensor

from difftilt.credit.tree import depth_advantage, kept_leaves, path_fusion, width_mask

PARENT = torch.tensor([-1, 0, 0, 1, 1, 2, 2])
STEP = torch.tensor([0, 1, 1, 2, 2, 2, 2])
LOG_PROB = torch.tensor([-0.5, -1.0, -2.0, -1.0, -3.0, -1.0, -1.0], dtype=torch.float64)
LAST = torch.tensor([3, 4, 5, 6])
REWARDS = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)


def by_paths(beta: float) -> Tensor:
    """The definition itself: for every node the softmax over its leaves of the summed log-probabilities below it."""
    values: list[Tensor] = []
    for node in range(len(PARENT)):
        scores: list[Tensor] = []
        rewards: list[Tensor] = []
        for leaf, reward in zip(LAST.tolist(), REWARDS, strict=True):
            at, total = leaf, torch.zeros((), dtype=torch.float64)
            while at not in (-1, node):
                total = total + LOG_PROB[at]
                at = int(PARENT[at])
            if at == node:
                scores.append(beta * total)
                rewards.append(reward)
        values.append((torch.stack(scores).softmax(0) * torch.stack(rewards)).sum())
    return torch.stack(values)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_fusion_is_the_softmax_over_paths(beta: float) -> None:
    torch.testing.assert_close(path_fusion(REWARDS, LAST, PARENT, STEP, LOG_PROB, beta), by_paths(beta))


def test_the_tree_of_the_paper_tells_paths_from_levels() -> None:
    """Root 2.252 by paths; a softmax of each level's own edges would make it 1.894."""
    value = path_fusion(REWARDS, LAST, PARENT, STEP, LOG_PROB, 1.0)
    assert value[1:3].tolist() == pytest.approx([1.119, 4.0], abs=5e-4)
    assert float(value[0]) == pytest.approx(2.252, abs=5e-4)
    weight = LOG_PROB[1:3].softmax(0)
    assert float((weight * value[1:3]).sum()) == pytest.approx(1.894, abs=5e-4)
    assert path_fusion(REWARDS, LAST, PARENT, STEP, LOG_PROB, 0.0)[:3].tolist() == [2.75, 1.5, 4.0]


def test_equal_rewards_are_passed_on_exactly() -> None:
    value = path_fusion(torch.full((4,), 0.1), LAST, PARENT, STEP, LOG_PROB, 1.0)
    assert value.unique().tolist() == [float(torch.tensor(0.1).double())]


def test_fusion_survives_log_probabilities_of_any_size() -> None:
    value = path_fusion(REWARDS, LAST, PARENT, STEP, LOG_PROB * 1e6, 1.0)
    assert value[0] == 1.0
    assert bool(value.isfinite().all())


def test_fusion_does_not_see_the_order_of_rows_or_gaps_between_steps() -> None:
    whole = path_fusion(REWARDS, LAST, PARENT, STEP, LOG_PROB, 1.0)
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    place = order.argsort()
    parent = torch.where(PARENT[order] >= 0, place[PARENT[order].clamp(min=0)], -1)
    mixed = path_fusion(REWARDS, place[LAST], parent, STEP[order] * 3 + 1, LOG_PROB[order], 1.0)
    torch.testing.assert_close(mixed, whole[order])


def test_depths_are_compared_inside_one_tree() -> None:
    value = path_fusion(REWARDS, LAST, PARENT, STEP, LOG_PROB, 0.0)
    advantage = depth_advantage(value, torch.zeros_like(STEP), STEP)
    assert advantage[3:].tolist() == pytest.approx([-1.025, -0.439, 0.146, 1.317], abs=5e-4)
    assert advantage[1:3].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert advantage[0] == 0  # one node has nothing to be compared with
    two = depth_advantage(torch.cat([value, 100 * value]), torch.arange(2).repeat_interleave(7), STEP.repeat(2))
    torch.testing.assert_close(two, advantage.repeat(2))


def test_a_depth_without_spread_teaches_nothing_and_large_advantages_are_clipped() -> None:
    step, tree = torch.zeros(40, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)
    assert not bool(depth_advantage(torch.arange(40) * 1e-9, tree, step).any())
    spike = torch.zeros(40, dtype=torch.float64).index_fill(0, torch.tensor([7]), 1.0)
    assert float(depth_advantage(spike, tree, step).max()) == 5.0
    assert bool(depth_advantage(spike * torch.nan, tree, step).isnan().all())


def test_widths_keep_chains_of_the_better_child_or_of_the_extremes() -> None:
    rewards, tree = torch.tensor([1.0, 2, 2, 2, 0, 7, 5, 6]), torch.zeros(8, dtype=torch.int64)

    def kept(width: str, tree: Tensor = tree, extreme: int = 2) -> list[int]:
        return kept_leaves(rewards, tree, width, children=2, extreme=extreme).nonzero()[:, 0].tolist()  # type: ignore[arg-type]

    assert kept("none") == list(range(8))
    assert kept("parent_top1") == [1, 2, 5, 7]  # equal rewards: the first
    assert kept("extreme") == [0, 4, 5, 7]
    assert kept("extreme", torch.arange(2).repeat_interleave(4), 1) == [0, 3, 4, 5]


def test_width_spares_the_splits_and_what_is_before_them() -> None:
    sample, step = (torch.tensor(rows) for rows in zip(*itertools.product(range(4), range(5)), strict=True))
    kept = torch.tensor([True, False, False, True])
    mask = width_mask(kept, sample, step, last_split=2)
    assert bool(mask[step <= 2].all())
    assert torch.equal(mask[step > 2], kept[sample[step > 2]])
