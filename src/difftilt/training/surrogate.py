"""The policy-gradient loss of recorded steps: replay, ratio, clip, and the KL of each step to the reference."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.objectives.kl import KLMode, step_kl
from difftilt.objectives.policy_gradient import divided_by_time, guard_log_ratio, reinforce, surrogate_of_ratio
from difftilt.sampling.presets import Preset, cps, dance_sde, ddim, flow_sde, unmasking
from difftilt.sampling.protocol import Edges, Moment
from difftilt.sampling.rollout import replay
from difftilt.sampling.steps import GaussianStep
from difftilt.training.experience import Experience
from difftilt.training.protocol import Loss, Run, Term


class SurrogateConfig(Config):
    """Stochastic step, objective and penalty, as in Flow-GRPO; clip ranges belong to a mean over dimensions."""

    kernel: Literal["flow_sde", "dance_sde", "cps", "ddim", "unmasking"] = "flow_sde"
    """Stochastic step and its log-probability convention."""
    noise_level: float = Field(default=0.7, gt=0)
    """``a`` of flow_sde and cps, ``eta`` of dance_sde and ddim."""
    objective: Literal["clipped", "guard", "reinforce"] = "clipped"
    """PPO's ratio, GRPO-Guard's corrected ratio, or DPOK's plain likelihood weighting."""
    guard_divide_by_dt: bool = True
    """Divide the guarded loss by the length of its step, as the reference script does."""
    clip_range: float | None = Field(default=None, gt=0)
    """c; None takes the preset's, made for images. With 2 to 64 dimensions use 0.05 to 0.2."""
    kl_weight: float = Field(default=0.04, ge=0)
    """Weight of the KL to the reference."""
    kl: KLMode = "exact"
    """``exact`` step KL; ``flow_grpo``: as released, weaker by the step length; ``velocity``, ``mean``: gaps."""


def make_preset(config: SurrogateConfig) -> Preset:
    """The preset that the configuration names."""
    makers = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps, "ddim": ddim}
    return unmasking() if config.kernel == "unmasking" else makers[config.kernel](config.noise_level)


def surrogate_loss(config: SurrogateConfig, preset: Preset, run: Run, rows: Experience, advantage: Tensor) -> Loss:
    """Rows of max(-A·rho, -A·clip(rho, 1 - c, 1 + c)) + kl_weight·KL(step || reference step).

    Args:
        config: objective and penalty.
        preset: of the rollout.
        run: gives ``current`` and ``reference``.
        rows: recorded steps with their behaviour log-probabilities.
        advantage: (rows,), constant.
    """
    edges = rows.edges
    assert edges.x_s is not None
    # the frozen pass comes first, so that nothing stands between the forward pass with gradient and its backward pass
    frozen = _frozen_moment(preset, run, rows) if config.kl_weight else None
    moment = replay(run.denoiser("current"), preset, edges, rows.condition)
    log_prob = preset.log_prob(moment.step, edges.x_s)
    log_ratio = _log_ratio(config, edges, moment, log_prob)
    surrogate = surrogate_of_ratio(log_ratio, advantage, config.clip_range or preset.clip_range)
    policy = surrogate.value
    if config.objective == "reinforce":
        policy = reinforce(log_prob, advantage)
    elif config.objective == "guard" and config.guard_divide_by_dt:
        policy = divided_by_time(policy, moment.t, moment.s)
    terms = {"policy": Term(policy)}
    if frozen is not None:
        predictions = (moment.prediction, frozen.prediction)
        kl = step_kl(
            config.kl, moment.step, frozen.step, moment.t, moment.s, predictions=predictions, reduce=preset.reduce
        )
        terms["kl"] = Term(kl, config.kl_weight)
    return Loss(terms, {"ratio": surrogate.ratio, "clip_fraction": surrogate.clipped})


def _frozen_moment(preset: Preset, run: Run, rows: Experience) -> Moment:
    with torch.no_grad():
        return replay(run.denoiser("reference"), preset, rows.edges, rows.condition)


def _log_ratio(config: SurrogateConfig, edges: Edges, moment: Moment, log_prob: Tensor) -> Tensor:
    """Log of new over old probability of the stored states, corrected in the guarded form."""
    assert edges.log_prob is not None
    if config.objective != "guard":
        return log_prob - edges.log_prob
    step = moment.step
    if not isinstance(step, GaussianStep) or edges.mean is None:
        raise TypeError("objective guard needs a Gaussian kernel: its correction is a distance of means")
    return guard_log_ratio(log_prob, edges.log_prob, step.mean, edges.mean, step.std)
