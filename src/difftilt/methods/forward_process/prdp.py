"""PRDP: the log-ratio of a trajectory learns to predict reward differences (arXiv 2402.08714).

For two chains i, j of one prompt the optimum of E[r] - beta·KL(path || reference path) satisfies

    R_i - R_j = (r_i - r_j)/beta,    R = Σ_t log pi(x_s | x_t) - log pi_ref(x_s | x_t),

because the unknown partition function is the same for both. PRDP regresses one side on the other, for all pairs of
fresh chains. Each step's log-ratio is also clipped around its value under the weights that drew the chains, and the
larger of the two squared errors counts, so that several gradient steps on one batch stay near them. The gradient comes
in two passes, with the activations of one microbatch at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.objectives.pairs import pessimistic_difference_error, ranked_pairs
from difftilt.process.gaussian import GaussianProcess
from difftilt.sampling.presets import dance_sde, ddim, flow_sde
from difftilt.sampling.protocol import Moment, NoiseSource, Sampler, Step, Trajectory
from difftilt.sampling.rollout import Plan, replay, rollout, start_state
from difftilt.sampling.steps import GaussianStep
from difftilt.sampling.windows import window_mask
from difftilt.statistics.folds import distinct, segment_mean, segment_sum
from difftilt.training.base import AveragedMethod
from difftilt.training.config import GroupSampling
from difftilt.training.drawing import rolled
from difftilt.training.experience import Experience, PromptBatch, scored_experience
from difftilt.training.grids import grid_of
from difftilt.training.protocol import Loss, Phase, Run, Task, Term
from difftilt.training.two_pass import carried, in_pieces, with_slopes
from difftilt.trees import tree_map

CARD = Card(
    name="prdp",
    entry="PRDP",
    paper="Deng et al. 2024, PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of "
    "Diffusion Models, arXiv 2402.08714",
    needs=("gaussian process", "stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)
REFERENCE = "reference_log_prob"
"""Name in ``edges.extras`` of log pi_ref of each step."""


class Config(GroupSampling):
    """Rollout, regression and update. Defaults are the paper's small scale; its large scale is on the page."""

    groups: int = Field(default=32, ge=1)
    """Prompts per iteration."""
    temperature: float = Field(default=3e-5, gt=0)
    """Beta, the weight of the KL: the reward is divided by it. Belongs to one reduction."""
    clip_range: float = Field(default=1e-6, gt=0)
    """Half-width of the interval about the old log-ratio of a step. Belongs to one reduction."""
    reduction: Literal["mean", "sum"] = "mean"
    """Of log-ratios, over the dimensions of a latent and over steps: the paper's listing, or the density itself."""
    epochs: int = Field(default=10, ge=1)
    """Passes over the chains of an iteration: the paper's gradient steps K."""
    updates: int = Field(default=1, ge=1)
    """Optimiser steps per pass, each on whole groups of its own."""
    steps: int | None = Field(default=None, ge=2)
    """Steps of a rollout; None follows the task's sampler."""
    shift: float = Field(default=1.0, gt=0)
    """Time shift of the grid when ``steps`` is given."""
    kernel: Literal["ddim", "flow_sde", "dance_sde"] = "ddim"
    """Stochastic step."""
    noise_level: float = Field(default=1.0, ge=0)
    """Eta of ddim, where 1 is DDPM, and of dance_sde; ``a`` of flow_sde, which forgets its start at sqrt(2)."""
    std_floor: float = Field(default=0.0, ge=0)
    """Smallest std of a step. 0 leaves the last step of ddim, whose std is 0, out of the log-ratio."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Largest decay of the averaged weights that are evaluated; 0 evaluates the trained weights, as the paper does."""
    start_signal: float = Field(default=0.01, ge=0, le=1)
    """Largest squared signal scale at t = 1 that is accepted: what the start knows of the sample cannot be tilted."""


class PRDP(AveragedMethod[Config]):
    """Roll out with ``current``, score, regress differences of log-ratios on differences of rewards.

    Raises:
        UserError: for tokens, a deterministic sampler, or a schedule that ends before the noise does.
    """

    def __init__(self, config: Config, task: Task) -> None:
        _check(config, task)
        makers = {"ddim": ddim, "flow_sde": flow_sde, "dance_sde": dance_sde}
        preset = makers[config.kernel](config.noise_level)
        self.config = config
        self.preset = replace(preset, reduce=config.reduction, draw_floor=config.std_floor)
        self.grid = grid_of(task, config.steps, config.shift)
        # where the noise of the last step would stay in the sample it follows the ODE
        self.clean_end = task.sampler.clean_end and config.kernel != "ddim"

    def sampler(self, task: Task) -> Sampler:
        """The policy itself: the stochastic chain, under the task's guidance."""
        return replace(task.sampler, grid=self.grid, kernel=self.preset.kernel, solver=None, clean_end=self.clean_end)

    def scored(self) -> Bool[Tensor, " steps"]:
        """True for the steps that have a density: all, or all but the last."""
        steps = len(self.grid) - 1
        last = self.config.std_floor > 0 if self.config.kernel == "ddim" else not self.clean_end
        return window_mask(steps, 0, steps if last else steps - 1)

    def collect(self, run: Run) -> Experience:
        """Chains with their rewards, and the log-probability of every step under the sampling and reference weights."""
        batch = run.prompts(self.config.groups, self.config.group_size)
        trajectory, samples, scores = rolled(run, batch, partial(self._roll, run))
        experience = scored_experience(batch, trajectory.x_0, trajectory.edges, scores, samples.media)
        edges = experience.edges
        reference = edges.log_prob
        if not run.roles.same("current", "reference"):
            rows = experience.rows(torch.arange(len(edges.step), device=edges.step.device), share=True)
            reference = in_pieces(run, partial(self.log_prob, run, "reference"), rows)
        assert reference is not None
        return replace(experience, edges=replace(edges, extras={REFERENCE: reference}))

    def _roll(self, run: Run, batch: PromptBatch) -> Trajectory:
        """Chains of ``current``; log-probabilities in float64, since the clip is far below float32's rounding."""
        record, kept = self.scored(), list[Tensor]()

        def observe(moment: Moment, x_s: Tensor) -> None:
            if bool(record[int(moment.position)]):
                kept.append(self._density(moment.step, x_s))

        trajectory = rollout(
            run.denoiser("current"),
            self.preset,
            self.grid,
            start_state(run.task.model.process, run.noise, batch.index, run.task.model.shape, batch.condition),
            batch.condition,
            noise=run.noise,
            index=batch.index,
            plan=Plan(stochastic=record if self.clean_end else None, record=record, score="none"),
            observe=observe,
        )
        return replace(trajectory, edges=replace(trajectory.edges, log_prob=torch.cat(kept)))

    def _density(self, step: Step, x_s: Tensor) -> Float[Tensor, " rows"]:
        assert isinstance(step, GaussianStep)
        return self.preset.log_prob(tree_map(Tensor.double, step), x_s.double())

    def log_prob(self, run: Run, role: str, rows: Experience) -> Float[Tensor, " rows"]:
        """Log pi(x_s | x_t) of each row under the weights of ``role`` and the task's guidance."""
        assert rows.edges.x_s is not None
        moment = replay(run.denoiser(role), self.preset, rows.edges, rows.condition)
        return self._density(moment.step, rows.edges.x_s)

    def phases(self, run: Run) -> Sequence[Phase]:
        """One: the regression, on whole groups, a row at a time."""
        before = partial(with_slopes, run, partial(self.log_prob, run, "current"), partial(self.share, run))
        settings = self.config
        phase = Phase("current", partial(self._loss, run), unit="group", micro="edge", before=before, guided=True)
        return [replace(phase, updates=settings.updates, epochs=settings.epochs)]

    def share(self, run: Run, log_prob: Float[Tensor, " rows"], rows: Experience) -> Float[Tensor, ""]:
        """This process's part of the mean error over all pairs of an update, from the log-probability of every step."""
        config, edges = self.config, rows.edges
        assert edges.log_prob is not None
        assert rows.rewards is not None
        reference = edges.extras[REFERENCE]
        ratio, old = log_prob - reference, edges.log_prob - reference
        clipped = ratio.clamp(old - config.clip_range, old + config.clip_range)
        first, sample = distinct(rows.index)
        over_steps = segment_sum if config.reduction == "sum" else segment_mean
        value, bound = (over_steps(step, sample, len(first)) for step in (ratio, clipped))
        reward = rows.rewards[first]
        pairs = ranked_pairs(reward, rows.group[first])
        errors = pessimistic_difference_error(value, bound, reward, pairs, config.temperature)
        (count,) = run.gather(torch.tensor([len(errors)], device=errors.device))
        return errors.sum() / max(int(count.sum()), 1)

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        log_prob = self.log_prob(run, "current", rows)
        assert rows.edges.log_prob is not None
        moved = log_prob.detach() - rows.edges.log_prob
        metrics = {"ratio": moved.exp(), "clip_fraction": moved.abs() > self.config.clip_range}
        return Loss({"pairs": Term(carried(rows, log_prob))}, metrics)


def _check(config: Config, task: Task) -> None:
    """Refuse what has no density, and what is known to have no optimum."""
    process = task.model.process
    if not isinstance(process, GaussianProcess):
        raise UserError(f"{CARD.name} needs a Gaussian process: {task.name} has tokens; use flow-grpo there")
    if config.noise_level == 0:
        raise UserError(
            f"method.noise_level = 0 makes {config.kernel} deterministic, and its steps have no density: use 1, DDPM's"
        )
    signal = float(process.alpha(torch.ones(1, dtype=torch.float64))) ** 2
    if signal > config.start_signal:
        raise UserError(
            f"the noise of {task.name} at t = 1 still holds abar = {signal:.3g} of the sample, which the fixed start "
            "cannot tilt: use a schedule that ends in noise, or raise method.start_signal to train all the same"
        )
    if config.steps is None and len(task.sampler.grid) < 3:
        raise UserError(
            f"{task.name} samples in one step, which leaves no step to score: set method.steps to 2 or more"
        )
