"""Fréchet distances of all sets that differ by one sample: together, against computing every set anew.

Both halves know the reference's root already, and begin with features; the floor finds mean, covariance and eigenvalues
of each set. The factor is 1/ratio.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.paired import Subject
from benchmarks.workload import Size
from difftilt.statistics import FrechetReference, FrechetState, SetMoments


def _features(count: int, dim: int, seed: int) -> Float[Tensor, "count dim"]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, dim, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale


def _sizes(size: Size) -> tuple[int, int]:
    """Samples and dimensions: 1024 and 64, or few."""
    return (32, 8) if size.batch < 32 else (1024, 64)


def _subject(size: Size, name: str, what: str, exchange: bool) -> Subject:
    count, dim = _sizes(size)
    pool = _features(2 * count, dim, 0)
    reference = FrechetReference(torch.zeros(dim, dtype=torch.float64), torch.cov(_features(4 * count, dim, 1).T))
    members = torch.arange(count)
    assert reference.root.shape == (dim, dim)  # found once per reference, so neither half pays for it

    def together() -> Tensor:
        state = FrechetState(pool, members, reference)
        return state.swapped(members, members + count) if exchange else state.leave_one_out()

    def anew() -> Tensor:
        sets = (_changed(members, place, exchange) for place in range(count))
        return torch.tensor([reference.distance(SetMoments.of(pool[rows])) for rows in sets], dtype=torch.float64)

    exact = anew()
    error = float(((together() - exact) / exact).abs().max())
    return Subject(
        name=name,
        bound=None,
        program=f"{what}, together",
        floor=f"{what}, each computed anew",
        run_program=together,
        run_floor=anew,
        shapes={"samples": count, "dimensions": dim},
        extra={"largest relative error": error},
        phases={},
    )


def _changed(members: Tensor, place: int, exchange: bool) -> Tensor:
    """The set with another sample at this place, or without the one that is there."""
    if exchange:
        return members.index_fill(0, members[place : place + 1], place + len(members))
    return torch.cat([members[:place], members[place + 1 :]])


def leave_one_out(size: Size) -> Subject:
    """Every set without one of its samples."""
    return _subject(size, "sets_leave_one_out", "Fréchet distances of all sets without one sample", exchange=False)


def swaps(size: Size) -> Subject:
    """Every set with one of its samples exchanged."""
    return _subject(size, "sets_swaps", "Fréchet distances of all sets with one sample exchanged", exchange=True)
