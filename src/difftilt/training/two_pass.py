"""Gradients in two passes, for losses of whole updates that see the network through one scalar per row.

A loss of whole groups and whole trajectories, L(s_1, ..., s_n), would hold the activations of all its rows at once. But
dL/dtheta = Σ_i (dL/ds_i)·(ds_i/dtheta). The first pass evaluates all s_i without gradient and differentiates L with
respect to them; the second one is a loss of single rows with constant slopes, in microbatches of any size. The gradient
is exact, at the price of one more forward pass.

A phase does the first pass in ``before`` (:func:`with_slopes`) and the second in ``loss`` (:func:`carried`), with the
unit that the loss needs whole as ``unit`` and ``micro="edge"``.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.training.experience import Experience
from difftilt.training.protocol import Run

SLOPE, SHARE = "two_pass_slope", "two_pass_share"
"""Names in ``edges.extras`` of what the first pass leaves to the second."""

Rows = Float[Tensor, " rows"]
Scalars = Callable[[Experience], Rows]
"""Rows -> s_i of each, with gradient where gradients are on."""
Share = Callable[[Rows, Experience], Float[Tensor, ""]]
"""(s, rows of this process) -> what they add to the loss; the shares of all processes add up to it. A share that is a
mean divides by a number of the whole update (``run.gather``)."""


def in_pieces(run: Run, scalars: Scalars, rows: Experience) -> Rows:
    """The scalars of all rows without gradient, float64, as many rows at a time as fill a network call.

    So no more than their states and conditions are gathered at once, however many rows an update has. No rows, no call.
    """
    pieces = torch.arange(len(rows.index), device=rows.index.device).split(run.forward_batch)
    with torch.no_grad():
        found = [scalars(rows.rows(piece)).double() for piece in pieces if len(piece)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device=rows.index.device)


def with_slopes(run: Run, scalars: Scalars, share: Share, rows: Experience) -> Experience:
    """The rows of a whole update with dL/ds_i, times the number of rows by which the loop divides, and with L.

    Args:
        run: speaks to the other processes, which may hold no rows.
        scalars: evaluated at the present weights.
        share: pure, but for sums over processes.
        rows: of this process.
    """
    with torch.enable_grad():
        scalar = in_pieces(run, scalars, rows).requires_grad_()
        value = share(scalar, rows)
        (slope,) = torch.autograd.grad(value, scalar)
    count = len(run.gather(slope)[0])
    # the mean over the rows of all processes of this is the sum of their shares
    own = torch.full_like(slope, float(value.detach()) * count / max(len(slope), 1))
    extras = rows.edges.extras | {SLOPE: count * slope, SHARE: own}
    return rows.changed(edges=replace(rows.edges, extras=extras))


def carried(rows: Experience, scalar: Rows) -> Rows:
    """A row's part of the loss: its mean over all rows is L, and its gradient that of L at the weights of the slopes.

    Args:
        rows: from :func:`with_slopes`.
        scalar: s_i under the present weights, with gradient.
    """
    extras = rows.edges.extras
    return extras[SHARE] + extras[SLOPE] * (scalar - scalar.detach())
