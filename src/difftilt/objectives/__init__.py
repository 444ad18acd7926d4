"""Losses as pure functions, one row in and one row out, each with its equation."""
