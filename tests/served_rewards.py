"""Rewards that the tests serve: one that fails in the way that the first prompt names, and one of sets."""

import os
import time
from typing import Any

import torch
from torch import Tensor

from difftilt.errors import UserError
from difftilt.rewards import Capabilities, FunctionReward, Reward, Samples


def closeness(samples: Samples) -> Tensor:
    """-|x|² / 100."""
    return -samples.media.flatten(1).double().square().sum(1).float() / 100


def faulty(lives: int = 0) -> Reward:
    """Scores by closeness, or fails as the first prompt says.

    Args:
        lives: requests that are answered before the process dies; 0 is endless.
    """
    asked = [0]

    def score(samples: Samples) -> Any:
        asked[0] += 1
        if asked[0] == lives + 1 and lives:
            os._exit(9)
        good, fault = closeness(samples), samples.prompts[0]
        if fault == "raise":
            raise ValueError("the judge is out")
        if fault == "user":
            raise UserError("this judge reads English only: write prompts in English")
        if fault == "hang":
            time.sleep(1.5)
        if fault == "die":
            os._exit(9)
        answers = {
            "nan": torch.where(torch.arange(len(good)) == 1, torch.nan, good),
            "inf": torch.where(torch.arange(len(good)) == 1, torch.inf, good),
            "shape": good[:, None],
            "length": good[1:],
            "dtype": ["good"] * len(good),
            "complex": good * 1j,
            "none": None,
        }
        return answers.get(fault, good)

    return FunctionReward("faulty", score)


def spread() -> Reward:
    """Of a set: the standard deviation of its closenesses."""

    def score(samples: Samples) -> Tensor:
        good = closeness(samples)
        return torch.stack([good[samples.group == one].std(correction=0) for one in samples.group.unique()])

    return FunctionReward("spread", score, Capabilities(set_valued=True))


def pooled() -> Reward:
    """Cannot be served."""
    return FunctionReward("pooled", closeness, Capabilities(set_valued=True, pooled=True))


def of_a_task(task: object) -> Reward:
    """Cannot be served."""
    return FunctionReward(str(task), closeness)
