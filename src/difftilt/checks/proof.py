"""A claim that can be measured: what ``difftilt check`` prints and what the test suite asserts, written once."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """A sentence, the number that decides it, and the interval the number must lie in.

    A module of this package holds ``PROOFS``, a tuple of these; its file name is the slug it speaks of. An ablation is
    a proof too: the idea is removed and the number must leave the interval that it otherwise keeps.

    Attributes:
        claim: one sentence that a reader can judge without the code.
        measure: takes no argument, is deterministic, returns the number.
        at_least, at_most: the bound, derived (standard error, order of the method), not fitted.
        long: needs more than a few seconds; left out by ``--quick`` and by ``make test``, run by ``make proofs``.
    """

    claim: str
    measure: Callable[[], float]
    at_least: float = -math.inf
    at_most: float = math.inf
    long: bool = False

    @property
    def bound(self) -> str:
        """The interval in words."""
        if self.at_least == -math.inf:
            return f"at most {self.at_most:g}"
        if self.at_most == math.inf:
            return f"at least {self.at_least:g}"
        return f"{self.at_least:g} to {self.at_most:g}"


@dataclass(frozen=True)
class Result:
    """One row of ``difftilt check``."""

    name: str
    claim: str
    measured: float
    bound: str
    passed: bool
    seconds: float


def run_proof(name: str, proof: Proof) -> Result:
    """Measure and compare. NaN never passes."""
    start = time.perf_counter()
    measured = float(proof.measure())
    seconds = time.perf_counter() - start
    return Result(name, proof.claim, measured, proof.bound, proof.at_least <= measured <= proof.at_most, seconds)
