"""Tasks whose truth is known, and their shipped checkpoints.

A testbed makes a ``Task`` (model, reward, prompts, sampler) and knows the tilted law, exactly or by enumeration, which
is what methods and steerers are held to. To add one, write a file with a ``CARD``, a ``Config`` and a class with
``task()``; its page says how each reward is fooled and which number shows it (docs/testbeds.md).

Traps: the truth is that of the sampler with its finite steps where that differs from the data's (``Sequences``).
Distances of finite samples are not 0 under the same law. ``task()`` makes a new model at every call, so runs do not
share weights.
"""

from difftilt.testbeds.digits import Digits
from difftilt.testbeds.enumeration import StateTable, chain_expectation, chain_law, chain_mean, chain_soft_value
from difftilt.testbeds.mixtures import Mixtures, ring
from difftilt.testbeds.sequences import Sequences

__all__ = [
    "Digits",
    "Mixtures",
    "Sequences",
    "StateTable",
    "chain_expectation",
    "chain_law",
    "chain_mean",
    "chain_soft_value",
    "ring",
]
