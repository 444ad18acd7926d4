"""Leaves (methods, steerers, rewards, models, testbeds) are found by their files and read without importing them.

A leaf is a file that holds the literal ``CARD = Card(...)``. There is no registry: to add a leaf is to add its file.
"""

import ast
import difflib
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from difftilt.card import Card
from difftilt.errors import UserError

ROOMS = {
    "methods": ("methods", "control", "search"),
    "steerers": ("steering",),
    "rewards": ("rewards",),
    "models": ("models",),
    "testbeds": ("testbeds",),
}
"""Kind of leaf -> rooms (folders of the package) that hold such leaves, at any depth."""

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Leaf:
    """A card and where it was found.

    Attributes:
        card: what the leaf says of itself.
        file: absolute path.
        module: dotted name to import.
    """

    card: Card
    file: Path
    module: str


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """End of a sentence that offers the most similar known names, or all of them where none is similar."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, count, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names)}" if names else "there is none"


@cache
def cards(kind: str) -> tuple[Leaf, ...]:
    """Every leaf of a kind, by name; imports nothing."""
    if kind not in ROOMS:
        raise UserError(f"there is no kind of leaf {kind!r}; {nearest(kind, ROOMS)}")
    files = [file for room in ROOMS[kind] for file in sorted((PACKAGE / room).rglob("*.py"))]
    found = [Leaf(card, file, _module(file)) for file in files if (card := read_card(file)) is not None]
    return tuple(sorted(found, key=lambda leaf: leaf.card.name))


def find(kind: str, name: str) -> Leaf:
    """The leaf of that name.

    Raises:
        UserError: if there is none; names the nearest.
    """
    found = {leaf.card.name: leaf for leaf in cards(kind)}
    if name not in found:
        raise UserError(f"there is no {kind[:-1]} {name!r}; {nearest(name, found)}")
    return found[name]


def load(kind: str, name: str) -> Callable[..., Any]:
    """What a name stands for: the entry of the leaf, or the object behind ``package.module:Name`` from elsewhere."""
    if ":" in name:
        module, _, entry = name.partition(":")
        return _entry(import_module(module, f"{kind[:-1]} {name!r}"), entry, f"{kind[:-1]} {name!r}")
    leaf = find(kind, name)
    return _entry(import_module(leaf.module, f"{kind[:-1]} {name!r}"), leaf.card.entry, str(leaf.file))


def import_module(module: str, user: str) -> Any:
    """Import a module for ``user``, which the message names if the module or something it needs is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        foreign = missing == module or module.startswith(f"{missing}.")
        if foreign and _extra(missing) is None:
            raise UserError(f"{user}: there is no module {missing!r} on the Python path") from error
        if missing.partition(".")[0] == "difftilt":
            raise  # a fault of ours, which no installation cures
        raise UserError(f"{user} needs {missing!r}, which is not installed: {_remedy(missing)}") from error


def read_card(file: Path) -> Card | None:
    """The card of a file, parsed but not executed; None if the file has none."""
    text = file.read_text(encoding="utf-8")
    if "CARD" not in text:
        return None
    for node in ast.parse(text, filename=str(file)).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets):
            return _literal_card(node.value, f"{file}:{node.lineno}")
    return None


def _literal_card(node: ast.expr, where: str) -> Card:
    if not isinstance(node, ast.Call) or node.args:
        raise UserError(f"{where}: CARD must be Card(...) with keyword arguments only")
    try:
        arguments = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in node.keywords}
        return Card(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: CARD must hold literals under the names of Card: {error}") from error


def _module(file: Path) -> str:
    return ".".join(("difftilt", *file.relative_to(PACKAGE).with_suffix("").parts))


def card_of(entry: object) -> Card | None:
    """The card of the leaf in whose file a class, a function, or an object's class or a parent stands; or None."""
    kinds = entry.__mro__ if isinstance(entry, type) else (entry, *type(entry).__mro__)
    for kind in kinds:
        card = getattr(sys.modules.get(getattr(kind, "__module__", "")), "CARD", None)
        if isinstance(card, Card):
            return card
    return None


def _entry(module: Any, entry: str, where: str) -> Callable[..., Any]:
    found = getattr(module, entry, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{where}: there is no class or function {entry!r} in it; {nearest(entry, names)}")
    return found


def _remedy(missing: str) -> str:
    """How to install a package: by the extra that offers it where there is one."""
    extra = _extra(missing)
    return f"pip install {missing.partition('.')[0]}" if extra is None else f"pip install 'difftilt[{extra}]'"


def extras() -> dict[str, list[str]]:
    """Extra -> packages, as the installation declares them."""
    offered: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("difftilt") or []:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name:
            offered.setdefault(extra[1], []).append(name[0])
    return offered


def _extra(missing: str) -> str | None:
    """The first extra that offers a package."""
    wanted = _normal(missing.partition(".")[0])
    found = (extra for extra, packages in extras().items() if wanted in map(_normal, packages))
    return next(found, None)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
