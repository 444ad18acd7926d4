"""Reading files that may be damaged: what can be read is returned, what cannot is noted, nothing is made up."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Row = dict[str, float]


@dataclass
class Damage:
    """Collects, in sentences, what of a run directory is missing or cannot be read."""

    lines: list[str] = field(default_factory=list[str])

    def add(self, line: str) -> None:
        """Note one fault."""
        self.lines.append(line)


def number(value: object) -> float | None:
    """A finite number, or None for everything else: missing, not zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:  # JSON knows integers of any length
        return None
    return converted if math.isfinite(converted) else None


def numbers(values: object) -> Row:
    """The finite numbers of a mapping; empty for anything else."""
    if not isinstance(values, Mapping):
        return {}
    found = {str(name): number(value) for name, value in cast(Mapping[object, object], values).items()}
    return {name: value for name, value in found.items() if value is not None}


def mapping(value: object) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return {str(key): one for key, one in cast(Mapping[object, Any], value).items()} if _maps(value) else {}


def items(value: object) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return list(cast(Sequence[Any], value)) if isinstance(value, list) else []


def read_object(path: Path, damage: Damage) -> dict[str, Any]:
    """A JSON object; empty, with a note unless the file is just not there."""
    text = read_plain(path, damage)
    if text is None:
        return {}
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        damage.add(f"{path.name} is damaged ({_short(error)})")
        return {}
    if not _maps(value):
        damage.add(f"{path.name} is damaged (it holds no JSON object)")
    return mapping(value)


def read_texts(path: Path, rows: int, damage: Damage) -> Sequence[str] | None:
    """A JSON list of one string for each row; None for other lists, and with a note for what is no such list."""
    text = read_plain(path, damage)
    if text is None:
        return None
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        damage.add(f"{path.name} is damaged ({_short(error)})")
        return None
    found = items(value)
    if not found or not all(isinstance(one, str) for one in found):
        return None  # tokens as numbers stand in a file of this name where samples have no strings
    if len(found) != rows:
        damage.add(f"{path.name} is damaged (it holds {len(found)} strings for {rows} samples)")
        return None
    return found


def read_plain(path: Path, damage: Damage) -> str | None:
    """The text of a file, None where there is none; bytes that are no UTF-8 are replaced."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        damage.add(f"{path.name} cannot be read ({error.strerror})")
        return None


def read_metrics(path: Path, damage: Damage) -> tuple[list[Row], int]:
    """The rows of ``metrics.jsonl`` that can be read, and how many there must have been at least.

    One per iteration in their order; of a repeated one the last.
    """
    text = read_plain(path, damage)
    if text is None:
        return [], 0
    rows: list[Row] = []
    lost = 0
    *whole, last = text.split("\n")
    for place, line in enumerate([*whole, last] if last.strip() else whole, start=1):
        row = _row(line)
        lost += row is None
        if row is not None:
            rows.append(row)
        elif place > len(whole):
            damage.add(f"{path.name}: the last line is cut short and left out")
        else:
            damage.add(f"{path.name}: line {place} is damaged and left out")
    order = [row["iteration"] for row in rows]
    if order != sorted(set(order)):
        damage.add(f"{path.name}: iterations are repeated or out of order; they were sorted, the last of each counts")
    by_iteration = {row["iteration"]: row for row in rows}
    last = int(max(order, default=-1.0))
    return [by_iteration[one] for one in sorted(by_iteration)], max(last + 1, len(by_iteration) + lost)


def read_tensors(path: Path, damage: Damage) -> dict[str, Tensor]:
    """The tensors of a safetensors file; empty, with a note unless the file is just not there.

    Floating ones come as float32, or what is larger as infinite: few operations know the narrow types.
    """
    if not path.exists():
        return {}
    try:
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
        }
    except (SafetensorError, OSError, ValueError, NotImplementedError) as error:  # the last: no way to widen a type
        damage.add(f"{path.name} is damaged ({_short(error)})")
        return {}


def _row(line: str) -> Row | None:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    row = numbers(value)
    return row if "iteration" in row else None


def _maps(value: object) -> bool:
    return isinstance(value, Mapping)


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:120] if text else type(error).__name__
