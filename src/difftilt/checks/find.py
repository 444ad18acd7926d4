"""FIND: where its laws of noise come to rest, what its baseline and its clip are for, and what it gains.

Where the best law is known (``best_noise``: the bowl, mixtures with a linear reward), on a ring of modes and on digits.
Prompts are independent repetitions.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from difftilt.checks.best_noise import CENTRE, DIMENSIONS, bowl, expected, short_of_best, slope_gap
from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.steering.find import FIND, FINDConfig
from difftilt.steering.protocol import Steered
from difftilt.testbeds.digits import Config as DigitsConfig
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.mixtures import Config, Mixtures


def _resting(penalty: str) -> tuple[float, float]:
    """Slope of the mean on c and mean std at rest, where 16·kl_weight is the reward's weight."""
    policy = bowl(4, 250, rollouts=64, kl_weight=10 / DIMENSIONS, penalty=penalty).policy
    return float((policy.mean @ CENTRE).mean() / CENTRE.square().sum()), float(policy.std.mean())


def _off(penalty: str, mean: float, std: float) -> float:
    """Largest distance of the two from where they should rest."""
    found = _resting(penalty)
    return max(abs(found[0] - mean), abs(found[1] - std))


def _reward(**settings: Any) -> float:
    """Mean expected reward after 400 iterations of one rollout, 20 repetitions."""
    return float(expected(bowl(20, 400, **settings)).mean())


def _reuse_gain() -> float:
    """Standard errors between the expected rewards with and without reuse, at equal runs of the generator."""
    gap = expected(bowl(8, 150, reused=4)) - expected(bowl(8, 150))
    return float(gap.mean() / (gap.std() / len(gap) ** 0.5))


def _kl(**settings: Any) -> float:
    return float(bowl(20, 400, **settings).policy.kl_to_prior(reduce="sum").mean())


def _std(**settings: Any) -> float:
    return float(bowl(20, 400, **settings).policy.std.mean())


def _clipped(**settings: Any) -> float:
    """Share of draws outside the interval in the second half."""
    return float(bowl(20, 400, **settings).history["clipped"][200:].mean())


@cache
def _ring(baseline: str) -> Tensor:
    """Share of 400 fresh samples in the wanted one of eight modes: 12 repetitions, 100 iterations of 8 rollouts."""
    testbed = Mixtures(Config(steps=20, shift=1.0))
    means = testbed.mixture.means

    def hit(samples: Samples) -> Tensor:
        return (torch.cdist(samples.media, means).argmin(1) == 0).float()

    task, settings = testbed.task(), {"rollouts": 8, "learning_rate": 0.05, "value_hidden": 64, "samples": 400}
    find = FIND(FINDConfig.model_validate({"iterations": 100, "baseline": baseline, **settings}))
    steered = find.steer(task, denoiser(task.model), FunctionReward("hit", hit), [""] * 12, Noise(0))
    return steered.rewards.reshape(12, -1).mean(1)


RUNS, FRESH = 400, 64
"""Generator runs that learn, and fresh samples, of each prompt of digits."""


@cache
def digits(reward: str, learning: bool) -> Steered:
    """Fresh samples of six prompts: after 100 iterations of 4 rollouts, or as many plain runs as all that cost."""
    config = DigitsConfig.model_validate({"reward": reward, "guidance": 0.0 if reward == "digit" else 1.0})
    task = Digits(config).task()
    settings = {"iterations": 100, "rollouts": 4, "learning_rate": 0.05, "value_hidden": 64, "samples": FRESH}
    if not learning:
        settings = {"iterations": 0, "samples": RUNS + FRESH}
    find, model = FIND(FINDConfig.model_validate(settings)), denoiser(task.model, guidance=config.guidance)
    return find.steer(task, model, task.reward, task.heldout_prompts[:6], Noise(0))


def _digits_gain(reward: str) -> float:
    """Standard errors over prompts between the mean reward of fresh samples and of best-of-7, at equal runs in all."""
    size = (RUNS + FRESH) // FRESH
    mine = digits(reward, True).rewards.reshape(6, FRESH).mean(1)
    plain = digits(reward, False).rewards.reshape(6, -1)[:, : size * FRESH]
    gap = mine - plain.reshape(6, FRESH, size).amax(2).mean(1)
    return float(gap.mean() / (gap.std() / 6**0.5))


PRIOR = {"reference": "prior"}

PROOFS = (
    Proof(
        "bowl, quadratic penalty: mean and std come to rest at c·w/(w + D·k) and D·k/(w + D·k), here c/2 and 1/2 (gap)",
        lambda: _off("quadratic", 1 / 2, 1 / 2),
        at_most=0.04,
    ),
    Proof(
        "bowl, exact penalty: the best Gaussian of the tilted law at temperature k/w, here 2c/3 and 3^-1/2 (gap)",
        lambda: _off("exact", 2 / 3, 3**-0.5),
        at_most=0.04,
    ),
    Proof(
        "mixture of one Gaussian, linear reward: mean and std are those of the tilted law of the noise (gap)",
        slope_gap,
        at_most=0.05,
    ),
    Proof(
        "mixture of eight, linear reward: E[r] - KL of the learned law below the best diagonal Gaussian's (nats)",
        short_of_best,
        at_most=0.05,
        long=True,
    ),
    Proof(
        "ablation, mixture of eight: with the quadratic stand-in for the KL the law rests elsewhere (nats below)",
        lambda: short_of_best(penalty="quadratic"),
        at_least=0.1,
        long=True,
    ),
    Proof(
        "ablation, bowl: without a penalty the std goes on falling (mean std after as many iterations)",
        lambda: float(bowl(4, 250, rollouts=64, kl_weight=0.0).policy.std.mean()),
        at_most=0.2,
        long=True,
    ),
    Proof(
        "bowl, one rollout per iteration, calibrated: mean expected reward of 20 repetitions (5 is the best)",
        _reward,
        at_least=4.8,
        long=True,
    ),
    Proof(
        "ablation, bowl: without the baseline the same number of rollouts gains little (mean expected reward)",
        lambda: _reward(baseline="none"),
        at_most=4.1,
    ),
    Proof(
        "bowl, calibrated, half as many iterations (mean expected reward of 4 repetitions)",
        lambda: float(expected(bowl(4, 200)).mean()),
        at_least=4.3,
    ),
    Proof(
        "bowl: four earlier draws beside each new one gain as if there were more rollouts (standard errors, 8 "
        "repetitions of 150)",
        _reuse_gain,
        at_least=2.5,
    ),
    Proof(
        "bowl, ratios to the prior: the clip is a trust region (KL to the prior over that without)",
        lambda: _kl(**PRIOR) / _kl(),
        at_most=0.65,
        long=True,
    ),
    Proof(
        "bowl, ratios to the prior: mean std (without the clip: 0.26)",
        lambda: _std(**PRIOR),
        at_least=0.4,
        long=True,
    ),
    Proof(
        "bowl, ratios to the prior: mean expected reward",
        lambda: _reward(**PRIOR),
        at_least=4.4,
        at_most=4.8,
        long=True,
    ),
    Proof(
        "ablation, bowl: with log-densities summed over dimensions the clip stops the learning (mean expected reward)",
        lambda: _reward(**PRIOR, reduce="sum"),
        at_most=4.2,
        long=True,
    ),
    Proof(
        "ablation, bowl: with log-densities summed over dimensions most draws are clipped (share)",
        lambda: _clipped(**PRIOR, reduce="sum"),
        at_least=0.85,
        long=True,
    ),
    Proof(
        "ring of eight modes, reward 1 in one of them: mean hit rate of fresh samples, 12 repetitions (the prior: 1/8)",
        lambda: float(_ring("network").mean()),
        at_least=0.99,
        long=True,
    ),
    Proof(
        "ring: the smallest hit rate of the 12 repetitions",
        lambda: float(_ring("network").amin()),
        at_least=0.95,
        long=True,
    ),
    Proof(
        "ablation, ring: without the baseline more fresh samples miss (share of misses over that with)",
        lambda: float((1 - _ring("none").mean()) / (1 - _ring("network").mean()).clamp(min=1e-9)),
        at_least=5,
        long=True,
    ),
    Proof(
        "digits without a class, probability of one: fresh samples against best-of-7 at equal runs (standard errors)",
        lambda: _digits_gain("digit"),
        at_least=4,
        long=True,
    ),
    Proof(
        "digits, symmetry: fresh samples against best-of-7 at equal runs (standard errors)",
        lambda: _digits_gain("symmetry"),
        at_least=2.5,
        long=True,
    ),
)
