"""Losses on the log-probabilities of steps: REINFORCE, the clipped surrogate, and the ratio of GRPO-Guard.

A row is one transition of one sample. Log-probabilities follow the preset's convention (a sum or a mean over the
dimensions of the latent): clip ranges mean something only relative to it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difftilt.process.gaussian import at_least_float32
from difftilt.sampling.steps import reduce_dims

Rows = Float[Tensor, " rows"]


@dataclass(frozen=True)
class Surrogate:
    """The loss of each row with its diagnostics.

    Attributes:
        value: to be minimised.
        ratio: new over old probability, detached.
        clipped: the ratio lies outside [1 - clip, 1 + clip], whether or not the clip was the larger of the two.
    """

    value: Rows
    ratio: Rows
    clipped: Bool[Tensor, " rows"]


def surrogate_of_ratio(
    log_ratio: Rows, advantage: Rows, clip_range: float | Rows, pessimistic: bool = True
) -> Surrogate:
    """max(-A·ratio, -A·clip(ratio, 1 - clip, 1 + clip)) with ratio = exp(log_ratio) (Schulman et al. 2017, eq. 7).

    Args:
        log_ratio: log of new over old probability, or what stands for it (:func:`guard_log_ratio`).
        advantage: of each row, constant.
        clip_range: half-width of the trusted interval about 1, one for all or one per row.
        pessimistic: False leaves the first term out: outside the interval there is then no gradient in any direction.
    """
    ratio = at_least_float32(log_ratio).exp()
    clip = torch.as_tensor(clip_range).to(ratio)
    value = -advantage * ratio.clamp(1 - clip, 1 + clip)
    if pessimistic:
        value = torch.maximum(-advantage * ratio, value)
    outside = (ratio.detach() - 1).abs() > clip
    return Surrogate(value, ratio.detach(), outside)


def clipped_surrogate(log_prob: Rows, old_log_prob: Rows, advantage: Rows, clip_range: float | Rows) -> Surrogate:
    """:func:`surrogate_of_ratio` of log_prob - old_log_prob.

    At the old weights the gradient is that of -A·log_prob.

    Args:
        log_prob: of the stored states under the present weights, with gradient.
        old_log_prob: the same states under the weights that drew them, as stored.
        advantage: of each row.
        clip_range: 1e-4 belongs to a mean over many dimensions; for 2 to 64 dimensions 0.05 to 0.2.
    """
    log_ratio = at_least_float32(log_prob) - at_least_float32(old_log_prob)
    return surrogate_of_ratio(log_ratio, advantage, clip_range)


def guard_log_ratio(
    log_prob: Rows,
    old_log_prob: Rows,
    mean: Float[Tensor, "rows *shape"],
    old_mean: Float[Tensor, "rows *shape"],
    std: Rows,
) -> Rows:
    """std·(log_prob - old_log_prob + MSE/(2·std²)), MSE = mean over dimensions of (mean - old_mean)².

    Under the old policy the plain log-ratio has mean -MSE/(2·std²), different at every step, so its clip cuts one side.
    This one has mean 0 and standard deviation sqrt(MSE/dimensions) at every step (GRPO-Guard, arXiv 2510.22319).

    Args:
        log_prob: mean over dimensions of the log-density under the present weights.
        old_log_prob: the same under the behaviour weights.
        mean: of the present step, with gradient.
        old_mean: of the behaviour step, stored in the rollout.
        std: of the step, equal for both.
    """
    squares = reduce_dims((at_least_float32(mean) - at_least_float32(old_mean)) ** 2, "mean")
    return std * (at_least_float32(log_prob) - at_least_float32(old_log_prob) + squares / (2 * std**2))


def divided_by_time(value: Rows, t: Rows, s: Rows) -> Rows:
    """value/(t - s): the weight that GRPO-Guard's reference script gives each step's loss; s < t."""
    return value / (t - s).to(value)


def reinforce(log_prob: Rows, advantage: Rows) -> Rows:
    """-A·log_prob: no ratio (Williams 1992; DPOK, arXiv 2305.16381, with a KL term beside it)."""
    return -advantage * at_least_float32(log_prob)
