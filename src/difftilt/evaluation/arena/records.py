"""What an arena keeps: one record per member and seed, and the whole result, as JSON and back."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.evaluation.arena.cost import CURRENCIES, Currency, spent
from difftilt.models.ledger import Ledger

Kind = Literal["base", "steered", "trained"]


class Reading(Config):
    """The samples of one member at one cost."""

    numbers: dict[str, float]
    """Every number of an evaluation, and ``distance``; what is not known is absent."""
    cost: Ledger
    """Everything spent until the samples existed, training included; measuring them costs nothing."""
    seconds: float
    """Wall clock of the same."""
    iterations: int | None = None
    """Of training."""
    particles: int | None = None
    """Of steering, per sample, or what else its amount is counted in."""
    unit: str | None = None
    """What ``particles`` counts where it is not particles: ``children``."""


class MemberRun(Config):
    """One member with one seed."""

    member: str
    """Its name."""
    seed: int
    """Of training, noise and base samples."""
    readings: dict[Currency, Reading]
    """One for each budget."""
    curve: tuple[Reading, ...] = ()
    """Of a trained member, in order of cost, beginning before the first iteration."""


class Entry(Config):
    """A member as the result names it."""

    name: str
    """Free text."""
    kind: Kind
    """What is done to the model."""
    algorithm: str
    """Name of method or steerer, or ``base``."""


class ArenaResult(Config):
    """Everything that tables, picture and page are made from."""

    source: str
    """Of the recipe."""
    command: str
    """That measured it."""
    versions: dict[str, str]
    """Of difftilt, PyTorch and Python."""
    threads: int
    """That PyTorch computed with, for the seconds."""
    reward: str
    """Name of the reward."""
    heldout: str
    """Number of the picture's second panel."""
    recipe: dict[str, Any]
    """The resolved arena."""
    members: tuple[Entry, ...]
    """In order."""
    runs: tuple[MemberRun, ...]
    """Of every member and seed."""

    def of(self, member: str) -> list[MemberRun]:
        """The runs of one member, in order of seeds."""
        return [run for run in self.runs if run.member == member]

    def budget(self, currency: Currency) -> int:
        """The budget in one currency."""
        return int(self.recipe["arena"][currency])


R = TypeVar("R", bound=Config)


def write_json(record: Config) -> str:
    """The record as text that :func:`read_json` takes back to an equal one."""
    return json.dumps(record.model_dump(mode="json", exclude_none=True), indent=1) + "\n"


def read_json(kind: type[R], path: Path) -> R:
    """The record in a file.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"), strict=True)
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged ({first}): remove it, and it is measured again with --resume") from error


def finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers that are numbers: missing is not zero."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def within(curve: tuple[Reading, ...], budgets: Mapping[Currency, int]) -> dict[Currency, Reading]:
    """For each budget the last reading whose cost does not exceed it."""
    return {
        currency: [point for point in curve if spent(point.cost, currency) <= budgets[currency]][-1]
        for currency in CURRENCIES
    }
