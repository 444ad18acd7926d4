"""GARDO on a ring with a planted hack: the gate keeps the true reward that a plain penalty of equal weight loses."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.trial import make_method
from difftilt.credit.diversity import favour_unlike, nearest_distance
from difftilt.credit.uncertainty import Fraction, mean_doubt, suspects, uncertainty
from difftilt.methods.policy_gradient.gardo import GatedChain
from difftilt.rewards.base import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures, ring
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.loop import train_task
from difftilt.training.protocol import Task

MODES = torch.cat([ring(8, 2.0, 2), torch.zeros(1, 2)])
GOOD = MODES[[0, 2, 4, 6, 8]]
BUG = torch.tensor([[3.2, 0.0]])
SEEDS = 3
SIZE, LR, UPDATES = 24, 2e-3, 250


def bumps(x: Float[Tensor, "batch 2"], centres: Float[Tensor, "bumps 2"], width: float) -> Float[Tensor, " batch"]:
    """Σ exp(-|x - c|²/(2·width²))."""
    return (-torch.cdist(x, centres).square() / (2 * width**2)).exp().sum(1)


def true_reward(samples: Samples) -> Float[Tensor, " batch"]:
    """What is meant: to be at one of five of the nine modes."""
    return bumps(samples.media, GOOD, 0.35)


def proxy_reward(samples: Samples) -> Float[Tensor, " batch"]:
    """What is optimised: the same, with a bump of twice the height where there is no data."""
    return true_reward(samples) + 2 * bumps(samples.media, BUG, 0.5)


def nearness(samples: Samples) -> Float[Tensor, " batch"]:
    """Minus the distance to the nearest mode."""
    return -torch.cdist(samples.media, MODES).amin(1)


def hacked(samples: Samples) -> Float[Tensor, " batch"]:
    """1 where the planted bump is nearer than any mode."""
    return (torch.cdist(samples.media, BUG)[:, 0] < torch.cdist(samples.media, MODES).amin(1)).float()


def hackable() -> Task:
    """A ring of eight modes and a centre of a tenth of their weight, with the proxy to climb."""
    means = tuple((float(x), float(y)) for x, y in MODES.tolist())
    bed = MixturesConfig(means=means, weights=(*[1.0] * 8, 0.1), std=0.2, steps=10)
    scores = {"true": true_reward, "nearness": nearness, "hacked": hacked}
    heldout = {name: as_reward(score, name=name) for name, score in scores.items()}
    task = Mixtures(bed).task()
    # evaluated as it is trained, by the SDE
    sampler = replace(task.sampler, solver=None)
    return replace(task, sampler=sampler, reward=as_reward(proxy_reward, name="proxy"), heldout=heldout)


def _flipped(proxy: Tensor, auxiliary: Tensor, scope: Tensor) -> Tensor:
    return -uncertainty(proxy, auxiliary, scope)


@cache
def arm(seed: int, flip: bool = False, **settings: Any) -> dict[str, float]:
    """Evaluation before and after 250 updates on one group of 24; ``reward``, ``true``, ``hacked`` and more."""
    common: dict[str, Any] = {
        "groups": 1,
        "group_size": SIZE,
        "updates": 1,
        "clip_range": 0.2,
        "ema": 0.0,
        "kl_weight": 0.1,
        "kl": "flow_grpo",
        "auxiliary": ("true", "nearness"),
        "kl_limit": None,
        "reset_steps": None,
        "diversity": "none",  # so that the gate is all that differs between the arms
        "share_start": False,
    }
    task = hackable()
    method = make_method("gardo", task, **{**common, **settings})
    assert isinstance(method, GatedChain)
    if flip:
        method.gating.uncertainty = _flipped
    optimizer = OptimizerConfig(lr=LR, weight_decay=0.0)
    config = TrainingConfig(
        iterations=UPDATES, seed=seed, forward_batch=256, evaluate_every=0, evaluation_samples=512, optimizer=optimizer
    )
    result = train_task(task, method, config, None)
    before = {f"before/{name}": value for name, value in result.before.items()}
    return {**result.after, **before, "resets": result.rows[-1].get("resets", 0.0)}


def wrongly_held() -> float:
    """Samples whose gate differs from the one that is wanted, over every reward replaced by its exponential."""
    proxy = torch.tensor([3.0, 2.0, 1.0, 0.0])
    auxiliary = torch.tensor([[0.0, 0.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    scope, wanted = torch.zeros(4, dtype=torch.int64), torch.tensor([True, False, False, False])
    pairs = ((proxy, auxiliary), (proxy.exp(), auxiliary), (proxy, auxiliary.exp()))
    return float(sum((suspects(uncertainty(*pair, scope), scope, 0.25) != wanted).sum() for pair in pairs))


def worst_share() -> float:
    """Largest error of k under mean doubts of 1, 2, 3, 1/2."""
    fraction, worst = Fraction(), 0.0
    for doubt, wanted in ((1.0, 0.1), (2.0, 0.11), (3.0, 0.121), (0.5, 0.1089)):
        fraction = fraction.after(doubt)
        worst = max(worst, abs(fraction.value - wanted))
    return worst


def doubts() -> tuple[float, float]:
    """(|mean U| over all samples, spread of the means of its positive part) over 20 batches of samples of the base."""
    task, noise = hackable(), Noise(0)
    mixture = Mixtures(MixturesConfig()).mixture
    means: list[float] = []
    whole = 0.0
    for batch in range(20):
        x = mixture.sample(noise.at(batch).normal(torch.arange(24), (3,), purpose="x"))
        group = torch.zeros(24, dtype=torch.int64)
        samples = Samples(x, [""] * 24, [""] * 24, group)
        auxiliary = torch.stack([task.heldout[name].score(samples) for name in ("true", "nearness")], dim=1)
        doubt = uncertainty(task.reward.score(samples), auxiliary, group)
        whole = max(whole, abs(float(doubt.mean())))
        means.append(mean_doubt(doubt) or 0.0)
    return whole, max(means) - min(means)


def outlier_factor(normalise: bool) -> float:
    """Advantage left to the one that is orthogonal to four others, less the sum of what is left to those."""
    group, features = torch.zeros(5, dtype=torch.int64), torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0], [0, 1]])
    shaped = favour_unlike(torch.ones(5), nearest_distance(features, group), group, normalise=normalise)
    return float(shaped[4] - shaped[:4].sum())


def smallest_lead(name: str, **other: Any) -> float:
    """Smallest difference over seeds between the gated arm and the other one, at one weight of the penalty."""
    return min(arm(seed)[name] - arm(seed, **other)[name] for seed in range(SEEDS))


def largest_lead(name: str, **other: Any) -> float:
    """Largest of the same."""
    return max(arm(seed)[name] - arm(seed, **other)[name] for seed in range(SEEDS))


PROOFS = (
    Proof(
        "the gate holds exactly the sample that only the reward likes, whatever monotone scale: samples wrongly gated",
        wrongly_held,
        at_most=0.0,
    ),
    Proof("the share k follows mean doubts of 1, 2, 3, 1/2 from 0.1: largest error", worst_share, at_most=1e-12),
    Proof("over all samples the mean doubt is 0, whatever the rewards: its size", lambda: doubts()[0], at_most=1e-12),
    Proof("over the positive part it is not, and it varies between batches: range", lambda: doubts()[1], at_least=0.01),
    Proof(
        "of five good samples of which four are alike only the other one keeps weight, five times its own",
        lambda: outlier_factor(normalise=True),
        at_least=5 - 1e-6,
        at_most=5 + 1e-6,
    ),
    Proof(
        "the gate keeps true reward that a penalty of equal weight on all samples loses: smallest lead over seeds",
        lambda: smallest_lead("true", gate="all"),
        at_least=0.0,
        long=True,
    ),
    Proof(
        "and keeps samples off the planted bump: largest lead of the hacked share over seeds",
        lambda: largest_lead("hacked", gate="all"),
        at_most=0.0,
        long=True,
    ),
    Proof(
        "without any penalty the bump takes the samples: share hacked",
        lambda: arm(0, kl_weight=0.0)["hacked"],
        at_least=0.9,
        long=True,
    ),
    Proof(
        "a penalty of weight 20 on all samples learns nothing: change of the reward from the base's",
        lambda: abs(arm(0, gate="all", kl_weight=20.0)["reward"] - arm(0)["before/reward"]),
        at_most=0.1,
        long=True,
    ),
    Proof(
        "a gate that holds the least doubtful fails: lead in true reward of the right one",
        lambda: arm(0)["true"] - arm(0, flip=True)["true"],
        at_least=0.05,
        long=True,
    ),
    Proof(
        "a reference reset at a KL of 0.003 or 50 steps undoes the gate: share hacked",
        lambda: arm(0, kl_limit=3e-3, reset_steps=50)["hacked"],
        at_least=0.9,
        long=True,
    ),
    Proof(
        "a limit of 0.2, which the held rows never reach, keeps the gate's protection: share hacked",
        lambda: arm(0, kl_limit=0.2)["hacked"],
        at_most=0.3,
        long=True,
    ),
)
