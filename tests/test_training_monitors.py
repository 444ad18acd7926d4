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
    "kl_reference": {"kl_reference": 50.1},
    "diversity": {"diversity": 0.99},
    "heldout_fall": {"heldout/watch": 0.39},
    "heldout_gap": {"heldout/reward": 0.4},
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
    assert not judge([{"iteration": 0, "kl_reference": float("nan"), "heldout/reward": 1.0}] * 2, CONFIG, {})


def gap(before: tuple[float, float], after: tuple[float, float]) -> set[str]:
    """Of two evaluated rows with (training reward, held-out reward)."""
    rows = [
        {"iteration": i, "reward_mean": mean, "reward_std": 1.0, "heldout/reward": held}
        for i, (mean, held) in enumerate((before, after))
    ]
    return {verdict.monitor for verdict in judge(rows, CONFIG, {})}


def test_the_heldout_gap_compares_gains_not_levels() -> None:
    assert gap((0.0, -5.0), (1.0, -4.4)) == set()  # held-out prompts gain 0.6 of the gain, whatever their level
    assert gap((0.0, -5.0), (1.0, -4.6)) == {"heldout_gap"}
    assert gap((0.0, 0.0), (1.0, -1.0)) == {"heldout_gap"}


def test_the_heldout_gap_waits_for_a_gain_that_is_not_noise() -> None:
    assert gap((0.0, 0.0), (0.25, -1.0)) == set()
    assert gap((0.0, 0.0), (-1.0, -2.0)) == set()
    assert not spoken([{"iteration": 0, "reward_mean": 9.0, "reward_std": 1.0, "heldout/reward": 0.0}])


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
