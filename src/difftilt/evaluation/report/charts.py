"""Charts as inline SVG that takes its colours from the page, so that it reads on white and on near-black.

matplotlib draws with placeholder colours, which become CSS variables: ``--run0`` to ``--run7`` for runs, ``--grid`` for
the grid and ``currentColor`` for text and axes. No text of a user enters a drawing: titles and legends are HTML.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

COLOURS = 8
"""Runs with a colour of their own; the next ones begin again with broken lines."""

POINTS = 1500
"""Largest number of points of one scatter plot."""

LARGEST = 1e100
"""Larger numbers are left out of a curve: the arithmetic of a layout overflows on them."""

_TEXT, _GRID, _MUTED = "#0100f0", "#0200f0", "#0300f0"


Style = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        run: place of the run in the report; decides the colour.
        xs, ys: iterations done, and values.
        style: a plain line, a faint one that others stand out from, or one with dots.
    """

    run: int
    xs: Sequence[float]
    ys: Sequence[float]
    style: Style


@dataclass(frozen=True)
class Cloud:
    """Points of one stage, of which the first two columns are drawn.

    Attributes:
        run: place of the run in the report; None is the model before training.
        points: finite ones.
        best: points that are drawn larger, on top.
    """

    run: int | None
    points: Float[Tensor, "rows dim"]
    best: Float[Tensor, "chosen dim"] | None = None


def line_chart(lines: Sequence[Line], number: int) -> str:
    """Curves over iterations.

    Args:
        lines: what to draw.
        number: of the chart in the page; makes its ids unique.
    """
    figure, axes = _figure(4.2, 2.3, 0.58, 0.42)
    for line in lines:
        colour, dashes = _colour(line.run), "-" if line.run < COLOURS else "--"
        single = len(line.xs) == 1  # a line of one point would not be seen
        axes.plot(
            line.xs,
            [y if abs(y) <= LARGEST else math.nan for y in line.ys],
            color=colour,
            linestyle=dashes,
            linewidth=1.2 if line.style == "faint" else 1.6,
            alpha=0.5 if line.style == "faint" else 1.0,
            marker="o" if single or line.style == "dots" else "",
            markersize=3.2,
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("iterations", fontsize=8)
    return _svg(figure, number)


def scatter_chart(cloud: Cloud, limits: Sequence[float], number: int) -> str:
    """Points in the plane, or a histogram of one-dimensional ones.

    Args:
        cloud: what to draw.
        limits: (left, right, bottom, top), the same for all plots to be compared.
        number: of the chart in the page.
    """
    figure, axes = _figure(2.5, 2.3, 0.42, 0.25)
    points = cloud.points
    colour = _MUTED if cloud.run is None else _colour(cloud.run)
    if points.shape[1] == 1:
        axes.hist(points[:, 0].numpy(), bins=40, range=(limits[0], limits[1]), color=colour)
    else:
        shown = points[:: max(1, -(-len(points) // POINTS))]
        axes.plot(shown[:, 0].numpy(), shown[:, 1].numpy(), "o", color=colour, markersize=2.2, alpha=0.6, mew=0)
        if cloud.best is not None:
            axes.plot(cloud.best[:, 0].numpy(), cloud.best[:, 1].numpy(), "o", color=_TEXT, mfc=colour, ms=5.5, mew=1.2)
        axes.set_ylim(limits[2], limits[3])
    axes.set_xlim(limits[0], limits[1])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return _svg(figure, number)


def limits_of(clouds: Sequence[Tensor]) -> list[float]:
    """A frame around all points of the first two columns, with a margin."""
    low = [min(float(c.amin(0)[i]) for c in clouds) for i in range(min(2, clouds[0].shape[1]))]
    high = [max(float(c.amax(0)[i]) for c in clouds) for i in range(len(low))]
    margin = [0.05 * (top - bottom) or 1.0 for bottom, top in zip(low, high, strict=True)]
    return [end for i in range(len(low)) for end in (low[i] - margin[i], high[i] + margin[i])]


def _colour(run: int) -> str:
    return f"#0000{0xA0 + run % COLOURS:02x}"


def _figure(width: float, height: float, left: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure in inches, with margins for the numbers of both axes, and one pair of axes in the style of the page."""
    figure = Figure(figsize=(width, height))
    # fixed margins: charts line up, and no layout is computed
    figure.subplots_adjust(left=left / width, right=1 - 0.08 / width, bottom=bottom / height, top=1 - 0.2 / height)
    axes: Axes = figure.subplots()
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)
    axes.tick_params(colors=_TEXT, labelsize=8, length=0)
    axes.xaxis.label.set_color(_TEXT)
    axes.yaxis.get_offset_text().set(color=_TEXT, fontsize=8)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, number: int) -> str:
    """The drawing as an element: no prolog, unique ids, colours and fonts of the page; a pure function."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "difftilt"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'<svg .*?viewBox="([^"]*)".*?>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1, flags=re.S)
    return re.sub(r"\s*\n\s*", "\n", _coloured(_own_ids(text, number)))


def _own_ids(text: str, number: int) -> str:
    """Ids that something refers to, under names of this chart; the others are left out."""
    used = set(re.findall(r"url\(#([^)]+)\)|xlink:href=\"#([^\"]+)\"", text))
    names = {first or second for first, second in used}
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="c{number}-{m[1]}"' if m[1] in names else "", text)
    text = re.sub(r"url\(#", f"url(#c{number}-", text)
    return text.replace('xlink:href="#', f'href="#c{number}-')


def _coloured(text: str) -> str:
    text = re.sub(r"#0000([0-9a-f]{2})", lambda m: f"var(--run{int(m[1], 16) - 0xA0})", text)
    return text.replace(_TEXT, "currentColor").replace(_GRID, "var(--grid)").replace(_MUTED, "var(--muted)")
