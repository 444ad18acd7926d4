"""The recipe of an arena: one task, two budgets, and members that compete on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from omegaconf import OmegaConf
from pydantic import Field, field_validator, model_validator

from difftilt.config import Config, Problems, dump
from difftilt.errors import UserError
from difftilt.evaluation.arena.cost import Clock, Currency
from difftilt.leaves import load, nearest
from difftilt.recipes.loading import read
from difftilt.recipes.parts import Part, read_part
from difftilt.recipes.schema import Recipe, RewardWeights, SteeringConfig
from difftilt.steering.pricing import scaled_by
from difftilt.steering.within import is_anytime
from difftilt.training.config import Device, OptimizerConfig, TrainingConfig

SECTIONS = ("testbed", "reward", "arena", "members")
MEMBER_SECTIONS = ("method", "training", "steerer", "sampler")
MAX_NAME = 60


class ArenaConfig(Config):
    """What is the same for every member."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    """Every member runs once with each; a seed fixes training, evaluation noise and the set of base samples."""
    evaluations: int = Field(ge=1)
    """Budget of network evaluations: forward passes, and three for every pass with a gradient."""
    reward_calls: int = Field(ge=1)
    """Budget of samples handed to the reward."""
    samples: int = Field(default=192, ge=2)
    """Samples that every member delivers on the held-out prompts; the budgets hold for all of them together."""
    forward_batch: int = Field(default=64, ge=4, multiple_of=4)
    """Rows of every network call, a multiple of 4."""
    heldout: str | None = None
    """Number of the picture's second panel, ``reward`` or a held-out reward; null is the task's headline."""
    target: float | None = None
    """Value of ``heldout`` for which a table says what each trained member has spent when it is first read at or above
    it. A noisy number crosses early, and the later the rarer it is read: give all members one ``evaluate_every``."""
    steered_curve: bool = False
    """Also read steered members at halves, quarters, ... of the budget of evaluations: shows from how many samples on
    training is the cheaper way, and costs as much again."""
    against: str | None = None
    """Trained member that a table compares the cost until ``target`` with, seed by seed."""
    clock: Clock = "wall"
    """What seconds are of. ``processor`` does not depend on other work on a shared machine; set OMP_NUM_THREADS=1."""
    device: Device = "cpu"
    """Torch device of the network."""

    @model_validator(mode="after")
    def _clock_sees_the_work(self) -> Self:
        if self.clock == "processor" and self.device != "cpu":
            raise ValueError(f"clock: processor does not see the work of {self.device}: use wall")
        return self

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands there twice: the same run would count as two")
        return seeds

    def budget(self, currency: Currency) -> int:
        """The budget in one currency."""
        return self.evaluations if currency == "evaluations" else self.reward_calls


class MemberTraining(Config):
    """What a trained member may choose of its loop; the rest is the arena's, or follows from the budgets."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the role ``current``."""
    evaluate_every: int = Field(default=10, ge=1)
    """Iterations between points of the curve; the last iteration within a budget is evaluated as well."""


class BaseMember(Config):
    """The untrained model."""

    sampler: Literal["solver", "kernel"] = "solver"
    """``solver`` samples as trained members do, ``kernel`` by the stochastic kernel that steerers use."""


@dataclass(frozen=True)
class Member:
    """One competitor: the base, a steerer or a method.

    Attributes:
        name: free text.
        method: of a trained member; ``training`` belongs to it.
        steerer: of a steered member; its number of particles (or children) follows from the budgets.
        training: settings of the loop.
        base: how the base is sampled.
    """

    name: str
    method: Part | None
    steerer: Part | None
    training: MemberTraining
    base: BaseMember

    @property
    def algorithm(self) -> str:
        """Name of what runs."""
        part = self.method or self.steerer
        return "base" if part is None else part.name

    def resolved(self) -> dict[str, Any]:
        """Plain values, as a recipe writes them."""
        if self.method is not None:
            return {"method": self.method.resolved(), "training": dump(self.training)}
        if self.steerer is not None:
            values = self.steerer.resolved()
            return {"steerer": {key: value for key, value in values.items() if key != scaled_by(self.steerer.config)}}
        return dump(self.base)


@dataclass(frozen=True)
class Arena:
    """A comparison, typed.

    Attributes:
        source: where it was read, for messages.
        overrides: what was changed on the way in.
        testbed, reward, weights: of the task, as in a recipe.
        config: budgets and seeds.
        members: in order.
    """

    source: str
    overrides: tuple[str, ...]
    testbed: Part
    reward: Part | None
    weights: RewardWeights | None
    config: ArenaConfig
    members: tuple[Member, ...]

    def recipe(self, member: Member) -> Recipe:
        """The member's own recipe."""
        return Recipe(
            f"member {member.name!r}",
            self.testbed,
            member.method,
            member.steerer,
            self.reward,
            self.weights,
            TrainingConfig(),
            SteeringConfig(),
        )

    def resolved(self) -> dict[str, Any]:
        """Plain values with every default filled in; :func:`load_arena` takes them back to an equal arena."""
        values: dict[str, Any] = {"testbed": self.testbed.resolved()}
        if self.reward is not None:
            values["reward"] = self.reward.resolved()
        if self.weights is not None:
            values["reward"] = dump(self.weights)
        members = {member.name: member.resolved() for member in self.members}
        return values | {"arena": dump(self.config), "members": members}

    def to_yaml(self) -> str:
        """The resolved arena as YAML."""
        return OmegaConf.to_yaml(OmegaConf.create(self.resolved()))


def load_arena(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Arena:
    """Read, override and type the recipe of an arena.

    Args:
        recipe: a path, a packaged name (``arena/digits``), or the values themselves.
        overrides: ``dotted.key=value``.

    Raises:
        UserError: reports everything that is wrong in all sections and members.
    """
    values, source = read(recipe, overrides)
    if "members" not in values and ("method" in values or "steerer" in values):
        command = "train" if "method" in values else "steer"
        raise UserError(f"{source} is no arena, it has no section 'members': use `difftilt {command}`")
    problems = Problems()
    for key in values:
        if key not in SECTIONS:
            problems.add(f"{key}: unknown section; {nearest(str(key), SECTIONS)}")
    testbed = read_part("testbeds", "testbed", values.get("testbed"), problems)
    reward, weights = _reward(values, problems)
    config = problems.parse(ArenaConfig, _mapping(values.get("arena", {}), "arena", problems), "arena")
    members = _members(_mapping(values.get("members", {}), "members", problems), problems)
    _check_against(config, members, problems)
    problems.check(source)
    return Arena(source, tuple(overrides), cast(Part, testbed), reward, weights, cast(ArenaConfig, config), members)


def _check_against(config: ArenaConfig | None, members: Sequence[Member], problems: Problems) -> None:
    """The member that others are compared with is trained, and there is a number to reach."""
    if config is None or config.against is None:
        return
    if config.target is None:
        problems.add("arena.against compares the cost until a number is reached: give arena.target")
    trained = [member.name for member in members if member.method is not None]
    if config.against not in trained:
        problems.add(f"arena.against = {config.against!r} is no trained member; {nearest(config.against, trained)}")


def _reward(values: Mapping[str, Any], problems: Problems) -> tuple[Part | None, RewardWeights | None]:
    data = values.get("reward")
    if data is None:
        return None, None
    if isinstance(data, Mapping) and "name" not in data:
        return None, problems.parse(RewardWeights, cast(Mapping[str, Any], data), "reward")
    return read_part("rewards", "reward", data, problems), None


def _members(data: Mapping[str, Any], problems: Problems) -> tuple[Member, ...]:
    if not data:
        problems.add("members: name at least one, as in 'members: {base: {}, best: {steerer: {name: best-of-n}}}'")
    read_ones = [_member(name, values, problems) for name, values in data.items()]
    return tuple(member for member in read_ones if member is not None)


def _member(name: object, data: object, problems: Problems) -> Member | None:
    where = f"members.{name}"
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        problems.add(f"members.{str(name)[:MAX_NAME]!r}: a name is one line of 1 to {MAX_NAME} printable characters")
        return None
    values = _mapping({} if data is None else data, where, problems)
    for key in values:
        if key not in MEMBER_SECTIONS:
            problems.add(f"{where}.{key}: unknown section; {nearest(str(key), MEMBER_SECTIONS)}")
    if "method" in values and "steerer" in values:
        problems.add(f"{where}: has either a method or a steerer, or neither (the base)")
    for key, owners in (("training", ("method",)), ("sampler", ())):
        known = any(owner in values for owner in owners) if owners else not {"method", "steerer"} & set(values)
        if key in values and not known:
            problems.add(f"{where}.{key}: belongs to {'a method' if owners else 'the base'}; leave it out")
    method = read_part("methods", f"{where}.method", values["method"], problems) if "method" in values else None
    steerer = _steerer(f"{where}.steerer", values["steerer"], problems) if "steerer" in values else None
    settings = _mapping(values.get("training", {}), f"{where}.training", problems)
    training = problems.parse(MemberTraining, settings, f"{where}.training")
    chosen = {"sampler": values["sampler"]} if "sampler" in values else {}
    base = problems.parse(BaseMember, chosen, where)
    return None if training is None or base is None else Member(name, method, steerer, training, base)


def _steerer(where: str, data: object, problems: Problems) -> Part | None:
    part = read_part("steerers", where, data, problems)
    if part is None or is_anytime(load(part.kind, part.name)):
        return part
    name = scaled_by(part.config)
    if name is None:
        problems.add(
            f"{where}: {part.name} has no field 'particles' and no rounds, so it cannot be brought to a budget"
        )
    elif isinstance(data, Mapping) and name in data:
        problems.add(f"{where}.{name}: follow from the budgets of the arena; leave them out")
    return part


def _mapping(data: object, where: str, problems: Problems) -> Mapping[str, Any]:
    if isinstance(data, Mapping):
        return cast(Mapping[str, Any], data)
    problems.add(f"{where}: must be a mapping of fields")
    return {}
