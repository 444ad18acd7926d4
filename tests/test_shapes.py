"""The checker of shapes sees what does not fit its annotation, wherever it is passed, and lets through what does."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.process.gaussian import RectifiedFlow
from difftilt.statistics.folds import segment_sum
from difftilt.trees import Batched
from shapes import check, decorate

ROWS = Float[Tensor, " rows"]


@check
def added(x: ROWS, y: Float[Tensor, "rows dim"], *, z: ROWS | None = None, wrong: bool = False) -> ROWS:
    return torch.cat([x, x]) if wrong else x + y.sum(1)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.ones(3), torch.ones(4, 2)), {}),
        ((torch.ones(3), torch.ones(3)), {}),
        ((torch.ones(3).long(), torch.ones(3, 2)), {}),
        ((torch.ones(3),), {"y": torch.ones(4, 2)}),
        ((torch.ones(3), torch.ones(3, 2)), {"z": torch.ones(2)}),
        ((torch.ones(3), torch.ones(3, 2)), {"wrong": True}),
    ],
)
def test_what_does_not_fit_is_refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="added"):
        added(*args, **kwargs)


def test_what_fits_passes_and_every_call_has_its_own_sizes() -> None:
    for rows in (3, 5):
        assert len(added(torch.ones(rows), torch.ones(rows, 2), z=torch.ones(rows))) == rows
        assert len(added(torch.ones(rows), torch.ones(rows, 7), z=None)) == rows


def test_functions_without_tensors_are_left_alone() -> None:
    def plain(x: int) -> "int":
        return x

    assert check(plain) is plain
    assert decorate(int) is int


def test_the_fields_of_a_record_must_fit_together() -> None:
    @decorate
    @dataclass
    class Record(Batched):
        x: Float[Tensor, "rows dim"]
        place: Int[Tensor, " rows"]

    Record(torch.ones(3, 2), torch.ones(3).long())
    with pytest.raises(TypeError, match="place"):
        Record(torch.ones(3, 2), torch.ones(4).long())


def test_the_package_is_checked() -> None:
    with pytest.raises(TypeError, match="segment_sum"):
        segment_sum(torch.ones(3), torch.zeros(2).long(), 1)
    with pytest.raises(TypeError, match="corrupt"):
        RectifiedFlow().corrupt(torch.ones(3, 2), torch.ones(2), torch.ones(3, 2))
