"""How often a reward agrees with preference pairs: a reward by itself, one that somebody holds, or that of a recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from difftilt.leaves import cards
from difftilt.recipes.building import build_reward, build_task
from difftilt.recipes.schema import Recipe, load_recipe
from difftilt.recipes.sources import Scored
from difftilt.rewards import as_reward
from difftilt.rewards.agreement import Agreement, Tell, agreement
from difftilt.training.pairs import PairSource, in_batches, read_pairs

Pairs = str | Path | Mapping[str, Any] | PairSource
"""A file, a folder, an id on the hub, or one of these with its columns."""


def judge_pairs(
    what: str | Path | Mapping[str, Any] | Recipe | Scored,
    pairs: Pairs,
    overrides: Sequence[str],
    batch: int,
    tell: Tell,
) -> Agreement:
    """Score every pair.

    Args:
        what: a reward, a function of samples, the name of a reward, or a recipe, whose reward and testbed are taken.
        pairs: where they are.
        overrides: ``key=value``: fields of a reward that is named, dotted keys of a recipe.
        batch: pairs scored at once.
        tell: told how many are done.

    Raises:
        UserError: for a reward or a recipe that cannot be made, and for pairs that cannot be read.
    """
    if isinstance(what, str) and (":" in what or what in {leaf.card.name for leaf in cards("rewards")}):
        return agreement(build_reward(what, overrides), in_batches(read_pairs(pairs), batch), tell)
    if not isinstance(what, str | Path | Mapping | Recipe):
        return agreement(as_reward(what), in_batches(read_pairs(pairs), batch), tell)
    recipe = what if isinstance(what, Recipe) else load_recipe(cast(str | Path | Mapping[str, Any], what), overrides)
    task = build_task(replace(recipe, method=None, steerer=None, data=None))
    found = in_batches(read_pairs(pairs), batch, task.read, task.model.encode)
    return agreement(as_reward(task.reward), found, tell)
