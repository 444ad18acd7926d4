"""``metrics.jsonl``: one JSON object per iteration, appended line by line and cut back on resume."""

import errno
import json
import math
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from difftilt.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""Codes of the system that say that a disk takes no more: full, over a quota or a limit, read-only, broken."""


@contextmanager
def told_if_full(output: Path, remedy: str) -> Generator[None, None, None]:
    """A disk that takes no more ends the work inside with one sentence.

    Args:
        output: what is written.
        remedy: what keeps what was done, after ``make room``.

    Raises:
        UserError: for a full or read-only disk; other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"{output} takes no more ({error.strerror}): make room, {remedy}") from error
    except SafetensorError as error:
        # the writer of safetensors has no codes, only "Error while serializing: I/O error: No space left on device"
        why = str(error).removeprefix("Error while serializing: I/O error: ")
        if why == str(error):
            raise
        raise UserError(f"{output} takes no more ({why}): make room, {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def finite(row: Mapping[str, float | int]) -> dict[str, float | int | None]:
    """Numbers as JSON has them: None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def append_row(path: Path, row: Mapping[str, float | int]) -> None:
    """Append one line and flush it to the disk. Numbers that are not finite are written as null: missing, not zero."""
    with path.open("a") as file:
        file.write(json.dumps(finite(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, float]]:
    """All whole lines; a last line that a kill cut short is left out. Nulls are dropped.

    Raises:
        UserError: names the line that is not an object with an iteration.
    """
    if not path.exists():
        return []
    rows: list[dict[str, float]] = []
    for number, line in enumerate(path.read_text().split("\n")[:-1]):
        try:
            row: dict[str, float | None] = json.loads(line)
            rows.append({name: value for name, value in row.items() if value is not None})
            rows[-1]["iteration"]
        except (ValueError, AttributeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number + 1} is no row of metrics: remove the line or the run directory"
            ) from error
    return rows


def truncate_rows(path: Path, iterations: int) -> None:
    """Keep the rows of the first ``iterations`` iterations, in one step.

    Raises:
        UserError: if the rows are not those of iterations 0, 1, 2 ...: the file was changed.
    """
    rows = read_rows(path)
    kept = [place for place, row in enumerate(rows) if row["iteration"] < iterations]
    if [rows[place]["iteration"] for place in kept] != list(range(iterations)):
        raise UserError(
            f"{path} does not hold one row for each of the {iterations} iterations of the checkpoint: restore the "
            "file, or start again in a new directory"
        )
    if not path.exists():
        return
    lines = path.read_text().split("\n")
    temporary = path.with_suffix(".cut")
    with temporary.open("w") as file:
        file.write("".join(lines[place] + "\n" for place in kept))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
