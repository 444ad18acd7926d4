"""One noise rate per step, raised while the gains of the step stay balanced in sign (DenseGRPO, arXiv 2601.20218)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.process.gaussian import GaussianProcess
from difftilt.sampling.completion import Grid
from difftilt.sampling.kernels import DanceSDE, FlowSDE, largest_rates
from difftilt.sampling.presets import Preset, stepwise_sde
from difftilt.sampling.protocol import Kernel
from difftilt.training.experience import PromptBatch
from difftilt.training.protocol import Run
from difftilt.trees import take

Rates = Float[Tensor, " steps"]
Signs = Int[Tensor, "steps three"]

KEPT = 0.1
"""Share of x_t that the largest rate leaves in the mean of a step; at 0 the Euler rule is about to overshoot."""
FLOOR = 0.1
"""The smallest rate, over the rate that the calibration begins with: a step that is scored needs noise."""


class CalibrationConfig(Config):
    """Rounds before training that set the noise rate of every step."""

    calibration_rounds: int | None = Field(default=None, ge=0)
    """Changes of the noise rates before training: None is as many as the chains of one iteration pay for, at least one;
    0 keeps the rates of the kernel."""
    calibration_samples: int = Field(default=32, ge=8)
    """Chains of one round."""
    calibration_tolerance: float = Field(default=0.25, gt=0, lt=1)
    """Balanced is |#positive - #negative| below so many times the number of gains that are not 0."""
    calibration_change: float = Field(default=0.05, gt=0)
    """By how much a round moves a rate."""

    @property
    def calibrated(self) -> bool:
        """Whether there is anything to calibrate."""
        return self.calibration_rounds != 0

    def rounds(self, chains: int) -> int:
        """Rounds of a method whose iteration has so many chains."""
        return (
            max(1, chains // self.calibration_samples) if self.calibration_rounds is None else self.calibration_rounds
        )

    def check(self, kernel: Kernel) -> None:
        """Refuse a kernel without a rate."""
        if self.calibrated and not isinstance(kernel, FlowSDE | DanceSDE):
            raise UserError(
                "method.calibration_rounds sets the rates of an SDE: set method.kernel to flow_sde or dance_sde, or "
                "calibration_rounds to 0"
            )


@dataclass(frozen=True)
class Calibration:
    """What is kept of a calibration, on the CPU.

    Attributes:
        rates: psi, the diffusion coefficient of every step of the grid, float64; NaN before they are known.
        signs: positive, negative and zero gains of every step in the last round.
    """

    rates: Rates
    signs: Signs

    @classmethod
    def none(cls, steps: int) -> "Calibration":
        """Not yet calibrated."""
        return cls(torch.full((steps,), torch.nan, dtype=torch.float64), torch.zeros(steps, 3, dtype=torch.int64))

    @property
    def done(self) -> bool:
        """Whether the rates are known."""
        return not bool(self.rates.isnan().any())


def calibrated_preset(grid: Grid, calibration: Calibration) -> Preset:
    """The SDE with the calibrated rates."""
    return stepwise_sde(tuple(grid[:-1].tolist()), tuple(calibration.rates.tolist()))


def calibrate(
    run: Run,
    config: CalibrationConfig,
    grid: Grid,
    kernel: Kernel,
    measure: Callable[[PromptBatch, Preset], Float[Tensor, "samples gains"]],
    used: int,
) -> Calibration:
    """Rates found by round after round, each measured under those of the round before.

    The rate of the last step stays, which is never trained.

    Args:
        run: gives prompts; everything that ``measure`` does is counted in its ledger.
        config: of the calibration.
        grid: of the rollouts.
        kernel: whose rates begin.
        measure: gains of the chains of a batch under a preset, of all steps of the grid but the last.
        used: chains of an iteration; noise indices below it are its own.
    """
    process = run.task.model.process
    assert isinstance(process, GaussianProcess)
    assert isinstance(kernel, FlowSDE | DanceSDE)
    first, smallest, largest = rate_bounds(process, grid, kernel)
    found = Calibration(first, torch.zeros(len(first), 3, dtype=torch.int64))
    for batch in draws(run, config.rounds(used), config.calibration_samples, used):
        gains = measure(batch, calibrated_preset(grid, found))
        signs = torch.cat([count_signs(run.gather(gains)[0]).cpu(), found.signs[-1:]])
        rates = adjusted(found.rates, signs, config.calibration_tolerance, config.calibration_change)
        found = Calibration(rates.clamp(smallest, largest), signs)
    return found


def draws(run: Run, rounds: int, samples: int, used: int) -> list[PromptBatch]:
    """This process's part of the batch of every round: prompts and noise of its own, every chain a group.

    The rounds deal out one run of the sequence of prompts among them, so a round holds the same chains however many
    processes there are.
    """
    every = run.prompts(rounds * samples, 1)
    processes = rounds * samples // len(every.index)
    if samples % processes:
        raise UserError(
            f"method.calibration_samples = {samples} does not divide among {processes} processes: use a multiple of "
            f"{processes}"
        )
    own = replace(every, index=every.index + used, group=every.index + used)
    return [take(own, (every.index % rounds == number).nonzero()[:, 0]) for number in range(rounds)]


def rate_bounds(process: GaussianProcess, grid: Grid, kernel: FlowSDE | DanceSDE) -> tuple[Rates, Rates, Rates]:
    """(first, smallest, largest) rate of every step, float64: first is the kernel's own, where it is allowed.

    The largest keeps 1 - g²·(t - s)/(2t) (of rectified flow) at ``KEPT``.
    """
    t, s = grid[:-1].double(), grid[1:].double()
    largest = largest_rates(process, t, s) * (1 - KEPT) ** 0.5
    first = torch.minimum(kernel.coefficient(process, t, s), largest)
    return first, FLOOR * first, largest


def count_signs(gains: Float[Tensor, "samples steps"]) -> Signs:
    """How many gains of each step are positive, negative and 0."""
    return torch.stack([(gains > 0).sum(0), (gains < 0).sum(0), (gains == 0).sum(0)], 1)


def adjusted(rates: Rates, signs: Signs, tolerance: float, change: float) -> Rates:
    """Psi + change where |#positive - #negative| < tolerance·(#positive + #negative), else psi - change.

    Ties decide nothing: they are left out of both sides, and a step with nothing else keeps its rate. The paper
    compares with a fixed number, 2; but the difference of a balanced step has standard deviation sqrt(N), so its rate
    would mostly fall.
    """
    positive, negative = signs[:, 0], signs[:, 1]
    decided = positive + negative
    balanced = (positive - negative).abs() < tolerance * decided
    return torch.where(decided > 0, torch.where(balanced, rates + change, rates - change), rates)
