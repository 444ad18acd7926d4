"""The laws that leaves declare on their cards, measured on the gradient of a method's first update.

``ratio_one``: before the first update every ratio is 1, under guidance and in microbatches unlike the rollout's.
``constant_reward``: the reward term then has no gradient. ``offset_per_prompt``: a constant added to all rewards of a
prompt changes nothing. ``batch_split``: neither does the size of microbatches.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difftilt.card import Card
from difftilt.checks.proof import Proof
from difftilt.checks.trial import gradient, loop_of, perturbed, with_reward
from difftilt.leaves import load
from difftilt.recipes.parts import config_of
from difftilt.rewards.protocol import Samples
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.protocol import Task

SMALL: dict[str, Any] = {"groups": 6, "group_size": 4, "updates": 1}
NEEDED: dict[str, dict[str, Any]] = {
    "gardo": {"auxiliary": ("on_mode",)},
    "dense-grpo": {"calibration_rounds": 1, "calibration_samples": 8},
    "euphonium": {"fit_samples": 32, "fit_steps": 10},
    "gdro": {"collect": 6},
    "prdp": {"epochs": 1},
}
"""Settings without which a leaf refuses to begin, prepares itself for long, or goes over the same rows many times."""


def small(name: str) -> dict[str, Any]:
    """Settings of the run that measures the laws of a leaf."""
    return SMALL | NEEDED.get(name, {})


def free(name: str) -> dict[str, Any]:
    """The same without the KL term, where the leaf has a weight for it."""
    fields = config_of(load("methods", name)).model_fields
    return small(name) | ({"kl_weight": 0.0} if "kl_weight" in fields else {})


def _task() -> Task:
    """Four classes of two modes each, so that prompts differ, and few steps."""
    return perturbed(Mixtures(MixturesConfig(classes=4, steps=6)).task())


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


def ratio_one(name: str) -> float:
    """Largest |ratio - 1| over the rows of the first update."""
    task = _task()
    loop = loop_of(name, replace(task, sampler=replace(task.sampler, guidance=2.5)), **small(name))
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    worst = 0.0
    for phase in loop.method.phases(loop.run):
        order = torch.arange(len(experience.edges.step)).flip(0)
        rows = experience.rows(order)
        rows = rows if phase.before is None else phase.before(rows)
        for part in torch.arange(len(order)).split(7):
            loss = phase.loss(rows.rows(part), loop.run.noise)
            worst = max(worst, float((loss.metrics["ratio"] - 1).abs().max()))
    return worst


def constant_reward(name: str) -> float:
    """Norm of the gradient, without the KL term, when all samples score the same."""
    task = with_reward(_task(), lambda samples: torch.full((len(samples.media),), 0.3))
    return float(gradient(name, task, **free(name)).norm())


def offset_per_prompt(name: str) -> float:
    """Relative change of the gradient when every prompt's rewards move by a constant of their own."""
    task = _task()
    base = task.reward

    def moved(samples: Samples) -> Tensor:
        return base.score(samples) + torch.tensor([8.0 * int(prompt[-1]) for prompt in samples.prompts])

    plain = gradient(name, with_reward(task, base.score), **free(name))
    return _gap(plain, gradient(name, with_reward(_task(), moved), **free(name)))


def batch_split(name: str) -> float:
    """Relative change of the gradient between microbatches of 64 and of 8 rows."""
    whole = gradient(name, _task(), 64, **small(name))
    return _gap(whole, gradient(name, _task(), 8, **small(name)))


LAWS: dict[str, tuple[str, Callable[[str], float], float]] = {
    "ratio_one": ("largest |ratio - 1| before the first update, guidance 2.5", ratio_one, 1e-6),
    "constant_reward": ("norm of the reward term's gradient under a constant reward", constant_reward, 0.0),
    "offset_per_prompt": ("relative change of the gradient under reward offsets per prompt", offset_per_prompt, 1e-4),
    "batch_split": ("relative change of the gradient between microbatches of 64 and 8 rows", batch_split, 1e-5),
}


def proofs_of(card: Card) -> Iterable[Proof]:
    """One proof for every law on the card."""
    for law in card.laws:
        claim, measure, bound = LAWS[law]
        yield Proof(f"law {law}: {claim}", lambda measure=measure: measure(card.name), at_most=bound)
