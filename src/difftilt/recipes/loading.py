"""Finding and reading recipes: packaged names, paths, YAML, dotted overrides. Nothing is typed or imported here."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, parser, scanner

from difftilt.errors import UserError
from difftilt.leaves import cards, nearest

PACKAGED = Path(__file__).parent


def packaged() -> dict[str, Path]:
    """Name -> file of every packaged recipe; the name is the path without its suffix."""
    files = sorted(PACKAGED.rglob("*.yaml"))
    return {file.relative_to(PACKAGED).with_suffix("").as_posix(): file for file in files}


def read(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """A recipe as plain nested values, interpolations resolved, and the source to name in messages.

    Args:
        recipe: a path, a packaged name, ``<testbed>/<method or steerer>``, or the values themselves.
        overrides: ``dotted.key=value``, applied in order; values are read as YAML.
    """
    if isinstance(recipe, Mapping):
        values, source = dict(recipe), "the recipe"
    elif (file := _file(recipe)) is not None:
        values, source = _read_yaml(file), str(recipe)
    else:
        values, source = _combination(str(recipe)), str(recipe)
    return _merge(values, overrides, source), source


def escaped(values: Any) -> Any:
    """Plain values, such that reading them leaves every text as it is: none of it is an interpolation.

    >>> escaped({"prompts": ["a ${x}"]})["prompts"][0] == "a " + chr(92) + "${x}"
    True
    """
    if isinstance(values, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", values)
    if isinstance(values, Mapping):
        return {key: escaped(value) for key, value in cast(Mapping[Any, Any], values).items()}
    if isinstance(values, list | tuple):
        return [escaped(value) for value in cast(Sequence[Any], values)]
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that :func:`read` takes back as they are."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(values)))


def _file(recipe: str | Path) -> Path | None:
    known = packaged()
    if str(recipe) in known:
        return known[str(recipe)]
    path = Path(recipe)
    if path.is_dir():
        raise UserError(f"recipe {str(recipe)!r} is a directory: name a YAML file")
    if path.suffix in (".yaml", ".yml") and not path.exists():
        raise UserError(f"recipe {str(recipe)!r}: no such file; {nearest(path.stem, known)}")
    return path if path.exists() else None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(file))
    except (parser.ParserError, scanner.ScannerError) as error:
        at = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"recipe {file}: not valid YAML{at}: {error.problem}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"recipe {file}: cannot be read: {_first_line(error)}") from error
    if not isinstance(values, dict) or not values:
        raise UserError(f"recipe {file}: must be a mapping with the sections testbed and method or steerer")
    return cast(dict[str, Any], values)


def _combination(name: str) -> dict[str, Any]:
    """A testbed and a method or steerer with all their defaults: a recipe that needs no file."""
    testbed, _, algorithm = name.partition("/")
    leaves = {kind: {leaf.card.name for leaf in cards(kind)} for kind in ("testbeds", "methods", "steerers")}
    if testbed in leaves["testbeds"] and algorithm in leaves["methods"] | leaves["steerers"]:
        section = "method" if algorithm in leaves["methods"] else "steerer"
        return {"testbed": {"name": testbed}, section: {"name": algorithm}}
    known = set(packaged()) | {
        f"{bed}/{leaf}" for bed in leaves["testbeds"] for leaf in leaves["methods"] | leaves["steerers"]
    }
    raise UserError(
        f"there is no recipe {name!r}, neither a file nor a packaged name; {nearest(name, known)}\n"
        "  `difftilt list recipes` shows all of them"
    )


def _merge(values: dict[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise UserError(f"override {override!r}: expected dotted.key=value, as in training.iterations=20")
    try:
        merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, TypeError) as error:  # a TypeError where a mapping meets a list
        given = f" with {' '.join(overrides)}" if overrides else ""
        raise UserError(f"{source}{given}: {_first_line(error)}") from error
    return cast(dict[str, Any], plain)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
