"""How the check of hacking reads a run: a dip that mends itself is no fall, and a warning must not come late."""

from dataclasses import replace

from difftilt.checks.hacking import ARMS, Outcome, fall_of, recipe_of


def rows(*accuracies: float) -> list[dict[str, float]]:
    """An evaluation every second iteration."""
    return [{"iteration": float(2 * i + 1), "heldout/accuracy": one} for i, one in enumerate(accuracies)] + [
        {"iteration": 99.0}
    ]


def test_a_fall_is_one_that_stays() -> None:
    assert fall_of(rows(0.6, 0.55, 0.52), 0.6) is None
    assert fall_of(rows(0.6, 0.4, 0.58), 0.6) is None
    assert fall_of(rows(0.4, 0.58, 0.45, 0.1, 0.0), 0.6) == 5


def test_a_warning_comes_before_the_fall_or_with_it() -> None:
    found = Outcome((0.0, 1.0), (0.6, 0.0), (3, "kl_reference"), 5, 1e4)
    assert found.warned
    assert replace(found, fall=3).warned
    assert not replace(found, fall=2).warned
    assert replace(found, fall=None).warned
    assert not replace(found, alarm=None).warned


def test_every_arm_is_a_recipe_and_the_clean_one_has_the_true_reward() -> None:
    for name, arm in ARMS.items():
        recipe = recipe_of(arm, 3)
        assert (recipe.testbed.resolved()["reward"] == "dense") == name.startswith("clean")
        assert recipe.training.seed == 3
