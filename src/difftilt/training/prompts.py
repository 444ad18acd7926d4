"""Prompts from a list, a text file, a file of JSON lines, or a data set; everything beside the text is metadata.

One reader for training, evaluation and steering. What is wrong with a file is told for all of its lines at once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, Field

from difftilt.config import Config, Problems
from difftilt.errors import UserError
from difftilt.models.diffusers.known import PICTURES
from difftilt.rewards.prompts import TEXT, Prompt, prompt_of
from difftilt.training.datasets import rows_of_dataset
from difftilt.training.jsonl import Row, read_text, rows_of_jsonl

MEANT = (".json", ".csv", ".tsv", ".arrow")
"""Files that are no lines of text, whatever they hold."""


def _entry(value: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(value, dict) and not isinstance(value.get(TEXT), str):
        raise ValueError(f"a prompt with metadata is a mapping with the text under {TEXT!r}")
    return value


class PromptSource(Config):
    """A file or a data set, and which of its columns are meant."""

    source: str = Field(min_length=1)
    """A ``.jsonl`` or ``.parquet`` file, a folder of them, what ``save_to_disk`` wrote, or an id on the hub."""
    column: str = Field(default=TEXT, min_length=1)
    """What holds the text."""
    metadata: tuple[str, ...] | None = None
    """Columns that rewards see; null is all others."""
    split: str | None = Field(default=None, min_length=1)
    """Of a data set; it may be left out where there is only one."""
    subset: str | None = Field(default=None, min_length=1)
    """Of a data set on the hub that has several."""


Entry = Annotated[str | dict[str, Any], AfterValidator(_entry)]
"""A text, or a mapping with ``prompt`` and metadata."""

Prompts = Annotated[tuple[Entry, ...], Field(min_length=1)] | Annotated[str, Field(min_length=1)] | PromptSource
"""As a recipe has them: a list, the path of a file, the folder or the id of a data set, or one with its columns."""

Given = Sequence[str | Mapping[str, Any]] | str | Path | Mapping[str, Any] | PromptSource
"""As Python has them; a mapping is a :class:`PromptSource`."""


def as_prompts(given: Given) -> list[str]:
    """The prompts, those with metadata as :class:`Prompt`.

    Raises:
        UserError: for a file or data set that cannot be read, or with everything that is wrong in it.
    """
    if isinstance(given, str | Path | Mapping | PromptSource):
        return list(read_prompts(given).values())
    problems = Problems()
    found = [_listed(place, value, problems) for place, value in enumerate(given)]
    problems.check("the list of prompts")
    return _same_names(found)


def _listed(place: int, value: object, problems: Problems) -> str:
    """One entry of a list."""
    text = cast(Mapping[str, Any], value).get(TEXT) if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        problems.add(f"entry {place} is {_short(value)}: a prompt is a text, or a mapping with the text under {TEXT!r}")
        return ""
    found = prompt_of(cast(str | Mapping[str, Any], value))
    check_prompt(f"entry {place}", found, problems)
    return found


def read_prompts(source: str | Path | Mapping[str, Any] | PromptSource) -> Mapping[str, str]:
    """Where a prompt stands ("line 3", "row 0") -> prompt.

    Of a text file empty lines and lines that begin with ``#`` are left out. All prompts of a source have the same names
    in their metadata, with None where a line has no such key. A picture that is to be begun from or to be inpainted
    (``image``, ``mask_image``) and lies where the source lies is told by its path from here.

    Raises:
        UserError: for what cannot be read or holds no prompt, and with all lines that are none.
    """
    if isinstance(source, Mapping):
        problems = Problems()
        parsed = problems.parse(PromptSource, source, "prompts")
        problems.check("prompts")
        source = cast(PromptSource, parsed)
    if not isinstance(source, PromptSource):
        source = PromptSource(source=str(source))
    name, path = source.source, Path(source.source).expanduser()
    if path.suffix == ".jsonl" and not path.is_dir():
        _refuse_unread(source, ("split", "subset"))
        return _of_rows(source, rows_of_jsonl(path), path.parent)
    if path.is_dir() or path.suffix == ".parquet" or (not path.exists() and _is_id(name)):
        wanted = None if source.metadata is None else (source.column, *source.metadata)
        rows = rows_of_dataset(name, source.split, source.subset, wanted)
        return _of_rows(source, rows, path if path.is_dir() else path.parent)
    if path.suffix in MEANT:
        raise UserError(
            f"prompts {name!r}: {path.suffix} files are not read: write one JSON object per line into a .jsonl file, "
            "or one prompt per line into a .txt file"
        )
    _refuse_unread(source, ("split", "subset", "column", "metadata"))
    return _of_text(name, path)


def _is_id(name: str) -> bool:
    """Whether a name that is no file may be one on the hub: OWNER/NAME, and no path or file name."""
    own = (".txt", ".jsonl", ".parquet", *MEANT)
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(own)


def _refuse_unread(source: PromptSource, names: Sequence[str]) -> None:
    """Refuse what was chosen and would not be looked at."""
    changed = [name for name in names if getattr(source, name) != PromptSource.model_fields[name].default]
    if changed:
        raise UserError(f"prompts {source.source!r}: {', '.join(changed)} belongs to a data set, and this is a file")


def _of_text(name: str, path: Path) -> Mapping[str, str]:
    text = read_text(
        path, f"prompts {name!r}", "name a text file with one prompt per line, or give the prompts as a list"
    )
    stripped = {f"line {number}": line.strip() for number, line in enumerate(text.splitlines(), start=1)}
    prompts = {where: line for where, line in stripped.items() if line and not line.startswith("#")}
    if not prompts:
        raise UserError(f"prompt file {name} holds no prompt: write one per line; lines with # in front are comments")
    return prompts


def _of_rows(source: PromptSource, rows: Iterable[Row], folder: Path) -> Mapping[str, str]:
    """Prompts of JSON objects or rows of a data set, which lies in a folder."""
    problems, found = Problems(), dict[str, str]()
    for where, row, wrong in rows:
        if wrong is not None:
            problems.add(f"{where}: {wrong}")
        else:
            found[where] = _of_row(source, where, row, folder, problems)
    problems.check(source.source)
    if not found:
        raise UserError(
            f"prompts {source.source!r} hold no prompt: write one JSON object with {source.column!r} per line"
        )
    return dict(zip(found, _same_names([*found.values()]), strict=True))


def _of_row(source: PromptSource, where: str, row: Mapping[str, Any], folder: Path, problems: Problems) -> str:
    text = row.get(source.column)
    if not isinstance(text, str):
        said = f"is {_short(text)}, not a text" if source.column in row else f"is missing, there are {_listing(row)}"
        problems.add(f"{where}: {source.column!r} {said}")
        return ""
    names = [name for name in row if name != source.column] if source.metadata is None else source.metadata
    absent = [name for name in names if name not in row]
    if absent and len(absent) == len(names):
        problems.add(f"{where}: has none of the metadata {', '.join(absent)}, there are {_listing(row)}")
    found = Prompt(text, {name: _found(name, row.get(name), folder) for name in names})
    check_prompt(where, found, problems)
    return found


def _found(name: str, value: object, folder: Path) -> object:
    """A value of metadata, with the path of a picture as it is found from here."""
    if name not in PICTURES or not isinstance(value, str):
        return value
    try:
        beside = (folder / value).is_file()
    except (OSError, ValueError):  # what is too long, or holds a zero
        return value
    return str(folder / value) if beside else value


def _listing(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no keys"


def _not_plain(value: object) -> str | None:
    """What in a value JSON cannot hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"what is not plain ({error})"
    return None


def check_prompt(where: str, prompt: str, problems: Problems) -> None:
    """Note what no file could hold: half of a character, or metadata that JSON has no form for."""
    lone = next((letter for letter in prompt if "\ud800" <= letter <= "\udfff"), None)
    if lone is not None:
        problems.add(
            f"{where}: the text holds \\u{ord(lone):04x}, half of a character: mend the encoding of the source"
        )
    for name, value in prompt.metadata.items() if isinstance(prompt, Prompt) else ():
        if (wrong := _not_plain(value)) is not None:
            problems.add(f"{where}: {name!r} holds {wrong}: name the columns that rewards need, as in metadata: [...]")


def _same_names(prompts: Sequence[str]) -> list[str]:
    """Prompts with equal names of metadata, None where one is missing, so that no reward sees them differ by batch."""
    names = dict.fromkeys(name for one in prompts if isinstance(one, Prompt) for name in one.metadata)
    if not names:
        return [str(one) for one in prompts]
    own = [one.metadata if isinstance(one, Prompt) else {} for one in prompts]
    return [Prompt(one, {name: known.get(name) for name in names}) for one, known in zip(prompts, own, strict=True)]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
