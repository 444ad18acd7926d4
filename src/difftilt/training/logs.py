"""``metrics.jsonl``: one JSON object per iteration, appended line by line and cut back on resume."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from difftilt.errors import UserError


def append_row(path: Path, row: Mapping[str, float | int]) -> None:
    """Append one line and flush it to the disk. Numbers that are not finite are written as null: missing, not zero."""
    clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
    with path.open("a") as file:
        file.write(json.dumps(clean) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, float]]:
    """All whole lines; a last line that a kill cut short is left out. Nulls are dropped."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines[:-1]):
        try:
            row: dict[str, float | None] = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number + 1} is not JSON: remove the line or the run directory") from error
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def truncate_rows(path: Path, iterations: int) -> None:
    """Keep the rows of the first ``iterations`` iterations, in one step."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().split("\n")[:-1] if json.loads(line)["iteration"] < iterations]
    temporary = path.with_suffix(".cut")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)
