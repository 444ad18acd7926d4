"""Prompts of a recipe: a list in it, or a text file with one prompt per line."""

from collections.abc import Sequence

from difftilt.config import Problems
from difftilt.errors import UserError
from difftilt.recipes.schema import SteeringConfig
from difftilt.training.prompts import read_prompts
from difftilt.training.protocol import Task


def prompts_of(task: Task, config: SteeringConfig) -> Sequence[str]:
    """The prompts to steer for: those of the recipe, or the held-out ones of the task.

    Raises:
        UserError: for a file that cannot be read or holds no prompt, or with the lines that the task has no condition
            for.
    """
    if config.prompts is None:
        return list(task.heldout_prompts)
    if not isinstance(config.prompts, str):
        return list(config.prompts)
    lines = read_prompts(config.prompts)
    problems = Problems()
    for number, prompt in lines.items():
        try:
            task.model.encode([prompt])
        except UserError as error:
            problems.add(f"line {number}: {error}")
    problems.check(config.prompts)
    return list(lines.values())
