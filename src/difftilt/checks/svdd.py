"""SVDD: with the soft value it draws the tilted law as M grows; other values stop at their bias, greedy collapses.

The ring chain has eight modes, 16 exact steps and r = x_1 at temperature 1/0.6, 3000 samples. The sequences have six
independent tokens over three symbols, revealed in six steps, at temperature 0.5, 20000 samples; the law of infinitely
many children is enumerated, so biases of values are seen without sampling error.
"""

import math
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.tilted_truths import Truth, ring_truth, sequence_reward, sequences, steer
from difftilt.models.denoiser import denoiser
from difftilt.models.process_reward import ProcessReward
from difftilt.process.gaussian import GaussianProcess
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import start_state
from difftilt.statistics.correlation import correlation
from difftilt.statistics.discrete import enumerate_sequences, histogram, total_variation
from difftilt.steering.protocol import Steered
from difftilt.steering.svdd import SVDD, SVDDConfig
from difftilt.testbeds.enumeration import StateTable, chain_mean, chain_soft_value, decoded_law
from difftilt.testbeds.exact_chain import ring_mixture
from difftilt.values.estimates import ClosedForm
from difftilt.values.learned import Regression, ValueFunction
from difftilt.values.protocol import Value
from difftilt.values.recorded import record_states

Named = Literal["soft", "mean", "posterior_mean"]
"""Whose value: the exact soft value, the exact E[r(x_0) | x_t], or the reward of the point prediction."""

LOW = 0.3
"""Temperature at which the mean is a bad value."""


@cache
def independent_truth(temperature: float = 0.5) -> Truth:
    """Tokens that do not depend on one another."""
    return sequences([[0.5, 0.3, 0.2]] * 3, temperature)


@cache
def _table(named: Named, temperature: float = 0.5) -> StateTable:
    """A value of the sequences, for all states; at t = 0 the reward, which is what decoding asks there."""
    truth = independent_truth(temperature)
    process, network = cast(MaskedProcess, truth.task.model.process), truth.task.model.network
    rewards, grid = sequence_reward(enumerate_sequences(3, 6)).double(), truth.task.sampler.grid
    if named == "soft":
        return chain_soft_value(network, process, 6, grid, rewards, temperature)
    if named == "mean":
        return chain_mean(network, process, 6, grid, rewards)
    return _tabulated(lambda x, t, c: sequence_reward(process.predict(network(x, t, None), x, t, "logits").x0))


@torch.no_grad()
def _tabulated(function: ValueFunction, temperature: float = 0.5) -> StateTable:
    """A value of the sequences before the end as a table, the reward at the end."""
    exact, every = _table("soft", temperature), enumerate_sequences(4, 6)
    before = [function(every, torch.full((len(every),), t), None).double() for t in exact.grid.tolist()[:-1]]
    return StateTable(exact.symbols, exact.grid, torch.stack([*before, exact.table[-1]]))


def bias(table: StateTable, temperature: float = 0.5) -> float:
    """Total variation between the law of infinitely many children and the tilted law."""
    truth = independent_truth(temperature)
    law = decoded_law(truth.task.model.network, cast(MaskedProcess, truth.task.model.process), 6, table, temperature)
    return float(total_variation(law, truth.law))


def exact_value(truth: Truth, named: Named) -> Value | None:
    """The value in closed form or by enumeration; None leaves it to the settings."""
    process = truth.task.model.process
    if named == "posterior_mean":
        return None
    if isinstance(process, GaussianProcess):
        slope = torch.tensor([1.0, 0.0])
        return ClosedForm(lambda x, t, c: ring_mixture().soft_value_linear(process, x, t, slope, truth.temperature))
    table = _table(named)
    return ClosedForm(lambda x, t, c: table(x, t))


def decode(truth: Truth, named: Named, children: int, runs: int, **settings: Any) -> Steered:
    """``runs`` samples, one for each prompt."""
    config = SVDDConfig.model_validate({"temperature": truth.temperature, **settings, "children": children})
    return steer(SVDD(config, value=exact_value(truth, named)), truth.task, runs)


@cache
def _ring(named: Named, children: int, runs: int = 3000) -> Steered:
    return decode(ring_truth(), named, children, runs)


@cache
def _greedy_ring() -> Steered:
    return decode(ring_truth(), "posterior_mean", 16, 1000, temperature=0.0)


@cache
def _tokens(named: Named, children: int) -> Steered:
    return decode(independent_truth(), named, children, 20000)


@cache
def _greedy_tokens() -> Steered:
    return decode(independent_truth(), "soft", 64, 20000, temperature=0.0)


def sample_distance(truth: Truth, steered: Steered) -> float:
    """Total variation between the histogram of all samples and the truth."""
    return float(total_variation(histogram(truth.outcome(steered.x_0), len(truth.law)), truth.law))


def noise_floor(truth: Truth, samples: int) -> float:
    """Expected total variation between a law and so many samples of it: Σ sqrt(p·(1 - p)/(2·π·n))."""
    return float((truth.law * (1 - truth.law) / (2 * math.pi * samples)).sqrt().sum())


def _distinct(truth: Truth, steered: Steered) -> int:
    return len(truth.outcome(steered.x_0).unique())


@cache
def _fitted(regression: Regression) -> ProcessReward:
    """The learned value of the sequences at the low temperature, from 16384 rollouts."""
    task, settings = independent_truth(LOW).task, {"value": "learned", "temperature": LOW, "regression": regression}
    steerer = SVDD(SVDDConfig.model_validate({**settings, "fit_samples": 16384, "fit_updates": 2000}))
    steerer.fit(task, denoiser(task.model), task.reward, [""], Noise(1))
    return steerer.network(task)


@cache
def _agreement(regression: Regression) -> Tensor:
    """Correlation of the learned value with the enumerated soft value on 4000 new rollouts, by time, noise first.

    The all-mask state, where nothing varies, is left out.
    """
    task, index, network = independent_truth(LOW).task, torch.arange(4000), _fitted(regression)
    start = start_state(task.model.process, Noise(9), index, (6,))
    states = record_states(
        denoiser(task.model), task.sampler, start, None, sequence_reward, noise=Noise(9), index=index
    )
    exact = _table("soft", LOW)(states.x, states.t)
    with torch.no_grad():
        found = network(states.x, states.t)
    return correlation(found.reshape(-1, 4000), exact.reshape(-1, 4000))[1:]


def _base_distance() -> float:
    """Of the untilted ring to its tilt."""
    return float(total_variation(torch.full((8,), 1 / 8), ring_truth().law))


PROOFS = (
    Proof(
        "ring chain, one child: the distance (TV) of the modes to the tilted law, against the base's own (difference)",
        lambda: abs(sample_distance(ring_truth(), _ring("soft", 1)) - _base_distance()),
        at_most=0.04,
    ),
    Proof(
        "ring chain, exact value, 4 children: distance (TV) of the modes to the tilted law",
        lambda: sample_distance(ring_truth(), _ring("soft", 4)),
        at_least=0.07,
        at_most=0.14,
    ),
    Proof(
        "ring chain, exact value, 16 children: distance (TV) of the modes to the tilted law (own samples: 0.014)",
        lambda: sample_distance(ring_truth(), _ring("soft", 16)),
        at_most=0.05,
    ),
    Proof(
        "ring chain, exact value, 64 children: distance (TV) of the modes to the tilted law (own samples: 0.014)",
        lambda: sample_distance(ring_truth(), _ring("soft", 64)),
        at_most=0.03,
        long=True,
    ),
    Proof(
        "ablation: ring chain, reward of the posterior mean, 64 children: the distance (TV) stops at its bias",
        lambda: sample_distance(ring_truth(), _ring("posterior_mean", 64)),
        at_least=0.03,
        at_most=0.08,
        long=True,
    ),
    Proof(
        "ablation: ring chain, greedy with 16 children ends in so many modes",
        lambda: _distinct(ring_truth(), _greedy_ring()),
        at_most=1,
    ),
    Proof(
        "ablation: ring chain, greedy with 16 children goes beyond the tilted law's mean reward of 3.07 to",
        lambda: float(_greedy_ring().rewards.mean()),
        at_least=5.0,
    ),
    Proof(
        "sequences, soft value: infinitely many children draw the tilted law (TV, enumerated)",
        lambda: bias(_table("soft")),
        at_most=1e-9,
    ),
    Proof(
        "ablation: sequences, mean in place of the soft mean: the bias (TV, enumerated) stays",
        lambda: bias(_table("mean")),
        at_least=0.05,
    ),
    Proof(
        "ablation: sequences, reward of the most likely completion: the bias (TV, enumerated) stays",
        lambda: bias(_table("posterior_mean")),
        at_least=0.15,
    ),
    Proof(
        "sequences, soft value, 4 children: distance (TV) of 20000 samples to the tilted law",
        lambda: sample_distance(independent_truth(), _tokens("soft", 4)),
        at_least=0.15,
        at_most=0.22,
    ),
    Proof(
        "sequences, soft value, 16 children: distance (TV) of 20000 samples to the tilted law",
        lambda: sample_distance(independent_truth(), _tokens("soft", 16)),
        at_most=0.09,
        long=True,
    ),
    Proof(
        "sequences, soft value, 64 children: distance (TV) above that of 20000 samples of the law itself",
        lambda: sample_distance(independent_truth(), _tokens("soft", 64)) - noise_floor(independent_truth(), 20000),
        at_most=0.01,
        long=True,
    ),
    Proof(
        "sequences, reward of the most likely completion, 16 children: the distance (TV) of 20000 samples stops",
        lambda: sample_distance(independent_truth(), _tokens("posterior_mean", 16)),
        at_least=0.15,
        at_most=0.21,
        long=True,
    ),
    Proof(
        "ablation: sequences, greedy with 64 children leaves so many of 729 sequences",
        lambda: _distinct(independent_truth(), _greedy_tokens()),
        at_most=100,
        long=True,
    ),
    Proof(
        "ablation: sequences, greedy with 64 children: distance (TV) to the tilted law",
        lambda: sample_distance(independent_truth(), _greedy_tokens()),
        at_least=0.6,
        long=True,
    ),
    Proof(
        "sequences at temperature 0.3, value learned from rollouts (stationary): correlation with the enumerated soft "
        "value at the time where it is lowest",
        lambda: float(_agreement("stationary").min()),
        at_least=0.95,
        long=True,
    ),
    Proof(
        "the same with mean regression: the correlation with the soft value rises towards t = 0 (last minus first)",
        lambda: float(_agreement("mean")[-1] - _agreement("mean")[0]),
        at_least=0.1,
        long=True,
    ),
    Proof(
        "the same, infinitely many children: the bias (TV, enumerated) under the value learned for the soft mean",
        lambda: bias(_tabulated(_fitted("stationary"), LOW), LOW),
        at_most=0.15,
        long=True,
    ),
    Proof(
        "ablation: the same with mean regression has the bias (TV, enumerated) of the exact mean, 0.22",
        lambda: bias(_tabulated(_fitted("mean"), LOW), LOW),
        at_least=0.18,
        long=True,
    ),
)
