"""Scores of noisy states, all with one signature."""
