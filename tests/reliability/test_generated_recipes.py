"""Whatever a recipe says, it runs or ends in one of the library's own errors; never in a traceback.

25 recipes in the suite; ``make soak`` sets DIFFTILT_RECIPES=200.
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import difftilt
from difftilt.errors import GuardError, RewardError, UserError
from difftilt.recipes.schema import load_recipe

EXAMPLES = int(os.environ.get("DIFFTILT_RECIPES", "25"))
RECIPES = tuple(
    sorted(
        f"{path.parent.name}/{path.stem}"
        for path in (Path(difftilt.__file__).parent / "recipes").glob("*/*.yaml")
        if path.parent.name in {"mixtures", "sequences"}
    )
)
SMALL: Mapping[str, Any] = {
    "training.iterations": 1,
    "training.forward_batch": 16,
    "training.evaluation_samples": 8,
    "steering.forward_batch": 64,
}
VALUES = (
    *("-1", "0", "1", "2", "3", "7", "33", "0.5", "1e-9", "-0.25", "nan", "inf", "null", "true", "false", "[]", "[1]"),
    *("[3,2,1]", "[0.5,0.5]", "abc", "''", "{a: 1}", "../x", "é\\u0000"),
)


def keys_of(values: Mapping[str, Any], above: str = "") -> list[str]:
    """Dotted names of all leaves of a recipe."""
    names: list[str] = []
    for key, value in values.items():
        names += keys_of(value, f"{above}{key}.") if isinstance(value, Mapping) and value else [above + key]
    return names


@st.composite
def recipes(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A packaged recipe, made small, with one to three values replaced by anything."""
    name = draw(st.sampled_from(RECIPES))
    recipe = load_recipe(name)
    known = [key for key in keys_of(recipe.resolved()) if key not in SMALL]
    changed = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    section = "training." if recipe.method is not None else "steering."
    small = [f"{key}={value}" for key, value in SMALL.items() if key.startswith(section)]
    return name, small + [f"{key}={draw(st.sampled_from(VALUES))}" for key in changed]


@pytest.mark.filterwarnings("default")
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(recipes())
def test_a_recipe_runs_or_is_refused_in_words(generated: tuple[str, list[str]]) -> None:
    name, overrides = generated
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(UserError, RewardError, GuardError):
        recipe = load_recipe(name, overrides)
        output = Path(directory) / "out"
        difftilt.train(recipe, output) if recipe.method is not None else difftilt.steer(recipe, output=output)
