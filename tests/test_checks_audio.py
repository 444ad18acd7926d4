"""How the check of audio reads a run: shares of a distance and of a diversity, and the number that is the reward."""

import pytest

from difftilt.checks import audio
from difftilt.checks.audio import ARMS, Outcome
from difftilt.recipes.schema import load_recipe

FOUND = Outcome((-0.04, -0.03), (9.0, 8.1), (0.5, 0.6), (0.95, 0.94), 120.0)


def test_a_fall_is_a_share_of_the_distance_and_what_is_kept_of_the_diversity() -> None:
    assert FOUND.fall == pytest.approx(0.25)
    assert FOUND.kept == pytest.approx(0.9)
    # a distance that grows has a negative fall, so it meets no bound
    assert Outcome((-0.04, -0.05), (9.0, 9.0), (0.5, 0.5), (1.0, 1.0), 0.0).fall == pytest.approx(-0.25)


def test_both_arms_are_the_recipe_with_another_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    for arm in ARMS:
        recipe = load_recipe("tones/dragon", [f"testbed.reward={arm}"])
        assert recipe.method is not None
        assert recipe.method.name == "dragon"
        assert recipe.testbed.resolved()["reward"] == arm
        assert recipe.testbed.resolved()["categories"] == ["empty"]
    monkeypatch.setattr(audio, "outcome", lambda arm, seed: FOUND)
    assert audio.table().splitlines()[2] == (
        "| `frechet` | 0 | 0.0400 → 0.0300 | 9.00 → 8.10 | 0.500 → 0.600 | 0.950 → 0.940 | 120 |"
    )
