"""Presets: a kernel bound to its log-probability convention, its floors and its KL scale.

Published clip ranges and KL weights are meaningless without the convention they were tuned for: DDPO, Flow-GRPO and
DanceGRPO clip the mean over dimensions, CPS a squared error, DPPO a mean with two separate floors of the std.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Shaped
from torch import Tensor

from difftilt.process.gaussian import GaussianProcess
from difftilt.process.grid import uniform_grid
from difftilt.process.protocol import Prediction, Process
from difftilt.sampling.kernels import CPS, DDIM, DanceSDE, Euler, FlowSDE, StepwiseSDE, Unmasking
from difftilt.sampling.protocol import Kernel, Reduction, Sampler, Step
from difftilt.sampling.solvers import EulerSolver
from difftilt.sampling.steps import GaussianStep


@dataclass(frozen=True)
class Preset:
    """How steps are drawn and scored, in rollout and replay alike.

    Attributes:
        name: recorded with the experience; replay under another preset is refused.
        kernel: the step.
        reduce: over the dimensions of a latent.
        score: ``density`` or the ``squared_error`` of CPS.
        draw_floor: smallest std that a draw uses.
        score_floor: smallest std that a log-probability uses.
        clamp: bounds of each dimension's log-probability before the reduction (DPPO: -5, 2).
        clip_range: default of the clipped surrogate under this convention at image dimensions.
    """

    name: str
    kernel: Kernel
    reduce: Reduction = "mean"
    score: Literal["density", "squared_error"] = "density"
    draw_floor: float = 0.0
    score_floor: float = 0.0
    clamp: tuple[float, float] | None = None
    clip_range: float = 1e-4

    def step(self, prediction: Prediction, x_t: Tensor, t: Tensor, s: Tensor) -> Step:
        """The step that draws."""
        step = self.kernel(prediction, x_t, t, s)
        return step.floored(self.draw_floor) if isinstance(step, GaussianStep) else step

    def log_prob(self, step: Step, x_s: Shaped[Tensor, "batch *shape"]) -> Float[Tensor, " batch"]:
        """What enters the ratio: log-density or negative squared error of x_s, reduced by the preset's rule."""
        if self.score == "squared_error":
            if not isinstance(step, GaussianStep):
                raise TypeError("the squared error is defined for Gaussian steps only")
            return step.squared_error(x_s, reduce=self.reduce)
        if isinstance(step, GaussianStep):
            step = step.floored(self.score_floor)
        return step.log_prob(x_s, reduce=self.reduce, clamp=self.clamp)


def flow_sde(a: float = 0.7) -> Preset:
    """Flow-GRPO."""
    return Preset("flow_sde", FlowSDE(a))


def dance_sde(eta: float = 0.3) -> Preset:
    """DanceGRPO."""
    return Preset("dance_sde", DanceSDE(eta))


def stepwise_sde(times: tuple[float, ...], rates: tuple[float, ...]) -> Preset:
    """DenseGRPO: one calibrated rate for every step of a grid."""
    return Preset("stepwise_sde", StepwiseSDE(times, rates))


def cps(a: float = 0.7) -> Preset:
    """Coefficient-preserving sampling."""
    return Preset("cps", CPS(a), score="squared_error", clip_range=1e-5)


def ddim(eta: float = 1.0) -> Preset:
    """DDPO on DDIM steps."""
    return Preset("ddim", DDIM(eta))


def euler() -> Preset:
    """The ODE: no density."""
    return Preset("euler", Euler())


def unmasking() -> Preset:
    """Masked tokens; the density of a step is the sum over positions."""
    return Preset("unmasking", Unmasking(), reduce="sum", clip_range=0.2)


def default_sampler(process: Process, steps: int = 50) -> Sampler:
    """A stochastic sampler on a uniform grid for a model that comes without one: DDIM with eta 1, or unmasking."""
    kernel = DDIM(1.0) if isinstance(process, GaussianProcess) else Unmasking()
    return Sampler(uniform_grid(steps), kernel, EulerSolver() if isinstance(process, GaussianProcess) else None)
