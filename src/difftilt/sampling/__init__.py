"""From a prediction to samples: noise, kernels, solvers, presets, rollout, replay, path KL."""
