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
from math import prod
from typing import Literal

from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as Settings
from difftilt.credit.group import broadcast
from difftilt.credit.history import History
from difftilt.errors import UserError
from difftilt.models.mlp import MLP
from difftilt.models.protocol import Denoiser, Lagging, RoleSpec, Trained
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.protocol import NoiseSource, Trajectory
from difftilt.sampling.rollout import Plan, rollout, start_state
from difftilt.sampling.solvers import DPMSolverPP
from difftilt.sampling.windows import Motion, compressed, moving_start, random_start, random_steps, window_mask
from difftilt.training.advantages import AdvantageConfig, Advantages
from difftilt.training.base import MethodBase
from difftilt.training.config import GroupSampling
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.grids import grid_of
from difftilt.training.protocol import Loss, Phase, Run, Task, Term
from difftilt.training.surrogate import SurrogateConfig, make_preset, surrogate_loss

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


class Config(GroupSampling, AdvantageConfig, SurrogateConfig):
    """Rollout and update; the comparison of rewards and the objective are shared by the whole family."""

    steps: int | None = Field(default=None, ge=2)
    """Steps of a rollout; None follows the task's sampler."""
    shift: float = Field(default=3.0, gt=0)
    """Time shift of the grid when ``steps`` is given."""
    share_start: bool = False
    """One initial noise for all samples of a group (DanceGRPO, MixGRPO)."""
    output: Literal["state", "x0"] = "state"
    """Score the last state, or the x0-prediction of the last evaluation (DanceGRPO)."""
    window: Window | None = None
    """None: all steps but the last are stochastic and trained."""
    flash_steps: int | None = Field(default=None, ge=1)
    """Steps of a second-order solver from the window's end to the data, on a compressed grid (MixGRPO-Flash)."""
    step_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the trainable steps that is trained, drawn for each sample (DanceGRPO: 0.6)."""
    value_baseline: bool = False
    """Subtract a learned value V(x_t, t, prompt) from the advantage (optional in DPOK)."""
    updates: int = Field(default=2, ge=1)
    """Optimiser steps per iteration."""
    unit: Literal["sample", "edge"] = "sample"
    """What the updates share out: whole samples with all their steps, or single steps shuffled (DDPO)."""
    ema: float = Field(default=0.9, ge=0, lt=1)
    """Largest decay of the averaged weights that are evaluated, updated every 8 steps; 0 evaluates the trained ones."""


class FlowGRPO(MethodBase):
    """Roll out with ``current``, compare in groups, climb the clipped surrogate."""

    def __init__(self, config: Config, task: Task) -> None:
        _check(config, task)
        self.config = config
        self.preset = make_preset(config)
        self.grid = grid_of(task, config.steps, config.shift)
        self.clean_end = task.sampler.clean_end
        self.advantages = Advantages(config, len(task.prompts))
        self.values = MLP(prod(task.model.shape), 1, classes=len(task.prompts)) if config.value_baseline else None

    @property
    def evaluated_role(self) -> str:
        return "ema" if self.config.ema else "current"

    def roles(self) -> Mapping[str, RoleSpec]:
        """``ema`` for evaluation, ``value`` for the learned baseline."""
        roles: dict[str, RoleSpec] = {}
        if self.config.ema:
            roles["ema"] = Lagging("current", partial(_warm_decay, largest=self.config.ema), every=8)
        if self.values is not None:
            roles["value"] = Trained(source=None, network=self.values)
        return roles

    def collect(self, run: Run) -> Experience:
        """Roll out groups, score, compare; the trained steps become edges with their sample's advantage."""
        batch = run.prompts(self.config.groups, self.config.group_size)
        trajectory = self._rollout(run, run.denoiser("current"), batch)
        scores = run.score(run.samples(trajectory.x_0, batch))
        advantage = self.advantages(run, scores, batch)
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

    def _rollout(self, run: Run, denoise: Denoiser, batch: PromptBatch) -> Trajectory:
        """The whole grid, or with ``flash_steps`` the grid up to the window's end and a fast solver from there."""
        key = batch.group if self.config.share_start else batch.index
        x_t = start_state(denoise.process, run.noise, key, run.task.model.shape)
        plan = self.plan(run.iteration, run.noise)
        grid, end = self.grid, len(self.grid) - 1
        if self.config.flash_steps is not None and plan.stochastic is not None:
            end = int(plan.stochastic.nonzero().max()) + 1
        trajectory = rollout(
            denoise, self.preset, grid[: end + 1], x_t, batch.condition, noise=run.noise, index=batch.index, plan=plan
        )
        if self.config.flash_steps is None:
            return trajectory
        rest = compressed(grid[end:], min(self.config.flash_steps, len(grid) - 1 - end))
        return replace(trajectory, x_0=DPMSolverPP()(denoise, trajectory.x_0, batch.condition, rest))

    def plan(self, iteration: int, noise: NoiseSource) -> Plan:
        """Which steps are stochastic, and recorded: a window, or all but the last."""
        steps = len(self.grid) - 1
        plan = Plan(
            record=window_mask(steps, 0, steps - 1), means=self.config.objective == "guard", output=self.config.output
        )
        window = self.config.window
        if window is None:
            # the last step is never trained; where its noise would stay in the sample it follows the ODE
            return replace(plan, stochastic=plan.record) if self.clean_end else plan
        if window.motion == "random":
            start = random_start(noise, window.low, window.high or max(steps // 2, window.width), window.width)
        else:
            start = moving_start(iteration, steps - window.width, window.every, window.stride, window.motion)
        return replace(plan, stochastic=window_mask(steps, start, window.width))

    def _trained(self, run: Run, experience: Experience, advantage: Tensor) -> Bool[Tensor, " edges"]:
        """False for samples that teach nothing or were not selected, and for steps not drawn."""
        edges = experience.edges
        mask = self.advantages.selected(run, advantage, experience.group)[edges.sample]
        if self.config.step_fraction < 1 and len(edges.step):
            first, last = int(edges.step.min()), int(edges.step.max())
            drawn = random_steps(run.noise, experience.index, last - first + 1, self.config.step_fraction)
            mask = mask & drawn[edges.sample, edges.step - first]
        return mask

    def phases(self, run: Run) -> Sequence[Phase]:
        """The surrogate with its KL, and the regression of the value where there is one."""
        phases = [Phase("current", partial(self._loss, run), unit=self.config.unit, updates=self.config.updates)]
        return phases if self.values is None else [*phases, Phase("value", partial(self._value_loss, run))]

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        assert rows.edges.advantage is not None
        advantage = rows.edges.advantage[:, 0]
        if self.values is not None:
            advantage = advantage - self._value(run, rows).detach()
        return surrogate_loss(self.config, self.preset, run, rows, advantage)

    def _value(self, run: Run, rows: Experience) -> Tensor:
        return run.roles.module("value")(rows.edges.x_t, rows.edges.t, rows.prompt)[:, 0]

    def _value_loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        assert rows.edges.advantage is not None
        return Loss({"value": Term((rows.edges.advantage[:, 0] - self._value(run, rows)).square())})

    def state_dict(self) -> dict[str, Tensor]:
        """The reward history of the prompts."""
        return {"history": self.advantages.history.values}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.advantages.history = History(state["history"])


def _warm_decay(n: int, largest: float) -> float:
    """min((1 + n)/(10 + n), largest)."""
    return min((1 + n) / (10 + n), largest)


def _check(config: Config, task: Task) -> None:
    """Refuse what cannot work, with the setting that would."""
    tokens = isinstance(task.model.process, MaskedProcess)
    if tokens != (config.kernel == "unmasking"):
        fitting = "unmasking" if tokens else "flow_sde, dance_sde, cps or ddim"
        raise UserError(f"method.kernel = {config.kernel} does not fit the process of {task.name}: use {fitting}")
    if config.kernel == "cps" and config.noise_level > 1:
        raise UserError(f"method.noise_level = {config.noise_level} of cps must be at most 1, where all noise is fresh")
    if tokens and config.value_baseline:
        raise UserError(f"{task.name} has tokens: method.value_baseline reads continuous states")
    if tokens and (config.window or config.objective == "guard" or config.kl != "exact"):
        raise UserError(f"{task.name} has tokens: window, objective guard and inexact kl need a Gaussian process")
    steps = len(grid_of(task, config.steps, config.shift)) - 1
    if config.window is not None and config.window.width >= steps:
        raise UserError(
            f"method.window.width = {config.window.width} leaves nothing of {steps} steps: the last is never trained"
        )
    if config.window is not None and (config.window.high or 0) >= steps:
        raise UserError(
            f"method.window.high = {config.window.high} reaches the last of {steps} steps, which is never trained: "
            f"use at most {steps - 1}"
        )
    window = config.window
    if window is not None and window.motion == "random":
        high = window.high or max(steps // 2, window.width)
        if window.low + window.width > high:
            raise UserError(
                f"method.window: {window.width} steps do not fit into steps {window.low} to {high - 1}: "
                "lower window.low or width, or raise high"
            )
    if config.flash_steps is not None and config.window is None:
        raise UserError("method.flash_steps replaces the steps after a window: set method.window, or leave it out")
    if config.flash_steps is not None and config.output == "x0":
        raise UserError("method.flash_steps needs the state at the window's end: set method.output to state")
    if config.objective == "guard" and config.kernel == "cps":
        raise UserError(
            "method.objective = guard corrects a Gaussian density, and cps scores a squared error: use flow_sde"
        )
    if config.aggregation is not None and config.advantage != "group":
        raise UserError(f"method.aggregation compares in groups: set method.advantage to group, not {config.advantage}")
    if config.component_weights and config.aggregation is None:
        raise UserError(
            "method.component_weights belong to method.aggregation: set it, or weigh the rewards themselves"
        )
    if config.best_worst is not None and (config.best_worst % 2 or config.best_worst > config.group_size):
        raise UserError(
            f"method.best_worst = {config.best_worst} must be even and at most group_size = {config.group_size}"
        )
