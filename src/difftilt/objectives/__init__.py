"""Losses as pure functions, one row in and one row out, each with its equation.

Between credit and the loop: a method chooses one, the loop takes the mean over all rows of an update. They are apart
from methods because most methods share them. To add one, write a function of log-probabilities or predictions that
returns a value per row, and hold its gradient to the formula in a proof.

Traps: never return a mean, the loop refuses it. A published weight belongs to one reduction over dimensions and to one
of four numbers called KL (``KLMode``). References and old policies are detached inside the function.
"""

from difftilt.objectives.centred import Baselines, baseline_weights, cell_baselines, centred_loss
from difftilt.objectives.denoising import ErrorSpace, denoising_error, implicit_reward
from difftilt.objectives.distillation import (
    distillation_loss,
    finite_target,
    limit_target,
    step_weight,
    velocity_slope,
)
from difftilt.objectives.kl import KLMode, exact_kl, flow_grpo_kl, mean_gap, sde_kl, step_kl, velocity_gap
from difftilt.objectives.nft import NFTLoss, nft_loss
from difftilt.objectives.pairs import pairs_within, pessimistic_difference_error, ranked_pairs
from difftilt.objectives.policy_gradient import (
    Surrogate,
    clipped_surrogate,
    divided_by_time,
    guard_log_ratio,
    reinforce,
    surrogate_of_ratio,
)
from difftilt.objectives.preference import gain_preference, kto, kto_offset, step_preference
from difftilt.objectives.ranking import suffix_cross_entropy
from difftilt.objectives.unmasking import invalid_loss, masked_error

__all__ = [
    "Baselines",
    "ErrorSpace",
    "KLMode",
    "NFTLoss",
    "Surrogate",
    "baseline_weights",
    "cell_baselines",
    "centred_loss",
    "clipped_surrogate",
    "denoising_error",
    "distillation_loss",
    "divided_by_time",
    "exact_kl",
    "finite_target",
    "flow_grpo_kl",
    "gain_preference",
    "guard_log_ratio",
    "implicit_reward",
    "invalid_loss",
    "kto",
    "kto_offset",
    "limit_target",
    "masked_error",
    "mean_gap",
    "nft_loss",
    "pairs_within",
    "pessimistic_difference_error",
    "ranked_pairs",
    "reinforce",
    "sde_kl",
    "step_kl",
    "step_preference",
    "step_weight",
    "suffix_cross_entropy",
    "surrogate_of_ratio",
    "velocity_gap",
    "velocity_slope",
]
