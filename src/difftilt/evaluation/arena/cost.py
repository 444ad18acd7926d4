"""What a result cost, in the two currencies that members of an arena are compared in."""

import time
from typing import Literal

from difftilt.models.ledger import Ledger

GRADIENT_PASS = 3
"""Evaluations that one gradient pass counts for: the forward pass, and a backward pass of about twice its work."""

Currency = Literal["evaluations", "reward_calls"]
"""What a budget is counted in."""

CURRENCIES: tuple[Currency, ...] = ("evaluations", "reward_calls")

WORDS: dict[Currency, str] = {"evaluations": "evaluations", "reward_calls": "reward calls"}
"""The currencies as people write them."""

Clock = Literal["wall", "processor"]
"""What seconds are of."""


def now(clock: Clock) -> float:
    """Seconds of a clock since some moment; ``processor`` stands still while other programs run, and adds threads."""
    return time.perf_counter() if clock == "wall" else time.process_time()


def evaluations(cost: Ledger) -> int:
    """Network evaluations: ``nfe + 3·gradient_passes``; other networks (``auxiliary_calls``) are not counted."""
    return cost.nfe + GRADIENT_PASS * cost.gradient_passes


def spent(cost: Ledger, currency: Currency) -> int:
    """The cost in one currency."""
    return evaluations(cost) if currency == "evaluations" else cost.reward_calls
