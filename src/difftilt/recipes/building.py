"""From a typed recipe to objects: the task with its reward, the method or steerer, and whether they fit together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from difftilt.config import Problems
from difftilt.errors import UserError
from difftilt.leaves import card_of, find, load, nearest
from difftilt.recipes.loading import read
from difftilt.recipes.parts import Part, read_part
from difftilt.recipes.schema import Recipe, RewardWeights
from difftilt.rewards import Reward, WeightedSum, as_reward
from difftilt.rewards.base import Unrewarded
from difftilt.training.datasets import is_dataset
from difftilt.training.experience import Experience
from difftilt.training.needs import check_needs
from difftilt.training.pairs import groups_of, read_pairs
from difftilt.training.protocol import Task
from difftilt.training.stored import MANIFEST, load_data


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
        _reads_data(recipe)
        task = replace(task, data=_data(recipe.data, task, recipe.resolved().get("reward")))
    algorithm = recipe.method or recipe.steerer
    if algorithm is not None:
        check_needs(load(algorithm.kind, algorithm.name), task, algorithm.config)
    return task


def _data(source: str, task: Task, reward: Mapping[str, Any] | None) -> Experience:
    """Groups that ``difftilt collect`` wrote, or preference pairs as groups of two."""
    path = Path(source).expanduser()
    if (path / MANIFEST).exists() or (path.suffix != ".jsonl" and not is_dataset(path)):
        return load_data(path, task, reward)
    return groups_of(task, read_pairs(source))


def _reads_data(recipe: Recipe) -> None:
    """Refuse data that the method of the recipe would not look at."""
    assert recipe.method is not None  # a recipe with data has a method
    card = card_of(load(recipe.method.kind, recipe.method.name))
    if card is not None and "offline data" not in card.needs:
        raise UserError(f"data: {card.name} draws its own samples and reads no data set: leave data out, or use gdro")


def build_reward(name: str, settings: Sequence[str]) -> Reward:
    """A reward by itself, without a task.

    Args:
        name: of a packaged one, or ``package.module:Name``.
        settings: ``field=value``.

    Raises:
        UserError: if there is none, a setting is wrong, or it is made from a task.
    """
    values, _ = read({"name": name}, settings)
    problems = Problems()
    part = read_part("rewards", "reward", values, problems)
    problems.check("the reward")
    assert part is not None
    if part.takes_task:
        raise UserError(
            f"reward {name!r} is made from a task, which a server has none of: use it in the process of the run"
        )
    return as_reward(part.build())


def _weighted(testbed: object, chosen: RewardWeights) -> WeightedSum:
    offer: Callable[[], Mapping[str, Reward]] | None = getattr(testbed, "rewards", None)
    offered = {} if offer is None else offer()
    for name in chosen.weights:
        if name not in offered:
            raise UserError(f"reward.weights.{name}: the testbed offers no such reward; {nearest(name, offered)}")
    rewards = {name: offered[name] for name in chosen.weights}
    return WeightedSum(rewards, chosen.weights, chosen.normalise)


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
