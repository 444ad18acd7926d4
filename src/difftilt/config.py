"""Frozen configuration: typed, bounded, one sentence per field, unknown keys refused, all errors reported at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from difftilt.errors import UserError
from difftilt.leaves import nearest


class Config(BaseModel):
    """Base of every configuration. Subclasses are frozen; a misspelt key is an error, and so is an infinite number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )


C = TypeVar("C", bound=Config)


@dataclass
class Problems:
    """Collects what is wrong with several sections of a configuration, so that one error reports all of it."""

    lines: list[str] = field(default_factory=list[str])

    def add(self, line: str) -> None:
        """Note one problem."""
        self.lines.append(line)

    def parse(self, config_class: type[C], data: Mapping[str, Any], where: str) -> C | None:
        """The typed configuration, or None after noting everything that is wrong with it.

        Types are strict, as in JSON: a string is not a number, true is not 1, but 1 is a float and a list a tuple.

        Args:
            config_class: what to parse into.
            data: plain values, as YAML or JSON give them.
            where: dotted name of the section, which begins every line.
        """
        try:
            text = json.dumps(dict(data))
        except TypeError as error:
            self.add(f"{where}: only plain values can be configured: {error}")
            return None
        try:
            return config_class.model_validate_json(text, strict=True)
        except ValidationError as error:
            self.lines += _lines(config_class, data, where, error.errors())
            return None

    def check(self, source: str) -> None:
        """Raise one error with every problem noted so far.

        Args:
            source: what was read (a file, a command line), named at the head of the message.

        Raises:
            UserError: if there is any problem.
        """
        if self.lines:
            count = f"{len(self.lines)} errors" if len(self.lines) > 1 else "1 error"
            raise UserError("\n".join([f"{count} in {source}", *(f"  {line}" for line in self.lines)]))


def parse(config_class: type[C], data: Mapping[str, Any], where: str = "method") -> C:
    """One section as typed configuration.

    Raises:
        UserError: names every key that is wrong, its value, what was expected and the nearest valid name.
    """
    problems = Problems()
    config = problems.parse(config_class, data, where)
    problems.check(where)
    return cast(C, config)


def dump(config: Config) -> dict[str, Any]:
    """Plain values that :func:`parse` takes back to an equal configuration."""
    return config.model_dump(mode="json")


def _lines(config_class: type[Config], data: Mapping[str, Any], where: str, errors: list[ErrorDetails]) -> list[str]:
    """One line per key; the members of a union that failed at one key share a line."""
    by_key: dict[str, tuple[str, list[str]]] = {}
    for error in errors:
        path = _path(data, error)
        key = ".".join((where, *map(str, path)))
        value, expected = _describe(config_class, path, error)
        _, reasons = by_key.setdefault(key, (value, []))
        if expected not in reasons:
            reasons.append(expected)
    return [f"{key}{value}: {', or '.join(reasons)}" for key, (value, reasons) in by_key.items()]


def _path(data: Any, error: ErrorDetails) -> list[str | int]:
    """The keys among an error's location: pydantic mixes in the tags of union members, which no user wrote."""
    path: list[str | int] = []
    for part in error["loc"]:
        if isinstance(data, Mapping) and part in data:
            data = cast(Mapping[Any, Any], data)[part]
        elif isinstance(data, list | tuple) and isinstance(part, int) and part < len(cast(Sequence[Any], data)):
            data = cast(Sequence[Any], data)[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        path.append(part)
    return path


def _describe(config_class: type[Config], path: list[str | int], error: ErrorDetails) -> tuple[str, str]:
    """The value as the user would write it, and what was expected."""
    if error["type"] == "missing":
        return "", "is required and has no default"
    value = f" = {_short(error['input'])}" if path else ""
    if error["type"] == "extra_forbidden":
        return value, f"unknown key; {nearest(str(path[-1]), _known(config_class, path[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    return value, message[0].lower() + message[1:]


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known(config_class: type[Config], path: Sequence[str | int]) -> list[str]:
    """Names of the fields at a path of keys below a configuration."""
    classes: list[type[Config]] = [config_class]
    for part in path:
        annotations = [c.model_fields[str(part)].annotation for c in classes if str(part) in c.model_fields]
        classes = [found for annotation in annotations for found in configs_in(annotation)]
    return [name for found in classes for name in found.model_fields]


def configs_in(annotation: Any) -> list[type[Config]]:
    """The configuration classes that an annotation mentions (unions, optional fields)."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for argument in get_args(annotation) for found in configs_in(argument)]
