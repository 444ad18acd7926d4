"""What a recipe is: a testbed, a method or a steerer, and the settings of the run, all typed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from difftilt.config import Config, Problems, dump
from difftilt.errors import UserError
from difftilt.leaves import nearest
from difftilt.models.execution import Execution
from difftilt.recipes.loading import escaped, read, to_yaml
from difftilt.recipes.parts import Part, read_part
from difftilt.steering.budget import Budget
from difftilt.training.config import Device, TrainingConfig
from difftilt.training.prompts import Prompts


class SteeringConfig(Execution):
    """One call of a steerer."""

    seed: int = Field(default=0, ge=0)
    """Fixes every draw of the run."""
    prompts: Prompts | None = None
    """What to sample for: a list, a file (.txt, .jsonl), a data set, or a mapping with ``source`` and its columns; null
    takes the held-out prompts of the testbed."""
    forward_batch: int = Field(default=64, ge=4, multiple_of=4)
    """Rows of every network call: shorter batches are padded, longer ones are split. A multiple of 4."""
    device: Device = "cpu"
    """Torch device of the network."""
    budget: Budget = Budget()
    """What the call may spend; where it is bounded, the number of particles follows from it unless it is set."""
    invalid: Literal["error", "mask"] = "error"
    """What a reward without a finite score does: ``error`` ends the call, ``mask`` counts the sample and never chooses
    it."""
    fitted: Annotated[str, Field(min_length=1)] | None = None
    """Directory that ``difftilt train`` wrote for this steerer, whose learned part is used; null fits if needed."""


class RewardWeights(Config):
    """A weighted sum of rewards that the testbed offers by name, in place of its own reward."""

    weights: dict[str, float] = Field(min_length=1)
    """Name -> weight; every component is logged as it comes, before its weight."""
    normalise: Literal["group", "batch"] | None = None
    """Standardise each component by its group or by the batch before it is weighted."""


SECTIONS = ("testbed", "reward", "method", "steerer", "training", "steering", "data")


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes a run. Exactly one of ``method`` and ``steerer`` is there.

    Attributes:
        source: where it was read, for messages.
        testbed: makes the task.
        method: what ``difftilt train`` runs.
        steerer: what ``difftilt steer`` runs.
        reward: replaces the testbed's own reward.
        weights: replaces it by a sum of rewards of the testbed.
        training: of the loop.
        steering: of the call.
        data: what the method learns from: a directory that ``difftilt collect`` wrote, or preference pairs.
    """

    source: str
    testbed: Part
    method: Part | None
    steerer: Part | None
    reward: Part | None
    weights: RewardWeights | None
    training: TrainingConfig
    steering: SteeringConfig
    data: str | None = None

    def resolved(self) -> dict[str, Any]:
        """Plain values with every default filled in; :func:`load_recipe` takes them back to the same run.

        A number of particles or children that nobody has chosen is left out where a budget decides it: written down it
        would be one that was chosen, which a budget repeats and does not change.
        """
        return self._plain(self.steering.budget.bounded)

    def open(self) -> dict[str, Any]:
        """The same for a recipe that is still to be changed: without that number whatever the budget."""
        return self._plain(True)

    def _plain(self, unsized: bool) -> dict[str, Any]:
        parts = {"testbed": self.testbed, "reward": self.reward, "method": self.method, "steerer": self.steerer}
        values: dict[str, Any] = {name: part.resolved() for name, part in parts.items() if part is not None}
        if self.steerer is not None and unsized:
            values["steerer"] = self.steerer.unsized()
        if self.weights is not None:
            values["reward"] = dump(self.weights)
        if self.data is not None:
            values["data"] = self.data
        if self.method is not None:
            return values | {"training": dump(self.training)}
        return values | {"steering": dump(self.steering)}

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return to_yaml(self.resolved())


def load_recipe(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and type a recipe.

    Args:
        recipe: a path, a packaged name, ``<testbed>/<method or steerer>``, or the values themselves.
        overrides: ``dotted.key=value``; ``seed=`` and ``iterations=`` stand for the key of the run's own section.

    Raises:
        UserError: reports everything that is wrong in all sections.
    """
    values, source = read(recipe)
    section = "steering" if "steerer" in values else "training"
    shortcuts = {"seed": f"{section}.seed", "iterations": f"{section}.iterations"}
    full = [_full_key(override, shortcuts) for override in overrides]
    if full:
        values, _ = read(escaped(_without_old_reward(values, full)), full)
    return type_recipe(values, source)


def _without_old_reward(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values without the fields of a reward that an override replaces by another: they are not the new one's."""
    named = [value for key, _, value in (override.partition("=") for override in overrides) if key == "reward.name"]
    held = values.get("reward")
    same = not isinstance(held, Mapping) or cast(Mapping[str, Any], held).get("name") in (named[-1:] or [None])
    return values if same or not named else {key: value for key, value in values.items() if key != "reward"}


def _full_key(override: str, shortcuts: Mapping[str, str]) -> str:
    key, equals, value = override.partition("=")
    return f"{shortcuts.get(key, key)}={value}" if equals else override


def type_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """Plain values as a typed recipe."""
    if "members" in values:
        raise UserError(f"{source} is an arena, it has a section 'members': use `difftilt compare`")
    problems = Problems()
    for key in values:
        if key not in SECTIONS:
            problems.add(f"{key}: unknown section; {nearest(str(key), SECTIONS)}")
    if ("method" in values) == ("steerer" in values):
        problems.add("a recipe has either a section 'method' (to train) or a section 'steerer' (to steer)")
    summed = isinstance(values.get("reward"), Mapping) and "name" not in values["reward"]
    wanted = ({"testbed"} | set(values)) - ({"reward"} if summed else set())
    parts = {
        section: read_part(kind, section, values.get(section), problems)
        for section, kind in _PART_KINDS.items()
        if section in wanted
    }
    weights = problems.parse(RewardWeights, values["reward"], "reward") if summed else None
    training = _settings(TrainingConfig, values, "training", "method", problems)
    steering = _settings(SteeringConfig, values, "steering", "steerer", problems)
    data = _data(values, problems)
    problems.check(source)
    return Recipe(
        source,
        cast(Part, parts["testbed"]),
        parts.get("method"),
        parts.get("steerer"),
        parts.get("reward"),
        weights,
        cast(TrainingConfig, training),
        cast(SteeringConfig, steering),
        data,
    )


_PART_KINDS = {"testbed": "testbeds", "method": "methods", "steerer": "steerers", "reward": "rewards"}


def _data(values: Mapping[str, Any], problems: Problems) -> str | None:
    data = values.get("data")
    if data is None:
        return None
    if not isinstance(data, str) or not data:
        problems.add(f"data = {data!r}: must be the directory of a data set")
    if "method" not in values:
        problems.add("data: has no meaning without a section 'method'")
    return str(data)


def _settings(
    config_class: type[Config], values: Mapping[str, Any], section: str, owner: str, problems: Problems
) -> Config | None:
    data = values.get(section, {})
    if section in values and owner not in values:
        problems.add(f"{section}: has no meaning without a section '{owner}'")
    if not isinstance(data, Mapping):
        problems.add(f"{section}: must be a mapping of fields")
        return None
    return problems.parse(config_class, cast(Mapping[str, Any], data), section)
