"""The time grid of a method: the task's own, or one that its configuration asks for."""

from jaxtyping import Float
from torch import Tensor

from difftilt.errors import UserError
from difftilt.process.grid import uniform_grid
from difftilt.training.protocol import Task


def grid_of(task: Task, steps: int | None, shift: float) -> Float[Tensor, " times"]:
    """``uniform_grid(steps, shift)``, or the grid of the task's sampler if ``steps`` is None.

    Raises:
        UserError: where sampling begins from an image at a time of the sampler's own grid.
    """
    if steps is None:
        return task.sampler.grid
    if task.sampler.begins:
        raise UserError(
            f"{task.name} samples from images, from the first time of its own grid on: leave out method.steps, and set "
            "the steps of the pipeline"
        )
    return uniform_grid(steps, shift)
