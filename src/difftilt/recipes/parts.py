"""A leaf with its typed configuration: what one section of a recipe stands for."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast, get_type_hints

from pydantic import create_model
from pydantic.errors import PydanticSchemaGenerationError

from difftilt.config import Config, Problems, configs_in, dump
from difftilt.errors import UserError
from difftilt.leaves import load
from difftilt.rewards.base import as_reward, scores_samples
from difftilt.rewards.protocol import Reward
from difftilt.steering.pricing import scaled_by


class NoFields(Config):
    """Of a leaf that nothing can be configured in."""


@dataclass(frozen=True)
class Part:
    """A named leaf and its configuration.

    Attributes:
        kind: of leaf, as in ``leaves.ROOMS``.
        name: slug or ``package.module:Name``.
        config: every field, defaults included.
        inner: the reward that a leaf wraps, where its entry has a parameter ``reward``.
    """

    kind: str
    name: str
    config: Config
    inner: "Part | None" = None

    @property
    def takes_task(self) -> bool:
        """Whether the leaf is made from a task."""
        return "task" in inspect.signature(load(self.kind, self.name)).parameters

    def build(self, task: Any = None) -> Any:
        """What the leaf makes of its configuration, and of the task where its entry has a parameter for it."""
        entry = load(self.kind, self.name)
        if self.config.__class__ is entry:
            return self.config
        if scores_samples(entry):
            return entry
        extra = {"task": task} if self.takes_task else {}
        if self.inner is not None:
            extra["reward"] = as_reward(self.inner.build(task))
        if _own_config(entry) is not None:
            return entry(self.config, **extra)
        return entry(**{name: getattr(self.config, name) for name in type(self.config).model_fields}, **extra)

    def resolved(self) -> dict[str, Any]:
        """Plain values, as a recipe writes them."""
        inner = {} if self.inner is None else {"reward": self.inner.resolved()}
        return {"name": self.name, **dump(self.config), **inner}

    def unsized(self) -> dict[str, Any]:
        """The same without the number that a budget decides, where nobody has chosen it: it is not the default."""
        count = scaled_by(self.config)
        free = count is not None and count not in self.config.model_fields_set
        return {name: value for name, value in self.resolved().items() if not (free and name == count)}


@dataclass(frozen=True)
class Given(Part):
    """A part that somebody gave as a Python object: a recipe can name it, but not make it again.

    Attributes:
        value: the object; None where a recipe was read from a file.
        facts: what the recipe says of it besides its name.
    """

    value: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def build(self, task: Any = None) -> Any:
        """The object.

        Raises:
            UserError: if the recipe was read from a file.
        """
        if self.value is None:
            raise UserError(
                f"{self.name} was given as a Python object, which no recipe can make again: call difftilt from Python "
                "with the same objects, or name a leaf"
            )
        return self.value

    def resolved(self) -> dict[str, Any]:
        """Name and facts."""
        return {"name": self.name, **self.facts}


def given(kind: str, value: Any, facts: Mapping[str, Any] | None = None) -> Given:
    """An object as a part, named ``<Class>`` or ``<function>``; no leaf has such a name."""
    name = getattr(value, "__name__", None) or getattr(value, "name", None) or type(value).__name__
    return Given(kind, f"<{name}>", NoFields(), value=value, facts=facts or {})


def read_part(kind: str, section: str, data: object, problems: Problems) -> Part | None:
    """The part that a section of a recipe names, or None after noting what is wrong with it."""
    if not isinstance(data, Mapping) or not isinstance(cast(Mapping[str, Any], data).get("name"), str):
        problems.add(f"{section}: needs a name, as in '{section}: {{name: ...}}'")
        return None
    values = dict(cast(Mapping[str, Any], data))
    name = str(values.pop("name"))
    if name.startswith("<"):
        return Given(kind, name, NoFields(), facts=values)
    try:
        entry = load(kind, name)
        config_class = config_of(entry)
    except UserError as error:
        problems.add(f'{section}.name = "{name}": {error}')
        return None
    inner = None
    if _wraps(entry):
        inner = read_part("rewards", f"{section}.reward", values.pop("reward", None), problems)
    config = problems.parse(config_class, values, section)
    return None if config is None or (_wraps(entry) and inner is None) else Part(kind, name, config, inner)


@cache
def config_of(entry: Callable[..., Any]) -> type[Config]:
    """The configuration class of a leaf's entry.

    It is the entry itself, or the type of its first parameter, or else made from the parameters of its signature.
    A plain reward, a function of :class:`Samples`, has no fields.
    """
    if isinstance(entry, type) and issubclass(entry, Config):
        return entry
    if scores_samples(entry):
        return NoFields
    return _own_config(entry) or _from_signature(entry)


def _wraps(entry: Callable[..., Any]) -> bool:
    """Whether an entry makes something of another reward."""
    return "reward" in inspect.signature(entry).parameters and _hints(entry).get("reward") is Reward


def _own_config(entry: Callable[..., Any]) -> type[Config] | None:
    parameters = list(inspect.signature(entry).parameters)
    found = configs_in(_hints(entry).get(parameters[0])) if parameters else []
    return found[0] if found else None


def _from_signature(entry: Callable[..., Any]) -> type[Config]:
    hints, fields = _hints(entry), dict[str, Any]()
    for name, parameter in inspect.signature(entry).parameters.items():
        if name == "task" or hints.get(name) is Reward:
            continue  # given by the run
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (hints.get(name, Any), default)
    title = getattr(entry, "__name__", "entry")
    try:
        return create_model(f"{title}Config", __base__=Config, __module__=__name__, **fields)
    except PydanticSchemaGenerationError as error:
        objects = ", ".join(name for name, (hint, _) in fields.items() if not _plain(hint))
        raise UserError(f"{title} takes objects that a recipe cannot hold ({objects}): use it from Python") from error


def _plain(hint: Any) -> bool:
    """Whether a recipe can hold values of this type."""
    try:
        create_model("Probe", __base__=Config, __module__=__name__, value=(hint, ...))
    except PydanticSchemaGenerationError:
        return False
    return True


def _hints(entry: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(entry.__init__ if isinstance(entry, type) else entry)
