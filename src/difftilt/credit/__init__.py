"""Pure functions from rewards (and parents) to advantages or labels.

Between rewards and objectives. Methods call them through ``run.jointly``, on the rewards of all processes, so that
group statistics do not depend on how many there are. To add one, write a function of columns and a group index; what
outlives an iteration enters and leaves as an argument (``History``).

Groups are always an explicit index, never a position in the batch. Statistics run in float64; results have the dtype
of the rewards, float32 or better.

Traps: a group without variance has advantage 0, by equality and not by a small std. ``global`` divides by the std
about the batch's mean, so an offset per prompt changes it; ``pooled`` does not. NaN stays NaN.
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
