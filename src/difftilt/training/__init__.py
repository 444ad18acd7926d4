"""The one loop and what it owns: experience, phases, checkpoints, monitors, metrics."""
