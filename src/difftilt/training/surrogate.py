"""The policy-gradient loss of recorded steps: replay, ratio, clip, and the KL of each step to the reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.models.protocol import Denoiser
from difftilt.objectives.kl import KLMode, step_kl
from difftilt.objectives.policy_gradient import divided_by_time, guard_log_ratio, reinforce, surrogate_of_ratio
from difftilt.sampling.presets import Preset, cps, dance_sde, ddim, flow_sde, unmasking
from difftilt.sampling.protocol import SHIFT, Edges, Moment, Step
from difftilt.sampling.rollout import replay
from difftilt.sampling.steps import GaussianStep
from difftilt.training.experience import Experience
from difftilt.training.protocol import Loss, Run, Term
from difftilt.trees import take

POLICY: Mapping[str, float] = MappingProxyType({"policy": 1.0})
"""One clipped term of weight 1."""
KL_GATE = "kl_gate"
"""Name in ``edges.extras`` of the factor of each row's penalty."""


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


def surrogate_loss(
    config: SurrogateConfig,
    preset: Preset,
    run: Run,
    rows: Experience,
    *,
    weights: Mapping[str, float] = POLICY,
    reference: str = "reference",
    state: Int[Tensor, " rows"] | None = None,
) -> Loss:
    """Rows of Σ_j w_j·max(-A_j·rho, -A_j·clip(rho, 1 - c, 1 + c)) + kl_weight·gate·KL(step || reference step).

    Args:
        config: objective and penalty.
        preset: of the rollout.
        run: gives ``current`` and the reference.
        rows: recorded steps with their behaviour log-probabilities and advantages, one column per clipped term.
            ``edges.extras`` may hold ``kl_gate``, which multiplies the penalty of each row (where it is 0 the reference
            is not evaluated), and the ``shift`` of a guided law that the log-probability belongs to.
        weights: name and weight of each column of the advantage.
        reference: role that the penalty pulls to.
        state: label of the state each row starts from, where rows share states; each is evaluated once.
    """
    edges = rows.edges
    assert edges.x_s is not None
    assert edges.advantage is not None
    # the frozen pass comes first, so that nothing stands between the forward pass with gradient and its backward pass
    penalty = _Penalty.of(config, preset, run.denoiser(reference), rows, state) if config.kl_weight else None
    moment = replay(run.denoiser("current"), preset, edges, rows.condition, state=state)
    step = moment.step.shift(edges.extras[SHIFT]) if SHIFT in edges.extras else moment.step
    log_prob = preset.log_prob(step, edges.x_s)
    log_ratio = _log_ratio(config, edges, step, log_prob)
    clip = config.clip_range or preset.clip_range
    terms: dict[str, Term] = {}
    for advantage, (name, weight) in zip(edges.advantage.unbind(1), weights.items(), strict=True):
        clipped = surrogate_of_ratio(log_ratio, advantage, clip).value
        terms[name] = Term(_objective(config, clipped, log_prob, advantage, moment), weight)
    if penalty is not None:
        terms["kl"] = Term(penalty(moment, log_prob), config.kl_weight)
    ratio = log_ratio.detach().exp()
    return Loss(terms, {"ratio": ratio, "clip_fraction": (ratio - 1).abs() > clip})


def _objective(config: SurrogateConfig, clipped: Tensor, log_prob: Tensor, advantage: Tensor, moment: Moment) -> Tensor:
    """The clipped surrogate, or what the configuration puts in its place."""
    if config.objective == "reinforce":
        return reinforce(log_prob, advantage)
    if config.objective == "guard" and config.guard_divide_by_dt:
        return divided_by_time(clipped, moment.t, moment.s)
    return clipped


@dataclass(frozen=True)
class _Penalty:
    """Gate·KL to a reference that has been evaluated at the rows whose gate is not 0.

    Attributes:
        frozen: what the reference does there; None where no row is held.
        held: these rows; None for all.
        gate: factor of every row; None is 1.
    """

    config: SurrogateConfig
    preset: Preset
    frozen: Moment | None
    held: Tensor | None
    gate: Tensor | None

    @classmethod
    def of(
        cls, config: SurrogateConfig, preset: Preset, denoise: Denoiser, rows: Experience, state: Tensor | None
    ) -> "_Penalty":
        gate = rows.edges.extras.get(KL_GATE)
        held = None if gate is None else gate.nonzero()[:, 0]
        if held is not None:
            if len(held) == 0:
                return cls(config, preset, None, held, gate)
            rows, state = rows.rows(held), None if state is None else state[held]
        with torch.no_grad():
            frozen = replay(denoise, preset, rows.edges, rows.condition, state=state)
        return cls(config, preset, frozen, held, gate)

    def __call__(self, moment: Moment, log_prob: Tensor) -> Tensor:
        """Of every row; exactly 0, with a gradient of exactly 0, where the gate is."""
        if self.frozen is None:
            return 0 * log_prob
        own = moment if self.held is None else take(moment, self.held)
        predictions = (own.prediction, self.frozen.prediction)
        mode, reduce = self.config.kl, self.preset.reduce
        kl = step_kl(mode, own.step, self.frozen.step, own.t, own.s, predictions=predictions, reduce=reduce)
        if self.held is None or self.gate is None:
            return kl
        return torch.zeros_like(log_prob).index_put((self.held,), (kl * self.gate[self.held]).to(log_prob))


def _log_ratio(config: SurrogateConfig, edges: Edges, step: Step, log_prob: Tensor) -> Tensor:
    """Log of new over old probability of the stored states, corrected in the guarded form."""
    assert edges.log_prob is not None
    if config.objective != "guard":
        return log_prob - edges.log_prob
    if not isinstance(step, GaussianStep) or edges.mean is None:
        raise TypeError("objective guard needs a Gaussian kernel: its correction is a distance of means")
    return guard_log_ratio(log_prob, edges.log_prob, step.mean, edges.mean, step.std)
