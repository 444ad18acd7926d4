"""Tasks whose truth is known, and their shipped checkpoints."""

from difftilt.testbeds.digits import Digits
from difftilt.testbeds.enumeration import chain_expectation, chain_law
from difftilt.testbeds.mixtures import Mixtures, ring
from difftilt.testbeds.sequences import Sequences

__all__ = [
    "Digits",
    "Mixtures",
    "Sequences",
    "chain_expectation",
    "chain_law",
    "ring",
]
