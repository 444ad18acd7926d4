"""Groups of samples that were drawn and scored before training, as an offline method learns from them.

They are the :class:`~difftilt.training.experience.Experience` of many groups, without edges; ``training.stored``
keeps them on disk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from difftilt.errors import UserError
from difftilt.process.protocol import Condition
from difftilt.sampling.protocol import Edges
from difftilt.statistics.folds import compact, segment_count, segment_max, segment_min, segment_rank
from difftilt.training.drawing import drawn
from difftilt.training.experience import Experience, PromptBatch, scored_experience
from difftilt.training.protocol import Run, Task

COMPONENTS = "components/"
COLUMNS = ("index", "group", "prompt", "x_0", "rewards")


@dataclass(frozen=True)
class Groups:
    """What can be learned from in a data set.

    Attributes:
        data: all samples.
        rows: of ``data``, one line for each group whose rewards differ.
        dropped: number of groups whose rewards are all equal; they are left out.
    """

    data: Experience
    rows: Int[Tensor, "groups size"]
    dropped: int


def scored(run: Run, batch: PromptBatch, draw: Callable[[PromptBatch], Shaped[Tensor, "samples *shape"]]) -> Experience:
    """Samples drawn and scored, not yet trained on."""
    x_0, _, scores = drawn(run, batch, draw)
    return scored_experience(batch, x_0, no_edges(), scores)


def gathered(run: Run, data: Experience) -> Experience:
    """The samples of all processes, without their conditions, on the CPU."""
    return from_tensors({name: run.gather(column)[0] for name, column in to_tensors(data).items()})


def to_tensors(data: Experience) -> dict[str, Tensor]:
    """All that is kept of a data set."""
    assert data.x_0 is not None
    assert data.rewards is not None
    columns = dict(zip(COLUMNS, (data.index, data.group, data.prompt, data.x_0, data.rewards), strict=True))
    columns |= {f"{COMPONENTS}{name}": column for name, column in data.components.items()}
    # own storage: safetensors refuses tensors that share memory
    return {name: column.detach().cpu().contiguous().clone() for name, column in columns.items()}


def from_tensors(tensors: Mapping[str, Tensor], condition: Condition = None) -> Experience:
    """Inverse of :func:`to_tensors`."""
    components = {
        name.removeprefix(COMPONENTS): column for name, column in tensors.items() if name.startswith(COMPONENTS)
    }
    index, group, prompt, x_0, rewards = (tensors[name] for name in COLUMNS)
    return Experience(index, group, prompt, condition, x_0, rewards, components, no_edges())


def no_edges() -> Edges:
    """Of a data set: what is trained on is decided when a group is drawn."""
    none = torch.zeros(0, dtype=torch.int64)
    return Edges(sample=none, step=none, t=torch.zeros(0))


def learnable(data: Experience, task: Task, size: int) -> Groups:
    """The groups that say which of their members are better; of each the first ``size`` members.

    Raises:
        UserError: if the data are not of this task, or groups are too small, or no group has two different rewards.
    """
    _check_fit(data, task)
    assert data.rewards is not None
    index, count = compact(data.group)
    smallest = int(segment_count(index, count).min())
    if smallest < size:
        remedy = "collect groups of at least two" if smallest < 2 else f"set method.group_size={smallest}"
        raise UserError(
            f"method.group_size = {size}, but the data of {task.name!r} have a group of {smallest}: {remedy}"
        )
    number = torch.arange(len(index), dtype=torch.float64)
    rank = segment_rank(number, index, count)
    kept = (rank < size).nonzero()[:, 0]
    place = index[kept] * size + rank[kept]
    rows = torch.zeros(count * size, dtype=torch.int64).scatter(0, place, kept).reshape(count, size)
    differ = data.rewards[rows].amax(1) > data.rewards[rows].amin(1)
    if not bool(differ.any()):
        raise UserError(
            f"all {count} groups of the data of {task.name!r} have equal rewards: nothing can be learned from their "
            "order; collect more or larger groups, or choose a finer reward"
        )
    return Groups(data, rows[differ], count - int(differ.sum()))


def equal_groups(data: Experience) -> int:
    """Number of groups whose rewards are all equal."""
    assert data.rewards is not None
    index, count = compact(data.group)
    return int((segment_max(data.rewards, index, count) == segment_min(data.rewards, index, count)).sum())


def _check_fit(data: Experience, task: Task) -> None:
    if data.x_0 is None or data.rewards is None or len(data.index) == 0:
        raise UserError(f"the data of {task.name!r} hold no scored samples: x_0 and rewards are needed for each")
    if tuple(data.x_0.shape[1:]) != tuple(task.model.shape):
        raise UserError(
            f"the data of {task.name!r} have latents of shape {tuple(data.x_0.shape[1:])}, its model "
            f"{tuple(task.model.shape)}: collect data with this model"
        )
    if not bool(data.rewards.isfinite().all()):
        raise UserError(f"the data of {task.name!r} have rewards that are not finite: leave those samples out")
    if int(data.prompt.min()) < 0 or int(data.prompt.max()) >= len(task.prompts):
        raise UserError(f"the data of {task.name!r} point to prompts outside its {len(task.prompts)}: number them anew")
