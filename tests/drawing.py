"""Most of the time of a report goes to its charts, and most tests of reports change something else."""

import pickle
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from difftilt.evaluation.report import charts


@contextmanager
def charts_drawn_once() -> Generator[None]:
    """Reports draw a chart of the same numbers once: charts are pure functions."""
    known = dict[bytes, str]()

    def remembered(draw: Callable[..., str]) -> Callable[..., str]:
        def drawn(*given: Any) -> str:
            key = pickle.dumps((draw.__name__, given))
            if key not in known:
                known[key] = draw(*given)
            return known[key]

        return drawn

    with (
        patch("difftilt.evaluation.report.views.line_chart", remembered(charts.line_chart)),
        patch("difftilt.evaluation.report.pictures.scatter_chart", remembered(charts.scatter_chart)),
    ):
        yield
