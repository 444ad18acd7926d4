"""Groups of samples that were drawn and scored before training: in memory, on disk, and checked against a task.

A data set is the :class:`~difftilt.training.experience.Experience` of many groups, without edges. On disk it is a
directory with ``data.safetensors`` (the tensors) and ``manifest.json`` (what they were made with); the condition is not
stored but encoded again from the texts of the prompts. ``difftilt collect`` writes such a directory.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from difftilt.config import Config, parse
from difftilt.errors import UserError
from difftilt.models.fingerprint import READ, fingerprint
from difftilt.models.ledger import Ledger
from difftilt.process.protocol import Condition
from difftilt.rewards.prompts import identity, prompt_of
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.scoring import same_scores, score_components
from difftilt.sampling.protocol import Edges, Sampler
from difftilt.statistics.folds import compact, segment_count, segment_max, segment_min, segment_rank
from difftilt.training.drawing import drawn
from difftilt.training.experience import Experience, PromptBatch, scored_experience
from difftilt.training.protocol import Run, Task
from difftilt.training.provenance import Drawn, drawn_by
from difftilt.trees import take

DATA, MANIFEST = "data.safetensors", "manifest.json"
VERSION = 3
"""Of the two files that are written."""
HASHED_WHOLE = 1
"""The first version, whose ``weights`` is the SHA-256 of every value."""
READABLE = (HASHED_WHOLE, 2, VERSION)
"""Versions that are read. Before the third there is no ``drawn``."""
COMPONENTS = "components/"
COLUMNS = ("index", "group", "prompt", "x_0", "rewards")


class Manifest(Config):
    """What a data set was made with."""

    version: int
    testbed: dict[str, Any]
    reward: str
    """Name of the reward."""
    reward_section: dict[str, Any] | None
    """Of the recipe; null where the testbed's own reward was taken."""
    repeatable: bool
    """Whether scoring the first group twice gave the same numbers: it can then be scored again as a test."""
    prompts: tuple[str | dict[str, Any], ...]
    """What ``prompt`` counts: texts, with their metadata where they have any."""
    shape: tuple[int, ...]
    """Of one latent."""
    groups: int
    group_size: int
    equal_groups: int
    """Groups whose rewards are all equal: nothing can be learned from their order."""
    weights: str
    """Fingerprint of the network that drew the samples."""
    drawn: Drawn | None = None
    """Process, output, solver and conditions; null before version 3, and then not compared."""
    grid: tuple[float, ...]
    guidance: float
    seed: int
    """Says where the data come from, as ``testbed`` does: never compared."""
    ledger: dict[str, int]
    """What the samples and their rewards cost."""
    data: str
    """SHA-256 of the file of tensors."""

    @property
    def texts(self) -> Sequence[str]:
        """The prompts with their metadata."""
        return [prompt_of(value) for value in self.prompts]


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


def load_data(directory: Path, task: Task, reward_section: Mapping[str, Any] | None = None) -> Experience:
    """The data set in a directory, if it is one of this task.

    Args:
        directory: written by ``difftilt collect``.
        task: with its untrained model and its reward.
        reward_section: of the recipe, if it has one.

    Raises:
        UserError: names what is missing, damaged, or of another model, reward or set of prompts.
    """
    manifest = read_manifest(directory)
    _check_manifest(directory, manifest, task, reward_section)
    data = from_tensors(_tensors(directory, manifest))
    known = {identity(prompt): place for place, prompt in enumerate(task.prompts)}
    place = torch.tensor([known[identity(prompt)] for prompt in manifest.texts])
    encoded = task.model.encode(manifest.texts)
    data = replace(data, condition=take(encoded, data.prompt), prompt=place[data.prompt])
    if manifest.repeatable:
        _check_scores(directory, data, task)
    return data


def read_manifest(directory: Path) -> Manifest:
    """What the data set of a directory was made with."""
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"data {directory} is no data set ({MANIFEST} is missing): make one with `difftilt collect RECIPE --output "
            f"{directory}`, or finish one that was interrupted with --resume"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): collect the data again") from error
    if not isinstance(values, dict) or values.get("version") not in READABLE:  # pyright: ignore[reportUnknownMemberType]
        raise UserError(f"{path} is not of version {VERSION}: collect the data again")
    return parse(Manifest, values, str(path))  # pyright: ignore[reportUnknownArgumentType]


def _check_manifest(directory: Path, manifest: Manifest, task: Task, section: Mapping[str, Any] | None) -> None:
    """One error with everything that is of another task."""
    found: list[str] = []
    if manifest.shape != tuple(task.model.shape):
        found.append(f"latents are of shape {manifest.shape}, the model's are {tuple(task.model.shape)}")
    elif manifest.weights != fingerprint(task.model.network, None if manifest.version == HASHED_WHOLE else READ):
        found.append("the samples were drawn by a model with other weights")
    found += _drawn_otherwise(manifest, task.sampler)
    own = set(map(identity, task.prompts))
    strange = [
        value for prompt, value in zip(manifest.texts, manifest.prompts, strict=True) if identity(prompt) not in own
    ]
    if manifest.drawn is not None:
        # another data set's prompts need not be any that this encoder knows
        found += [] if strange else manifest.drawn.differences(drawn_by(task, manifest.texts))
    else:
        warnings.warn(
            f"data {directory} are of version {manifest.version}, which does not say by which process, output, solver "
            "and encoder of texts they were drawn: that these are the task's was not checked",
            stacklevel=3,
        )
    settings = None if section is None else dict(section)
    if (manifest.reward, manifest.reward_section) != (task.reward.name, settings):
        there, here = ((manifest.reward, manifest.reward_section), (task.reward.name, settings))
        found.append(f"the samples were scored by {_named(*there)}, the task's reward is {_named(*here)}")
    if strange:
        found.append(f"{len(strange)} prompts are no training prompts of the task, the first is {strange[0]!r}")
    if manifest.group_size < 2:
        found.append("the groups have one member, which nothing can be compared with")
    if found:
        lines = "\n  ".join(found)
        raise UserError(f"data {directory} do not fit {task.name!r}; collect them with the same recipe:\n  {lines}")


def _drawn_otherwise(manifest: Manifest, sampler: Sampler) -> list[str]:
    """What differs between the sampling that made the data and that of the task."""
    found: list[str] = []
    there, here = torch.tensor(manifest.grid).double(), sampler.grid.double().cpu()
    if len(there) != len(here):
        found.append(f"the samples were drawn in {len(there) - 1} steps, the task's sampler has {len(here) - 1}")
    elif not torch.allclose(there, here, rtol=0, atol=1e-6):
        found.append("the samples were drawn at other times (the sampler's grid differs)")
    if manifest.guidance != sampler.guidance:
        found.append(f"the samples were drawn with guidance {manifest.guidance:g}, the task has {sampler.guidance:g}")
    return found


def _named(name: str, section: Mapping[str, Any] | None) -> str:
    return repr(name) if section is None else f"{name!r} {json.dumps(section)}"


def _tensors(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    path = directory / DATA
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest.data:
            raise UserError(f"{path} is damaged (its hash differs from {MANIFEST}): collect the data again")
        return load(content)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: collect the data again") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): collect the data again") from error


def first_group(data: Experience, task: Task) -> Samples:
    """The samples of the first group, decoded, with the prompts of the task."""
    assert data.x_0 is not None
    rows = (data.group == data.group[0]).nonzero()[:, 0]
    texts = [task.prompts[int(place)] for place in data.prompt[rows]]
    with torch.no_grad():
        media = task.model.decode(data.x_0[rows])
    return Samples.of(media, texts, data.group[rows], task.model.encode(texts))


def scores_again(data: Experience, task: Task, reward: Reward) -> bool:
    """Whether a reward gives the first group the components that are stored with it."""
    rows = (data.group == data.group[0]).nonzero()[:, 0]
    with torch.no_grad():
        fresh = score_components(reward, first_group(data, task), Ledger())
    held = {name: column[rows] for name, column in data.components.items()}
    return same_scores(fresh, held)


def _check_scores(directory: Path, data: Experience, task: Task) -> None:
    if not scores_again(data, task, task.reward):
        raise UserError(
            f"data {directory} do not fit {task.name!r}: its reward {task.reward.name!r} scores the first group "
            "otherwise than is stored, so it was configured differently; collect the data with this recipe"
        )
