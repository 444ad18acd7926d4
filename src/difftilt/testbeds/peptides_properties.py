"""Amino acids in numbers, and properties of peptides in closed form.

Properties are of linear peptides with free ends. The tables are of common knowledge; each says what it is.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
"""Token 0 is alanine, A, and so on in the order of the letters."""

_RESIDUES: tuple[tuple[float, float, float], ...] = (
    (8.3, 0.62, 71.0788),
    (1.4, 0.29, 103.1429),
    (5.5, -0.90, 115.0886),
    (6.7, -0.74, 129.1155),
    (3.9, 1.19, 147.1766),
    (7.1, 0.48, 57.0519),
    (2.3, -0.40, 137.1411),
    (5.9, 1.38, 113.1594),
    (5.8, -1.50, 128.1741),
    (9.7, 1.06, 113.1594),
    (2.4, 0.64, 131.1961),
    (4.1, -0.78, 114.1038),
    (4.7, 0.12, 97.1167),
    (3.9, -0.85, 128.1307),
    (5.5, -2.53, 156.1875),
    (6.6, -0.18, 87.0782),
    (5.4, -0.05, 101.1051),
    (6.9, 1.08, 99.1326),
    (1.1, 0.81, 186.2132),
    (2.9, 0.26, 163.1760),
)
"""Frequency, hydrophobicity and mass of each letter."""


def _column(place: int) -> dict[str, float]:
    return {letter: row[place] for letter, row in zip(LETTERS, _RESIDUES, strict=True)}


FREQUENCY = _column(0)
"""Percent of residues in proteins, to the nearest tenth or so; normalised where it is used."""
HYDROPHOBICITY = _column(1)
"""Normalised consensus scale of Eisenberg et al. 1984, from -2.53 (arginine) to 1.38 (isoleucine)."""
MASS = _column(2)
"""Average mass of a residue, g/mol: the amino acid less a water."""
WATER = 18.0153
PKA = {"K": 10.8, "R": 12.5, "H": 6.5, "D": 3.9, "E": 4.1, "C": 8.5, "Y": 10.1}
"""Of side chains, the values of EMBOSS."""
PKA_AMINO, PKA_CARBOXYL = 8.6, 3.6
"""Of the free ends."""
BASES = "KRH"
"""Side chains that are positive when they hold a proton; the others with a pKa are negative when they have lost it."""

FRAGILE = ("DG", "DP", "NG")
"""Neighbours that do not last: aspartate or asparagine before glycine rearranges, aspartate before proline splits."""
GREASY = "ACFILMVWY"
"""Hydrophobic residues, for the rule on their share."""
LONGEST_RUN = 2
"""Of one residue."""

Tokens = Int[Tensor, "batch position"]


def table(values: dict[str, float]) -> Float[Tensor, " vocab"]:
    """A value for each token, float64; 0 where there is none."""
    return torch.tensor([values.get(letter, 0.0) for letter in LETTERS], dtype=torch.float64)


def residue_charges(ph: float = 7.0) -> Float[Tensor, " vocab"]:
    """Mean charge of each side chain, elementary charges (Henderson-Hasselbalch).

    A base is 1/(1 + 10^(pH - pKa)), an acid -1/(1 + 10^(pKa - pH)).
    """
    return table({one: _half(ph, pka) if one in BASES else _half(ph, pka) - 1 for one, pka in PKA.items()})


def end_charge(ph: float = 7.0) -> float:
    """Mean charge of the two free ends together."""
    return _half(ph, PKA_AMINO) + _half(ph, PKA_CARBOXYL) - 1


def charge(tokens: Tokens, ph: float = 7.0) -> Float[Tensor, " batch"]:
    """Net charge, elementary charges."""
    return residue_charges(ph)[tokens].sum(1) + end_charge(ph)


def hydrophobicity(tokens: Tokens) -> Float[Tensor, " batch"]:
    """Mean over the residues, in units of the scale."""
    return table(HYDROPHOBICITY)[tokens].mean(1)


def weight(tokens: Tokens) -> Float[Tensor, " batch"]:
    """Molecular weight, g/mol."""
    return table(MASS)[tokens].sum(1) + WATER


def moment(tokens: Tokens, degrees: float = 100.0) -> Float[Tensor, " batch"]:
    """Hydrophobic moment per residue, |Σ_n H_n exp(i·n·δ)|/length, δ = 100° for an alpha helix (Eisenberg 1982)."""
    angle = torch.arange(tokens.shape[1], dtype=torch.float64) * math.radians(degrees)
    values = table(HYDROPHOBICITY)[tokens]
    return torch.hypot((values * angle.cos()).sum(1), (values * angle.sin()).sum(1)) / tokens.shape[1]


def valid(tokens: Tokens) -> Bool[Tensor, " batch"]:
    """Whether a chemist would make it: no residue three times in a row, no fragile pair, at most half hydrophobic."""
    run = torch.ones(len(tokens), tokens.shape[1] - LONGEST_RUN, dtype=torch.bool)
    for shift in range(1, LONGEST_RUN + 1):
        run &= tokens[:, shift : shift + run.shape[1]] == tokens[:, : run.shape[1]]
    pairs = torch.zeros(len(LETTERS), len(LETTERS), dtype=torch.bool)
    for one, other in FRAGILE:
        pairs[LETTERS.index(one), LETTERS.index(other)] = True
    fragile = pairs[tokens[:, :-1], tokens[:, 1:]]
    greasy = table(dict.fromkeys(GREASY, 1.0))[tokens].sum(1)
    return ~run.any(1) & ~fragile.any(1) & (greasy <= tokens.shape[1] / 2)


def _half(ph: float, pka: float) -> float:
    """Share that holds its proton."""
    return 1 / (1 + 10 ** (ph - pka))
