"""Tasks whose tilted law is known, and how far weighted samples of a steerer are from it.

The ring has eight modes, 16 exact steps and r = x_1 at temperature 1/0.6; short sequences are enumerated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from difftilt.models.denoiser import denoiser
from difftilt.models.markov import MarkovPosterior
from difftilt.models.protocol import GenerativeModel
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.base import FunctionReward
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.statistics.discrete import enumerate_sequences, histogram, sequence_codes, tilted, total_variation
from difftilt.steering.protocol import Steered, Steerer
from difftilt.testbeds.enumeration import chain_law
from difftilt.testbeds.exact_chain import exact_chain, nearest_mode, ring_mixture
from difftilt.training.protocol import Task

Law = Tensor
"""Probabilities of the outcomes, float64; of several runs (runs, outcomes)."""


@dataclass(frozen=True)
class Truth:
    """A task whose tilted law is known.

    Attributes:
        task: what to steer.
        temperature: of the tilt.
        law: of the outcomes under the tilt.
        log_z: log E_p[exp(r/temperature)].
        outcome: samples -> index of the outcome.
    """

    task: Task
    temperature: float
    law: Law
    log_z: float
    outcome: Callable[[Tensor], Tensor]


@cache
def ring_truth() -> Truth:
    """Eight equal modes, r = x_1, temperature 1/0.6; outcomes are the modes."""
    mixture, temperature = ring_mixture(), 1 / 0.6
    tilted = mixture.tilted_linear(torch.tensor([1.0, 0.0]), temperature)
    task = exact_chain(mixture, lambda x: x[:, 0])
    law = tilted.mixture.weights.double()
    return Truth(task, temperature, law, float(tilted.log_z), lambda x: nearest_mode(mixture, x))


def sequence_reward(x: Tensor) -> Tensor:
    """Number of "01" pairs, and 0.7 for at least four 2s."""
    pairs = ((x[:, :-1] == 0) & (x[:, 1:] == 1)).sum(-1)
    return pairs + 0.7 * ((x == 2).sum(-1) >= 4)


def sequences(rows: Sequence[Sequence[float]], temperature: float = 0.5) -> Truth:
    """Six tokens over three symbols unmasked in six steps; the truth is the tilted law of this chain, enumerated.

    Args:
        rows: law of the token after each symbol; the first one has the law (0.5, 0.3, 0.2).
        temperature: of the tilt.
    """
    network, process = MarkovPosterior(torch.tensor([0.5, 0.3, 0.2]), torch.tensor(rows), 6), MaskedProcess(3)
    model = GenerativeModel(network, process, "logits", (6,), lambda prompts: None, lambda x: x, dtype_tokens=True)
    reward, grid = FunctionReward("pairs", lambda samples: sequence_reward(samples.media)), uniform_grid(6)
    task = Task("sequences", model, reward, ("",), ("",), Sampler(grid, Unmasking()))
    base, rewards = chain_law(network, process, 6, grid), sequence_reward(enumerate_sequences(3, 6)).double()
    log_z = float((base.log() + rewards / temperature).logsumexp(0))
    return Truth(task, temperature, tilted(base, rewards, temperature), log_z, lambda x: sequence_codes(x, 3))


@cache
def sequence_truth() -> Truth:
    """Neighbours depend on one another."""
    return sequences([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]])


def steer(steerer: Steerer, task: Task, runs: int, seed: int = 0) -> Steered:
    """``runs`` independent runs as so many prompts."""
    with torch.no_grad():
        return steerer.steer(task, denoiser(task.model), task.reward, [""] * runs, Noise(seed))


def laws(truth: Truth, steered: Steered) -> Law:
    """Weighted histogram of every run, (runs, outcomes)."""
    runs, outcomes = len(steered.log_z), len(truth.law)
    code = steered.group * outcomes + truth.outcome(steered.x_0)
    return (histogram(code, runs * outcomes, steered.weight) * runs).reshape(runs, outcomes)


def distance(truth: Truth, steered: Steered) -> float:
    """Total variation between the histogram averaged over the runs and the truth."""
    return float(total_variation(laws(truth, steered).mean(0), truth.law))


def rms_error(truth: Truth, steered: Steered) -> float:
    """Root mean square over the runs of the Euclidean distance between a run's histogram and the truth."""
    return float((laws(truth, steered) - truth.law).square().sum(-1).mean().sqrt())


def slope(particles: Sequence[int], errors: Sequence[float]) -> float:
    """Least-squares slope of log error against log number of particles."""
    x = torch.tensor([math.log(k) for k in particles], dtype=torch.float64)
    y = torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def z_ratio(truth: Truth, steered: Steered) -> Tensor:
    """Estimate of Z over its truth, of each run."""
    return (steered.log_z - truth.log_z).exp()


def z_score(truth: Truth, steered: Steered) -> float:
    """Standard errors between the mean of Z's estimate and the truth."""
    ratio = z_ratio(truth, steered)
    return float((ratio.mean() - 1).abs() / (ratio.std() / math.sqrt(len(ratio))))
