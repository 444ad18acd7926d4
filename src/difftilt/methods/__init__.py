"""One file per training method, by family."""
