"""Policy gradient through the denoising chain.

Steps of a stochastic sampler are actions; the reward comes at the end. New methods of the family change the rollout
plan, the advantage of each edge, the noise of each step or the penalty; the shared parts are ``training.advantages``
and ``training.surrogate``.

Traps: the last step of a chain is not trained, and a clip range means something only under its preset's convention.
"""
