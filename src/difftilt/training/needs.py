"""What an algorithm may ask of a task, and the one check that a task offers it, from a recipe and from Python alike."""

from collections.abc import Callable

import torch

from difftilt.errors import UserError
from difftilt.leaves import card_of, nearest
from difftilt.process.gaussian import GaussianProcess
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.of_sets import OfSets
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.reference import same_space
from difftilt.training.protocol import Task

NEEDS: dict[str, tuple[Callable[[Task], bool], str]] = {
    "gaussian process": (
        lambda task: isinstance(task.model.process, GaussianProcess),
        "its model samples tokens: use a method for masked models",
    ),
    "masked process": (
        lambda task: isinstance(task.model.process, MaskedProcess),
        "its model is continuous: use a method for Gaussian processes",
    ),
    "stochastic kernel": (
        lambda task: isinstance(task.model.process, GaussianProcess | MaskedProcess),
        "no kernel is known for its process: use a method of the forward process",
    ),
    "differentiable reward": (
        lambda task: task.reward.capabilities.differentiable,
        "its reward is black-box, as every served one is: use a method that needs no gradient",
    ),
    "per-sample reward": (
        lambda task: not task.reward.capabilities.of_sets,
        "its reward, or a part of its sum, scores sets: leave that part out, or use dragon for sets alone",
    ),
    "set reward": (
        lambda task: task.reward.capabilities.set_valued,
        "its reward scores samples: give a reward of sets",
    ),
    "offline data": (
        lambda task: task.data is not None,
        "make some with `difftilt collect` and name them with data=DIR, or set method.collect to the number of groups "
        "to draw before training",
    ),
    "environment": (lambda task: task.environment is not None, "it is no environment"),
}
"""What a card may name under ``needs`` -> (whether a task offers it, why not and what to do where it does not)."""


def check_needs(algorithm: object, task: Task, config: object) -> None:
    """Refuse a task that does not offer everything that the card of an algorithm, or of its class, needs.

    Offline data that the configuration lets the method draw itself need not be offered. What has no card needs nothing.

    Raises:
        UserError: names the need that is not met, and what to do.
    """
    card = card_of(algorithm)
    if card is None:
        return
    for need in card.needs:
        if need == "offline data" and getattr(config, "collect", None) is not None:
            continue
        if need not in NEEDS:
            raise UserError(f"{card.name} needs {need!r}, which nothing can be tested for; {nearest(need, NEEDS)}")
        met, remedy = NEEDS[need]
        if not met(task):
            article = "" if need.endswith("data") else "a "
            raise UserError(f"{card.name} needs {article}{need}, which {task.name!r} does not offer: {remedy}")


def check_space(reward: Reward, task: Task) -> None:
    """Refuse a reward whose reference has features of another dimension than a sample of the task.

    One latent of zeros is decoded and encoded to find out, and not counted.
    """
    if not isinstance(reward, OfSets) or reward.dim is None:
        return
    text = list(task.prompts[:1])
    with torch.no_grad():
        media = task.model.decode(torch.zeros(1, *task.model.shape))
        sample = Samples.of(media, text, torch.zeros(1, dtype=torch.int64), task.model.encode(text))
        same_space(reward.name, reward.features(sample), reward.dim)
