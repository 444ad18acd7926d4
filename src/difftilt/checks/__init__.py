"""The claims that ``difftilt check`` measures, and that the tests assert: written once.

A module named after a part or a leaf holds ``PROOFS``, a tuple of ``Proof``: a sentence, a number, an interval.
``laws`` makes proofs out of the laws that leaves declare; ``trial`` has small training runs for them. To add a claim,
add a proof.

Traps: bounds are derived (standard error, order of the method), not fitted to the number. An ablation is a proof too:
try it, and see the number leave the interval. Mark what takes more than a few seconds ``long``; measurements are
deterministic and take no argument.
"""
