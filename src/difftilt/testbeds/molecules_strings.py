"""Molecules as tokens: SELFIES, pair encoding, padding, and the molecules that the shipped model was trained on.

In SELFIES (Krenn et al. 2020, arXiv 1905.13741) the symbols of a string are rules of a grammar that tracks valences,
and branches and rings say how far they reach: every sequence of symbols spells a molecule. Tokens are words: single
symbols, and the strings that arise where the most frequent neighbours are merged again and again (byte pair encoding,
Sennrich et al. 2016). A benzene ring is one word then, and a molecule has six tokens where it had 24 symbols.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import cast

import selfies
import torch
from jaxtyping import Int
from torch import Tensor

from difftilt.testbeds.molecules_chemistry import KEPT, TRAINING, parse

END = "<end>"
"""Word that ends a string and fills what is left of it."""
LENGTH = 12
"""Tokens of a sequence; a string has one less at most."""
SYMBOLS = (
    *("[C]", "[=C]", "[#C]", "[N]", "[=N]", "[#N]", "[NH1]", "[N+1]", "[=N+1]", "[O]", "[=O]", "[O-1]"),
    *("[S]", "[=S]", "[P]", "[Cl]", "[Br]", "[I]"),
    *("[Branch1]", "[=Branch1]", "[#Branch1]", "[Branch2]", "[=Branch2]", "[#Branch2]", "[Ring1]", "[Ring2]"),
)
"""Symbols that at least 60 of the 5000 molecules hold: atoms with the bond before them, branches, rings."""
MERGES = 400
"""Words that are made by merging."""


@lru_cache(maxsize=KEPT)
def split(smiles: str) -> tuple[str, ...]:
    """The SELFIES symbols of a molecule, none if SELFIES cannot write it."""
    try:
        written = selfies.encoder(smiles)
    except selfies.EncoderError:
        return ()
    return tuple(selfies.split_selfies(written))


@cache
def training_smiles() -> tuple[str, ...]:
    """Canonical SMILES of the NCI molecules that are in one piece and of known symbols; each once, in their order."""
    lines = TRAINING.read_text(encoding="utf-8").splitlines()
    found = (parse(line.split()[0]) for line in lines if line.strip())
    smiles = dict.fromkeys(one.smiles for one in found if one is not None)
    whole = [one for one in smiles if "." not in one]
    return tuple(one for one in whole if (symbols := split(one)) and set(SYMBOLS).issuperset(symbols))


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


def encode(smiles: str, rank: Mapping[str, int]) -> tuple[str, ...]:
    """A molecule as words: of all neighbours whose union is a word, those of the earliest word are merged first.

    Args:
        smiles: that SELFIES can write.
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
    """Molecules as tokens, filled up with the end; those of unknown symbols or too many words are left out."""
    rank = {word: place for place, word in enumerate(words)}
    rows = [[rank.get(word, -1) for word in encode(one, rank)] for one in smiles]
    fitting = [row for row in rows if len(row) < LENGTH and -1 not in row]
    tokens = torch.full((len(fitting), LENGTH), rank[END])
    for row, places in zip(tokens, fitting, strict=True):
        row[: len(places)] = torch.tensor(places, dtype=torch.int64)
    return tokens


def smiles_of(tokens: Int[Tensor, "batch position"], words: Sequence[str]) -> list[str]:
    """The molecules that stand before the first end, as SELFIES writes them in SMILES; empty where there is none."""
    end = list(words).index(END)
    rows: list[list[int]] = tokens.tolist()
    return [_read("".join(words[token] for token in (row[: row.index(end)] if end in row else row))) for row in rows]


@lru_cache(maxsize=KEPT)
def _read(written: str) -> str:
    return cast("str", selfies.decoder(written))  # a pair only where attributions are asked for


def _merged(row: Sequence[str], left: str, right: str) -> tuple[str, ...]:
    found, place = list[str](), 0
    while place < len(row):
        both = tuple(row[place : place + 2]) == (left, right)
        found.append(left + right if both else row[place])
        place += 2 if both else 1
    return tuple(found)
