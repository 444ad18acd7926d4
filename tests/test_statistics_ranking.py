"""Orders of candidates, and areas between curves, against their definitions."""

import math

import torch

from difftilt.statistics import kendall_tau, relative_increase, top_keep


def test_tau_counts_ordered_pairs() -> None:
    truth = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    predicted = torch.tensor([[10.0, 20.0, 30.0, 40.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 4.0, 3.0]])
    torch.testing.assert_close(kendall_tau(predicted, truth), torch.tensor([1.0, -1.0, 4 / 6]).double())


def test_tau_leaves_missing_rows_out_and_has_none_for_a_constant() -> None:
    predicted = torch.tensor([[3.0, math.nan, 1.0], [5.0, 5.0, 5.0]])
    truth = torch.tensor([[2.0, 0.0, 1.0], [1.0, 2.0, 3.0]])
    found = kendall_tau(predicted, truth)
    assert float(found[0]) == 1.0
    assert math.isnan(float(found[1]))


def test_top_keep_says_whether_the_best_survives_and_what_is_lost() -> None:
    truth = torch.tensor([[0.0, 1.0, 5.0, 3.0], [9.0, 1.0, 2.0, 3.0]])
    predicted = torch.tensor([[4.0, 3.0, 1.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    found = top_keep(predicted, truth, [1, 3, 4])
    assert found.accuracy.tolist() == [0.5, 0.5, 1.0]
    assert found.gap[:2].tolist() == [5.0, 2.0]  # the best kept of the first group is worth 0, then 3
    assert math.isnan(float(found.gap[2]))


def test_top_keep_of_the_truth_is_perfect_and_of_its_opposite_hopeless() -> None:
    truth = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert top_keep(truth, truth, [1, 5]).accuracy.tolist() == [1.0, 1.0]
    assert top_keep(-truth, truth, [1, 19]).accuracy.tolist() == [0.0, 0.0]


def test_relative_increase_is_exact_for_parabolas() -> None:
    """Simpson's rule is exact up to the third power: areas 1/3 and 2/3 above the baseline's first value."""
    x = torch.linspace(0, 1, 5).double()
    assert abs(relative_increase(x, 7 + 2 * x**2, 7 + x**2) - 1) < 1e-12
    assert abs(relative_increase(x, 7 + x**2, 7 + x**2)) < 1e-12
    assert math.isnan(relative_increase(x, x, torch.ones(5)))
