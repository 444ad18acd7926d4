"""Rows of data sets, by the library ``datasets``: of the hub, of ``save_to_disk``, of folders of parquet or JSON lines.

Local data are streamed: nothing is copied into a cache.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from difftilt.errors import UserError
from difftilt.leaves import import_module, nearest
from difftilt.models.hub import from_hub
from difftilt.training.jsonl import Row, rows_of_jsonl

SAVED = ("dataset_dict.json", "dataset_info.json")
"""What ``save_to_disk`` writes, of several splits or of one."""


def rows_of_dataset(
    source: str, split: str | None = None, subset: str | None = None, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """The rows, by number; of a folder of JSON lines by file and line.

    Args:
        source: folder, ``.parquet`` file, or id on the hub.
        split: may be None where there is only one.
        subset: of a data set on the hub.
        columns: that are wanted; None is all. Images of the others are then not decoded.

    Raises:
        UserError: in one line, for what is not there or cannot be read, and for a split that is missing or unknown.
    """
    path = Path(source).expanduser()
    if subset is not None and path.exists():
        raise UserError(f"data set {source!r}: subset belongs to a data set on the hub, and this is a folder")
    lines = sorted(path.glob("*.jsonl")) if path.is_dir() and not any(path.rglob("*.parquet")) else []
    if lines and not _saved(path):
        if split is not None:
            raise UserError(
                f"data set {source!r}: files of JSON lines have no splits: leave out split, or name one file"
            )
        for file in lines:
            yield from rows_of_jsonl(file, f"{file.name} ")
        return
    table = _split(source, _opened(path, source, subset), split)
    if columns is not None and table.column_names is not None:
        table = table.select_columns([name for name in table.column_names if name in columns])
    rows, number = iter(table), 0
    while (row := _read(source, lambda _: next(rows, None))) is not None:
        yield f"row {number}", row, None
        number += 1


def _read(source: str, read: Callable[[str], Any]) -> Any:
    """What the library reads; what it raises is told in one line."""
    return from_hub(
        "data set", source, read, also=(import_module("datasets", f"data set {source!r}").exceptions.DatasetsError,)
    )


def is_dataset(path: Path) -> bool:
    """Whether a path is a folder or a file that :func:`rows_of_dataset` reads."""
    held = path.is_dir() and (_saved(path) or any(path.rglob("*.parquet")) or any(path.glob("*.jsonl")))
    return held or path.suffix == ".parquet"


def _saved(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED)


def _opened(path: Path, source: str, subset: str | None) -> Any:
    """A data set, or a mapping of its splits."""
    library = import_module("datasets", f"data set {source!r}")
    if path.is_file():
        return _read(source, lambda file: library.load_dataset("parquet", data_files=file, streaming=True))
    if _saved(path):
        return _read(source, library.load_from_disk)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise UserError(
            f"{source} is a directory and no data set: that holds .parquet or .jsonl files, or what save_to_disk wrote"
        )
    local = path.is_dir()
    return _read(source, lambda name: library.load_dataset(name, subset, streaming=local))


def _split(source: str, found: Any, wanted: str | None) -> Any:
    """One split; a data set without splits is one."""
    splits: Sequence[str] | None = [*map(str, found)] if isinstance(found, Mapping) else None
    if splits is None:
        if wanted is not None:
            raise UserError(f"data set {source!r} has no splits: leave out split")
        return found
    if wanted is None and len(splits) == 1:
        return found[splits[0]]
    if wanted is None or wanted not in splits:
        said = "has several splits" if wanted is None else f"has no split {wanted!r}"
        raise UserError(f"data set {source!r} {said}; {nearest(wanted or '', splits)}")
    return found[wanted]
