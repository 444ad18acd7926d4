"""Tasks whose truth is known, with their shipped checkpoints."""
