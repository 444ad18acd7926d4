"""Credit of single steps from the rewards R_0..R_K of completions along a chain: gains and turning points.

Step k leads from state k to state k + 1 and gains d_k = R_{k+1} - R_k, so that Σ_k d_k = R_K - R_0. A turning point
(TP-GRPO, arXiv 2602.06422) is a step that turns the local trend into that of the whole chain; it is credited with all
that follows from it, F - R_k, where F = R_K.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.credit.group import Group, Normaliser

Along = Float[Tensor, "samples states"]
PerStep = Float[Tensor, "samples steps"]

Definition = Literal["consistent", "basic", "reversal"]
"""When a step is a turning point, see :func:`turning_points`."""

Assignment = Literal["replace", "bonus", "released"]
"""What a turning point changes, see :func:`step_rewards`."""


def gains(rewards: Along) -> PerStep:
    """d_k = R_{k+1} - R_k in float64, where differences of float32 rewards do not round.

    >>> gains(torch.tensor([[1.0, 0.5, 2.0]])).tolist()
    [[-0.5, 1.5]]
    """
    return rewards.double().diff(dim=1)


def per_step(values: PerStep, group: Group, normaliser: Normaliser) -> PerStep:
    """The group advantage of every column on its own; a group whose values of a step are all equal has 0 there."""
    return torch.stack([normaliser(column, group) for column in values.unbind(1)], 1)


def turning_points(rewards: Along, definition: Definition, dead_zone: float = 0.0) -> Bool[Tensor, "samples steps"]:
    """Steps that turn the local trend into the global one; only signs decide.

    With D = F - R_0 and s_k = sign(d_k)·sign(D), step k is a turning point if s_{k-1} < 0 < s_k (``basic``), and if
    moreover sign(d_k)·sign(F - R_{k+1}) > 0: what follows goes the same way (``consistent``). The first step has no
    predecessor: it is one if s_0 > 0 (``basic``), or if sign(d_0)·sign(F - R_1) > 0 (``consistent``). ``reversal`` asks
    for d_{k-1}·d_k < 0 only, so never for the first step.

    Args:
        rewards: R_0..R_K.
        definition: see above.
        dead_zone: a difference at most so large in absolute value has sign 0, and a sign of 0 makes no turning point.
    """
    d = _sign(gains(rewards), dead_zone)
    if definition == "reversal":
        turns = d[:, 1:] * d[:, :-1] < 0
        return torch.cat([torch.zeros_like(d[:, :1], dtype=torch.bool), turns], 1)
    r = rewards.double()
    aligned = d * _sign(r[:, -1:] - r[:, :1], dead_zone)
    onwards = d * _sign(r[:, -1:] - r[:, 1:], dead_zone) > 0
    first, later = aligned[:, :1] > 0, (aligned[:, :-1] < 0) & (aligned[:, 1:] > 0)
    if definition == "consistent":
        first, later = onwards[:, :1], later & onwards[:, 1:]
    return torch.cat([first, later], 1)


def _sign(values: Tensor, dead_zone: float) -> Tensor:
    return torch.where(values.abs() > dead_zone, values.sign(), 0.0)


def step_rewards(
    rewards: Along,
    turning: Bool[Tensor, "samples steps"],
    assignment: Assignment = "replace",
    weight: float = 1.0,
    balance: bool = False,
) -> PerStep:
    """What every step is credited with, before it is compared in its group.

    ``replace`` (the paper): d_k, and F - R_k at a turning point. ``bonus``: d_k, and weight·(F - R_k) on top of it at
    a turning point. ``released`` (the published configurations): D at every step, and weight·d_k on top at turning
    points.

    Args:
        rewards: R_0..R_K, of all samples that are to be balanced together.
        turning: the turning points.
        assignment: see above.
        weight: of what ``bonus`` and ``released`` add.
        balance: keep as many turning points of positive as of negative assigned value, see :func:`balanced`; the
            others are ordinary steps.
    """
    r, d = rewards.double(), gains(rewards)
    onwards = r[:, -1:] - r[:, :-1]
    plain = onwards[:, :1].expand_as(d) if assignment == "released" else d
    assigned = onwards if assignment == "replace" else weight * (d if assignment == "released" else onwards)
    if balance:
        turning = balanced(turning, assigned)
    return torch.where(turning, assigned if assignment == "replace" else plain + assigned, plain)


def balanced(turning: Bool[Tensor, "samples steps"], assigned: PerStep) -> Bool[Tensor, "samples steps"]:
    """The turning points that are kept: of each sign the m of largest |assigned|, m the smaller number of the two.

    Where one sign is absent all are kept, and so are those of value 0, which have no sign. Equal magnitudes are kept in
    order of row, then of step.
    """
    positive, negative = turning & (assigned > 0), turning & (assigned < 0)
    # counts stay tensors: nothing here waits for a device
    fewer = torch.minimum(positive.sum(), negative.sum())
    both = turning & ~(_beyond(positive, assigned, fewer) | _beyond(negative, assigned, fewer))
    return torch.where(fewer > 0, both, turning)


def _beyond(among: Tensor, assigned: Tensor, kept: Int[Tensor, ""]) -> Tensor:
    """Those of ``among`` that come after the first ``kept`` by magnitude."""
    magnitude = torch.where(among, assigned.abs(), -1.0).reshape(-1)
    order = magnitude.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    return among & (rank.reshape(among.shape) >= kept)
