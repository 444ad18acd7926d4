"""Which steps of a rollout are stochastic and trained, as pure functions of the iteration.

The last step of a grid is never trained: its std is tiny and its density explodes. A window is a run of consecutive
stochastic steps inside the others; everything outside it follows the ODE.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.errors import UserError
from difftilt.sampling.protocol import NoiseSource

Motion = Literal["sliding", "decay", "exponential_decay", "random"]


def window_mask(steps: int, start: int, width: int) -> Bool[Tensor, " steps"]:
    """True for steps start .. start + width - 1."""
    place = torch.arange(steps)
    return (place >= start) & (place < start + width)


def random_start(noise: NoiseSource, low: int, high: int, width: int) -> int:
    """A window's first step, uniform over [low, high - width], from this iteration's noise (Flow-GRPO-Fast).

    Raises:
        UserError: if no window of this width fits between ``low`` and ``high``.
    """
    count = high - width - low + 1
    if count < 1:
        raise UserError(
            f"a window of {width} steps does not fit into steps {low} to {high - 1}: make it narrower, or take "
            "more steps"
        )
    uniform = noise.uniform(torch.zeros(1, dtype=torch.int64), (1,), purpose="window")
    return low + min(int(float(uniform) * count), count - 1)


def moving_start(iteration: int, positions: int, every: int, stride: int = 1, motion: Motion = "sliding") -> int:
    """A window's first step, moving through its positions and rolling back to the first (MixGRPO, arXiv 2507.21802).

    Args:
        iteration: counts from 0.
        positions: number of starts at which the window fits before the untrained last step.
        every: iterations at one position.
        stride: steps by which it moves.
        motion: ``sliding`` stays ``every`` iterations everywhere; ``exponential_decay`` stays
            ceil(every·exp(-0.1·max(0, start - 13))); ``decay`` falls linearly from ``every`` at the first start to 1 at
            the last (its published form was not available: reconstructed).

    Raises:
        UserError: if no window fits.
    """
    if positions < 1:
        raise UserError("no moving window fits before the untrained last step: make it narrower, or take more steps")
    starts = list(range(0, positions, stride))
    stays = [_stay(start, positions, every, motion) for start in starts]
    place = iteration % sum(stays)
    for start, stay in zip(starts, stays, strict=True):
        if place < stay:
            return start
        place -= stay
    raise AssertionError("unreachable: place is below the sum of all stays")


def _stay(start: int, positions: int, every: int, motion: Motion) -> int:
    if motion == "exponential_decay":
        return math.ceil(every * math.exp(-0.1 * max(0, start - 13)))
    if motion == "decay":
        return round(every - (every - 1) * start / max(positions - 1, 1))
    return every


def random_steps(
    noise: NoiseSource, index: Int[Tensor, " samples"], steps: int, fraction: float
) -> Bool[Tensor, "samples steps"]:
    """For every sample a random subset of max(1, floor(fraction·steps)) steps (DanceGRPO trains 60 %)."""
    # 0.29 · 100 is a little below 29 in floating point
    count = max(1, math.floor(fraction * steps + 1e-9))
    order: Float[Tensor, "samples steps"] = noise.uniform(index, (steps,), purpose="trained steps")
    return order.argsort(1).argsort(1) < count


def compressed(grid: Float[Tensor, " times"], steps: int) -> Float[Tensor, " fewer"]:
    """``steps + 1`` of the times of a grid, its first and last among them, evenly by position.

    Raises:
        ValueError: if the grid has fewer steps than that.
    """
    if steps > len(grid) - 1:
        raise ValueError(f"a grid of {len(grid) - 1} steps cannot be compressed to {steps}")
    return grid[torch.linspace(0, len(grid) - 1, steps + 1).round().long()]


def drifting_start(iteration: int, first: int, last: int, every: int) -> int:
    """A window's first step, moving from ``first`` to ``last``, either way, by one every ``every`` iterations.

    There it stays (the depth window of BranchGRPO, arXiv 2509.06040).
    """
    moved = min(iteration // every, abs(last - first))
    return first + moved if last >= first else first - moved


def interval_length(stage: int, stages: int, shortest: int, longest: int) -> int:
    """Trained steps before the data end: shortest + floor(stage·(longest - shortest + 1)/stages), at most ``longest``.

    The backward progressive schedule of B²-DiffuRL (arXiv 2503.11240); after its ``stages`` it stays at ``longest``.
    """
    return min(shortest + stage * (longest - shortest + 1) // stages, longest)
