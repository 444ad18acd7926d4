"""``difftilt report``: one self-contained HTML file about one run or several side by side.

The file needs no network and no script, all text of users is escaped, and the same runs give the same bytes.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from difftilt import __version__
from difftilt.errors import UserError
from difftilt.evaluation.report import views
from difftilt.evaluation.report.charts import COLOURS
from difftilt.evaluation.report.pictures import pictures
from difftilt.evaluation.report.reading import RunRecord, read_runs
from difftilt.training.logs import write_text

MARK = '<meta name="generator" content="difftilt'
"""In the head of every report: a file without it is not overwritten."""

_HEAD = 1000


UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and marks that turn the direction of what follows: shown as their numbers."""


@dataclass(frozen=True)
class Card:
    """The headline of one run: what the layout shows of it first."""

    record: RunRecord
    run: int
    what: str
    facts: Sequence[str]
    numbers: Sequence[views.Change]
    commands: Sequence[str]


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Read runs, finished or not, and write the report; it appears whole or not at all.

    Args:
        runs: run directories of training or of steering; one named twice is shown once.
        output: file to write; None is ``report.html`` in the first run directory.

    Returns:
        The file.

    Raises:
        UserError: if a path is no run directory, or the file cannot be written or would replace something else.
    """
    paths = [Path(run) for run in runs]
    records = read_runs(paths)
    file = paths[0] / "report.html" if output is None else Path(output)
    check_file(file)
    twice = len(paths) - len(records)
    text = render(records, file, ["A run that was named twice is shown once."] if twice else [])
    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(f"output {file} cannot be written ({error.strerror}): name another file") from error
    return file


def check_file(file: Path) -> None:
    """Refuse a file that cannot be written or that is no report; touches nothing.

    Raises:
        UserError: says why.
    """
    if file.is_dir():
        raise UserError(f"output {file} is a directory: name a file, as in {file / 'report.html'}")
    if not file.parent.is_dir():
        raise UserError(f"output {file}: there is no directory {file.parent}; make it, or name another file")
    if file.exists() and MARK not in _head(file):
        raise UserError(f"output {file} exists and is no report of difftilt: name another file")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"output {file}: {file.parent} cannot be written to; name another file with --output")


def _head(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(_HEAD).decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"output {file} exists and cannot be read ({error.strerror}): name another file") from error


def render(records: Sequence[RunRecord], file: Path, notes: Sequence[str]) -> str:
    """The page as text.

    Args:
        records: in the order in which they are shown.
        file: that the page will be written to; named in its commands.
        notes: sentences that stand at the top.
    """
    pages = FileSystemLoader(Path(__file__).parent / "pages")
    environment = Environment(
        loader=pages, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "signed": signed, "whole": whole}
    drawn = views.curves(records)
    page = environment.get_template("report.html.j2").render(
        version=__version__,
        title=", ".join(record.name for record in records),
        cards=[_card(record, place) for place, record in enumerate(records)],
        records=records,
        notes=notes,
        charts=drawn.shown,
        folded=drawn.folded,
        left_out=drawn.left_out,
        pictures=pictures(records, len(drawn.shown) + len(drawn.folded)),
        overview=views.overview(records),
        categories=views.categories(records),
        phases=views.phases(records),
        costs=views.costs(records),
        names=views.NAMES,
        citations=views.citations(records),
        report_command=views.report_command(records, file),
        colours=COLOURS,
        mean=views.steered_mean,
        tilt_kl=views.tilt_kl,
        short=views.short,
        unseen=views.unseen,
    )
    # names of files may hold bytes that are no text at all
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", page.encode("utf-8", "replace").decode("utf-8"))


def _card(record: RunRecord, place: int) -> Card:
    numbers = views.headline(record)
    return Card(record, place, views.what(record), views.facts(record), numbers, views.commands(record))


def figure(value: float | None, digits: int = 4) -> str:
    """Significant digits; a dash for what is missing."""
    if value is None:
        return "–"
    text = "0" if value == 0 else f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.{digits}g}"
    return text.replace("-", "−").replace(",", "\u202f")


def signed(value: float | None) -> str:
    """A difference with its sign."""
    return f"+{figure(value, 3)}" if value is not None and value > 0 else figure(value, 3)


def whole(value: Any) -> str:
    """A count with thin spaces between thousands; a dash for what is missing."""
    return "–" if value is None or not math.isfinite(value) else f"{int(value):,}".replace(",", "\u202f")
