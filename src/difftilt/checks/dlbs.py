"""DLBS: the lookahead sees past a decoy that blurred predictions fall for, and beams take wrong decisions back.

The ring has eight modes and exact predictions, 30 DDIM steps with eta 1, lookahead times on the same 30. The reward has
a narrow peak beside the mode at angle 0, and a *decoy* of height 0.45 at the mean of all modes, where no sample lies
but predictions at high noise do. 200 repetitions.
"""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.tilted_truths import steer
from difftilt.models.denoiser import denoiser
from difftilt.process.protocol import Process
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.calibration import Calibration, calibrate
from difftilt.sampling.kernels import DDIM
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.rollout import rollout
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.dlbs import DLBS, DLBSConfig
from difftilt.steering.protocol import Steered
from difftilt.testbeds.exact_chain import exact_chain, ring_mixture
from difftilt.training.protocol import Task
from difftilt.values.estimates import LatentReward, Lookahead
from difftilt.values.protocol import Rows

STEPS = 30
RUNS = 200
LOOKAHEADS = (1, 2, 3, 6, 10)


def decoy_reward(x: Tensor) -> Tensor:
    """A peak of width 0.5 at (4.4, 0), which is what is wanted, and the decoy at 0."""
    peak = x - x.new_tensor([4.4, 0.0])
    return (-peak.square().sum(-1) / (2 * 0.5**2)).exp() + 0.45 * (-x.square().sum(-1) / 2).exp()


@cache
def ring_task(steps: int = STEPS) -> Task:
    """The ring by DDIM with eta 1; its last step has no noise."""
    task = exact_chain(ring_mixture(), decoy_reward, steps)
    return Task("decoy", task.model, task.reward, ("",), ("",), Sampler(task.sampler.grid, DDIM(1.0)))


@cache
def beams(particles: int, children: int, lookahead: int) -> Steered:
    """B beams of K children, with so many evaluations ahead."""
    config = DLBSConfig(particles=particles, children=children, lookahead=lookahead, clock=STEPS)
    return steer(DLBS(config), ring_task(), RUNS)


@cache
def best_of(count: int) -> Steered:
    """The best of so many."""
    return steer(BestOfN(BestOfNConfig(particles=count)), ring_task(), RUNS)


def score(steered: Steered) -> float:
    """Mean over the repetitions of the best reward."""
    return float(steered.rewards[steered.best].mean())


@cache
def estimate_errors() -> dict[int, float]:
    """Evaluations -> mean distance of the estimate from t = 20/30 to the solution of the ODE on all 20 steps left."""
    task, index = ring_task(), torch.arange(1000)
    model, process, t = denoiser(task.model), task.model.process, torch.full((1000,), 20 / STEPS)
    x_0 = ring_mixture().sample(Noise(1).normal(index, (3,), purpose="data"))
    x = _corrupted(process, x_0, t)
    with torch.no_grad():
        ode, rest = Preset("ode", DDIM(0.0)), task.sampler.grid[STEPS - 20 :]
        exact = rollout(model, ode, rest, x, None, noise=Noise(0), index=index).x_0
        rows, prediction = Rows(index, torch.zeros_like(index), STEPS - 20), model(x, t, None)
        found: dict[int, float] = {}
        for count in LOOKAHEADS:
            # a value is one number for each state: the reward is asked for one coordinate after the other
            values = [
                Lookahead(_coordinate(axis, task), model, count, STEPS)(x, t, None, prediction, rows) for axis in (0, 1)
            ]
            found[count] = float((torch.stack(values, -1) - exact).norm(dim=-1).mean())
    return found


def _corrupted(process: Process, x_0: Tensor, t: Tensor) -> Tensor:
    return process.corrupt(x_0, t, Noise(1).normal(torch.arange(len(x_0)), (2,), purpose="noise"))


def _coordinate(axis: int, task: Task) -> LatentReward:
    reward = FunctionReward("coordinate", lambda samples: samples.media[:, axis])
    return LatentReward(reward, task.model.decode, ("",), denoiser(task.model).ledger)


def _largest_ratio() -> float:
    errors = [estimate_errors()[count] for count in LOOKAHEADS]
    return max(later / earlier for earlier, later in pairwise(errors))


@cache
def calibrated() -> Calibration:
    """Three independent metrics of 400 samples; the oracle is 0.25·a + 1·b and noise of standard deviation 0.5."""
    metrics = Noise(3).normal(torch.arange(400), (4,), purpose="metrics").double()
    oracle = 0.25 * metrics[:, 0] + metrics[:, 1] + 0.5 * metrics[:, 3]
    return calibrate({"a": metrics[:, 0], "b": metrics[:, 1], "c": metrics[:, 2]}, oracle)


def _calibration_error() -> float:
    """Largest difference between fitted and true weights, both with the largest 1."""
    weights = list(calibrated().weights.values())
    return max(abs(mine / max(weights) - true) for mine, true in zip(weights, (0.25, 1.0, 0.0), strict=True))


PROOFS = (
    Proof(
        "with 1, 2, 3, 6, 10 evaluations the estimate from t = 20/30 comes nearer to the ODE's end every time (largest "
        "ratio of neighbouring errors)",
        _largest_ratio,
        at_most=0.75,
    ),
    Proof(
        "one evaluation ahead: greedy with 8 children falls for the decoy (mean reward)",
        lambda: score(beams(1, 8, 1)),
        at_most=0.65,
    ),
    Proof(
        "six evaluations ahead: greedy with 8 children finds the peak (mean reward)",
        lambda: score(beams(1, 8, 6)),
        at_least=0.97,
        long=True,
    ),
    Proof(
        "32 candidates, one evaluation ahead: 8 beams of 4 children find the peak (mean reward)",
        lambda: score(beams(8, 4, 1)),
        at_least=0.97,
        long=True,
    ),
    Proof(
        "ablation: 32 candidates, one evaluation ahead: one beam of 32 children falls for the decoy (mean reward)",
        lambda: score(beams(1, 32, 1)),
        at_most=0.35,
        long=True,
    ),
    Proof(
        "8 beams of 4 children, one evaluation ahead, against the best of 128 at four times the calls (difference)",
        lambda: score(beams(8, 4, 1)) - score(best_of(128)),
        at_least=0.02,
        long=True,
    ),
    Proof(
        "8 candidates, one evaluation ahead: 2 beams against one (difference of mean rewards)",
        lambda: score(beams(2, 4, 1)) - score(beams(1, 8, 1)),
        at_least=0.1,
        long=True,
    ),
    Proof(
        "8 candidates, one evaluation ahead: 4 beams against 2 (difference of mean rewards)",
        lambda: score(beams(4, 2, 1)) - score(beams(2, 4, 1)),
        at_least=0.05,
        long=True,
    ),
    Proof(
        "8 candidates, 4 beams of 2 children, 6 evaluations ahead: mean reward",
        lambda: score(beams(4, 2, 6)),
        at_least=0.95,
        long=True,
    ),
    Proof(
        "calibration recovers the weights 0.25, 1, 0 of the oracle (largest difference, in proportion)",
        _calibration_error,
        at_most=0.01,
    ),
    Proof(
        "the calibrated sum correlates with the oracle more than its best metric alone (difference)",
        lambda: calibrated().correlation - max(calibrated().alone.values()),
        at_least=0.005,
    ),
)
