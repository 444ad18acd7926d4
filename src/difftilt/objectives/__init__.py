"""Losses as pure functions, one row in and one row out, each with its equation.

Between credit and the loop: a method chooses one, the loop takes the mean over all rows of an update. They are apart
from methods because most methods share them. To add one, write a function of log-probabilities or predictions that
returns a value per row, and hold its gradient to the formula in a proof.

Traps: never return a mean, the loop refuses it. A published weight belongs to one reduction over dimensions and to one
of four numbers called KL (``KLMode``). References and old policies are detached inside the function.
"""

from difftilt.objectives.distillation import (
    distillation_loss,
    finite_target,
    limit_target,
    step_weight,
    velocity_slope,
)
from difftilt.objectives.kl import KLMode, exact_kl, flow_grpo_kl, mean_gap, sde_kl, step_kl, velocity_gap
from difftilt.objectives.nft import NFTLoss, NFTSpace, nft_loss
from difftilt.objectives.policy_gradient import (
    Surrogate,
    clipped_surrogate,
    divided_by_time,
    guard_log_ratio,
    reinforce,
    surrogate_of_ratio,
)
from difftilt.objectives.preference import step_preference

__all__ = [
    "KLMode",
    "NFTLoss",
    "NFTSpace",
    "Surrogate",
    "clipped_surrogate",
    "distillation_loss",
    "divided_by_time",
    "exact_kl",
    "finite_target",
    "flow_grpo_kl",
    "guard_log_ratio",
    "limit_target",
    "mean_gap",
    "nft_loss",
    "reinforce",
    "sde_kl",
    "step_kl",
    "step_preference",
    "step_weight",
    "surrogate_of_ratio",
    "velocity_gap",
    "velocity_slope",
]
