"""Potentials: how intermediate rewards become weights. In units of the reward; the caller divides by the temperature.

The gains of one lineage sum to its final reward exactly (``difference``: to the reward minus ``r_min``), which is the
product condition Π_t G_t = exp(r(x_0)/temperature) with log G = gain / temperature (Singhal et al. 2025).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.trees import Batched

PotentialName = Literal["difference", "max", "sum", "reward_only", "importance"]


@dataclass(frozen=True)
class Lineage(Batched):
    """What a particle remembers of its own line; gathered with it.

    Attributes:
        record: last reward (``difference``), running maximum (``max``) or running sum (``sum``), float64.
        total: sum of the gains so far, float64.
    """

    record: Float[Tensor, " particles"]
    total: Float[Tensor, " particles"]


def begin(potential: PotentialName, particles: int, r_min: float, device: torch.device | str = "cpu") -> Lineage:
    """The memory before the first weighting: r_min where the potential compares with an earlier reward."""
    first = r_min if potential in ("difference", "max") else 0.0
    record = torch.full((particles,), first, dtype=torch.float64, device=device)
    return Lineage(record, torch.zeros_like(record))


def gain(
    potential: PotentialName, lineage: Lineage, reward: Float[Tensor, " particles"], final: bool
) -> tuple[Float[Tensor, " particles"], Lineage]:
    """Temperature · log G at one weighting time, and the memory after it.

    difference: r - previous r. Before the end max: max(r_min, all r so far); sum: all r so far; reward_only: r;
    importance: 0. At the end these four pay r(x_0) minus all gains before, with r(x_0) itself and not the running
    maximum or sum, which the published code uses and which breaks the product condition.

    Args:
        potential: its name.
        lineage: memory of each particle.
        reward: intermediate reward, or r(x_0) if ``final``.
        final: True at t = 0.
    """
    reward = reward.double()
    if potential == "difference":
        step, record = reward - lineage.record, reward
    elif final:
        step, record = reward - lineage.total, lineage.record
    elif potential == "max":
        step = record = torch.maximum(lineage.record, reward)
    elif potential == "sum":
        step = record = lineage.record + reward
    elif potential == "reward_only":
        step, record = reward, lineage.record
    else:
        step, record = torch.zeros_like(reward), lineage.record
    return step, Lineage(record, lineage.total + step)


def offset(potential: PotentialName, r_min: float) -> float:
    """What the gains of every lineage fall short of r(x_0): r_min for ``difference``, to be given back to log Z."""
    return r_min if potential == "difference" else 0.0
