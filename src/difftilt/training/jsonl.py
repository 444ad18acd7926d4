"""Files of JSON objects, one per line, read to the end: a line that is none is told with its number."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from difftilt.errors import UserError

Row = tuple[str, Mapping[str, Any], str | None]
"""Where it stands, its values, and what is wrong with it where it has none."""


def read_text(path: Path, what: str, remedy: str) -> str:
    """The text of a file.

    Raises:
        UserError: for a file that cannot be read; ``what`` names it, ``remedy`` ends the sentence.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{what} cannot be read as a file ({reason}): {remedy}") from error


def rows_of_jsonl(path: Path, prefix: str = "") -> Iterator[Row]:
    """All lines that are not empty.

    Args:
        path: of the file.
        prefix: before the number of a line, where there are several files.

    Raises:
        UserError: for a file that cannot be read.
    """
    text = read_text(path, f"{str(path)!r}", "name a file with one JSON object per line")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield (f"{prefix}line {number}", *_object(line))


def _object(line: str) -> tuple[Mapping[str, Any], str | None]:
    try:
        value = json.loads(line, object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        return {}, f"no JSON ({error})"
    if not isinstance(value, dict):
        return {}, f"is a JSON {type(value).__name__}, not an object with keys"
    return cast(Mapping[str, Any], value), None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
