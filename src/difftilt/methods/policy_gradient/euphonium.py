"""Euphonium: rollouts guided by the gradient of a process reward, credit per step and per sample, and distillation.

A process reward r(x_t, t, c) scores noisy states. Its gradient is added to the mean of the stochastic steps,

    mean_g = mean + gamma·∇r(x_t, t, c),    gamma = lambda·(t - s),    lambda fixed, or g²/(2·temperature)

so that a group holds better samples. Each trained step k of sample i has two advantages, of the outcome O_i and of the
process reward of the state it reached, P_ik, each normalised in its group (P at each step), and two clipped terms:

    L = c_o·clipped(rho, A(O)_i) + c_p·clipped(rho, A(P)_ik)

The ratio is by default that of the unguided step. Distillation then puts the guidance into the velocity itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.protocol import RoleSpec
from difftilt.process.gaussian import GaussianProcess
from difftilt.sampling.protocol import Edges, NoiseSource, Trajectory
from difftilt.sampling.rollout import Plan
from difftilt.training.advantages import NormaliserConfig, check_best_worst, drawn_steps, extremes
from difftilt.training.completions import check_scale
from difftilt.training.experience import Experience, scored_experience
from difftilt.training.guided import Distillation, GuidanceConfig, Guided, distilling, guide_of
from difftilt.training.policy_gradient import ChainConfig, ChainPolicyGradient
from difftilt.training.process_reward import (
    ProcessRewardConfig,
    beside,
    fit_to_base,
    process_reward_of,
    process_role,
    scorer,
)
from difftilt.training.protocol import Loss, Phase, Run, Task
from difftilt.training.surrogate import surrogate_loss
from difftilt.trees import take
from difftilt.values.process_reward import GradientGuide

CARD = Card(
    name="euphonium",
    entry="Euphonium",
    paper="Euphonium: Steering Video Flow Matching via Process Reward Gradient Guided Stochastic Dynamics, 2026, "
    "arXiv 2602.04928",
    needs=("gaussian process", "stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "batch_split"),
)

TRAINED = "trained"
"""Name in ``edges.extras`` of the rows that the surrogate learns from; the other phases learn from all."""
PROCESS = "process_score"
"""Name in ``edges.extras``, and in the metrics, of the process reward of each step."""


class Config(ChainConfig, NormaliserConfig, GuidanceConfig, ProcessRewardConfig):
    """Credit, and the paper's settings of the shared parts."""

    group_size: int = Field(default=8, ge=2)
    """Samples per prompt."""
    kernel: Literal["flow_sde", "dance_sde", "cps", "ddim", "unmasking"] = "dance_sde"
    """Stochastic step and its log-probability convention."""
    noise_level: float = Field(default=0.25, gt=0)
    """``a`` of flow_sde and cps, ``eta`` of dance_sde and ddim."""
    share_start: bool = True
    """One initial noise for all samples of a group."""
    output: Literal["state", "x0"] = "x0"
    """Score the x0-prediction of the last evaluation, or the last state."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference; the paper's option has 3.125."""
    ddof: Literal[0, 1] = 1
    """Population or sample standard deviation."""
    std_eps: float = Field(default=1e-8, gt=0)
    """Added to the standard deviation."""
    score_mean: Literal["unguided", "guided"] = "unguided"
    """Whose log-probability enters the ratio: of the policy alone, or of the law that drew the states."""
    credit: Literal["both", "outcome", "process"] = "both"
    """Which advantages are trained on."""
    outcome_weight: float = Field(default=1.0, gt=0)
    """c_o, of the outcome's clipped term."""
    process_weight: float = Field(default=1.0, gt=0)
    """c_p, of the process reward's."""
    process_state: Literal["reached", "before"] = "reached"
    """A step is judged by the state that it reaches, or (released code) by the one that it starts from."""
    best_worst: int | None = Field(default=None, ge=2)
    """Train only on so many samples of a group, half the best and half the worst by outcome; null on all."""
    step_fraction: float = Field(default=0.6, gt=0, le=1)
    """Share of the trainable steps that is trained, drawn for each sample."""
    distillation: Distillation | None = None
    """Null leaves it out."""


class Euphonium(ChainPolicyGradient[Config]):
    """Guided rollouts, outcome and process advantages, distillation of the guidance."""

    def __init__(self, config: Config, task: Task) -> None:
        if not isinstance(task.model.process, GaussianProcess):
            raise UserError(f"{task.name} has tokens, and euphonium moves the mean of Gaussian steps: use flow-grpo")
        super().__init__(config, task)
        self.guided = Guided(config, config.temperature, len(self.grid) - 1)
        _check(config)
        _check_steps(config, self.guided.active & self.trainable())
        followed = config.guidance != 0 and config.gradient == "model"
        needed = followed or config.credit != "outcome" or config.distillation is not None
        if config.guidance != 0 and config.gradient == "spsa":
            check_scale(task, "the two sides of an SPSA estimate are two batches")
        if needed and (config.process_reward is None or config.train_beside):
            check_scale(task, "the process reward is fitted to several batches, the first in groups of one")
        self.network: nn.Module | None = process_reward_of(config, task) if needed else None

    def roles(self) -> Mapping[str, RoleSpec]:
        """``ema`` for evaluation, ``process_reward`` where one is used."""
        return {**super().roles(), **({} if self.network is None else process_role(self.config, self.network))}

    def plan(self, iteration: int, noise: NoiseSource) -> Plan:
        """The chain's, with the law that is scored."""
        plan = super().plan(iteration, noise)
        return replace(plan, score="guided") if self.config.score_mean == "guided" else plan

    def collect(self, run: Run) -> Experience:
        """Fit the process reward once, roll out guided groups, score, and credit samples and steps."""
        if run.iteration == 0 and self.network is not None:
            fit_to_base(self.config, run)
        batch = run.prompts(self.config.groups, self.config.group_size)
        guide = guide_of(self.config, self.guided, run, batch)
        trajectory = self.roll(run, batch, guide=guide)
        samples = run.samples(trajectory.x_0, batch)
        experience = scored_experience(batch, trajectory.x_0, trajectory.edges, run.score(samples), samples.media)
        scores = None if self.config.credit == "outcome" else self._process_scores(run, trajectory, guide)
        return self._credited(run, experience, scores)

    def _process_scores(self, run: Run, trajectory: Trajectory, guide: GradientGuide | None) -> Float[Tensor, " edges"]:
        """The process reward of every recorded step; 0 at the steps where it is not asked."""
        edges = trajectory.edges
        states, times = _judged(edges, self.config.process_state)
        known = guide.scores if guide is not None and self.config.process_state == "before" else {}
        scores = torch.zeros_like(edges.t)
        for place in edges.step.unique().tolist():
            rows = (edges.step == place).nonzero()[:, 0]
            if place in known:
                scores[rows] = known[place][edges.sample[rows]].to(scores)
            elif bool(self.guided.active[place]):
                condition = take(trajectory.condition, edges.sample[rows])
                scores[rows] = scorer(run)(states[rows], times[rows], condition).to(scores)
        return scores

    def _credited(self, run: Run, experience: Experience, scores: Float[Tensor, " edges"] | None) -> Experience:
        """The advantages as columns, and which edges the surrogate is trained on."""
        edges, bound, normaliser = experience.edges, self.config.advantage_clip, self.config.normaliser
        assert experience.rewards is not None
        outcome: Tensor = run.jointly(normaliser, experience.rewards, experience.group).clamp(-bound, bound)
        columns = [] if self.config.credit == "process" else [outcome[edges.sample]]
        extras = dict(edges.extras)
        if scores is not None:
            at_each_step = experience.group[edges.sample] * len(self.grid) + edges.step
            columns.append(run.jointly(normaliser, scores, at_each_step).clamp(-bound, bound))
            extras[PROCESS] = scores
        advantage = torch.stack(columns, 1)
        extras[TRAINED] = (advantage != 0).any(1) & self._selected(run, experience, outcome)
        return replace(experience, edges=replace(edges, advantage=advantage, extras=extras))

    def _selected(self, run: Run, experience: Experience, outcome: Float[Tensor, " samples"]) -> Bool[Tensor, " edges"]:
        """Edges of the best and the worst samples of each group, at the steps drawn for their sample."""
        edges, config = experience.edges, self.config
        kept = drawn_steps(run, experience, config.step_fraction)
        if config.best_worst is None:
            return kept
        return kept & extremes(run, config.best_worst, outcome, experience.group)[edges.sample]

    def phases(self, run: Run) -> Sequence[Phase]:
        """The surrogate, then distillation, then the process reward beside."""
        distil = self.config.distillation
        until = distil.first if distil is not None and distil.alone else None
        phases = [
            replace(phase, select=_trained, when=lambda iteration: until is None or iteration < until)
            for phase in super().phases(run)
        ]
        if distil is not None:
            phases.append(distilling(distil, run, self.preset, self.guided))
        return [*phases, beside(self.config, run)] if self.config.train_beside else phases

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        weights = {"outcome": self.config.outcome_weight, "process": self.config.process_weight}
        if self.config.credit != "both":
            weights = {self.config.credit: weights[self.config.credit]}
        loss = surrogate_loss(self.config, self.preset, run, rows, weights=weights)
        if PROCESS not in rows.edges.extras:
            return loss
        return replace(loss, metrics={**loss.metrics, PROCESS: rows.edges.extras[PROCESS]})


def _judged(edges: Edges, which: Literal["reached", "before"]) -> tuple[Tensor, Tensor]:
    """The states that the steps are judged by, and their times."""
    states, times = (edges.x_s, edges.s) if which == "reached" else (edges.x_t, edges.t)
    assert states is not None
    assert times is not None
    return states, times


def _trained(experience: Experience) -> Int[Tensor, " chosen"]:
    return experience.edges.extras[TRAINED].nonzero()[:, 0]


def _check_steps(config: Config, used: Bool[Tensor, " steps"]) -> None:
    """Refuse guided steps none of which is ever stochastic and trained, as nothing would be learned from them."""
    if bool(used.any()) or (config.guidance == 0 and config.credit == "outcome"):
        return
    if config.window is None:
        raise UserError(
            "method.guide_from and guide_to hold the last step alone, which is never trained: lower guide_from, or set "
            "guidance to 0 and credit to outcome"
        )
    raise UserError(
        "no step that method.guide_from and guide_to hold is ever in method.window, outside which none is stochastic "
        "or trained: lower guide_from, move or widen the window, or set guidance to 0 and credit to outcome"
    )


def _check(config: Config) -> None:
    """Refuse what cannot work, with the setting that would."""
    check_best_worst(config.best_worst, config.group_size)
    used = (config.guidance != 0 and config.gradient == "model") or config.credit != "outcome"
    if config.train_beside and not used and config.distillation is None:
        raise UserError("method.train_beside trains a process reward that nothing asks: set it to false")
    if config.distillation is None:
        return
    if config.gradient == "spsa":
        raise UserError("method.distillation follows the gradient of the process reward: set method.gradient to model")
    if config.distillation.target == "finite" and config.guidance == 0:
        raise UserError("method.guidance = 0 leaves nothing to distil: raise it, or set distillation.target to limit")
