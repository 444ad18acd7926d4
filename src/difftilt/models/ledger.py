"""The currency of every comparison: network evaluations, reward calls and gradient passes."""

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace

WORDS = {
    "nfe": ("network evaluation", "network evaluations"),
    "reward_calls": ("reward call", "reward calls"),
    "gradient_passes": ("gradient pass", "gradient passes"),
    "auxiliary_calls": ("auxiliary call", "auxiliary calls"),
    "seconds": ("second", "seconds"),
}
"""One and several of what costs are counted in, as people write them."""


def in_words(counts: Mapping[str, float | None]) -> str:
    """What is neither zero nor None: ``3 400 network evaluations and 1 reward call``; "nothing" if nothing is."""
    parts = [f"{count:,} {WORDS[name][count != 1]}".replace(",", " ") for name, count in counts.items() if count] or [
        "nothing"
    ]
    return ", ".join([*parts[:-2], " and ".join(parts[-2:])])


@dataclass
class Ledger:
    """Counts what a computation cost. One unit is one sample, whatever the batch; padded rows are not counted.

    Attributes:
        nfe: network function evaluations without gradient; a guided evaluation counts two.
        reward_calls: samples handed to a reward.
        gradient_passes: network evaluations through which a gradient flowed back.
        auxiliary_calls: evaluations of other networks (hypernetworks, process reward models).
    """

    nfe: int = 0
    reward_calls: int = 0
    gradient_passes: int = 0
    auxiliary_calls: int = 0

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Ledger") -> "Ledger":
        return Ledger(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, count: int) -> "Ledger":
        """The cost of ``count`` of them."""
        return Ledger(*(count * mine for mine in astuple(self)))

    def __str__(self) -> str:
        """What was spent, in words: ``3 400 network evaluations and 1 reward call``."""
        return in_words(asdict(self))

    def copy(self) -> "Ledger":
        """The counts now, to subtract later."""
        return replace(self)
