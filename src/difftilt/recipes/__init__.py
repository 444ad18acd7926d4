"""Packaged recipes (YAML) and how a recipe becomes typed configuration."""

from difftilt.recipes.directory import check_output
from difftilt.recipes.loading import packaged
from difftilt.recipes.parts import Part, config_of
from difftilt.recipes.schema import Recipe, SteeringConfig, load_recipe

__all__ = ["Part", "Recipe", "SteeringConfig", "check_output", "config_of", "load_recipe", "packaged"]
