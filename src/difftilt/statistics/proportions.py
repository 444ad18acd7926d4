"""Shares of independent trials, and how surely they are known."""

import math

Z95 = 1.959963984540054
"""Quantile of the standard normal law at 0.975."""


def wilson_interval(share: float, count: int, z: float = Z95) -> tuple[float, float]:
    """Where the true share lies (Wilson 1927), all p with (share - p)² <= z²·p·(1 - p)/count.

    For trials with results between 0 and 1 (a tie that counts half) it is too wide rather than too narrow: their
    variance is at most p·(1 - p).

    Args:
        share: mean of the results, in [0, 1].
        count: trials, at least one.
        z: quantile of the normal law; 1.96 is 95 %.
    """
    spread = z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
