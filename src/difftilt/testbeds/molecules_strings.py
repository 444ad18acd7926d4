"""SMILES as tokens: splitting, padding, and the molecules that the shipped model was trained on."""

import re
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from difftilt.testbeds.molecules_chemistry import TRAINING, parse

END = "<end>"
"""Token that ends a string and fills what is left of it."""
LENGTH = 40
"""Tokens of a sequence; a string has one less at most."""
SYMBOLS = (
    *("c", "n", "o", "s", "[nH]", "[n+]", "C", "N", "O", "S", "P", "F", "Cl", "Br", "I", "[N+]", "[O-]"),
    *("=", "#", "-", "(", ")", "1", "2", "3", "4", END),
)
"""Tokens of the shipped model: those that at least 60 of the 5000 molecules hold."""
BONDS = ("=", "#", "-", "(", ")", "1", "2", "3", "4")
"""Tokens that say how atoms are joined: bonds, branches and ring closures."""

_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|.")


def split(smiles: str) -> list[str]:
    """The tokens of a string: an atom (in brackets as a whole), a bond, a bracket of a branch, a digit of a ring."""
    return _TOKEN.findall(smiles)


@cache
def training_smiles() -> tuple[str, ...]:
    """Canonical SMILES of NCI molecules in one piece, of known tokens, short enough; each once, in their order."""
    lines = TRAINING.read_text(encoding="utf-8").splitlines()
    found = (parse(line.split()[0]) for line in lines if line.strip())
    known, smiles = set(SYMBOLS), dict.fromkeys(one.smiles for one in found if one is not None)
    return tuple(one for one in smiles if len(tokens := split(one)) < LENGTH and known.issuperset(tokens))


def tokens_of(
    smiles: Sequence[str], symbols: Sequence[str] = SYMBOLS, length: int = LENGTH
) -> Int[Tensor, "batch position"]:
    """Strings as tokens, filled up with the end token; every string must fit."""
    place = {symbol: number for number, symbol in enumerate(symbols)}
    rows = torch.full((len(smiles), length), place[END])
    for row, one in zip(rows, smiles, strict=True):
        tokens = [place[token] for token in split(one)]
        row[: len(tokens)] = torch.tensor(tokens)
    return rows


def smiles_of(tokens: Int[Tensor, "batch position"], symbols: Sequence[str] = SYMBOLS) -> list[str]:
    """The strings of sequences: what stands before the first end token."""
    end = list(symbols).index(END)
    rows: list[list[int]] = tokens.tolist()
    return ["".join(symbols[token] for token in (row[: row.index(end)] if end in row else row)) for row in rows]
