"""Prompts of a recipe: a list in it, a file or a data set."""

from collections.abc import Sequence

from difftilt.config import Problems
from difftilt.errors import UserError
from difftilt.recipes.schema import SteeringConfig
from difftilt.training.prompts import as_prompts, read_prompts
from difftilt.training.protocol import Task


def prompts_of(task: Task, config: SteeringConfig) -> Sequence[str]:
    """The prompts to steer for: those of the recipe, or the held-out ones of the task.

    Raises:
        UserError: for a file that cannot be read or holds no prompt, or with the lines that the task has no condition
            for.
    """
    if config.prompts is None:
        return list(task.heldout_prompts)
    if isinstance(config.prompts, tuple):
        return as_prompts(config.prompts)
    lines = read_prompts(config.prompts)
    problems = Problems()
    for where, prompt in lines.items():
        try:
            task.model.encode([prompt])
        except UserError as error:
            problems.add(f"{where}: {error}")
    problems.check(config.prompts if isinstance(config.prompts, str) else config.prompts.source)
    return list(lines.values())
