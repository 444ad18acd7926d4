from pathlib import Path

import pytest
from matplotlib.axes import Axes

from difftilt.evaluation.arena.crossover import Crossover, Point, cost_of, crossovers, rising, save_crossover_picture
from difftilt.evaluation.arena.records import ArenaResult, Entry, MemberRun, Reading
from difftilt.evaluation.arena.tables import pays
from difftilt.models.ledger import Ledger

SAMPLES = 10


def reading(value: float, cost: Ledger) -> Reading:
    return Reading(numbers={"reward": value}, cost=cost, seconds=0.0)


def result(trained: list[Reading], steered: list[Reading]) -> ArenaResult:
    runs = [
        MemberRun(
            member=name, seed=0, readings={"evaluations": curve[-1], "reward_calls": curve[-1]}, curve=tuple(curve)
        )
        for name, curve in (("learner", trained), ("searcher", steered))
    ]
    members = (
        Entry(name="learner", kind="trained", algorithm="nft"),
        Entry(name="searcher", kind="steered", algorithm="svdd"),
    )
    recipe = {"arena": {"samples": SAMPLES, "seeds": [0]}}
    versions = {"difftilt": "0", "torch": "0", "python": "3"}
    return ArenaResult(
        source="x", command="x", versions=versions, threads=1, reward="r", heldout="reward", recipe=recipe,
        members=members, runs=tuple(runs),
    )  # fmt: skip


def test_the_crossover_is_where_both_ways_cost_the_same() -> None:
    """Plain sampling 8 a sample; training to 0.5 costs 2400; steering to 0.5 costs 48 a sample."""
    learned = [
        reading(0.1, Ledger(80)),
        reading(0.5, Ledger(480, gradient_passes=2000 // 3)),
        reading(0.9, Ledger(9080)),
    ]
    searched = [reading(0.3, Ledger(160)), reading(0.5, Ledger(480)), reading(0.7, Ledger(1000))]
    (found,) = crossovers(result(learned, searched))
    training = 400 + 3 * (2000 // 3)
    (point,) = found.points
    assert point.value == 0.5
    many = point.cost
    assert training + many * 8 == pytest.approx(many * 48)
    assert found.beyond == (0.9,)


def test_below_the_first_steered_value_the_number_is_a_bound_and_shown_as_one(tmp_path: Path) -> None:
    """Training to 0.2 costs 400; steering was first read at 0.3, for 16 a sample: 0.2 may cost less, N* be more."""
    learned = [reading(0.1, Ledger(80)), reading(0.2, Ledger(480))]
    searched = [reading(0.3, Ledger(160)), reading(0.5, Ledger(480))]
    outcome = result(learned, searched)
    (found,) = crossovers(outcome)
    assert found.points == (Point(0.2, 400 / (16 - 8), at_least=True),)
    assert pays([found]).rows[0][3] == "≥ 50 samples"
    # at the very value it is known
    (known,) = crossovers(result([learned[0], reading(0.3, Ledger(480))], searched))
    assert known.points == (Point(0.3, 50.0),)
    assert pays([known]).rows[0][3] == "50 samples"
    arrows: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "errorbar", lambda self, x, y, up, **how: arrows.append((x, y, how["lolims"], how["mfc"])))
        save_crossover_picture(outcome, tmp_path / "bound.png")
        assert arrows == [([0.2], [50.0], True, "none")]
        save_crossover_picture(result([learned[0], reading(0.3, Ledger(480))], searched), tmp_path / "known.png")
    assert len(arrows) == 1
    save_crossover_picture(outcome, tmp_path / "drawn.png")


def test_costs_between_two_points_follow_the_logarithm() -> None:
    curve = [Point(0.2, 10.0), Point(0.4, 1000.0)]
    assert cost_of(0.3, curve) == pytest.approx(100.0)
    assert cost_of(0.1, curve) == 10.0
    assert cost_of(0.4, curve) == pytest.approx(1000.0)
    assert cost_of(0.41, curve) is None
    assert cost_of(0.3, []) is None


def test_a_value_counts_when_it_is_first_reached() -> None:
    noisy = [Point(0.3, 1.0), Point(0.2, 2.0), Point(0.3, 3.0), Point(0.5, 4.0)]
    assert rising(noisy) == [Point(0.3, 1.0), Point(0.5, 4.0)]
    assert rising(noisy, above=0.4) == [Point(0.5, 4.0)]


def test_a_member_that_never_gains_has_no_crossover(tmp_path: Path) -> None:
    flat = [reading(0.1, Ledger(80)), reading(0.05, Ledger(1000))]
    outcome = result(flat, [reading(0.3, Ledger(160))])
    assert crossovers(outcome) == [Crossover("learner", "searcher", (), ())]
    save_crossover_picture(outcome, tmp_path / "crossover.png")
    assert (tmp_path / "crossover.png").stat().st_size > 1000
