"""Forward corruption and every conversion between the names of a denoiser. Pure mathematics, no networks.

Second of the rooms. It is the one place that knows alpha, sigma and the mask probability, so that no kernel or loss
converts a prediction by itself. A new Gaussian process gives four coefficients and inherits the rest from
``GaussianProcess``; another corruption implements ``Process`` and a ``Prediction``.

Traps: t = 0 is data and t = 1 is noise, here and everywhere; a network's own clock (0..999) is translated by the
process alone. Conversions are singular where alpha or sigma is 0: use ``target`` there, which is written from (x_0,
noise). A finite schedule leaves a trace of data at t = 1, which the prior does not have.
"""

from difftilt.process.gaussian import (
    GaussianPrediction,
    GaussianProcess,
    RectifiedFlow,
    VariancePreserving,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
)
from difftilt.process.grid import shifted, timestep_grid, uniform_grid
from difftilt.process.masked import MaskedProcess, TokenPrediction
from difftilt.process.protocol import Condition, Prediction, PredictionKind, Process

__all__ = [
    "Condition",
    "GaussianPrediction",
    "GaussianProcess",
    "MaskedProcess",
    "Prediction",
    "PredictionKind",
    "Process",
    "RectifiedFlow",
    "TokenPrediction",
    "VariancePreserving",
    "cosine_schedule",
    "linear_schedule",
    "scaled_linear_schedule",
    "shifted",
    "timestep_grid",
    "uniform_grid",
]
