"""Sets that differ by one row: every state against computing each set anew; the rule's ends; moments."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from difftilt.statistics import (
    CoverageState,
    FrechetReference,
    FrechetState,
    KernelState,
    MeanState,
    Negated,
    RecomputedState,
    SetMoments,
    SetState,
    coverage,
    frechet_distance,
    mmd_squared,
    neighbour_radius,
    rbf_kernel,
    vendi_score,
)
from difftilt.statistics.moments import Change, root_trace_change

KERNEL = rbf_kernel(1.5)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POOL, OTHERS, START = normal(0, 24, 4), normal(1, 30, 4) + 0.4, torch.arange(12)


def reference(**how: object) -> FrechetReference:
    moments = SetMoments.of(OTHERS)
    return FrechetReference(moments.mean, moments.scatter / (len(OTHERS) - 1), **how)  # pyright: ignore[reportArgumentType]


STATES: dict[str, tuple[Callable[[], SetState], Callable[[Tensor], float]]] = {
    "frechet": (lambda: FrechetState(POOL, START, reference()), lambda x: float(frechet_distance(x, OTHERS))),
    "diagonal": (
        lambda: FrechetState(POOL, START, reference(spread="diagonal")),
        lambda x: float((x.mean(0) - OTHERS.mean(0)).square().sum() + (x.std(0) - OTHERS.std(0)).square().sum()),
    ),
    "mean": (
        lambda: FrechetState(POOL, START, reference(spread="none")),
        lambda x: float((x.mean(0) - OTHERS.mean(0)).square().sum()),
    ),
    "shrunk": (
        lambda: FrechetState(POOL, START, reference(shrinkage=0.4)),
        lambda x: reference(shrinkage=0.4).distance(SetMoments.of(x)),
    ),
    "mmd": (lambda: KernelState(POOL, START, OTHERS, KERNEL), lambda x: float(mmd_squared(x, OTHERS, KERNEL))),
    "mmd, biased": (
        lambda: KernelState(POOL, START, OTHERS, KERNEL, unbiased=False),
        lambda x: float(mmd_squared(x, OTHERS, KERNEL, unbiased=False)),
    ),
    "coverage": (
        lambda: CoverageState(POOL, START, OTHERS, neighbour_radius(OTHERS, 2)),
        lambda x: float(coverage(OTHERS, x, 2)),
    ),
    "vendi": (
        lambda: RecomputedState(POOL, START, lambda x: float(vendi_score(x))),
        lambda x: float(vendi_score(x)),
    ),
    "mean of scores": (lambda: MeanState(POOL[:, 0], START), lambda x: float(x[:, 0].mean())),
    "negated": (
        lambda: Negated(MeanState(POOL[:, 0], START)),
        lambda x: -float(x[:, 0].mean()),
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_knows_every_set_that_differs_by_one_row(name: str) -> None:
    make, anew = STATES[name]
    state = make()
    for place, row in ((3, 20), (0, 13), (3, 3), (11, 15)):
        state.swap(place, row)
    members = state.members
    assert members.tolist() == [13, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15]
    assert START.tolist() == list(range(12))
    near = partial(pytest.approx, rel=1e-8, abs=1e-10)
    assert state.value == near(anew(POOL[members]))
    without = [anew(POOL[members[torch.arange(12) != place]]) for place in range(12)]
    assert state.leave_one_out().tolist() == near(without)
    places, rows = torch.tensor([0, 5, 5, 11]), torch.tensor([20, 21, 12, 23])
    changed = [anew(POOL[members.index_fill(0, place, int(row))]) for place, row in zip(places, rows, strict=True)]
    assert state.swapped(places, rows).tolist() == near(changed)
    assert state.members is members or state.members.equal(members)


def test_one_member_may_be_exchanged_where_only_means_count() -> None:
    state = FrechetState(POOL, torch.tensor([4]), reference(spread="none"))
    (told,) = state.swapped(torch.tensor([0]), torch.tensor([7])).tolist()
    state.swap(0, 7)
    exact = float((POOL[7] - OTHERS.mean(0)).square().sum())
    assert state.value == pytest.approx(exact, rel=1e-12)
    assert told == pytest.approx(exact, rel=1e-12)


def test_a_set_is_computed_once_until_it_changes() -> None:
    asked: list[int] = []

    def number(features: Tensor) -> float:
        asked.append(len(features))
        return float(features.sum())

    state = RecomputedState(POOL, START, number)
    assert state.value == state.value == float(POOL[:12].sum())
    assert len(asked) == 1
    state.swap(0, 20)
    assert state.value == float(POOL[state.members].sum())
    assert len(asked) == 2


def test_the_radius_of_a_reference_is_the_distance_of_its_kth_neighbour() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    assert neighbour_radius(line, 1).tolist() == pytest.approx([1, 1, 2, 4])
    assert neighbour_radius(line, 2).tolist() == pytest.approx([3, 2, 3, 6])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_rule_holds_in_any_unit_and_beyond_the_few(scale: float) -> None:
    values = torch.tensor([0.0, 1e-3, 0.5, 2.0, 9.0], dtype=torch.float64) * scale
    rows, more = normal(2, 300, 5) * scale**0.5, normal(3, 300, 5) * scale**0.5
    rows[:, 0] = 0
    rows = rows * (0.9 / (rows[:, 1:].square() / values[1:]).sum(1, keepdim=True)).sqrt()  # what is left stays positive
    less, more = Change(-1.0, rows), Change(1.0, more)
    exact = torch.linalg.eigvalsh(values.diag() + less.matrices + more.matrices).clamp(min=0).sqrt().sum(1)
    found = root_trace_change(values, less, more) + values.sqrt().sum()
    assert float((found / exact - 1).abs().max()) < 1e-8
    alone = torch.linalg.eigvalsh(values.diag() + less.matrices).clamp(min=0).sqrt().sum(1)
    assert float(((root_trace_change(values, less) + values.sqrt().sum()) / alone - 1).abs().max()) < 1e-7


@pytest.mark.parametrize("count", [1, 2, 6])
def test_moments_follow_an_exchange_of_rows(count: int) -> None:
    moments = SetMoments.of(POOL[:count]).replaced(POOL[0], POOL[count])
    exact = SetMoments.of(POOL[1 : count + 1])
    assert moments.count == count
    torch.testing.assert_close(moments.mean, exact.mean)
    torch.testing.assert_close(moments.scatter, exact.scatter)


def test_shrinkage_keeps_equal_laws_at_no_distance() -> None:
    law = SetMoments.of(OTHERS)
    for shrinkage in (0.0, 0.5, 1.0):
        assert abs(reference(shrinkage=shrinkage).distance(law)) < 1e-12


def test_vendi_of_many_rows_in_few_dimensions_is_that_of_the_kernel_matrix() -> None:
    def cosine(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T

    assert float(vendi_score(POOL)) == pytest.approx(float(vendi_score(POOL, cosine)), rel=1e-9)
