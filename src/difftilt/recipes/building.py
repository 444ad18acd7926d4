"""From a typed recipe to objects: the task with its reward, the method or steerer, and whether they fit together."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from difftilt.card import Card
from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.leaves import find, nearest
from difftilt.process.gaussian import GaussianProcess
from difftilt.process.masked import MaskedProcess
from difftilt.recipes.parts import Part
from difftilt.recipes.schema import Recipe, RewardWeights
from difftilt.rewards import Reward, WeightedSum, as_reward
from difftilt.rewards.base import Unrewarded
from difftilt.training.offline import load_data
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
        lambda task: not task.reward.capabilities.set_valued,
        "its reward scores sets: use dragon",
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


def build_task(recipe: Recipe) -> Task:
    """The testbed's task, with the recipe's own reward where it names one; refused if the algorithm cannot run on it.

    Raises:
        UserError: names the need that is not met.
    """
    testbed = recipe.testbed.build()
    task = testbed if isinstance(testbed, Task) else cast(Task, testbed.task())
    if recipe.reward is not None:
        task = replace(task, reward=as_reward(recipe.reward.build(task)))
    if recipe.weights is not None:
        task = replace(task, reward=_weighted(testbed, recipe.weights))
    if isinstance(task.reward, Unrewarded):
        raise UserError(
            f"testbed {recipe.testbed.name!r} has no reward of its own: add a section, as in "
            "reward: {name: my_module:my_function}"
        )
    if recipe.data is not None:
        task = replace(task, data=load_data(Path(recipe.data), task, recipe.resolved().get("reward")))
    algorithm = recipe.method or recipe.steerer
    if algorithm is not None and ":" not in algorithm.name:
        check_needs(find(algorithm.kind, algorithm.name).card, task, algorithm.config)
    return task


def _weighted(testbed: object, chosen: RewardWeights) -> WeightedSum:
    offer: Callable[[], Mapping[str, Reward]] | None = getattr(testbed, "rewards", None)
    offered = {} if offer is None else offer()
    for name in chosen.weights:
        if name not in offered:
            raise UserError(f"reward.weights.{name}: the testbed offers no such reward; {nearest(name, offered)}")
    rewards = {name: offered[name] for name in chosen.weights}
    return WeightedSum(rewards, chosen.weights, chosen.normalise)


def check_needs(card: Card, task: Task, config: Config) -> None:
    """Refuse a task that does not offer everything that the card needs.

    Offline data that the configuration lets the method draw itself need not be offered.
    """
    for need in card.needs:
        if need == "offline data" and getattr(config, "collect", None) is not None:
            continue
        if need not in NEEDS:
            raise UserError(f"{card.name} needs {need!r}, which nothing can be tested for; {nearest(need, NEEDS)}")
        met, remedy = NEEDS[need]
        if not met(task):
            article = "" if need.endswith("data") else "a "
            raise UserError(f"{card.name} needs {article}{need}, which {task.name!r} does not offer: {remedy}")


def require(recipe: Recipe, section: Literal["method", "steerer"]) -> Part:
    """The section that a command runs.

    Raises:
        UserError: if the recipe is for the other command.
    """
    part = recipe.method if section == "method" else recipe.steerer
    if part is None:
        other = "steerer" if section == "method" else "method"
        remedy = "`difftilt steer`, or difftilt.fit" if section == "method" else "`difftilt train`"
        raise UserError(f"{recipe.source} has a section {other!r}, not {section!r}: use {remedy}")
    return part


def laws_of(part: Part) -> tuple[str, ...]:
    """The laws that a leaf declares; a foreign class declares none."""
    return () if ":" in part.name else find(part.kind, part.name).card.laws
