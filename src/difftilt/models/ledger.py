"""The currency of every comparison: network evaluations, reward calls and gradient passes."""

from dataclasses import astuple, dataclass, replace


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

    def copy(self) -> "Ledger":
        """The counts now, to subtract later."""
        return replace(self)
