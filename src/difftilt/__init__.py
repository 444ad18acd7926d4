"""difftilt: align generative models that sample by removing noise to a reward.

Every method aims at the reward-tilted distribution ``p*(x | c) ∝ p(x | c) · exp(r(x, c) / β)``.
"""

__version__ = "0.1.0"
