"""Win rates, quantile gate, adaptive share and the bonus for being unlike, on hand-made numbers."""

import pytest
import torch
from torch import Tensor

from difftilt.credit.diversity import favour_unlike, nearest_distance
from difftilt.credit.uncertainty import Fraction, mean_doubt, scope_of, suspects, uncertainty, wins

ONE = torch.zeros(4, dtype=torch.int64)


def test_the_sample_that_only_the_proxy_likes_is_most_doubtful_and_the_only_suspect() -> None:
    proxy = torch.tensor([3.0, 2.0, 1.0, 0.0])
    auxiliary = torch.tensor([[0.0, 0.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    doubt = uncertainty(proxy, auxiliary, ONE)
    assert doubt.tolist() == [0.75, -0.25, -0.25, -0.25]
    assert suspects(doubt, ONE, 0.25).tolist() == [True, False, False, False]


def test_monotone_transforms_of_any_reward_change_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, auxiliary = torch.randn(40, generator=generator), torch.randn(40, 3, generator=generator)
    scope = torch.zeros(40, dtype=torch.int64)
    plain = uncertainty(proxy, auxiliary, scope)
    assert torch.equal(uncertainty(proxy.exp(), auxiliary, scope), plain)
    assert torch.equal(uncertainty(proxy, auxiliary**3, scope), plain)
    assert not torch.equal(uncertainty(-proxy, auxiliary, scope), plain)


def test_ties_are_nobodys_win() -> None:
    assert wins(torch.tensor([1.0, 1.0, 0.0, 1.0]), ONE).tolist() == [1, 1, 0, 1]
    flat = uncertainty(torch.ones(4), torch.tensor([[0.0], [1.0], [2.0], [3.0]]), ONE)
    assert flat.tolist() == [0.0, -0.25, -0.5, -0.75]
    assert not bool(suspects(torch.zeros(4), ONE, 0.5).any())


def test_groups_as_scopes_are_ranked_and_gated_apart() -> None:
    group = torch.tensor([7, 3, 7, 3, 7, 3, 7, 3])
    proxy = torch.tensor([3.0, 30.0, 2.0, 20.0, 1.0, 10.0, 0.0, 0.0])
    scope = scope_of(group, whole_batch=False)
    assert wins(proxy, scope).tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    assert wins(proxy, scope_of(group, whole_batch=True)).tolist() == [4, 7, 3, 6, 2, 5, 0, 0]
    auxiliary = torch.tensor([0.0, 0, 3, 1, 2, 2, 1, 3])[:, None]
    doubt = uncertainty(proxy, auxiliary, scope)
    assert suspects(doubt, scope, 0.25).nonzero()[:, 0].tolist() == [0, 1]
    assert suspects(doubt[group == 7], scope[group == 7], 0.25).tolist() == [True, False, False, False]


def test_the_quantile_of_the_released_code_singles_out_about_half_as_many() -> None:
    doubt = torch.linspace(-1, 1, 41, dtype=torch.float64)
    scope = torch.zeros(41, dtype=torch.int64)
    counts = [int(suspects(doubt, scope, 0.2, positive_only=half).sum()) for half in (False, True)]
    assert counts == [8, 4]


def test_the_share_follows_the_window() -> None:
    fraction, seen = Fraction(), []
    for doubt in (1.0, 2.0, 3.0, 0.5, 1.5):
        fraction = fraction.after(doubt)
        seen.append(fraction.value)
    assert seen == pytest.approx([0.1, 0.11, 0.121, 0.1089, 0.1089])
    assert fraction.after(None) == fraction


def test_the_share_is_bounded_and_the_window_forgets() -> None:
    fraction = Fraction()
    for doubt in range(30):
        fraction = fraction.after(float(doubt))
    assert fraction.value == 0.2
    assert fraction.seen == tuple(float(doubt) for doubt in range(10, 30))
    for doubt in range(60):
        fraction = fraction.after(-float(doubt))
    assert fraction.value == 0.02
    # nine is within the twenty newest here, but not if the window forgot at once
    assert Fraction(seen=(0.0, 9.0)).after(5.0).value == 0.1


def test_without_ties_all_doubts_average_to_nothing_and_the_positive_ones_do_not() -> None:
    generator = torch.Generator().manual_seed(1)
    doubt = uncertainty(
        torch.randn(50, generator=generator), torch.randn(50, 2, generator=generator), torch.zeros(50).long()
    )
    assert float(doubt.mean()) == pytest.approx(0, abs=1e-12)
    assert (mean_doubt(doubt) or 0) > 0.05
    assert mean_doubt(torch.tensor([-0.5, -0.1])) is None


def outlier() -> Tensor:
    return torch.tensor([[1.0, 0], [2, 0], [3, 0], [0.1, 0], [0, 7]])


def test_only_the_outlier_keeps_weight_and_its_normalised_factor_is_the_size_of_the_group() -> None:
    group = torch.zeros(5, dtype=torch.int64)
    distance = nearest_distance(outlier(), group)
    assert distance.tolist() == pytest.approx([0, 0, 0, 0, 1])
    assert favour_unlike(torch.ones(5), distance, group, normalise=False).tolist() == pytest.approx([0, 0, 0, 0, 1])
    assert favour_unlike(torch.ones(5), distance, group).tolist() == pytest.approx([0, 0, 0, 0, 5])


def test_a_bad_sample_gains_nothing_from_being_different() -> None:
    group = torch.zeros(5, dtype=torch.int64)
    advantage = torch.tensor([1.0, 0.5, 0.0, 0.5, -2.0])
    shaped = favour_unlike(advantage, nearest_distance(outlier(), group), group)
    assert shaped.tolist() == [0.0, 0.0, 0.0, 0.0, -2.0]


def test_neighbours_are_looked_for_in_the_own_group_only() -> None:
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert nearest_distance(features, torch.tensor([0, 1, 0, 1])).tolist() == pytest.approx([1, 1, 1, 1])
    assert nearest_distance(features, torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 0, 0]


def test_a_group_of_equal_samples_keeps_its_advantages() -> None:
    group = torch.zeros(3, dtype=torch.int64)
    features = torch.full((3, 4), 0.3)
    advantage = torch.tensor([1.0, -1.0, 0.0])
    assert torch.equal(favour_unlike(advantage, nearest_distance(features, group), group), advantage)
