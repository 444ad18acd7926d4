"""From a prediction to samples: noise, kernels, solvers, presets, rollout, replay, path KL.

A kernel makes a ``Step``, which draws and scores by one formula; ``rollout`` and ``replay`` both go through it, so the
ratio of a policy gradient begins at 1. Noise is an input, a function of (seed, iteration, purpose, index, step). A new
kernel is a frozen dataclass called with (prediction, x_t, t, s); a preset binds it to a log-probability convention.

Traps: ``std`` is of one whole step, ``g`` a rate. A deterministic step has no density, and asking for one is an error.
Clip ranges belong to a preset's convention (mean, sum or squared error). Different draws need different purposes.
Grids are explicit, float64, and must be the same in rollout and replay.
"""

from difftilt.sampling.drift import TIGHTEST, canonical_kernel, path_kl
from difftilt.sampling.kernels import CPS, DDIM, DDPM, DanceSDE, Euler, FlowSDE, StepwiseSDE, Unmasking, ancestral_std
from difftilt.sampling.noise import Noise, siblings
from difftilt.sampling.presets import Preset, cps, dance_sde, ddim, euler, flow_sde, stepwise_sde, unmasking
from difftilt.sampling.protocol import (
    Edges,
    Guide,
    Kernel,
    Moment,
    NoiseSource,
    Observe,
    Project,
    Reduction,
    RelaxedStep,
    Sampler,
    Solver,
    Step,
    Trajectory,
)
from difftilt.sampling.solvers import DPMSolverPP, EulerSolver, Heun
from difftilt.sampling.steps import CategoricalStep, GaussianStep, MixtureStep, reduce_dims

__all__ = [
    "CPS",
    "DDIM",
    "DDPM",
    "TIGHTEST",
    "CategoricalStep",
    "DPMSolverPP",
    "DanceSDE",
    "Edges",
    "Euler",
    "EulerSolver",
    "FlowSDE",
    "GaussianStep",
    "Guide",
    "Heun",
    "Kernel",
    "MixtureStep",
    "Moment",
    "Noise",
    "NoiseSource",
    "Observe",
    "Preset",
    "Project",
    "Reduction",
    "RelaxedStep",
    "Sampler",
    "Solver",
    "Step",
    "StepwiseSDE",
    "Trajectory",
    "Unmasking",
    "ancestral_std",
    "canonical_kernel",
    "cps",
    "dance_sde",
    "ddim",
    "euler",
    "flow_sde",
    "path_kl",
    "reduce_dims",
    "siblings",
    "stepwise_sde",
    "unmasking",
]
