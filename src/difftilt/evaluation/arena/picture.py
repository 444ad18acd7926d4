"""The picture of an arena: reward against drift with diversity beside it, and a held-out number against cost."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from difftilt.evaluation.arena.cost import CURRENCIES, GRADIENT_PASS, WORDS, Currency, evaluations
from difftilt.evaluation.arena.records import ArenaResult, Entry, Reading

AREA = 110.0
"""Area of a marker, in square points, at the largest diversity."""

SHAPES: Mapping[Currency, str] = {"evaluations": "o", "reward_calls": "D"}
"""Marker of a reading at each budget."""


def save_arena_picture(result: ArenaResult, path: Path) -> None:
    """Two panels side by side."""
    figure = Figure(figsize=(11, 5.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    # ten colours that are easy to tell apart, or twenty where there are more members
    palette = colormaps["tab10"] if len(result.members) <= 10 else colormaps["tab20"]
    colours = {entry.name: palette(place % palette.N) for place, entry in enumerate(result.members)}
    _drift_panel(left, result, colours)
    _cost_panel(right, result, colours)
    handles = [
        Line2D([], [], color=colours[one.name], marker="o", ls="", label=plain(one.name)) for one in result.members
    ]
    handles += [
        Line2D([], [], color="0.3", marker=SHAPES[one], ls="", label=f"at equal {WORDS[one]}") for one in CURRENCIES
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def plain(text: str) -> str:
    """Free text that is drawn as it is: no formula, and not hidden from the legend."""
    return f" {text}".replace("$", r"\$")


Colours = Mapping[str, tuple[float, float, float, float]]


def _drift_panel(axes: Axes, result: ArenaResult, colours: Colours) -> None:
    """Means as filled markers, seeds as faint ones; the area of a marker is its diversity."""
    largest = max(one.numbers["diversity"] for run in result.runs for one in run.readings.values())

    def dot(points: Sequence[Reading], entry: Entry, currency: Currency, faint: bool) -> None:
        x, y, diversity = (_mean(points, name) for name in ("distance", "reward", "diversity"))
        x = max(x, 1e-6)  # the axis is logarithmic, and equal sets are at 0
        size = AREA * max(diversity / max(largest, 1e-12), 0.03)
        edge = "none" if faint else "black"
        alpha = 0.25 if faint else 0.9
        axes.scatter(
            [x], [y], s=size, color=[colours[entry.name]], marker=SHAPES[currency], alpha=alpha, edgecolors=edge, lw=0.6
        )

    for entry in result.members:
        for currency in CURRENCIES:
            readings = [run.readings[currency] for run in result.of(entry.name)]
            for one in readings if len(readings) > 1 else ():
                dot([one], entry, currency, True)
            dot(readings, entry, currency, False)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("drift: Fréchet distance to base samples (log)")
    axes.set_ylabel(f"reward: {plain(result.reward).strip()}")
    axes.set_title("reward, drift, and diversity (marker area)", fontsize=10)
    axes.grid(alpha=0.25)


def _cost_panel(axes: Axes, result: ArenaResult, colours: Colours) -> None:
    """Trained members as curves over training, the others as points at each budget; seeds faint."""
    for entry in result.members:
        runs, colour = result.of(entry.name), colours[entry.name]
        for run in runs if len(runs) > 1 else ():
            axes.plot(*_line(run.curve, result.heldout), color=colour, alpha=0.2, lw=0.8)
        if entry.kind == "trained":
            axes.plot(*_mean_curve([run.curve for run in runs], result.heldout), color=colour, lw=1.8)
            continue
        for currency in CURRENCIES:
            readings = [run.readings[currency] for run in runs]
            cost = statistics.fmean(evaluations(one.cost) for one in readings)
            value = _mean(readings, result.heldout)
            axes.plot([cost], [value], color=colour, marker=SHAPES[currency], ls="", ms=6, mec="black", mew=0.6)
    axes.set_xlabel(f"evaluations: forward passes + {GRADIENT_PASS} · gradient passes")
    axes.set_ylabel(plain(result.heldout).strip())
    title = "reward over cost" if result.heldout == "reward" else "held-out number over cost"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)


def _line(curve: Sequence[Reading], name: str) -> tuple[list[float], list[float]]:
    return [float(evaluations(one.cost)) for one in curve], [one.numbers[name] for one in curve]


def _mean_curve(curves: Sequence[Sequence[Reading]], name: str) -> tuple[list[float], list[float]]:
    """Mean over seeds at the iterations that every seed was evaluated after."""
    by_iteration = [{one.iterations: one for one in curve} for curve in curves]
    shared = sorted(set.intersection(*(set(points) for points in by_iteration)), key=lambda count: count or 0)

    def mean(of: Callable[[Reading], float]) -> list[float]:
        return [statistics.fmean(of(points[count]) for points in by_iteration) for count in shared]

    return mean(lambda one: float(evaluations(one.cost))), mean(lambda one: one.numbers[name])


def _mean(readings: Sequence[Reading], name: str) -> float:
    return statistics.fmean(one.numbers[name] for one in readings)
