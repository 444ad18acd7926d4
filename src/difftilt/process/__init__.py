"""Forward corruption and every conversion between the names of a denoiser. Pure mathematics, no networks."""

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
