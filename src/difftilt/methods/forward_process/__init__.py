"""Training on the forward process: no likelihoods, no stored trajectories."""
