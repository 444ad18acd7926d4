"""Scores of decoded samples. One file per family; knows nothing of training."""

from difftilt.rewards.base import FunctionReward, as_reward
from difftilt.rewards.compose import Moments, WeightedSum
from difftilt.rewards.protocol import Capabilities, Reward, Samples, Scores, SetReward, TrainedReward
from difftilt.rewards.scoring import evaluate, score_components

__all__ = [
    "Capabilities",
    "FunctionReward",
    "Moments",
    "Reward",
    "Samples",
    "Scores",
    "SetReward",
    "TrainedReward",
    "WeightedSum",
    "as_reward",
    "evaluate",
    "score_components",
]
