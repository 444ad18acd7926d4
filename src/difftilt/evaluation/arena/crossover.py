"""How many samples until training pays off: training is paid once, steering for every sample.

For a value v of the reward let T(v) be what training has spent when its model first reaches v, p what plain sampling
of one sample costs, and s(v) what steering the untrained model to v costs for one sample. N samples cost T + N·p the
one way and N·s the other, so training is the cheaper way from N*(v) = T(v)/(s(v) - p) samples on.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from difftilt.evaluation.arena.cost import GRADIENT_PASS, evaluations
from difftilt.evaluation.arena.picture import plain
from difftilt.evaluation.arena.records import ArenaResult, Reading


@dataclass(frozen=True)
class Point:
    """A value and what it costs, both means over seeds.

    Attributes:
        value: of the reward.
        cost: evaluations, of the training or of steering one sample; or a number of samples.
        at_least: the cost is a lower bound.
    """

    value: float
    cost: float
    at_least: bool = False


@dataclass(frozen=True)
class Crossover:
    """A trained and a steered member.

    Attributes:
        trained, steered: their names.
        points: value of the reward, and the number of samples from which training to it is the cheaper way; for a value
            below the first one that steering was read at, at least that many, for less may have been enough to steer.
        beyond: values that training reached and steering, at the costs that were tried, did not.
        never: values that steering reaches at no more than plain sampling costs: training never pays.
    """

    trained: str
    steered: str
    points: tuple[Point, ...]
    beyond: tuple[float, ...]
    never: tuple[float, ...] = ()


def crossovers(result: ArenaResult) -> list[Crossover]:
    """Every trained member against every steered one that was read at several costs."""
    samples = int(result.recipe["arena"]["samples"])
    kinds = {kind: [one.name for one in result.members if one.kind == kind] for kind in ("trained", "steered")}
    found: list[Crossover] = []
    for trained in kinds["trained"]:
        curve = _means([run.curve for run in result.of(trained)])
        if len(curve) < 2:
            continue
        sampling = curve[0].cost  # before the first iteration nothing but plain sampling is spent
        training = rising([Point(one.value, one.cost - sampling) for one in curve[1:]], above=curve[0].value)
        for steered in kinds["steered"]:
            each = [Point(one.value, one.cost / samples) for one in _means([run.curve for run in result.of(steered)])]
            if each:
                found.append(_crossover(trained, steered, training, rising(each), sampling / samples))
    return found


def _crossover(
    trained: str, steered: str, training: Sequence[Point], steering: Sequence[Point], sampling: float
) -> Crossover:
    points: list[Point] = []
    beyond: list[float] = []
    never: list[float] = []
    for one in training:
        cost = cost_of(one.value, steering)
        if cost is None:
            beyond.append(one.value)
        elif cost > sampling:
            points.append(Point(one.value, one.cost / (cost - sampling), at_least=one.value < steering[0].value))
        else:
            never.append(one.value)
    return Crossover(trained, steered, tuple(points), tuple(beyond), tuple(never))


def rising(curve: Sequence[Point], above: float = -math.inf) -> list[Point]:
    """The points at which a value above all earlier ones (and above ``above``) is first reached."""
    found: list[Point] = []
    for point in sorted(curve, key=lambda one: one.cost):
        if point.value > max(above, found[-1].value if found else -math.inf):
            found.append(point)
    return found


def cost_of(value: float, curve: Sequence[Point]) -> float | None:
    """The cost at which a rising curve reaches a value, between two points by the logarithm of the cost.

    Below its first point it is the first point's cost, an upper bound (and what follows from it a lower one); above its
    last it is not known: None.
    """
    if not curve or value > curve[-1].value:
        return None
    place = next(place for place, one in enumerate(curve) if one.value >= value)
    if place == 0:
        return curve[0].cost
    low, high = curve[place - 1], curve[place]
    share = (value - low.value) / (high.value - low.value)
    return low.cost * (high.cost / low.cost) ** share


def _means(curves: Sequence[Sequence[Reading]]) -> list[Point]:
    """Mean over the seeds of reading after reading, as far as all seeds go."""
    return [
        Point(
            statistics.fmean(one.numbers["reward"] for one in row),
            statistics.fmean(evaluations(one.cost) for one in row),
        )
        for row in zip(*curves, strict=False)
    ]


def save_crossover_picture(result: ArenaResult, path: Path) -> None:
    """N* over the reward, one line for every pair."""
    found = crossovers(result)
    figure = Figure(figsize=(9.5, 5), dpi=110, layout="constrained")
    axes, palette = figure.subplots(), colormaps["tab10"]
    methods = list(dict.fromkeys(one.trained for one in found))
    steerers = list(dict.fromkeys(one.steered for one in found))
    marks = dict(zip(steerers, "os^DvPX<>*hd" * 9, strict=False))
    for one in found:
        # one method alone leaves the colours to the steerers
        colour = palette((methods.index(one.trained) if len(methods) > 1 else steerers.index(one.steered)) % 10)
        known, least = ([point for point in one.points if point.at_least == bound] for bound in (False, True))
        name, mark = plain(f"{one.trained} / {one.steered}"), marks[one.steered]
        axes.plot(
            [p.value for p in known], [p.cost for p in known], color=colour, marker=mark, ms=4.5, lw=1, label=name
        )
        if least:  # hollow, with an arrow: the true number lies above
            x, y = [p.value for p in least], [p.cost for p in least]
            up = [0.5 * cost for cost in y]
            axes.errorbar(x, y, up, lolims=True, fmt=mark, ms=4.5, lw=0.8, color=colour, mfc="none", capsize=2)
    axes.set_yscale("log")
    axes.set_xlabel(f"reward: {plain(result.reward).strip()}")
    axes.set_ylabel(f"samples from which training is cheaper\n(forward passes + {GRADIENT_PASS} · gradient passes)")
    bounded = any(point.at_least for one in found for point in one.points)
    title = "training to a reward against steering to it" + ("; hollow: at least so many" if bounded else "")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, which="both")
    if found:
        figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    figure.savefig(path, metadata={"Software": None})
