"""The proofs of the monitors: they fail where a monitor never speaks, and every alarm of a planted run is listed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import pytest

from difftilt.checks import monitors as checks
from difftilt.checks.monitors import PLANTED, PROOFS, Alarm, outcome
from difftilt.checks.proof import run_proof
from difftilt.training import monitors
from difftilt.training.loop import TrainResult
from difftilt.training.monitors import Reading, Row, Verdict
from difftilt.training.run import LoopRun


def silent(rows: Sequence[Row], before: Mapping[str, float]) -> Reading | None:
    del rows, before
    return None


SHORT = [proof for proof in PROOFS if not proof.long]


@pytest.mark.long
@pytest.mark.parametrize("name", checks.GUARDED)
def test_a_monitor_that_never_speaks_fails_a_short_proof(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = [replace(one, measure=silent) if one.name == name else one for one in monitors.MONITORS]
    monkeypatch.setattr(monitors, "MONITORS", deaf)
    checks._tiny.cache_clear()  # pyright: ignore[reportPrivateUsage]
    results = [run_proof(name, proof) for proof in SHORT]
    checks._tiny.cache_clear()  # pyright: ignore[reportPrivateUsage]
    assert not all(result.passed for result in results)


def test_every_alarm_is_listed_with_its_first_iteration() -> None:
    """A fall of another reward before the right one is an alarm of the same monitor."""
    before: dict[str, float] = {"accuracy": 0.5, "clean": 0.5, "fidelity": 0.5, "diversity": 0.5}
    before["fidelity_tolerance"] = 0.5
    rows: list[Row] = [{"iteration": i, "heldout/reward": 0.0, **_heldout(before, i)} for i in range(3)]
    verdicts = [
        Verdict("heldout_fall", i, 2.0, 1.0, "advice", of) for i, of in enumerate(("count", "fidelity", "count"))
    ]
    verdicts.append(Verdict("kl_reference", 2, 9.0, 1.0, "advice"))
    found = outcome(_result(rows, verdicts, before), "heldout_fall", ("fidelity",))
    assert found.first == {
        Alarm("heldout_fall", "count"): 0,
        Alarm("heldout_fall", "fidelity"): 1,
        Alarm("kl_reference", ""): 2,
    }
    assert found.alarm == 1
    line = checks._line("drifting ground", 7, found)  # pyright: ignore[reportPrivateUsage]
    assert PLANTED["drifting ground"].alarm == "heldout_fall"
    assert "| heldout_fall 1 | heldout_fall of count 0, heldout_fall of fidelity 1, kl_reference 2 |" in line


def _heldout(before: Mapping[str, float], iteration: int) -> Row:
    now = dict(before) | {"fidelity": 0.5 - 0.6 * (iteration > 0)}
    return {f"heldout/{name}": value for name, value in now.items()}


def _result(rows: list[Row], verdicts: list[Verdict], before: dict[str, float]) -> TrainResult:
    run = cast(LoopRun, None)  # the judgement needs no model
    return TrainResult(None, rows, before, before, verdicts, run)
