"""Data sets on disk: groups that were drawn and scored before training, with what they were made with.

A directory with ``data.safetensors`` (the tensors) and ``manifest.json``; the condition is not stored but encoded again
from the texts of the prompts. ``difftilt collect`` writes it, and it is read for a task that it is checked against.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from difftilt.config import Config, parse
from difftilt.errors import UserError
from difftilt.models.fingerprint import READ, fingerprint
from difftilt.models.ledger import Ledger
from difftilt.rewards.prompts import identity, prompt_of
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.scoring import same_scores, score_components
from difftilt.sampling.protocol import Sampler
from difftilt.training.experience import Experience
from difftilt.training.offline import from_tensors
from difftilt.training.protocol import Task
from difftilt.training.provenance import Drawn, drawn_by
from difftilt.trees import take

DATA, MANIFEST = "data.safetensors", "manifest.json"
VERSION = 3
"""Of the two files that are written."""
HASHED_WHOLE = 1
"""The first version, whose ``weights`` is the SHA-256 of every value."""
READABLE = (HASHED_WHOLE, 2, VERSION)
"""Versions that are read. Before the third there is no ``drawn``."""


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
