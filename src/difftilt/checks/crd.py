"""CRD: averages per prompt reach the tilted table exactly; on a ring its anchor holds what the reward would destroy."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.trial import loop_of, minimise, scatter, trained, with_reward
from difftilt.objectives.centred import Baselines, cell_baselines, centred_loss
from difftilt.rewards.base import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.protocol import Task

TEMPERATURE = 0.5
"""Beta of the tables."""
Cells = Literal["prompt", "batch", "none"]


def table_gaps(cells: Cells) -> Float[Tensor, " tables"]:
    """KL(pi* || pi) in nats of the worse of two prompts with six items, in four tables of random rewards.

    The rewards of the second prompt are moved by 10. The log-ratio to a random prior is the implicit reward, exactly;
    pi* is the prior times exp(r/beta). Averages are per prompt, over both prompts of a table, or there are none. Adam
    moves every entry on its own, so four tables at once are four runs; 3000 steps from the prior, at a falling rate.
    """
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(4, 2, 6, generator=generator).double() + torch.tensor([0.0, 10.0])[:, None]
    prior = torch.randn(4, 2, 6, generator=generator).double().log_softmax(2)
    logits = prior.clone().requires_grad_()
    flat, place = rewards.reshape(-1), torch.arange(48)

    def loss() -> Tensor:
        implicit = (logits.log_softmax(2) - prior).reshape(-1)
        if cells == "none":
            baselines = Baselines(torch.zeros(48, 1).double(), torch.zeros(48, 1).double())
        else:
            baselines = cell_baselines(implicit, flat, flat, place // (6 if cells == "prompt" else 12))
        return centred_loss(implicit, flat, baselines, beta=TEMPERATURE).sum()

    minimise(logits, loss, lr=0.02, steps=3000)
    exact = (prior + rewards / TEMPERATURE).log_softmax(2)
    return (exact.exp() * (exact - logits.detach().log_softmax(2))).sum(2).amax(1)


def score(samples: Samples) -> Float[Tensor, " samples"]:
    """x/2 for the first prompt and y/2 + 10 for the second."""
    first = torch.tensor([prompt == "class 0" for prompt in samples.prompts])
    return torch.where(first, samples.media[:, 0] / 2, samples.media[:, 1] / 2 + 10)


def ring() -> Task:
    """Two prompts, each of which has all eight modes; the reward of the first is reported apart, times its share."""
    modes = [(2 * math.cos(k * math.pi / 4), 2 * math.sin(k * math.pi / 4)) for k in range(8)]
    bed = MixturesConfig(means=tuple(mode for mode in modes for _ in range(2)), classes=2, steps=10, shift=1.0)
    task = Mixtures(bed).task()
    both = ("class 0", "class 1")

    def first(samples: Samples) -> Tensor:
        own = torch.tensor([prompt == "class 0" for prompt in samples.prompts])
        return torch.where(own, score(samples), 0.0)

    heldout = {**task.heldout, "first": as_reward(first, name="first")}
    return replace(with_reward(task, score), prompts=both, heldout_prompts=both, heldout=heldout)


SLOW: Mapping[str, Any] = {
    "old_decay": (0, 0.25, 0.001, 0.5),
    "sampling_decay": (0, 0.0, 0.001, 0.5),
}
"""The general schedules of the authors' code: those for OCR stop following after 210 optimiser steps."""
SIZE: Mapping[str, Any] = {"groups": 8, "group_size": 64, "updates": 4, "ema": 0.0, "advantage_std": "pooled"}


@cache
def on_ring(method: str, kl_weight: float, **settings: Any) -> tuple[float, float, float]:
    """(reward of prompt 1, of prompt 2 without its 10, share of samples on a mode) after 40 iterations.

    All 0, 0 and 0.99 before. A prompt has half of the samples of an evaluation.
    """
    own: dict[str, Any] = {**SLOW, "kl_guidance": 1.0, "draws": 8} if method == "crd" else {}
    after = trained(method, ring(), 40, 1e-3, kl_weight=kl_weight, **SIZE, **own, **settings).after
    return 2 * after["first"], 2 * (after["reward"] - after["first"]) - 10, after["on_mode"]


def worse(method: str, kl_weight: float, **settings: Any) -> float:
    """The smaller of the two prompts' rewards."""
    return min(on_ring(method, kl_weight, **settings)[:2])


def better(method: str, kl_weight: float, **settings: Any) -> float:
    """The larger of the two."""
    return max(on_ring(method, kl_weight, **settings)[:2])


def size_at_equal_weights() -> float:
    """Largest |s| over the rows of a first update; ``old`` has the weights of ``current`` and a pass of its own."""
    loop = loop_of("crd", ring(), groups=2, group_size=16, kl_weight=0.0)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    # moves nothing, but tells the roles apart: both are evaluated
    scatter(loop)
    (phase,) = loop.method.phases(loop.run)
    rows, before = experience.rows(torch.arange(len(experience.edges.step))), loop.run.ledger.copy()
    loss = phase.loss(rows, loop.run.noise)
    assert (loop.run.ledger - before).nfe == len(rows.edges.step)
    return float(loss.metrics["implicit_reward"].max())


def size_after_six(decay: float) -> float:
    """Mean |s| in the sixth iteration of two updates; ``old`` copies (decay 0) or lags with a constant decay."""
    settings: dict[str, Any] = {**SIZE, "groups": 2, "group_size": 16, "updates": 2, "kl_weight": 0.0}
    schedule = (0, decay, 0.0, decay)
    return trained("crd", ring(), 6, 1e-3, count=16, old_decay=schedule, **settings).rows[-1]["implicit_reward"]


PROOFS = (
    Proof(
        "tables: averages per prompt reach pi_ref·exp(r/beta)/Z whatever is added to a prompt, largest KL of four",
        lambda: float(table_gaps("prompt").max()),
        at_most=1e-6,
        long=True,
    ),
    Proof(
        "the same without averages: smallest KL of four",
        lambda: float(table_gaps("none").min()),
        at_least=1e-2,
        long=True,
    ),
    Proof(
        "the same with averages over both prompts: smallest KL of four",
        lambda: float(table_gaps("batch").min()),
        at_least=1.0,
        long=True,
    ),
    Proof(
        "old with the weights of current, each with a pass of its own: largest |s|", size_at_equal_weights, at_most=0.0
    ),
    Proof(
        "mean |s| in the sixth iteration, an old that lags (decay 0.9) over one that is copied every time",
        lambda: size_after_six(0.9) / size_after_six(0.0),
        at_least=3.0,
    ),
    Proof(
        "on the ring with two prompts, anchor 0.6: the smaller of two rewards that begin at 0",
        lambda: worse("crd", 0.6),
        at_least=0.8,
        long=True,
    ),
    Proof("and the share of samples on a mode", lambda: on_ring("crd", 0.6)[2], at_least=0.8, long=True),
    Proof(
        "without the anchor the reward is hacked: the smaller of the two rewards",
        lambda: worse("crd", 0.0),
        at_least=1.2,
        long=True,
    ),
    Proof("and the share of samples left on a mode", lambda: on_ring("crd", 0.0)[2], at_most=0.3, long=True),
    Proof(
        "diffusion-nft without its anchor is hacked as well: share of samples left on a mode",
        lambda: on_ring("diffusion-nft", 0.0)[2],
        at_most=0.3,
        long=True,
    ),
    Proof(
        "without averages the same anchor 0.6 does not hold the samples on the modes",
        lambda: on_ring("crd", 0.6, centre="none")[2],
        at_most=0.7,
        long=True,
    ),
    Proof(
        "an anchor that grows with the reward lets it rise further: its smaller reward over a fixed anchor's larger",
        lambda: worse("crd", 0.6) - better("crd", 0.6, kl_adaptive=False),
        at_least=0.1,
        long=True,
    ),
    Proof(
        "and the fixed one keeps no more than a tenth of the samples more on a mode",
        lambda: on_ring("crd", 0.6, kl_adaptive=False)[2] - on_ring("crd", 0.6)[2],
        at_most=0.1,
        long=True,
    ),
)
