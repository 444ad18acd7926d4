"""Scores of decoded samples, higher is better. One file per family; knows nothing of training.

A reward sees ``Samples`` (media, prompts, metadata), not latents; it declares what it can do, so that a method it
cannot serve is refused before any work. ``evaluate`` is the one place that calls it, counts the calls and checks the
scores. To add one, write a file with a ``CARD``, or hand any function of samples to ``as_reward``.

Traps: a NaN, a missing sample or a wrong shape raises ``RewardError``; a failure is never read as 0. A set reward
returns one number per group, in order of group index; a pooled one takes all samples as one set. ``WeightedSum`` logs
every component before its weight.
"""

from difftilt.rewards.base import FunctionReward, as_reward
from difftilt.rewards.calibration import Calibration, calibrate
from difftilt.rewards.compose import Moments, WeightedSum
from difftilt.rewards.corrected import Corrected
from difftilt.rewards.instances import FrechetPerSample, MeanReward, as_set
from difftilt.rewards.masked import Masked
from difftilt.rewards.protocol import Capabilities, Reward, Samples, Scores, SetReward, TrainedReward
from difftilt.rewards.reference import ReferenceSet
from difftilt.rewards.scoring import encode, evaluate, score_components
from difftilt.rewards.sets import CoverageReward, FrechetReward, MMDReward, VendiReward
from difftilt.rewards.video import VideoReward
from difftilt.rewards.wins import win_rate

__all__ = [
    "Calibration",
    "Capabilities",
    "Corrected",
    "CoverageReward",
    "FrechetPerSample",
    "FrechetReward",
    "FunctionReward",
    "MMDReward",
    "Masked",
    "MeanReward",
    "Moments",
    "ReferenceSet",
    "Reward",
    "Samples",
    "Scores",
    "SetReward",
    "TrainedReward",
    "VendiReward",
    "VideoReward",
    "WeightedSum",
    "as_reward",
    "as_set",
    "calibrate",
    "encode",
    "evaluate",
    "score_components",
    "win_rate",
]
