import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difftilt.sampling.noise import Noise
from difftilt.steering.selection import categorical, kept, rank_sum, top


def test_one_child_is_drawn_in_proportion_to_exp_of_its_score() -> None:
    parents, scores = 20000, torch.tensor([0.2, -0.3, 0.5, -torch.inf], dtype=torch.float64)
    uniform = Noise(0).uniform(torch.arange(parents), (4,), purpose="test")
    child = categorical(scores.expand(parents, 4), 0.4, uniform)
    law = (scores / 0.4).softmax(0)
    seen = torch.bincount(child, minlength=4).double() / parents
    assert (seen - law).abs().max() < 4 * (law * (1 - law) / parents).sqrt().max()
    assert seen[3] == 0


def test_temperature_zero_takes_the_best_child() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2], [-1.0, -torch.inf, -2.0]])
    assert categorical(scores, 0.0, torch.full((2, 3), 0.5)).tolist() == [1, 0]


def best_by_force(scores: list[float], keep: int, children: int, most: int) -> set[int]:
    """Row by row in falling order, skipping a parent that is full while others are left."""
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    taken: list[int] = []
    for row in order:
        if sum(other // children == row // children for other in taken) < most:
            taken.append(row)
    return set([*taken, *(row for row in order if row not in taken)][:keep])


@given(st.permutations(range(12)), st.integers(1, 12), st.integers(1, 5))
def test_the_best_of_all_with_a_limit_for_each_parent(scores: list[int], keep: int, most: int) -> None:
    column = torch.tensor(scores, dtype=torch.float64)
    assert top(column[None], keep)[0].tolist() == sorted(range(12), key=lambda row: -scores[row])[:keep]
    capped = top(column[None], keep, children=4, most=most)[0].tolist()
    assert set(capped) == best_by_force([float(one) for one in scores], keep, 4, most)


def test_counts_that_are_kept_round_halves_to_even() -> None:
    counts = [13]
    for fraction in (0.4, 0.4, 0.5):
        counts.append(kept(counts[-1], fraction))
    assert counts == [13, 5, 2, 1]
    assert kept(1, 0.1) == 1


def test_ranks_are_summed_whatever_the_scales() -> None:
    one = torch.tensor([[0.1, 0.5, 0.3], [2.0, 1.0, 0.0]])
    other = torch.tensor([[100.0, 0.0, 50.0], [1e-9, 3e-9, 2e-9]])
    fused = rank_sum(torch.stack([one, other]))
    assert fused.tolist() == [[2, 2, 2], [2, 3, 1]]
    for moved in (one * 7 + 3, one.exp()):
        assert torch.equal(rank_sum(torch.stack([moved, other])), fused)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_ranks_of_one_term_are_its_order(order: tuple[int, ...]) -> None:
    assert rank_sum(torch.tensor([[order]]).double())[0].tolist() == list(order)
