"""SMILES as tokens: splitting, pair encoding, padding, and the molecules that the shipped model was trained on.

Tokens are words: single symbols, and the strings that arise where the most frequent neighbours are merged again and
again (SMILES pair encoding, Li and Fourches 2021; byte pair encoding, Sennrich et al. 2016). A benzene ring is one word
then, and a molecule has seven tokens where it had twenty-five symbols.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from difftilt.testbeds.molecules_chemistry import TRAINING, parse

END = "<end>"
"""Word that ends a string and fills what is left of it."""
LENGTH = 16
"""Tokens of a sequence; a string has one less at most."""
SYMBOLS = (
    *("c", "n", "o", "s", "[nH]", "[n+]", "C", "N", "O", "S", "P", "F", "Cl", "Br", "I", "[N+]", "[O-]"),
    *("=", "#", "-", "(", ")", "1", "2", "3", "4"),
)
"""Symbols that at least 60 of the 5000 molecules hold: atoms (in brackets as a whole), bonds, branches, rings."""
MERGES = 150
"""Words that are made by merging."""

_SYMBOL = re.compile(r"\[[^\]]+\]|Br|Cl|.")


def split(smiles: str) -> list[str]:
    """The symbols of a string."""
    return _SYMBOL.findall(smiles)


def joins(word: str) -> bool:
    """Whether a word opens or closes a branch or a ring that it does not close or open itself.

    Such words join what stands far apart: they are to molecules what bonds are to the strings of PepTune.
    """
    symbols = split(word)
    rings = Counter(symbol for symbol in symbols if symbol.isdigit())
    depth = [(symbol == "(") - (symbol == ")") for symbol in symbols]
    lowest = min((sum(depth[: place + 1]) for place in range(len(depth))), default=0)
    return any(count % 2 for count in rings.values()) or sum(depth) != 0 or lowest < 0


@cache
def training_smiles() -> tuple[str, ...]:
    """Canonical SMILES of the NCI molecules that are in one piece and of known symbols; each once, in their order."""
    lines = TRAINING.read_text(encoding="utf-8").splitlines()
    found = (parse(line.split()[0]) for line in lines if line.strip())
    smiles = dict.fromkeys(one.smiles for one in found if one is not None)
    return tuple(one for one in smiles if set(SYMBOLS).issuperset(split(one)))


def learn_words(smiles: Sequence[str], merges: int = MERGES) -> list[str]:
    """Symbols, merged words in the order of their merging, and the end: a vocabulary for :func:`tokens_of`."""
    rows, words = [split(one) for one in smiles], list(SYMBOLS)
    for _ in range(merges):
        pairs = Counter(pair for row in rows for pair in pairwise(row))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        if left + right not in words:
            words.append(left + right)
        rows = [_merged(row, left, right) for row in rows]
    return [*words, END]


def encode(smiles: str, rank: Mapping[str, int]) -> list[str]:
    """A string as words: of all neighbours whose union is a word, those of the earliest word are merged first.

    Args:
        smiles: of known symbols.
        rank: place of each word in the vocabulary.
    """
    row = split(smiles)
    while True:
        options = [(rank[left + right], left, right) for left, right in pairwise(row) if left + right in rank]
        if not options:
            return row
        _, left, right = min(options)
        row = _merged(row, left, right)


def tokens_of(smiles: Sequence[str], words: Sequence[str]) -> Int[Tensor, "batch position"]:
    """Strings as tokens, filled up with the end; strings of unknown symbols or too many words are left out."""
    rank = {word: place for place, word in enumerate(words)}
    rows = [[rank.get(word, -1) for word in encode(one, rank)] for one in smiles]
    fitting = [row for row in rows if len(row) < LENGTH and -1 not in row]
    tokens = torch.full((len(fitting), LENGTH), rank[END])
    for row, places in zip(tokens, fitting, strict=True):
        row[: len(places)] = torch.tensor(places, dtype=torch.int64)
    return tokens


def smiles_of(tokens: Int[Tensor, "batch position"], words: Sequence[str]) -> list[str]:
    """The strings of sequences: what stands before the first end."""
    end = list(words).index(END)
    rows: list[list[int]] = tokens.tolist()
    return ["".join(words[token] for token in (row[: row.index(end)] if end in row else row)) for row in rows]


def _merged(row: Sequence[str], left: str, right: str) -> list[str]:
    found, place = list[str](), 0
    while place < len(row):
        both = row[place : place + 2] == [left, right]
        found.append(left + right if both else row[place])
        place += 2 if both else 1
    return found
