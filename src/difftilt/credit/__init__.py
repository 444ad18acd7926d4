"""Pure functions from rewards (and parents) to advantages or labels.

Groups are always an explicit index, never a position in the batch. Statistics run in float64; results have the dtype
of the rewards, float32 or better. NaN is never read as a number: it stays NaN.
"""

from difftilt.credit.group import (
    Normaliser,
    aggregate,
    best_worst,
    broadcast,
    constant_groups,
    group_advantage,
    leave_one_out,
    standardise,
    zero_std_fraction,
)
from difftilt.credit.history import History, normalise, push, push_and_normalise
from difftilt.credit.optimality import OptimalityMode, optimality

__all__ = [
    "History",
    "Normaliser",
    "OptimalityMode",
    "aggregate",
    "best_worst",
    "broadcast",
    "constant_groups",
    "group_advantage",
    "leave_one_out",
    "normalise",
    "optimality",
    "push",
    "push_and_normalise",
    "standardise",
    "zero_std_fraction",
]
