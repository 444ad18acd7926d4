"""Packaged recipes (YAML) and how a recipe becomes typed configuration."""
