"""The advantage of several views on numbers small enough to work out by hand."""

import torch
from torch import Tensor

from difftilt.credit.granular import multi_view_advantage
from difftilt.credit.group import Normaliser

SAMPLE = Normaliser(ddof=1, eps=1e-8)
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


def of(*views: Tensor, clip: float | None = None) -> Tensor:
    return multi_view_advantage(
        [{"r": view.double()} for view in views], {"r": 1.0}, GROUP, normaliser=SAMPLE, clip=clip
    )


def test_every_view_is_standardised_in_its_groups_and_the_sum_is_not_divided() -> None:
    fine = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 40.0])
    coarse = torch.tensor([3.0, 2.0, 4.0, 0.0, 0.0, 0.0])
    # sample std 1 of 1, 2, 3; sqrt(300) of 10, 10, 40, whose mean is 20; a constant block gives 0
    thirds = 300**-0.5
    expected = torch.tensor([-1.0, 0.0, 1.0, -10 * thirds, -10 * thirds, 20 * thirds]).double()
    expected += torch.tensor([0.0, -1.0, 1.0, 0.0, 0.0, 0.0])
    assert torch.allclose(of(fine, coarse), expected, atol=1e-6)
    assert torch.allclose(of(fine, fine, fine), 3 * of(fine))


def test_an_offset_or_a_scale_of_one_view_changes_nothing() -> None:
    fine = torch.tensor([1.0, 5.0, 3.0, 2.0, 2.5, 7.0])
    coarse = torch.tensor([0.3, 0.1, 0.9, 0.2, 0.8, 0.4])
    assert torch.allclose(of(fine, 100 * coarse + 40), of(fine, coarse), atol=1e-6)
    # the ablation: views that are added before they are compared
    assert not torch.allclose(of(fine + 100 * coarse), of(fine + coarse), atol=0.1)


def test_the_sum_is_clipped_once_at_the_end() -> None:
    many = 30
    group = torch.zeros(many, dtype=torch.int64)
    one, other = torch.eye(many).double()[:2]
    views = [{"r": one}, {"r": other}]
    # A of the one that stands out is 29/sqrt(30) = 5.29, of all others -1/sqrt(30) = -0.18
    whole = multi_view_advantage(views, {"r": 1.0}, group, normaliser=SAMPLE)
    assert torch.allclose(whole[:2], torch.tensor(28 / 30**0.5).double())
    clipped = multi_view_advantage(views, {"r": 1.0}, group, normaliser=SAMPLE, clip=5.0)
    assert clipped[:2].tolist() == [5.0, 5.0]  # clipped before the sum they would be 4.82
    assert torch.equal(clipped[2:], whole[2:])


def test_components_are_normalised_one_by_one_and_weighted() -> None:
    wide, narrow = torch.tensor([0.0, 100.0, 50.0, 1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0, 6.0, 5.0, 4.0])
    views = [{"wide": wide.double(), "narrow": narrow.double()}]
    mixed = multi_view_advantage(views, {"wide": 1.0, "narrow": -0.5}, GROUP, normaliser=SAMPLE)
    assert torch.allclose(mixed, of(wide) - 0.5 * of(narrow))
