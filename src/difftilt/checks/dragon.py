"""DRAGON: a reward of a set keeps the spread that an instance reward destroys; variety; exemplars that are texts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from difftilt.checks.proof import Proof
from difftilt.checks.trial import trained
from difftilt.methods.forward_process.dragon import Config, Dragon
from difftilt.rewards import FrechetReward, ReferenceSet, as_reward, win_rate
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import NoiseSource
from difftilt.statistics import mode_shares, vendi_score
from difftilt.testbeds.mixture_sets import closeness, membership
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.experience import Experience
from difftilt.training.loop import TrainResult, train_task
from difftilt.training.plain import draw
from difftilt.training.protocol import Loss, Run, Task, Term

COUNT = 2000
CENTRE = (1.0, 0.0)
WIDE = MixturesConfig(
    means=((0.0, 0.0),), std=1.0, centre=CENTRE, reference_std=0.5**0.5, steps=10, shift=1.0, kernel="exact"
)
"""N(0, I); what is wanted is N((1, 0), I/2)."""
RING = MixturesConfig(
    weights=(0.4, 0.25, 0.12, 0.08, 0.06, 0.04, 0.03, 0.02), std=0.15, steps=20, shift=1.0, kernel="exact"
)
"""Eight modes at radius 2, of which half hardly occur."""
EXEMPLARS = (1, 4)
"""Labels that stand for what is wanted; their modes hold 0.31 of the base."""
ROUND: dict[str, Any] = {"updates": 4, "levels": 4, "beta": 1.0, "ema": 0.0}
Arm = Literal["set", "instance", "imitation"]


def samples_of(result: TrainResult, role: str = "current") -> Float[Tensor, "count dim"]:
    """Unguided samples of a role, the same noise for all."""
    run, none = result.run, torch.zeros(COUNT, dtype=torch.int64)
    with torch.no_grad():
        return draw(run, role, run.task.sampler, run.batch(none, none), Noise(7)).double()


class Imitation(Dragon):
    """The control: fine-tuning on D+ alone, without D- and without the reference."""

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        assert rows.label is not None
        error = self._error(run, "current", rows)
        return Loss({"imitation": Term(error * (rows.label > 0))})


@cache
def tuned(arm: Arm, loss: Literal["kto", "dpo"] = "kto") -> Float[Tensor, "count dim"]:
    """Samples after 60 rounds of 128 pairs and 4 updates from N(0, I)."""
    task = Mixtures(WIDE.model_copy(update={"reward": "quadratic" if arm == "instance" else "frechet"})).task()
    settings: dict[str, Any] = {**ROUND, "groups": 128, "loss": loss}
    if arm != "imitation":
        return samples_of(trained("dragon", task, 60, 1e-3, **settings))
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.0)
    config = TrainingConfig(iterations=60, forward_batch=1024, evaluate_every=0, optimizer=optimizer)
    return samples_of(train_task(task, Imitation(Config(**settings), task), config))


def distance(x: Float[Tensor, "count dim"]) -> float:
    """Squared Fréchet distance to what is wanted, whose moments are known."""
    return -closeness(torch.tensor(CENTRE), WIDE.reference_std).score_features(x)


def trace(x: Float[Tensor, "count dim"]) -> float:
    """Of the covariance; 1 is wanted, the base has 2."""
    return float(torch.cov(x.T).trace())


def base() -> Float[Tensor, "count dim"]:
    """Samples of N(0, I)."""
    noise = Noise(7).normal(torch.arange(COUNT), (3,), purpose="base")
    return Mixtures(WIDE).mixture.sample(noise).double()


def wins(ours: Float[Tensor, "count dim"], theirs: Float[Tensor, "count dim"], of: Literal["set", "instance"]) -> float:
    """Win rate on the distance to what is wanted, of 200 bootstrap sets, or on that to its centre, row against row."""
    centre = torch.tensor(CENTRE)
    near = as_reward(lambda samples: -(samples.media - centre).square().sum(1).float(), name="near")
    reward = near if of == "instance" else closeness(centre, WIDE.reference_std)
    none = [""] * COUNT
    first, second = (Samples(x, none, none, torch.zeros(COUNT, dtype=torch.int64)) for x in (ours, theirs))
    return win_rate(reward, first, second, Noise(7))


@dataclass(frozen=True)
class Variety:
    """Samples of the ring: Vendi score of the membership, share on a mode, and modes with more than 5 %."""

    vendi: float
    on_mode: float
    modes: int


@cache
def ring(reward: str, embedding: str = "modes", role: str = "current") -> Variety:
    """After 40 rounds of 64 pairs and 4 updates."""
    bed = Mixtures(RING.model_copy(update={"reward": reward, "embedding": embedding}))
    x = samples_of(ring_run(reward, embedding), role)
    shares = mode_shares(x, bed.mixture.means, 3 * bed.mixture.std)
    return Variety(float(vendi_score(membership(x, bed.mixture))), float(shares.sum()), int((shares > 0.05).sum()))


@cache
def ring_run(reward: str, embedding: str) -> TrainResult:
    """The run behind :func:`ring`."""
    task = Mixtures(RING.model_copy(update={"reward": reward, "embedding": embedding})).task()
    return trained("dragon", task, 40, 2e-3, groups=64, **ROUND)


def described(labels: Int[Tensor, " rows"]) -> Float[Tensor, "rows 32"]:
    """The text encoder: a fixed random linear map of the label."""
    return functional.one_hot(labels, 8).double() @ _JOINT


def seen(x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch 32"]:
    """The sample encoder into the same space: how near each mode is, through the same map."""
    near = torch.cdist(x.double(), Mixtures(RING).mixture.means.double()).square() / (2 * (3 * RING.std) ** 2)
    return (-near).exp() @ _JOINT


_JOINT = Noise(0).normal(torch.arange(8), (32,), purpose="joint").double() / 32**0.5


@cache
def described_task() -> Task:
    """The ring, rewarded for a mean embedding like that of the exemplars, which are labels alone."""
    reference = ReferenceSet.encoded(torch.tensor(EXEMPLARS), described)
    return replace(Mixtures(RING).task(), reward=FrechetReward(reference, seen, spread="none", name="exemplars"))


@cache
def described_shares() -> list[float]:
    """Shares of the modes after 60 rounds of 128 pairs."""
    x = samples_of(trained("dragon", described_task(), 60, 1e-3, groups=128, **ROUND))
    return mode_shares(x, Mixtures(RING).mixture.means, 3 * RING.std).tolist()


def _proof(claim: str, measure: Callable[[], float], least: float = -torch.inf, most: float = torch.inf) -> Proof:
    return Proof(claim, measure, at_least=least, at_most=most, long=True)


PROOFS = (
    Proof("Fréchet distance of N(0, I) to N((1, 0), I/2), 2000 samples; law 1.17", lambda: distance(base()), 1.0, 1.35),
    _proof("after 60 rounds on the reward of a set, kto", lambda: distance(tuned("set")), most=0.1),
    _proof("trace of its covariance, of which 1 is wanted", lambda: trace(tuned("set")), 0.7, 1.3),
    _proof("the same, dpo: distance", lambda: distance(tuned("set", "dpo")), most=0.1),
    _proof("the same, dpo: trace", lambda: trace(tuned("set", "dpo")), 0.7, 1.3),
    _proof("instance reward -|x - (1, 0)|²: distance, kto", lambda: distance(tuned("instance")), least=0.1),
    _proof("instance reward: trace, kto: the spread has collapsed", lambda: trace(tuned("instance")), most=0.2),
    _proof("instance reward: distance, dpo", lambda: distance(tuned("instance", "dpo")), least=0.1),
    _proof("instance reward: trace, dpo", lambda: trace(tuned("instance", "dpo")), most=0.2),
    _proof("win rate over the base on the reward of a set, kto", lambda: wins(tuned("set"), base(), "set"), least=0.95),
    _proof("and over what the instance reward made", lambda: wins(tuned("set"), tuned("instance"), "set"), least=0.95),
    _proof(
        "which wins on the instance reward, sample against sample of the base",
        lambda: wins(tuned("instance"), base(), "instance"),
        least=0.9,
    ),
    _proof(
        "control: fine-tuning on D+ alone gets there as well, so D- is not needed in two dimensions: distance",
        lambda: distance(tuned("imitation")),
        most=0.1,
    ),
    _proof("unequal ring, Vendi reward on bounded features: Vendi", lambda: ring("vendi").vendi, least=7.0),
    _proof("it was", lambda: ring("vendi", role="reference").vendi, most=5.5),
    _proof("modes above 5 %; 5 before", lambda: ring("vendi").modes, least=7),
    _proof("share on a mode", lambda: ring("vendi").on_mode, least=0.85),
    _proof(
        "ablation, RBF kernel on raw coordinates: the share on a mode falls",
        lambda: ring("vendi", "coordinates").on_mode,
        most=0.8,
    ),
    _proof("instance reward of the first mode: Vendi", lambda: ring("quadratic").vendi, most=2.0),
    _proof(
        "exemplars are the descriptions of two modes: share of samples on these, 0.31 before",
        lambda: sum(described_shares()[label] for label in EXEMPLARS),
        least=0.6,
    ),
    _proof(
        "the smaller of the two shares: neither is forgotten",
        lambda: min(described_shares()[label] for label in EXEMPLARS),
        least=0.2,
    ),
)
