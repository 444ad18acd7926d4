"""FK steering: exact on a Gaussian-mixture chain and on enumerable sequences; biased where carried weights are dropped.

The ring chain has eight modes, 16 exact steps and r = x_1 at temperature 1/0.6; particles are weighted at every second
step and resampled by the ESS rule. Runs are prompts of one flat batch.
"""

from functools import cache
from typing import Any

from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.tilted_truths import (
    Truth,
    distance,
    laws,
    ring_truth,
    rms_error,
    sequence_reward,
    sequence_truth,
    slope,
    steer,
    z_ratio,
    z_score,
)
from difftilt.models.mixture import GaussianMixture
from difftilt.statistics.discrete import enumerate_sequences
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.steering.protocol import Steered, Steerer
from difftilt.testbeds.exact_chain import exact_chain, ring_mixture
from difftilt.training.protocol import Task


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
