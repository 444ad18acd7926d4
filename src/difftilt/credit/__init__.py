"""Pure functions from rewards (and parents) to advantages or labels.

Between rewards and objectives. Methods call them through ``run.jointly``, on the rewards of all processes, so that
group statistics do not depend on how many there are. To add one, write a function of columns and a group index; what
outlives an iteration enters and leaves as an argument (``History``).

Groups are always an explicit index, never a position in the batch. Statistics run in float64; results have the dtype
of the rewards, float32 or better.

Traps: a group without variance has advantage 0, by equality and not by a small std. ``global`` divides by the std
about the batch's mean, so an offset per prompt changes it; ``pooled`` does not. NaN stays NaN.
"""

from difftilt.credit.diversity import favour_unlike, nearest_distance
from difftilt.credit.gains import gains, per_step, step_rewards, turning_points
from difftilt.credit.granular import multi_view_advantage
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
from difftilt.credit.history import History, Stages, normalise, push, push_and_normalise, stage_scores
from difftilt.credit.optimality import OptimalityMode, optimality
from difftilt.credit.selection import Contrast, contrast
from difftilt.credit.sets import Partition, partners, swap_sets, top_half
from difftilt.credit.tree import Width, depth_advantage, kept_leaves, path_fusion, width_mask
from difftilt.credit.uncertainty import Fraction, mean_doubt, scope_of, suspects, uncertainty, wins

__all__ = [
    "Contrast",
    "Fraction",
    "History",
    "Normaliser",
    "OptimalityMode",
    "Partition",
    "Stages",
    "Width",
    "aggregate",
    "best_worst",
    "broadcast",
    "constant_groups",
    "contrast",
    "depth_advantage",
    "favour_unlike",
    "gains",
    "group_advantage",
    "kept_leaves",
    "leave_one_out",
    "mean_doubt",
    "multi_view_advantage",
    "nearest_distance",
    "normalise",
    "optimality",
    "partners",
    "path_fusion",
    "per_step",
    "push",
    "push_and_normalise",
    "scope_of",
    "stage_scores",
    "standardise",
    "step_rewards",
    "suspects",
    "swap_sets",
    "top_half",
    "turning_points",
    "uncertainty",
    "width_mask",
    "wins",
    "zero_std_fraction",
]
