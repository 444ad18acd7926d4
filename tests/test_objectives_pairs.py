"""Pairs within groups, and the pessimistic error of their differences."""

from itertools import combinations

import torch

from difftilt.objectives.pairs import pairs_within, pessimistic_difference_error, ranked_pairs

GROUP = torch.tensor([5, 2, 5, 9, 2, 5, 5])
REWARD = torch.tensor([1.0, 0.0, 3.0, 7.0, 2.0, 1.0, -1.0])


def test_every_unordered_pair_of_a_group_stands_once_and_none_across_groups() -> None:
    first, second = pairs_within(GROUP)
    found = sorted(tuple(sorted(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True))
    assert found == [(i, j) for i, j in combinations(range(7), 2) if GROUP[i] == GROUP[j]]


def test_ties_drop_out_and_the_better_one_stands_first() -> None:
    better, worse = ranked_pairs(REWARD, GROUP)
    found = sorted(zip(better.tolist(), worse.tolist(), strict=True))
    assert found == [(i, j) for i in range(7) for j in range(7) if GROUP[i] == GROUP[j] and REWARD[i] > REWARD[j]]
    assert (0, 5) not in found


def test_groups_without_a_pair_and_no_samples_give_no_pair() -> None:
    for group in (torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64)):
        assert [len(places) for places in ranked_pairs(torch.zeros(len(group)), group)] == [0, 0]


def test_the_error_is_zero_where_differences_match_and_the_larger_of_the_two_elsewhere() -> None:
    pairs = ranked_pairs(REWARD, GROUP)
    exact = REWARD / 0.5 + torch.where(GROUP == 5, 4.0, -7.0)
    assert float(pessimistic_difference_error(exact, exact, REWARD, pairs, 0.5).abs().max()) < 1e-9
    value = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clipped = value.clamp(-0.3, 0.3)
    error = pessimistic_difference_error(value, clipped, REWARD, pairs, 0.5)
    for place, (i, j) in enumerate(zip(*(side.tolist() for side in pairs), strict=True)):
        gap = (float(REWARD[i]) - float(REWARD[j])) / 0.5
        both = [(float(side[i]) - float(side[j]) - gap) ** 2 for side in (value, clipped)]
        assert abs(float(error[place]) - max(both)) < 1e-9


def test_a_constant_of_the_group_changes_nothing() -> None:
    pairs = ranked_pairs(REWARD, GROUP)
    value = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = REWARD + torch.where(GROUP == 5, 100.0, -30.0)
    plain = pessimistic_difference_error(value, value, REWARD, pairs, 2.0)
    assert torch.allclose(plain, pessimistic_difference_error(value, value, moved, pairs, 2.0), rtol=1e-4)
