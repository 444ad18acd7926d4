"""Scores of noisy states, in units of the reward.

A reward sees decoded samples only, a value sees (x_t, t, condition) and the prediction already paid for. Steerers rank
partial trajectories with it; process rewards are values too. To add one, write a callable with the signature of
``Value``: an estimate from the denoiser in ``estimates``, a learned one in ``learned`` (noised samples) or
``recorded`` (states of rollouts).

Traps: the soft value is β·log E[exp(r/β)], not E[r]; an average at the wrong temperature gives another target. A value
that evaluates networks counts them in its denoiser's ledger. Noise is keyed by the slot (``rows.index``), not by the
particle that stands in it.
"""

from difftilt.values.curriculum import Curriculum, fit_curriculum
from difftilt.values.distillation import Distillation
from difftilt.values.estimates import ClosedForm, LatentReward, Lookahead, PosteriorMean, Rollout, SampledX0
from difftilt.values.learned import Learned, fit_value, noised_loss, regression_loss
from difftilt.values.noise_aware import Regressor, Term, Verified, terms_of
from difftilt.values.process_reward import GradientGuide, Scorer, Strength, fit_process_reward
from difftilt.values.protocol import Rows, Value
from difftilt.values.recorded import States, fit_states, record_states, value_correlations
from difftilt.values.spsa import spsa_gradient
from difftilt.values.trajectories import Recorded, record

__all__ = [
    "ClosedForm",
    "Curriculum",
    "Distillation",
    "GradientGuide",
    "LatentReward",
    "Learned",
    "Lookahead",
    "PosteriorMean",
    "Recorded",
    "Regressor",
    "Rollout",
    "Rows",
    "SampledX0",
    "Scorer",
    "States",
    "Strength",
    "Term",
    "Value",
    "Verified",
    "fit_curriculum",
    "fit_process_reward",
    "fit_states",
    "fit_value",
    "noised_loss",
    "record",
    "record_states",
    "regression_loss",
    "spsa_gradient",
    "terms_of",
    "value_correlations",
]
