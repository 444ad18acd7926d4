"""Pure functions from rewards (and parents) to advantages or labels."""
