"""The rules of a run directory: never overwritten, and resumed only with the recipe that it was begun with."""

import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from difftilt.errors import UserError
from difftilt.recipes.schema import Recipe, load_recipe

CONFIG = "config.yaml"
"""The resolved recipe of the run."""

MAY_CHANGE = frozenset({"training.iterations", "training.keep_checkpoints"})
"""What a resumed run may set anew without becoming another run: it goes on for longer, or keeps more."""


def check_output(output: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuse an output directory that would lose work; touches nothing.

    Raises:
        UserError: if it holds something and ``resume`` is off, or holds another run, or there is nothing to resume.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a directory")
    occupied = output.is_dir() and any(output.iterdir())
    if occupied and not resume:
        raise UserError(f"output {output} exists and is not empty: add --resume to go on with it, or name another one")
    if not resume:
        return
    if not (output / CONFIG).exists():
        raise UserError(f"output {output} holds no run to resume ({CONFIG} is missing): leave out --resume")
    changed = differences(load_recipe(output / CONFIG).resolved(), recipe.resolved())
    if changed:
        lines = [f"  {key}: {was!r} there, {now!r} asked for" for key, (was, now) in changed.items()]
        raise UserError("\n".join([f"{output} was begun with another recipe: resume with the same values", *lines]))


@contextmanager
def run_directory(output: Path, recipe: Recipe, *, keep: bool) -> Generator[None, None, None]:
    """Store the resolved recipe for the run inside; take everything back if the run is refused before it has results.

    Args:
        output: directory, new or of the same run.
        recipe: what is about to run.
        keep: leave the directory as it is (another process writes, or a run goes on in it).
    """
    if not keep:
        output.mkdir(parents=True, exist_ok=True)
        (output / CONFIG).write_text(recipe.to_yaml(), encoding="utf-8")
    try:
        yield
    except UserError:
        if not keep and not (output / "metrics.jsonl").exists():
            shutil.rmtree(output)
        raise


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> values, of everything that differs and may not change; a missing value is None."""
    old, new = _flat(before), _flat(after)
    keys = sorted(old.keys() | new.keys())
    pairs = {key: (old.get(key), new.get(key)) for key in keys if key not in MAY_CHANGE}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
