"""The rules of a run directory: never overwritten, and resumed only with the recipe that it was begun with."""

import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from difftilt.errors import UserError
from difftilt.recipes.schema import Recipe, load_recipe
from difftilt.training.checkpoint import newest_checkpoint
from difftilt.training.logs import told_if_full, write_text

CONFIG = "config.yaml"
"""The resolved recipe of the run."""

MAY_CHANGE = frozenset(
    {
        "training.iterations",
        "training.keep_checkpoints",
        "training.sharding",
        "training.offload_weights",
        "training.offload_experience",
        "training.track",
        "reward.url",
        "reward.timeout",
        "reward.retries",
    }
)
"""What a resumed run may set anew without becoming another run: it goes on for longer, keeps more, lays its memory out
in another way, is told to other programs, or asks a reward server that has moved."""


def check_output(output: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuse an output directory that would lose work; touches nothing.

    Raises:
        UserError: if it holds something and ``resume`` is off, or holds another run, or there is nothing to resume.
    """
    if not resume:
        remedy = "name another one" if recipe.method is None else "add --resume to go on with it, or name another one"
        check_free(output, remedy)
        return
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a directory")
    if not (output / CONFIG).exists():
        raise UserError(f"output {output} holds no run to resume ({CONFIG} is missing): leave out --resume")
    changed = differences(load_recipe(output / CONFIG).resolved(), recipe.resolved())
    if changed:
        lines = [f"  {key}: {was!r} there, {now!r} asked for" for key, (was, now) in changed.items()]
        raise UserError("\n".join([f"{output} was begun with another recipe: resume with the same values", *lines]))


def check_free(output: Path, remedy: str = "name another one") -> None:
    """Refuse a directory that holds something, or a file; touches nothing."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a directory")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"output {output} exists and is not empty: {remedy}")


@contextmanager
def run_directory(output: Path, recipe: Recipe, *, resume: bool, writes: bool) -> Generator[None, None, None]:
    """Store the resolved recipe for the run inside; take everything back if it ends before it has a checkpoint.

    Args:
        output: directory, new or of the same run.
        recipe: what is about to run; a resumed run that ends well leaves it in place of the older one.
        resume: a run goes on in the directory, which then stays whatever happens.
        writes: this process is the one that writes files.
    """
    ended = False
    try:
        if writes and not resume:
            _begin(output, recipe)
        with told_if_full(output, "then go on with --resume from the newest checkpoint, or begin anew without one"):
            yield
        ended = True
    finally:
        if ended and writes and resume:
            write_text(output / CONFIG, recipe.to_yaml())
        if not ended and writes and not resume and newest_checkpoint(output / "checkpoints") is None:
            shutil.rmtree(output, ignore_errors=True)


def _begin(output: Path, recipe: Recipe) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / CONFIG, recipe.to_yaml())
    except OSError as error:
        raise UserError(f"output {output} cannot be written ({error.strerror}): name another directory") from error


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
