"""Scores of decoded samples. One file per family; knows nothing of training."""
