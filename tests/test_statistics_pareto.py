import itertools

import numpy as np
import pytest
import torch
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from torch import Tensor

from difftilt.statistics.pareto import dominates, front, insert, pareto_rank
from difftilt.steering.archive import Archive


def beats(a: list[float], b: list[float]) -> bool:
    """By the definition."""
    pairs = [*zip(a, b, strict=True)]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def points(seed: int, rows: int, objectives: int = 3) -> Tensor:
    """Few different values, so that ties and copies are common."""
    return torch.randint(0, 4, (rows, objectives), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("seed", range(5))
def test_dominance_fronts_and_ranks_are_their_definitions(seed: int) -> None:
    a, b = points(seed, 20), points(seed + 100, 13)
    rows, others = a.tolist(), b.tolist()
    assert dominates(a, b).tolist() == [[beats(x, y) for y in others] for x in rows]
    assert front(a).tolist() == [not any(beats(y, x) for y in rows) for x in rows]
    ranks = [[sum(x[k] >= y[k] for y in others) / len(others) for k in range(3)] for x in rows]
    torch.testing.assert_close(pareto_rank(a, b), torch.tensor(ranks, dtype=torch.float64))
    assert torch.equal(pareto_rank(a, b[:0]), torch.ones(20, 3, dtype=torch.float64))
    assert front(a[:0]).tolist() == []


@pytest.mark.parametrize("seed", range(5))
def test_an_archive_filled_row_by_row_is_the_front_of_all_rows_in_any_order(seed: int) -> None:
    a = points(seed, 30)
    expected = sorted(a[front(a)].tolist())
    for order in (torch.arange(30), torch.arange(30).flip(0)):
        archive = a[:0]
        for row in a[order]:
            kept, entering = insert(archive, row[None])
            archive = torch.cat([archive[kept], row[None][entering]])
            assert bool(front(archive).all())
        assert sorted(archive.tolist()) == expected
    kept, entering = insert(a[:10][front(a[:10])], a[10:])
    assert sorted([*a[:10][front(a[:10])][kept].tolist(), *a[10:][entering].tolist()]) == expected


def first_front(scores: Tensor) -> list[int]:
    """Rows of the first front by pymoo, which minimises."""
    found = NonDominatedSorting().do(-scores.numpy(), only_non_dominated_front=True)
    return sorted(np.asarray(found).tolist())


@pytest.mark.parametrize("objectives", [1, 2, 4])
def test_fronts_are_those_of_non_dominated_sorting(objectives: int) -> None:
    tied = points(objectives, 150, objectives)
    smooth = torch.rand(150, objectives, generator=torch.Generator().manual_seed(9)).double()
    for scores in (tied, smooth, tied[:1].expand(5, -1)):
        assert front(scores).nonzero()[:, 0].tolist() == first_front(scores)


@pytest.mark.parametrize("seed", range(4))
def test_an_archive_of_samples_is_the_first_front_of_all_that_it_met_each_once(seed: int) -> None:
    """Samples come in batches and again, and different ones have equal scores; a column is not looked at."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 3, (120, 4), generator=generator)
    table = points(seed, 3**4, 3)
    scores = table[(x * 3 ** torch.arange(4)).sum(1)]
    archive, looked = Archive(x[:0], scores[:0]), torch.tensor([0, 2])
    for part in torch.arange(120).split(17):
        archive.add(x[part], scores[part], looked, looked)
        known = {tuple(one): row for row, one in enumerate(x[: int(part[-1]) + 1].tolist())}
        every = [*known.values()]
        expected = {tuple(x[every[row]].tolist()) for row in first_front(scores[every][:, looked])}
        assert {tuple(one) for one in archive.x.tolist()} == expected
        assert len(archive.x) == len(expected)
        assert torch.equal(archive.scores, scores[[known[tuple(one)] for one in archive.x.tolist()]])


def test_one_that_only_equals_does_not_dominate() -> None:
    a = torch.tensor([[1.0, 2.0]])
    assert not bool(dominates(a, a).any())
    for gap in itertools.product((0.0, 1e-9), repeat=2):
        assert bool(dominates(a + torch.tensor(gap).double(), a).all()) == (max(gap) > 0)
