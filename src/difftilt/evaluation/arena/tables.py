"""Tables of an arena: one row per member at each budget, means and spread over seeds."""

import html
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from difftilt.evaluation.arena.cost import CURRENCIES, GRADIENT_PASS, WORDS, Currency, evaluations, spent
from difftilt.evaluation.arena.crossover import Crossover, Point, crossovers
from difftilt.evaluation.arena.records import ArenaResult, Entry, MemberRun, Reading


@dataclass(frozen=True)
class Grid:
    """A table in words: a title, the names of its columns, and rows of cells."""

    title: str
    header: list[str]
    rows: list[list[str]]


def grids(result: ArenaResult) -> list[Grid]:
    """The tables of a result: both budgets, and below each the numbers per category where there are any."""
    found: list[Grid] = []
    for currency in CURRENCIES:
        title = f"At equal {WORDS[currency]}: {grouped(result.budget(currency))}"
        found.append(_main(result, currency, title))
        categories = [name for name in _names(result) if "@" in name]
        if categories:
            found.append(_plain(result, currency, f"{title}, by category", categories))
    target, against = (result.recipe["arena"].get(key) for key in ("target", "against"))
    if target is not None:
        found.append(_until(result, float(target)))
    if target is not None and against is not None:
        found.append(_ratios(result, float(target), against))
    crossed = crossovers(result)
    return [*found, pays(crossed)] if crossed else found


def basis(result: ArenaResult) -> str:
    """For how many samples the tables hold, and in what currency."""
    count = result.recipe["arena"]["samples"]
    seeds = len(result.recipe["arena"]["seeds"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"Cost until {count} samples exist, training included; evaluations are forward passes plus {GRADIENT_PASS} for "
        f"every gradient pass. Training is paid once however many samples follow, steering for each of them: the order "
        f"holds for {count} samples. Numbers: {spread}.{_clock(result)}"
    )


def _clock(result: ArenaResult) -> str:
    """What seconds are of, where they are not wall clock."""
    if result.recipe["arena"].get("clock", "wall") == "wall":
        return ""
    return f" Seconds are of the processor, {result.threads} thread{'s' if result.threads > 1 else ''}."


def markdown_tables(result: ArenaResult) -> str:
    """The tables as Markdown; free text is escaped."""
    parts = [basis(result)]
    for grid in grids(result):
        lines = [f"### {grid.title}", "", _line(map(escaped, grid.header)), _line(["---"] * len(grid.header))]
        parts.append("\n".join([*lines, *(_line(map(escaped, row)) for row in grid.rows)]))
    return "\n\n".join(parts) + "\n"


def arena_report(result: ArenaResult) -> RenderableType:
    """The same for a terminal, turned round: a column per member, since members are fewer than numbers."""
    parts: list[RenderableType] = []
    for grid in grids(result):
        columns = [grid.header, *grid.rows]
        table = Table(*(Column(Text(column[0])) for column in columns), title=Text(grid.title), title_justify="left")
        table.box = None
        for cells in zip(*(column[1:] for column in columns), strict=True):
            table.add_row(*map(Text, cells))
        parts.append(table)
    return Group(*parts, Text(basis(result)))


def escaped(text: str) -> str:
    """Free text as Markdown shows it literally, inside a table too."""
    safe = html.escape(text, quote=False)
    for mark in "\\`*_[]|~$":
        safe = safe.replace(mark, f"\\{mark}")
    return safe


def grouped(count: float) -> str:
    """A whole number with a thin gap at thousands."""
    return f"{count:,.0f}".replace(",", " ")


def _line(cells: "Sequence[str] | map[str]") -> str:
    return f"| {' | '.join(cells)} |"


def _main(result: ArenaResult, currency: Currency, title: str) -> Grid:
    names = [name for name in _names(result) if _headline(name)]
    header = ["member", "setting", "evaluations", "reward calls", f"share of {WORDS[currency]}", *names, "seconds"]
    rows: list[list[str]] = []
    for entry in result.members:
        readings = _readings(result, entry, currency)
        cost = [_mean(readings, lambda one: evaluations(one.cost)), _mean(readings, lambda one: one.cost.reward_calls)]
        share = _mean(readings, lambda one: spent(one.cost, currency) / result.budget(currency))
        cells = [_setting(readings), *map(grouped, cost), f"{share:.0%}"]
        numbers = [_cell(readings, name) for name in names]
        rows.append([entry.name, *cells, *numbers, f"{_mean(readings, lambda one: one.seconds):.0f}"])
    return Grid(title, header, rows)


def _plain(result: ArenaResult, currency: Currency, title: str, names: list[str]) -> Grid:
    rows = [
        [entry.name, *(_cell(_readings(result, entry, currency), name) for name in names)] for entry in result.members
    ]
    return Grid(title, ["member", *names], rows)


def pays(crossed: Sequence[Crossover]) -> Grid:
    """From how many samples on training is cheaper than steering to the same reward."""
    header = ["trained", "steered", "reward", "training pays from", "highest reward of training", "reached by steering"]
    rows: list[list[str]] = []
    for one in crossed:
        last = one.points[-1] if one.points else None
        cells = ["", ""] if last is None else [f"{last.value:.3g}", _samples(last)]
        highest = max((*(point.value for point in one.points), *one.beyond, *one.never), default=math.nan)
        known = "" if math.isnan(highest) else f"{highest:.3g}"
        rows.append([one.trained, one.steered, *cells, known, "" if not known else "no" if one.beyond else "yes"])
    return Grid("Training against steering to the same reward", header, rows)


def _samples(point: Point) -> str:
    return f"{'≥ ' if point.at_least else ''}{grouped(max(point.cost, 1))} samples"


def _until(result: ArenaResult, target: float) -> Grid:
    """What each trained member has spent when the watched number first reaches a target."""
    header = ["member", "seeds that reach it", "iterations", "evaluations", "reward calls", "seconds", "kl_reference"]
    rows: list[list[str]] = []
    for entry in result.members:
        runs = [run for run in result.of(entry.name) if run.curve]
        if runs and entry.kind == "trained":
            found = [reached for run in runs if (reached := _reached(run, result.heldout, target)) is not None]
            rows.append([entry.name, f"{len(found)} of {len(runs)}", *_spendings(found)])
    return Grid(f"Until {result.heldout} reaches {target:g}", header, rows)


PAID: Mapping[str, Callable[[Reading], float]] = {
    "evaluations": lambda one: evaluations(one.cost),
    "seconds": lambda one: one.seconds,
}
"""What a ratio of costs is of."""
NOT_REACHED, UNTRAINED = "not reached", "untrained"


def _ratios(result: ArenaResult, target: float, against: str) -> Grid:
    """What each trained member has spent until a number is reached, over what one member has with the same seed."""
    seeds: list[int] = result.recipe["arena"]["seeds"]
    columns = [[*(f"{word}, seed {seed}" for seed in seeds), f"{word}, mean"] for word in PAID]
    floor = {run.seed: _reached(run, result.heldout, target) for run in result.of(against)}
    rows: list[list[str]] = []
    for entry in result.members:
        if entry.kind != "trained" or entry.name == against:
            continue
        found = {run.seed: _reached(run, result.heldout, target) for run in result.of(entry.name)}
        parts = [_quotients([(found[seed], floor[seed]) for seed in seeds], paid) for paid in PAID.values()]
        rows.append([entry.name, *(cell for part in parts for cell in part)])
    title = f"Until {result.heldout} reaches {target:g}: times what {against} spends, by seed"
    return Grid(title, ["member", *(name for part in columns for name in part)], rows)


def _quotients(pairs: Sequence[tuple[Reading | None, Reading | None]], paid: Callable[[Reading], float]) -> list[str]:
    """One ratio for each pair, and mean and spread of those that there are; a seed that never gets there has none."""
    known = {
        place: paid(one) / paid(other)
        for place, (one, other) in enumerate(pairs)
        if one is not None and other is not None and one.iterations and other.iterations
    }
    cells = [f"{known[place]:.2g}" if place in known else _why_none(*pair) for place, pair in enumerate(pairs)]
    return [*cells, _spread(list(known.values()), len(pairs)) if known else cells[0] if len({*cells}) == 1 else ""]


def _why_none(*pair: Reading | None) -> str:
    """Why there is no ratio: one of the two never got there, or was there before it was trained."""
    return NOT_REACHED if None in pair else UNTRAINED


def _spread(values: Sequence[float], seeds: int) -> str:
    """Mean ± standard deviation, and of how many seeds where not of all."""
    mean = f"{statistics.fmean(values):.2g}" + (f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else "")
    return mean if len(values) == seeds else f"{mean} ({len(values)} of {seeds} seeds)"


def _reached(run: MemberRun, name: str, target: float) -> Reading | None:
    """The first reading of a run at which a number is at least the target."""
    return next((reading for reading in run.curve if reading.numbers.get(name, -math.inf) >= target), None)


def _spendings(found: Sequence[Reading]) -> list[str]:
    """Mean and range over the seeds; empty where none got there."""
    columns: list[Callable[[Reading], float]] = [
        lambda one: one.iterations or 0,
        lambda one: evaluations(one.cost),
        lambda one: one.cost.reward_calls,
        lambda one: one.seconds,
        lambda one: one.numbers.get("kl_reference", math.nan),
    ]
    cells: list[str] = []
    for column in columns:
        values = [column(one) for one in found]
        known = bool(values) and not any(map(math.isnan, values))
        cells.append(f"{grouped(statistics.fmean(values))} ({_span(values)})" if known else "")
    return cells


def _span(values: Sequence[float]) -> str:
    return f"{grouped(min(values))} to {grouped(max(values))}"


def _readings(result: ArenaResult, entry: Entry, currency: Currency) -> list[Reading]:
    return [run.readings[currency] for run in result.of(entry.name)]


def _names(result: ArenaResult) -> list[str]:
    """Every number of any reading, in the order in which they come."""
    readings = [reading for run in result.runs for reading in run.readings.values()]
    return list(dict.fromkeys(name for reading in readings for name in reading.numbers))


def _headline(name: str) -> bool:
    """Not a component, a category, what belongs to another number, or the bound that stands in for a drift."""
    return not (name.startswith("reward/") or name.endswith(("_std", "_tolerance", "_bound")) or "@" in name)


def _setting(readings: Sequence[Reading]) -> str:
    """Iterations or particles, with the range where seeds differ."""
    for word in ("iterations", "particles"):
        counts = [count for one in readings if (count := getattr(one, word)) is not None]
        if counts:
            span = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
            return f"{span} {readings[0].unit or word}"
    return "untrained" if not any(one.cost.reward_calls for one in readings) else "rounds"


def _mean(readings: Sequence[Reading], of: Callable[[Reading], float]) -> float:
    return statistics.fmean(map(of, readings))


def _cell(readings: Sequence[Reading], name: str) -> str:
    """Mean and spread; a bound where only that is known; empty where nothing is."""
    known = [one.numbers[name] for one in readings if name in one.numbers]
    if name == "kl_reference" and not known:
        bounds = [one.numbers["kl_bound"] for one in readings if "kl_bound" in one.numbers]
        return f"≤ {max(bounds):.3g}" if bounds else ""
    if len(known) < len(readings):
        return ""
    mean = f"{statistics.fmean(known):.3g}"
    return f"{mean} ± {statistics.stdev(known):.2g}" if len(set(known)) > 1 else mean
