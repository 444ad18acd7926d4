"""Measuring a model on a task: reward, drift and diversity side by side."""
