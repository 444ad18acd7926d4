"""Per-prompt statistics that outlive an iteration: of the newest rewards (DDPO) or the newest stages (B²-DiffuRL)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.statistics.folds import (
    compact,
    segment_count,
    segment_max,
    segment_mean,
    segment_min,
    segment_rank,
    segment_sum,
)

Rewards = Float[Tensor, " samples"]
Prompt = Int[Tensor, " samples"]


@dataclass(frozen=True)
class History:
    """The newest rewards of each prompt, oldest first, right-aligned; NaN marks a free place.

    Attributes:
        values: (prompts, capacity), float64.
    """

    values: Float[Tensor, "prompts capacity"]

    @classmethod
    def empty(cls, prompts: int, capacity: int = 32) -> "History":
        """Nothing remembered."""
        return cls(torch.full((prompts, capacity), torch.nan, dtype=torch.float64))

    @property
    def held(self) -> Int[Tensor, " prompts"]:
        """How many rewards of each prompt are remembered."""
        return (~self.values.isnan()).sum(1)


def push(history: History, rewards: Rewards, prompt: Prompt) -> History:
    """The history with the rewards appended to their prompts, in order of row; the oldest fall out.

    Raises:
        ValueError: if a reward is not finite: a NaN would pass for a free place.
    """
    if not bool(rewards.isfinite().all()):
        raise ValueError("the history takes finite rewards only: leave failed samples out before pushing")
    old = history.values
    prompts, capacity = old.shape
    index, count = compact(prompt)
    arrived = torch.zeros(prompts, dtype=torch.int64, device=old.device).scatter_add(0, prompt, torch.ones_like(prompt))
    source = torch.arange(capacity, device=old.device) + arrived[:, None]
    kept = old.gather(1, source.clamp(max=capacity - 1))
    order = segment_rank(torch.zeros_like(rewards), index, count)
    column = capacity - segment_count(index, count)[index] + order
    fits = column >= 0
    fresh = torch.full_like(old, torch.nan)
    fresh[prompt[fits], column[fits]] = rewards[fits].to(old)
    return History(torch.where(source < capacity, kept, fresh))


def normalise(history: History, rewards: Rewards, prompt: Prompt, *, min_count: int = 16, eps: float = 1e-6) -> Rewards:
    """(r - mean) / (population std + eps) with the statistics of the prompt's history.

    A prompt that holds fewer than ``min_count`` rewards uses those of the whole batch. Where the statistics come from
    equal rewards and r is one of them, the advantage is exactly 0.
    """
    r = rewards.double()
    own = history.values[prompt].to(r)
    enough = (history.held >= min_count).to(r.device)[prompt]
    mean = torch.where(enough, own.nanmean(1), r.mean())
    deviation = (own - own.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    std = torch.where(enough, deviation, r.std(correction=0))
    low = torch.where(enough, own.nan_to_num(torch.inf).amin(1), r.min())
    high = torch.where(enough, own.nan_to_num(-torch.inf).amax(1), r.max())
    advantage = torch.where((low == high) & (r == high), 0.0, (r - mean) / (std + eps))
    return advantage.to(torch.promote_types(rewards.dtype, torch.float32))


def push_and_normalise(
    history: History, rewards: Rewards, prompt: Prompt, *, min_count: int = 16, eps: float = 1e-6
) -> tuple[Rewards, History]:
    """Push the batch, then normalise it with what is held (DDPO, arXiv 2305.13301: capacity 16 to 32)."""
    newer = push(history, rewards, prompt)
    return normalise(newer, rewards, prompt, min_count=min_count, eps=eps), newer


@dataclass(frozen=True)
class Stages:
    """The rewards of the newest stages, one row each; what is remembered is bounded by stages, not by rewards.

    Attributes:
        values: float64.
        prompt: of each.
        stage: in which it was drawn.
    """

    values: Float[Tensor, " rewards"]
    prompt: Int[Tensor, " rewards"]
    stage: Int[Tensor, " rewards"]

    @classmethod
    def empty(cls) -> "Stages":
        """Nothing remembered."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(none.double(), none, none)

    def push(self, rewards: Rewards, prompt: Prompt, stage: int, earlier: int) -> "Stages":
        """With the rewards of ``stage``, and without those drawn more than ``earlier`` stages before it."""
        kept = self.stage >= stage - earlier
        return Stages(
            torch.cat([self.values[kept], rewards.double()]),
            torch.cat([self.prompt[kept], prompt]),
            torch.cat([self.stage[kept], torch.full_like(prompt, stage)]),
        )


def stage_scores(stages: Stages, rewards: Rewards, prompt: Prompt, *, eps: float = 1e-8) -> Rewards:
    """(r - mean) / (sample std + eps) over what the stages hold of its prompt (B²-DiffuRL, arXiv 2503.11240).

    0 where they hold fewer than two values of the prompt, or equal ones.

    Args:
        stages: with the rewards themselves already pushed.
        rewards: to be normalised.
        prompt: of each; every one must be held.
        eps: added to the std, in units of the reward.
    """
    labels, held = stages.prompt.unique(return_inverse=True)
    count, own = len(labels), torch.searchsorted(labels, prompt)
    mean, number = segment_mean(stages.values, held, count), segment_count(held, count)
    squares = segment_sum((stages.values - mean[held]).square(), held, count)
    std = (squares / (number - 1).clamp(min=1)).sqrt()
    # equality, not a small std: rounding of the mean must not be amplified
    flat = segment_max(stages.values, held, count) == segment_min(stages.values, held, count)
    score = torch.where(flat[own], 0.0, (rewards.double() - mean[own]) / (std[own] + eps))
    return score.to(torch.promote_types(rewards.dtype, torch.float32))
