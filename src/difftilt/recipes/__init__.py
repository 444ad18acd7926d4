"""Packaged recipes (YAML) and how a recipe becomes typed configuration.

Between the rooms and the commands: it finds leaves by name, types every section, reports all errors at once, refuses
tasks that do not meet a leaf's needs, and keeps run directories from being overwritten. To add a recipe, add a file
below this folder: its name is its path.

Traps: types are strict, a string is not a number; Nothing is guessed: a recipe has either a method or a steerer. A run
is resumed only with the recipe that it was begun with.
"""

from difftilt.recipes.directory import check_output
from difftilt.recipes.loading import packaged
from difftilt.recipes.parts import Part, config_of
from difftilt.recipes.schema import Recipe, SteeringConfig, load_recipe

__all__ = ["Part", "Recipe", "SteeringConfig", "check_output", "config_of", "load_recipe", "packaged"]
