"""Monitors: silent on a healthy run, and each speaks where its number crosses the threshold."""

import pytest

from difftilt.training.monitors import MONITORS, MonitorConfig, Row, judge

CONFIG = MonitorConfig()
BEFORE = {"reward": 0.0, "reward_std": 1.0, "watch": 0.5, "watch_std": 0.1, "kl_reference": 0.0}


def healthy(count: int = 30) -> list[Row]:
    """Rewards rise on training and held-out prompts alike, everything else stays small."""
    rows: list[Row] = []
    for i in range(count):
        row: Row = {"iteration": i, "reward_mean": 0.1 * i, "reward_std": 1.0, "kl_reference": 0.2 * i}
        row |= {"diversity": 2.0 - 0.02 * i, "clip_fraction": 0.1, "zero_std_fraction": 0.0, "grad_norm": 0.5}
        if (i + 1) % 5 == 0:
            row["heldout/reward"] = 0.09 * i
        rows.append(row)
    return rows


def ended(**changes: float) -> list[Row]:
    rows = healthy()
    return [*rows[:-1], {**rows[-1], **changes}]


def spoken(rows: list[Row]) -> set[str]:
    return {verdict.monitor for verdict in judge(rows, CONFIG, BEFORE)}


def test_a_healthy_run_is_left_in_peace_at_every_iteration() -> None:
    rows = healthy()
    assert not any(judge(rows[:count], CONFIG, BEFORE) for count in range(1, len(rows) + 1))


CASES = {
    "kl_reference": {"heldout/kl_reference": 50.1},
    "diversity": {"diversity": 0.99},
    "heldout_fall": {"heldout/watch": 0.39},
    "heldout_gap": {"heldout/reward": 0.2},
    "clip_fraction": {"clip_fraction": 0.51},
    "zero_std_fraction": {"zero_std_fraction": 0.6},
    "grad_norm": {"grad_norm": 101.0},
}


def test_every_monitor_has_a_case() -> None:
    assert CASES.keys() == {monitor.name for monitor in MONITORS} == MonitorConfig.model_fields.keys()


@pytest.mark.parametrize("name", CASES)
def test_each_monitor_speaks_alone_and_advises(name: str) -> None:
    rows = ended(**CASES[name])
    (verdict,) = judge(rows, CONFIG, BEFORE)
    assert verdict.monitor == name
    assert verdict.iteration == 29
    assert verdict.threshold == getattr(CONFIG, name)
    assert (verdict.value > verdict.threshold) != (name == "diversity")
    happened, _, advice = verdict.advice.partition(":")
    assert len(happened.split()) > 4
    assert len(advice.split()) > 4
    assert not judge(rows, CONFIG.model_copy(update={name: verdict.value}), BEFORE)


def test_a_number_that_is_missing_is_not_judged() -> None:
    assert not judge([{"iteration": 0}], CONFIG, {})
    assert not judge([{"iteration": 0, "diversity": 0.0}, {"iteration": 1, "diversity": 0.0}], CONFIG, {})
    assert not judge([{"iteration": 0, "kl_reference": float("nan"), "heldout/reward": 1.0}] * 6, CONFIG, {})


def drifting(drifts: list[float], **last: float) -> set[str]:
    rows: list[Row] = [{"iteration": i, "kl_reference": drift} for i, drift in enumerate(drifts)]
    return spoken([*rows[:-1], {**rows[-1], **last}])


def test_one_wild_estimate_of_the_drift_is_passed_over() -> None:
    assert drifting([10.0, 20.0, 10.0, 20.0, 1000.0]) == set()
    assert drifting([1000.0, 20.0, 1000.0, 20.0, 10.0]) == set()
    assert drifting([10.0, 20.0, 60.0, 60.0, 60.0]) == {"kl_reference"}
    assert drifting([60.0] * 4) == set()  # too few to tell
    assert drifting([0.0] * 5 + [60.0] * 3) == {"kl_reference"}


def test_an_evaluation_of_the_drift_counts_more_than_the_iterations_own() -> None:
    assert drifting([60.0] * 6, **{"heldout/kl_reference": 40.0}) == set()
    assert drifting([40.0], **{"heldout/kl_reference": 60.0}) == {"kl_reference"}


WINDOW = 8


def gap(gain: float, heldout: float, noise: float = 0.0, before: float = -5.0, std: float = 1.0) -> set[str]:
    """Of two windows of training rewards, ``gain`` apart, around evaluations that rise by ``heldout`` in all."""
    rows: list[Row] = []
    for i in range(2 * WINDOW):
        jitter = noise if i % 2 else -noise
        row: Row = {"iteration": i, "reward_mean": gain * (i >= WINDOW) + jitter, "reward_std": std}
        rows.append(row)
    rows[WINDOW - 1]["heldout/reward"] = before
    rows[-1]["heldout/reward"] = before + 2 * heldout  # its mean with the one before is the level of the last window
    return {verdict.monitor for verdict in judge(rows, CONFIG, {"reward": before})}


def test_the_heldout_gap_compares_gains_not_levels() -> None:
    assert gap(1.0, 0.6) == set()  # held-out prompts gain 0.6 of the gain, whatever their level
    assert gap(1.0, 0.6, before=50.0) == set()
    assert gap(1.0, 0.2) == {"heldout_gap"}
    assert gap(1.0, -1.0) == {"heldout_gap"}


def test_the_heldout_gap_waits_for_a_gain_that_is_certain_and_not_small() -> None:
    assert gap(0.25, -1.0) == set()  # of a quarter of the spread of samples
    assert gap(0.5, -1.0) == {"heldout_gap"}
    assert gap(0.5, -1.0, std=2.0) == set()
    assert gap(-1.0, -2.0) == set()
    # the rewards jump by 0.8 from one iteration to the next, and so would a difference of means by chance
    assert gap(0.5, -1.0, noise=0.4) == set()
    assert gap(2.0, -1.0, noise=0.4) == {"heldout_gap"}


def test_one_lucky_draw_of_prompts_is_no_gap() -> None:
    rows: list[Row] = [{"iteration": i, "reward_mean": 0.6 + 0.05 * (i % 3), "reward_std": 0.4} for i in range(20)]
    for place in (9, 19):
        rows[place]["heldout/reward"] = 0.75
    rows[19]["reward_mean"] = 0.85
    assert not judge(rows, CONFIG, {"reward": 0.72})


def test_the_heldout_gap_counts_what_was_gained_before_the_first_evaluation() -> None:
    rows: list[Row] = [{"iteration": i, "reward_mean": 0.1 * i, "reward_std": 1.0} for i in range(20)]
    rows[9]["heldout/reward"], rows[19]["heldout/reward"] = 0.95, 1.3
    assert not judge(rows, CONFIG, {"reward": 0.0})  # 0.65 of a gain of 1 from window to window
    assert {verdict.monitor for verdict in judge(rows, CONFIG, {"reward": 0.9})} == {"heldout_gap"}


def test_the_heldout_gap_needs_two_evaluations_and_the_one_before_training() -> None:
    assert not spoken([{"iteration": 0, "reward_mean": 9.0, "reward_std": 1.0, "heldout/reward": 0.0}])
    rows: list[Row] = [{"iteration": i, "reward_mean": 9.0 * i, "heldout/reward": 0.0} for i in range(6)]
    assert judge(rows, CONFIG, {"reward": 0.0})
    assert not judge(rows, CONFIG, {})


def test_rows_between_evaluations_repeat_the_last_finding_on_the_gap() -> None:
    rows = [*ended(**CASES["heldout_gap"]), {"iteration": 30, "reward_mean": 3.0, "reward_std": 1.0}]
    assert [verdict.iteration for verdict in judge(rows, CONFIG, BEFORE)] == [30]


def test_a_watched_reward_falls_in_units_of_its_own_spread() -> None:
    def fall(before: dict[str, float], now: float) -> set[str]:
        rows = [{"iteration": 0, "heldout/watch": now}]
        return {verdict.monitor for verdict in judge(rows, CONFIG, before)}

    assert fall({"watch": 10.0, "watch_std": 5.0}, 5.1) == set()
    assert fall({"watch": 10.0, "watch_std": 5.0}, 4.9) == {"heldout_fall"}
    # a declared tolerance takes the place of the spread, be it wider or narrower
    assert fall({"watch": 10.0, "watch_std": 5.0, "watch_tolerance": 6.0}, 4.9) == set()
    assert fall({"watch": 10.0, "watch_std": 0.0, "watch_tolerance": 0.1}, 9.8) == {"heldout_fall"}
    assert fall({"watch": 10.0, "watch_std": 5.0}, 30.0) == set()
    # a reward that was the same for every sample has no unit to fall in, and one that is new has no past
    assert fall({"watch": 10.0, "watch_std": 0.0}, 0.0) == set()
    assert fall({}, 0.0) == set()


def test_the_advice_on_a_fall_names_what_fell_most() -> None:
    before = {"near": 1.0, "near_tolerance": 0.1, "far": 1.0, "far_tolerance": 0.1}
    (verdict,) = judge([{"iteration": 0, "heldout/near": 0.8, "heldout/far": 0.5}], CONFIG, before)
    assert verdict.of == "far"
    assert verdict.advice.startswith("far has fallen far on held-out prompts")
    assert verdict.value == pytest.approx(5)
