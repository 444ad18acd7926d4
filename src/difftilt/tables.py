"""What the command line shows: rows of leaves, fields of a configuration, results of checks, metrics of a run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic.fields import FieldInfo
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from difftilt.checks.proof import Result
from difftilt.config import Config
from difftilt.environment import readable
from difftilt.errors import UserError, printable
from difftilt.leaves import ROOMS, Leaf, cards, load, nearest
from difftilt.recipes.estimating import Diagnosis, Estimate
from difftilt.recipes.fitting import FitResult
from difftilt.recipes.loading import packaged, read
from difftilt.recipes.parts import config_of
from difftilt.recipes.schema import SteeringConfig
from difftilt.training.config import TrainingConfig
from difftilt.training.monitors import Verdict

KINDS = (*ROOMS, "recipes")

SHOWN = 20
"""Prompts that a table of steering lists."""

SETTINGS: dict[str, type[Config]] = {"training": TrainingConfig, "steering": SteeringConfig}
"""Sections of a recipe that belong to no leaf."""


def entries(kind: str) -> list[dict[str, Any]]:
    """Objects with ``name, file, paper, needs, laws`` of everything of a kind; imports no leaf."""
    if kind not in KINDS:
        raise UserError(f"there is no kind {kind!r}; {nearest(kind, KINDS)}")
    if kind == "recipes":
        return [_recipe_entry(name) for name in packaged()]
    return [_entry(leaf) for leaf in cards(kind)]


def entry_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The same for reading."""
    table = Table("name", "paper", "needs", box=None, header_style="bold")
    for row in rows:
        table.add_row(Text(row["name"]), Text(row["paper"]), Text(", ".join(row["needs"])))
    return table


def describe(name: str) -> RenderableType:
    """Card and configuration fields of a leaf of any kind, or of a section of settings."""
    if name in SETTINGS:
        return _field_table(SETTINGS[name])
    found = [(kind, leaf) for kind in ROOMS for leaf in cards(kind) if leaf.card.name == name]
    if not found:
        known = [*SETTINGS, *(leaf.card.name for kind in ROOMS for leaf in cards(kind))]
        raise UserError(f"there is no leaf {name!r}; {nearest(name, known)}")
    return Group(*(part for kind, leaf in found for part in _description(kind, leaf)))


def check_table(results: Iterable[Result]) -> Table:
    """Claim, measured number, bound and verdict."""
    table = Table("name", "claim", "measured", "bound", "passed", "seconds", box=None, header_style="bold")
    for row in results:
        verdict = Text("yes", "green") if row.passed else Text("NO", "bold red")
        numbers = (f"{row.measured:.4g}", row.bound, verdict, f"{row.seconds:.1f}")
        table.add_row(Text(row.name), Text(row.claim), *numbers)
    return table


def metric_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """One row per metric and one column per named row of metrics (before, after)."""
    table = Table("metric", *columns, box=None, header_style="bold")
    # spreads are for machines and for error bars; a table of means has no room for them
    names = dict.fromkeys(name for row in columns.values() for name in row if not name.endswith(("_std", "_tolerance")))
    for name in names:
        table.add_row(Text(name), *(f"{row[name]:.4g}" if name in row else "" for row in columns.values()))
    return table


def train_report(
    before: Mapping[str, float], after: Mapping[str, float], verdicts: Sequence[Verdict]
) -> RenderableType:
    """Held-out evaluations before and after training, and the last finding of every monitor."""
    last = {verdict.monitor: verdict for verdict in verdicts}
    notes = [
        Text(f"{v.monitor} is {v.value:.4g} (limit {v.threshold:g}) at iteration {v.iteration}: {v.advice}", "yellow")
        for v in last.values()
    ]
    return Group(metric_table({"before": before, "after": after}), *notes)


def fit_report(result: FitResult) -> RenderableType:
    """Metrics of a fit, and what it cost."""
    cost = ", ".join(f"{name} {count}" for name, count in asdict(result.ledger).items())
    return Group(metric_table({"fit": result.metrics}), Text(f"cost: {cost}"))


def steer_report(summary: Mapping[str, Any]) -> RenderableType:
    """One row per prompt of a steering summary (at most :data:`SHOWN`), the means over all, and what it cost."""
    spelled = ["best sample"] if any("text" in row for row in summary["prompts"]) else []
    names = ["prompt", "best reward", "mean reward", "log Z", "ancestors", *spelled]
    table = Table(*names, box=None, header_style="bold")
    for row in summary["prompts"][:SHOWN]:
        log_z = "" if row["log_z"] is None else f"{row['log_z']:.4g}"
        numbers = (f"{row['reward_best']:.4g}", f"{row['reward_mean']:.4g}", log_z)
        ancestors = str(row["ancestors"][-1]) if row["ancestors"] else ""
        table.add_row(
            Text(printable(row["prompt"])),
            *numbers,
            ancestors,
            *(Text(printable(row[key])) for key in ("text",) if key in row),
        )
    rest = len(summary["prompts"]) - SHOWN
    more = [Text(f"and {rest} more prompts")] if rest > 0 else []
    best = ", ".join(f"{name} {value:.4g}" for name, value in summary["best"].items())
    cost = ", ".join(f"{name} {count}" for name, count in summary["ledger"].items())
    invalid = sum(row["invalid"] or 0 for row in summary["prompts"])
    more += [Text(f"{invalid} samples were invalid or had no score; they were never chosen")] if invalid else []
    equal = summary.get("equal", 0)
    more += [Text(f"all samples of {equal} prompts have the same reward: nothing was chosen there")] if equal else []
    more += [] if summary["complete"] else [Text("ended early: this is what the finished rounds found")]
    return Group(table, *more, Text(f"best sample of each prompt, mean: {best}"), Text(f"cost: {cost}"))


def doctor_report(found: Diagnosis) -> RenderableType:
    """Machine, programs and extras; of a recipe memory line by line, and the verdict."""
    has = found.environment
    machine = Table(box=None, show_header=False)
    for name, value in {**has.versions, "system": has.system, "cores": f"{has.cores}, {has.threads} threads"}.items():
        machine.add_row(Text(name), Text(value))
    machine.add_row("memory", _size(has.memory))
    for name, size in has.devices.items():
        machine.add_row(Text(name), _size(size))
    for name, path in has.programs.items():
        machine.add_row(Text(name), Text(path or "not installed"))
    extras = Table("extra", "installed", "missing", "to install", box=None, header_style="bold")
    for extra in has.extras:
        there = ", ".join(f"{name} {version}" for name, version in extra.packages.items() if version is not None)
        missing = ", ".join(name for name, version in extra.packages.items() if version is None)
        extras.add_row(*map(Text, (extra.name, there, missing, extra.install or "")))
    if found.estimate is None:
        return Group(machine, Text(), extras)
    return Group(machine, Text(), extras, Text(), _memory_table(found.estimate), Text(found.estimate.verdict, "bold"))


def _memory_table(estimate: Estimate) -> Table:
    table = Table("memory of a process", "size", "how it was found", box=None, header_style="bold")
    for line in estimate.lines:
        name = f"{line.name} (for a while)" if line.passing else line.name
        table.add_row(Text(name), _size(line.bytes), Text(line.note))
    return table


def _size(count: int | None) -> Text:
    return Text("unknown" if count is None else readable(count))


def result_objects(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Results as JSON objects; a number that JSON has no word for becomes null."""
    rows = [asdict(result) for result in results]
    for row in rows:
        if not abs(row["measured"]) < float("inf"):
            row["measured"] = None
    return rows


def _entry(leaf: Leaf) -> dict[str, Any]:
    card = leaf.card
    return {
        "name": card.name,
        "file": str(leaf.file),
        "paper": card.paper,
        "needs": list(card.needs),
        "laws": list(card.laws),
    }


def _recipe_entry(name: str) -> dict[str, Any]:
    values, _ = read(name)
    section = "method" if "method" in values else "steerer"
    algorithm = str(values.get(section, {}).get("name"))
    leaf = next((_entry(leaf) for leaf in cards(f"{section}s") if leaf.card.name == algorithm), {})
    return {"paper": "", "needs": [], "laws": []} | leaf | {"name": name, "file": str(packaged()[name])}


def _description(kind: str, leaf: Leaf) -> Iterable[RenderableType]:
    card = leaf.card
    yield Text(f"{card.name} ({kind[:-1]})", "bold")
    yield Text(f"  paper: {card.paper}\n  file:  {leaf.file}")
    yield Text(f"  needs: {', '.join(card.needs) or 'nothing special'}\n  laws:  {', '.join(card.laws) or 'none'}\n")
    try:
        config_class = config_of(load(kind, card.name))
    except UserError as error:
        yield Text(f"  not configurable by a recipe: {error}")
        return
    yield _field_table(config_class) if config_class.model_fields else Text("  no fields")


def _field_table(config_class: type[Config]) -> Table:
    table = Table("field", "type", "default", "meaning", box=None, header_style="bold")
    for row in _fields(config_class):
        table.add_row(*map(Text, row))
    return table


def _fields(config_class: type[Config], prefix: str = "") -> Iterable[Sequence[str]]:
    for name, field in config_class.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            yield f"{prefix}{name}", _type(field), default, " ".join((field.description or "").split())


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
    bounds = [str(bound).split("(", 1)[1].rstrip(")") for bound in field.metadata if "(" in str(bound)]
    return f"{text} ({', '.join(bounds)})" if bounds else text
