"""Scores of noisy states."""

from difftilt.values.estimates import ClosedForm, LatentReward, PosteriorMean, Rollout, SampledX0
from difftilt.values.learned import Learned, ValueNetwork, fit_value, regression_loss
from difftilt.values.protocol import Rows, Value

__all__ = [
    "ClosedForm",
    "LatentReward",
    "Learned",
    "PosteriorMean",
    "Rollout",
    "Rows",
    "SampledX0",
    "Value",
    "ValueNetwork",
    "fit_value",
    "regression_loss",
]
