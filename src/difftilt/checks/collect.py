"""Which proofs there are: those of every module of this package, and the declared laws of every leaf."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from difftilt.card import Card
from difftilt.checks.proof import Proof, Result, run_proof
from difftilt.errors import UserError
from difftilt.leaves import cards, nearest

_PARTS = {"__init__", "proof", "collect", "trial", "attribution", "calibration"}
"""Modules of this package that are no slug."""


def check_names() -> list[str]:
    """Every name that has something to check: modules of this package, and leaves that declare laws."""
    return sorted({*_modules(), *(card.name for card in _lawful())})


def collect(names: Iterable[str] = (), *, quick: bool = False) -> list[tuple[str, Proof]]:
    """Name and proof, by name, of all or of the given names.

    A module ``checks/<slug>.py`` holds ``PROOFS``. A module may also offer ``proofs_of(card)``, which makes proofs out
    of the laws that a leaf declares; they count under the name of the leaf.

    Args:
        names: slugs; none means all.
        quick: leave out proofs that need more than a few seconds.

    Raises:
        UserError: if a name has nothing to check; names the nearest.
    """
    known = check_names()
    for name in names:
        if name not in known:
            raise UserError(f"there is nothing to check under {name!r}; {nearest(name, known)}")
    wanted = set(names) or set(known)
    found = [(name, proof) for name, proof in _all() if name in wanted and not (quick and proof.long)]
    return sorted(found, key=lambda pair: pair[0])


def run(proofs: Iterable[tuple[str, Proof]]) -> Iterator[Result]:
    """Measure one after the other."""
    for name, proof in proofs:
        yield run_proof(name, proof)


def _all() -> Iterator[tuple[str, Proof]]:
    for slug in _modules():
        module = _module(slug)
        for proof in getattr(module, "PROOFS", ()):
            yield slug, proof
        proofs_of: Callable[[Card], Iterable[Proof]] | None = getattr(module, "proofs_of", None)
        if proofs_of is not None:
            yield from ((card.name, proof) for card in _lawful() for proof in proofs_of(card))


def _lawful() -> list[Card]:
    return [leaf.card for kind in ("methods", "steerers") for leaf in cards(kind) if leaf.card.laws]


def _modules() -> list[str]:
    stems = {file.stem for file in Path(__file__).parent.glob("*.py")} - _PARTS
    return sorted(stem.replace("_", "-") for stem in stems)


def _module(slug: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{slug.replace('-', '_')}")
