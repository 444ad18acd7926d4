"""FK steering: exact on a Gaussian-mixture chain and on enumerable sequences; biased where carried weights are dropped.

The ring chain has eight modes, 16 exact steps and r = x_1 at temperature 1/0.6; particles are weighted at every second
step and resampled by the ESS rule. Runs are prompts of one flat batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.models.markov import MarkovPosterior
from difftilt.models.mixture import GaussianMixture
from difftilt.models.protocol import GenerativeModel
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.base import FunctionReward
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.statistics.discrete import enumerate_sequences, histogram, sequence_codes, tilted, total_variation
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
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


def fk(truth: Truth, runs: int, **settings: Any) -> Steered:
    """Runs of FK steering at the temperature of the truth, with the reference's multinomial resampling."""
    config = {"temperature": truth.temperature, "resample_at": 2, "resampler": "multinomial", **settings}
    return steer(FKSteering(FKSteeringConfig.model_validate(config)), truth.task, runs)


@cache
def _ring_runs(particles: int, runs: int, potential: str = "difference", compat: str | None = None) -> Steered:
    return fk(ring_truth(), runs, particles=particles, potential=potential, compat=compat)


@cache
def _sequence_runs(particles: int, runs: int) -> Steered:
    return fk(sequence_truth(), runs, particles=particles, resample_at=1)


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


def _ring_slope(compat: str | None) -> float:
    sizes = {16: 400, 64: 200, 256: 100}
    return slope([*sizes], [rms_error(ring_truth(), _ring_runs(k, n, "difference", compat)) for k, n in sizes.items()])


def _sequence_slope() -> float:
    sizes = {64: 200, 256: 100, 1024: 50}
    return slope([*sizes], [rms_error(sequence_truth(), _sequence_runs(k, n)) for k, n in sizes.items()])


def _sequence_bias_slope() -> float:
    truth, sizes = sequence_truth(), {16: 4000, 64: 4000}
    reward = sequence_reward(enumerate_sequences(3, 6)).double()
    biases = [abs(float((laws(truth, _sequence_runs(k, n)).mean(0) - truth.law) @ reward)) for k, n in sizes.items()]
    return slope([*sizes], biases)


def _spread(potential: str) -> float:
    return float(_ring_runs(32, 400, potential).log_z.std())


RARE_SETTINGS = {"particles": 8, "temperature": 1 / 8, "resample_at": (4, 8, 12), "resample": "always"}


@cache
def _rare() -> tuple[Task, GaussianMixture]:
    """The rare mode at angle 0 has mass 0.004; the reward is a bump of width 2.5 about it; 32 steps."""
    mixture = ring_mixture([0.004] + [0.996 / 7] * 7)
    peak = mixture.means[0]
    return exact_chain(mixture, lambda x: (-(x - peak).square().sum(-1) / (2 * 2.5**2)).exp(), 32), mixture


@cache
def _best(name: str) -> Tensor:
    """Best reward of each of 400 runs with 8 particles."""
    if name == "best-of-n":
        steerer: Steerer = BestOfN(BestOfNConfig(particles=8))
    else:
        steerer = FKSteering(FKSteeringConfig.model_validate({**RARE_SETTINGS, "potential": name}))
    steered = steer(steerer, _rare()[0], 400)
    return steered.rewards[steered.best]


def _advantage(name: str) -> float:
    """Standard errors by which the mean best reward exceeds that of best-of-n."""
    mine, theirs = _best(name), _best("best-of-n")
    return float((mine.mean() - theirs.mean()) / ((mine.var() + theirs.var()) / len(mine)).sqrt())


PROOFS = (
    Proof(
        "ring chain, difference, ESS rule, 256 particles, 100 runs: the mode histogram has the tilted law (TV)",
        lambda: distance(ring_truth(), _ring_runs(256, 100)),
        at_most=0.02,
    ),
    Proof(
        "ring chain: the mean of Z's estimate is Z (in standard errors)",
        lambda: z_score(ring_truth(), _ring_runs(256, 100)),
        at_most=3,
    ),
    Proof(
        "ring chain: the error of one run falls as K^-1/2 (slope of log error on log K)",
        lambda: _ring_slope(None),
        at_least=-0.6,
        at_most=-0.4,
    ),
    Proof(
        "ablation: without the carried weights the mode histogram is not the tilted law (TV)",
        lambda: distance(ring_truth(), _ring_runs(256, 100, "difference", "reference")),
        at_least=0.2,
    ),
    Proof(
        "ablation: without the carried weights Z is underestimated (mean of its estimate over Z)",
        lambda: float(z_ratio(ring_truth(), _ring_runs(256, 100, "difference", "reference")).mean()),
        at_least=0.5,
        at_most=0.7,
    ),
    Proof(
        "ablation: without the carried weights more particles hardly help (slope of log error on log K)",
        lambda: _ring_slope("reference"),
        at_least=-0.25,
    ),
    Proof(
        "ring chain, 32 particles: log Z varies more under max than under difference (ratio of sd)",
        lambda: _spread("max") / _spread("difference"),
        at_least=1.5,
    ),
    Proof(
        "ring chain, 32 particles: log Z varies more under sum than under max (ratio of sd)",
        lambda: _spread("sum") / _spread("max"),
        at_least=1.5,
    ),
    Proof(
        "ring chain, 32 particles: difference and importance sampling vary alike where the tilt is mild (ratio of sd)",
        lambda: _spread("difference") / _spread("importance"),
        at_least=0.7,
        at_most=1.4,
        long=True,
    ),
    Proof(
        "rare mode, 8 particles, difference: mean best reward against best-of-8 (difference in standard errors)",
        lambda: _advantage("difference"),
        at_least=4,
    ),
    Proof(
        "rare mode, 8 particles, max: mean best reward against best-of-8 (difference in standard errors)",
        lambda: _advantage("max"),
        at_least=4,
        long=True,
    ),
    Proof(
        "sequences, 256 particles, 100 runs: distance (TV) to the enumerated tilted law (the base: 0.44)",
        lambda: distance(sequence_truth(), _sequence_runs(256, 100)),
        at_most=0.1,
    ),
    Proof(
        "sequences: the mean of Z's estimate is Z (in standard errors)",
        lambda: z_score(sequence_truth(), _sequence_runs(256, 100)),
        at_most=3,
    ),
    Proof(
        "sequences: the error of one run falls as K^-1/2 (slope of log error on log K)",
        _sequence_slope,
        at_least=-0.6,
        at_most=-0.4,
        long=True,
    ),
    Proof(
        "sequences: the bias of the mean reward falls as 1/K (slope of log bias on log K)",
        _sequence_bias_slope,
        at_least=-1.2,
        at_most=-0.75,
        long=True,
    ),
)
