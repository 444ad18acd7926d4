"""Policy gradient through the denoising chain, with the group mean as baseline: Flow-GRPO and its relatives.

A sampler with stochastic steps is a decision process whose action is the next state. Rollouts follow an SDE with the
marginals of the model's ODE; the reward of the finished sample, compared with the others of its prompt, is the
advantage A of each of its trained steps, and the clipped ratio rho = exp(log p_new - log p_old) of PPO does the rest:

    L = mean max(-A·rho, -A·clip(rho, 1 - c, 1 + c)) + kl_weight·KL(step || reference step)

Settings turn it into DDPO (``kernel: ddim``, ``advantage: history``), DPOK (``objective: reinforce``), DanceGRPO
(``kernel: dance_sde``, ``share_start``, ``step_fraction: 0.6``, ``output: x0``), Flow-GRPO-Fast and MixGRPO
(``window``), GRPO-Guard (``objective: guard``) and CPS (``kernel: cps``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as Settings
from difftilt.credit.group import Aggregation, Normaliser, Scale, aggregate, best_worst, broadcast, leave_one_out
from difftilt.credit.history import History, push_and_normalise
from difftilt.models.protocol import Lagging, RoleSpec
from difftilt.objectives.kl import KLMode, step_kl
from difftilt.objectives.policy_gradient import divided_by_time, guard_log_ratio, reinforce, surrogate_of_ratio
from difftilt.rewards.protocol import Scores
from difftilt.sampling.presets import Preset, cps, dance_sde, ddim, flow_sde, unmasking
from difftilt.sampling.protocol import Edges, Moment, NoiseSource
from difftilt.sampling.rollout import Plan, replay, rollout, start_state
from difftilt.sampling.steps import GaussianStep
from difftilt.sampling.windows import Motion, moving_start, random_start, random_steps, window_mask
from difftilt.training.base import MethodBase
from difftilt.training.config import GroupSampling
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.grids import grid_of
from difftilt.training.protocol import Loss, Phase, Run, Task, Term

CARD = Card(
    name="flow-grpo",
    entry="FlowGRPO",
    paper="Liu et al. 2025, Flow-GRPO: Training Flow Matching Models via Online RL, arXiv 2505.05470",
    needs=("stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)


class Window(Settings):
    """Steps that are stochastic and trained, inside others that follow the ODE."""

    width: int = Field(default=2, ge=1)
    """Number of steps."""
    motion: Motion = "random"
    """``random``: a new start in every rollout (Flow-GRPO-Fast); the others move as in MixGRPO."""
    low: int = Field(default=0, ge=0)
    """First start of a random window."""
    high: int | None = Field(default=None, ge=1)
    """End (exclusive) of the steps a random window may cover; None is half of the grid."""
    every: int = Field(default=25, ge=1)
    """Iterations that a moving window stays."""
    stride: int = Field(default=1, ge=1)
    """Steps that it moves by."""


class Config(GroupSampling):
    """Defaults are Flow-GRPO's; clip ranges belong to the mean over dimensions."""

    steps: int | None = Field(default=None, ge=2)
    """Steps of a rollout; None follows the task's sampler."""
    shift: float = Field(default=3.0, gt=0)
    """Time shift of the grid when ``steps`` is given."""
    kernel: Literal["flow_sde", "dance_sde", "cps", "ddim", "unmasking"] = "flow_sde"
    """Stochastic step and its log-probability convention."""
    noise_level: float = Field(default=0.7, gt=0)
    """``a`` of flow_sde and cps, ``eta`` of dance_sde and ddim."""
    share_start: bool = False
    """One initial noise for all samples of a group (DanceGRPO, MixGRPO)."""
    output: Literal["state", "x0"] = "state"
    """Score the last state, or the x0-prediction of the last evaluation (DanceGRPO)."""
    window: Window | None = None
    """None: all steps but the last are stochastic and trained."""
    step_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the trainable steps that is trained, drawn for each sample (DanceGRPO: 0.6)."""
    advantage: Literal["group", "history", "leave_one_out", "none"] = "group"
    """Baseline: the group, DDPO's running buffer of each prompt, the other samples of the group, or nothing (DPOK)."""
    advantage_std: Scale = "group"
    """What a centred reward is divided by."""
    ddof: Literal[0, 1] = 0
    """Population (Flow-GRPO) or sample (DanceGRPO) standard deviation."""
    std_eps: float = Field(default=1e-4, gt=0)
    """Added to the standard deviation; DanceGRPO 1e-8."""
    history: int = Field(default=32, ge=16)
    """Rewards remembered for each prompt."""
    aggregation: Aggregation | None = None
    """How the components of the reward meet; None takes its weighted total."""
    component_weights: dict[str, float] = Field(default_factory=dict[str, float])
    """Weights for ``aggregation``; a component not named counts 1."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """Bound of the absolute advantage."""
    best_worst: int | None = Field(default=None, ge=2)
    """Train only on so many samples of a group, half the best and half the worst; None on all."""
    objective: Literal["clipped", "guard", "reinforce"] = "clipped"
    """PPO's ratio, GRPO-Guard's corrected ratio, or DPOK's plain likelihood weighting."""
    guard_divide_by_dt: bool = True
    """Divide the guarded loss by the length of its step, as the reference script does."""
    clip_range: float | None = Field(default=None, gt=0)
    """c; None takes the preset's, made for images. With 2 to 64 dimensions use 0.05 to 0.2."""
    kl_weight: float = Field(default=0.04, ge=0)
    """Weight of the KL to the reference."""
    kl: KLMode = "exact"
    """``exact`` step KL; ``flow_grpo``: as released, weaker by the step length; ``velocity``, ``mean``: squared gaps."""
    updates: int = Field(default=2, ge=1)
    """Optimiser steps per iteration."""
    ema: float = Field(default=0.9, ge=0, lt=1)
    """Largest decay of the averaged weights that are evaluated, updated every 8 steps; 0 evaluates the trained ones."""


def make_preset(config: Config) -> Preset:
    """The preset that the configuration names."""
    makers = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps, "ddim": ddim}
    return unmasking() if config.kernel == "unmasking" else makers[config.kernel](config.noise_level)


class FlowGRPO(MethodBase):
    """Roll out with ``current``, compare in groups, climb the clipped surrogate."""

    Config = Config

    def __init__(self, config: Config, task: Task) -> None:
        self.config = config
        self.preset = make_preset(config)
        self.grid = grid_of(task, config.steps, config.shift)
        self.clip_range = config.clip_range or self.preset.clip_range
        self.history = History.empty(len(task.prompts), config.history)

    @property
    def evaluated_role(self) -> str:
        return "ema" if self.config.ema else "current"

    def roles(self) -> Mapping[str, RoleSpec]:
        """``ema`` for evaluation."""
        decay = partial(_warm_decay, largest=self.config.ema)
        return {"ema": Lagging("current", decay, every=8)} if self.config.ema else {}

    def collect(self, run: Run) -> Experience:
        """Roll out groups, score, compare; the trained steps become edges with their sample's advantage."""
        batch = run.prompts(self.config.groups, self.config.group_size)
        denoise = run.denoiser("current")
        key = batch.group if self.config.share_start else batch.index
        x_t = start_state(denoise.process, run.noise, key, run.task.model.shape)
        plan = self.plan(run.iteration, run.noise)
        trajectory = rollout(
            denoise, self.preset, self.grid, x_t, batch.condition, noise=run.noise, index=batch.index, plan=plan
        )
        scores = run.score(run.samples(trajectory.x_0, batch))
        advantage = self._advantage(run, scores, batch)
        edges = replace(trajectory.edges, advantage=broadcast(advantage, trajectory.edges.sample))
        experience = Experience(
            index=batch.index,
            group=batch.group,
            prompt=batch.prompt,
            condition=batch.condition,
            x_0=trajectory.x_0,
            rewards=scores.total,
            components=scores.components,
            edges=edges,
        )
        return replace(experience, edges=replace(edges, mask=self._trained(run, experience, advantage)))

    def plan(self, iteration: int, noise: NoiseSource) -> Plan:
        """Which steps are stochastic, and recorded: a window, or all but the last."""
        steps = len(self.grid) - 1
        trained = window_mask(steps, 0, steps - 1)
        window = self.config.window
        if window is None:
            return Plan(record=trained, means=self.config.objective == "guard", output=self.config.output)
        if window.motion == "random":
            start = random_start(noise, window.low, window.high or max(steps // 2, window.width), window.width)
        else:
            start = moving_start(iteration, steps - window.width, window.every, window.stride, window.motion)
        inside = window_mask(steps, start, window.width)
        means = self.config.objective == "guard"
        return Plan(stochastic=inside, record=inside & trained, means=means, output=self.config.output)

    def _advantage(self, run: Run, scores: Scores, batch: PromptBatch) -> Tensor:
        """(samples,), clipped; computed from the rewards of all processes."""
        config = self.config
        names = sorted(scores.components)
        normaliser = Normaliser(config.advantage_std, config.ddof, config.std_eps)

        def credit(total: Tensor, group: Tensor, prompt: Tensor, *columns: Tensor) -> Tensor:
            if config.aggregation is not None:
                weights = {name: config.component_weights.get(name, 1.0) for name in names}
                components = dict(zip(names, columns, strict=True))
                return aggregate(components, weights, group, config.aggregation, normaliser=normaliser)
            if config.advantage == "history":
                advantage, self.history = push_and_normalise(self.history, total, prompt)
                return advantage
            if config.advantage == "none":
                return total
            return leave_one_out(total, group) if config.advantage == "leave_one_out" else normaliser(total, group)

        columns = [scores.components[name] for name in names]
        advantage = run.jointly(credit, scores.total, batch.group, batch.prompt, *columns)
        return advantage.clamp(-config.advantage_clip, config.advantage_clip)

    def _trained(self, run: Run, experience: Experience, advantage: Tensor) -> Tensor:
        """(edges,) False for samples that teach nothing or were not selected, and for steps not drawn."""
        edges, config = experience.edges, self.config
        kept = advantage != 0 if config.objective != "reinforce" else torch.ones_like(advantage, dtype=torch.bool)
        if config.best_worst is not None:
            kept &= run.jointly(partial(best_worst, keep=config.best_worst), advantage, experience.group)
        mask = kept[edges.sample]
        if config.step_fraction < 1:
            first = int(edges.step.min()) if len(edges.step) else 0
            count = int(edges.step.max()) - first + 1 if len(edges.step) else 1
            drawn = random_steps(run.noise, experience.index, count, config.step_fraction)
            mask &= drawn[edges.sample, edges.step - first]
        return mask

    def phases(self, run: Run) -> Sequence[Phase]:
        """One: the surrogate and the KL."""
        return [Phase("current", partial(self._loss, run), updates=self.config.updates)]

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        edges = rows.edges
        assert edges.x_s is not None
        assert edges.advantage is not None
        moment = replay(run.denoiser("current"), self.preset, edges, rows.condition)
        log_prob = self.preset.log_prob(moment.step, edges.x_s)
        surrogate = surrogate_of_ratio(self._log_ratio(edges, moment, log_prob), edges.advantage[:, 0], self.clip_range)
        policy = surrogate.value
        if self.config.objective == "reinforce":
            policy = reinforce(log_prob, edges.advantage[:, 0])
        elif self.config.objective == "guard" and self.config.guard_divide_by_dt:
            policy = divided_by_time(policy, moment.t, moment.s)
        terms = {"policy": Term(policy)}
        if self.config.kl_weight:
            with torch.no_grad():
                frozen = replay(run.denoiser("reference"), self.preset, edges, rows.condition)
            predictions = (moment.prediction, frozen.prediction)
            kl = step_kl(self.config.kl, moment.step, frozen.step, moment.t, moment.s, predictions=predictions)
            terms["kl"] = Term(kl, self.config.kl_weight)
        return Loss(terms, {"ratio": surrogate.ratio, "clip_fraction": surrogate.clipped})

    def _log_ratio(self, edges: Edges, moment: Moment, log_prob: Tensor) -> Tensor:
        """Log of new over old probability of the stored states, corrected in the guarded form."""
        assert edges.log_prob is not None
        if self.config.objective != "guard":
            return log_prob - edges.log_prob
        step = moment.step
        if not isinstance(step, GaussianStep) or edges.mean is None:
            raise TypeError("objective guard needs a Gaussian kernel: its correction is a distance of means")
        return guard_log_ratio(log_prob, edges.log_prob, step.mean, edges.mean, step.std)

    def state_dict(self) -> dict[str, Tensor]:
        """The reward history of the prompts."""
        return {"history": self.history.values}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.history = History(state["history"])


def _warm_decay(n: int, largest: float) -> float:
    """min((1 + n)/(10 + n), largest)."""
    return min((1 + n) / (10 + n), largest)
