import pytest
import torch
from torch import Tensor

from difftilt.statistics import (
    compact,
    group_diversity,
    mean_group_diversity,
    segment_logmeanexp,
    segment_max,
    segment_mean,
    segment_min,
    segment_rank,
    segment_softmax,
    segment_sum,
)

INDEX = torch.tensor([2, 0, -1, 2, 0, 2])
VALUES = torch.tensor([1.0, -3.0, 100.0, 4.0, 0.5, -2.0], dtype=torch.float64)


def rows_of(segment: int) -> Tensor:
    return VALUES[segment == INDEX]


@pytest.mark.parametrize("segment", [0, 2])
def test_segments_equal_loops(segment: int) -> None:
    mine = rows_of(segment)
    assert segment_sum(VALUES, INDEX, 3)[segment] == mine.sum()
    assert segment_mean(VALUES, INDEX, 3)[segment] == mine.mean()
    assert segment_max(VALUES, INDEX, 3)[segment] == mine.max()
    assert segment_min(VALUES, INDEX, 3)[segment] == mine.min()
    torch.testing.assert_close(segment_softmax(VALUES, INDEX, 3)[segment == INDEX], mine.softmax(0))
    torch.testing.assert_close(segment_logmeanexp(VALUES, INDEX, 3)[segment], mine.exp().mean().log())


def test_rows_without_segment_and_empty_segments() -> None:
    assert segment_sum(VALUES, INDEX, 3)[1] == 0
    assert segment_mean(VALUES, INDEX, 3)[1].isnan()
    assert segment_max(VALUES, INDEX, 3)[1] == -torch.inf
    assert segment_logmeanexp(VALUES, INDEX, 3)[1] == -torch.inf
    assert segment_softmax(VALUES, INDEX, 3)[2] == 0


def test_large_values_do_not_overflow() -> None:
    torch.testing.assert_close(
        segment_logmeanexp(VALUES + 1e4, INDEX, 3)[0], segment_logmeanexp(VALUES, INDEX, 3)[0] + 1e4
    )
    assert segment_softmax(VALUES * 1e4, INDEX, 3).isfinite().all()


def test_trailing_dimensions_are_columns() -> None:
    columns = torch.stack([VALUES, 2 * VALUES], dim=1)
    torch.testing.assert_close(
        segment_mean(columns, INDEX, 3)[2], torch.stack([rows_of(2).mean(), 2 * rows_of(2).mean()])
    )
    torch.testing.assert_close(segment_softmax(columns, INDEX, 3)[:, 1], segment_softmax(2 * VALUES, INDEX, 3))


def test_gradients() -> None:
    values = VALUES.clone().requires_grad_()
    for function in (segment_softmax, segment_logmeanexp, segment_sum):
        kept = torch.tensor([0, 2]) if function is not segment_softmax else torch.arange(6)
        assert torch.autograd.gradcheck(lambda v, f=function, k=kept: f(v, INDEX, 3)[k], (values,))


def test_nan_is_kept() -> None:
    broken = VALUES.clone()
    broken[3] = torch.nan
    assert segment_max(broken, INDEX, 3)[2].isnan()
    assert segment_mean(broken, INDEX, 3).isnan().tolist() == [False, True, True]


def test_rank_sorts_inside_segments_and_breaks_ties_by_row() -> None:
    index = torch.tensor([1, 0, 1, 0, 1])
    assert segment_rank(torch.tensor([5.0, 2.0, 1.0, 2.0, 3.0]), index, 2).tolist() == [2, 0, 0, 1, 1]


def test_compact_keeps_order() -> None:
    index, count = compact(torch.tensor([40, 7, 40, 9]))
    assert index.tolist() == [2, 0, 2, 1]
    assert count == 3


def test_group_diversity_by_explicit_group() -> None:
    features = torch.tensor([[0.0, 0.0], [10.0, 0.0], [3.0, 4.0], [10.0, 2.0], [5.0, 5.0], [0.0, 4.0]])
    group = torch.tensor([8, 3, 8, 3, 5, 8])
    expected = torch.tensor([2.0, torch.nan, (5 + 4 + 3) / 3], dtype=torch.float64)
    torch.testing.assert_close(group_diversity(features, group), expected, equal_nan=True)
    torch.testing.assert_close(group_diversity(features, group, chunk=2), expected, equal_nan=True)
    assert mean_group_diversity(features, group) == 3.0
