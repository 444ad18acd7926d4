"""Every proof of every checks module: short ones here, long ones under ``make proofs``."""

import pytest

from difftilt.checks.collect import collect
from difftilt.checks.proof import Proof, run_proof

CASES = [
    pytest.param(name, proof, id=f"{name}: {proof.claim}", marks=[pytest.mark.long] if proof.long else [])
    for name, proof in collect()
]


@pytest.mark.parametrize(("name", "proof"), CASES)
def test_proof(name: str, proof: Proof) -> None:
    result = run_proof(name, proof)
    assert result.passed, f"{proof.claim}: measured {result.measured:.6g}, bound {result.bound}"
