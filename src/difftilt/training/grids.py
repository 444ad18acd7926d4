"""The time grid of a method: the task's own, or one that its configuration asks for."""

from jaxtyping import Float
from torch import Tensor

from difftilt.process.grid import uniform_grid
from difftilt.training.protocol import Task


def grid_of(task: Task, steps: int | None, shift: float) -> Float[Tensor, " times"]:
    """``uniform_grid(steps, shift)``, or the grid of the task's sampler if ``steps`` is None."""
    return task.sampler.grid if steps is None else uniform_grid(steps, shift)
