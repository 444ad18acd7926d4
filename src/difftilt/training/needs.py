"""What an algorithm may ask of a task, and the one check that a task offers it, from a recipe and from Python alike."""

from collections.abc import Callable

from difftilt.errors import UserError
from difftilt.leaves import card_of, nearest
from difftilt.process.gaussian import GaussianProcess
from difftilt.process.masked import MaskedProcess
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
        "its reward is black-box: use a method that needs no gradient",
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
