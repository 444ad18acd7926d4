"""G2RPO: one noisy step per group of samples, completed by the ODE at several granularities.

Where every step is noisy the final reward says little about the noise of one of them. Here the ODE runs from one noise
per prompt (the anchor). From its state a_k at every trained step k a group of G samples takes one stochastic step, each
with its own noise, and follows the ODE to the data; all that tells the samples apart is the noise of step k. Each is
completed once per granularity lambda, which leaves out times of the grid, and

    A = clip(Σ_lambda (r_lambda - mean of the group)/(std of the group + eps), -5, 5)

is the advantage of the step in the clipped surrogate of Flow-GRPO; one optimiser step for each k, from the noise on.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.credit.granular import multi_view_advantage
from difftilt.credit.group import broadcast
from difftilt.errors import UserError
from difftilt.process.masked import MaskedProcess
from difftilt.process.protocol import Condition
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Scores
from difftilt.sampling.completion import ODE
from difftilt.sampling.protocol import Edges, Moment, NoiseSource, Trajectory
from difftilt.sampling.rollout import Plan, rollout, start_state, step_noise
from difftilt.sampling.steps import GaussianStep
from difftilt.statistics.folds import distinct
from difftilt.training.advantages import NormaliserConfig
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.granularities import scored_views
from difftilt.training.policy_gradient import PolicyGradient, PolicyGradientConfig, with_advantage
from difftilt.training.protocol import Loss, Phase, Run, Task
from difftilt.training.surrogate import surrogate_loss
from difftilt.trees import Pooled, join, take

CARD = Card(
    name="g2rpo",
    entry="G2RPO",
    paper="Zhou et al. 2025, G2RPO: Granular GRPO for Precise Reward in Flow Models, arXiv 2510.01982",
    needs=("gaussian process", "stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)


class Config(PolicyGradientConfig, NormaliserConfig):
    """Trained steps, granularities and update. Defaults are the paper's."""

    group_size: int = Field(default=12, ge=2)
    """Samples per prompt and trained step."""
    trained_steps: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """Steps k, counted from the noise, that are made stochastic and trained; None is the first half of the grid."""
    granularities: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 3), min_length=1)
    """Completions of every sample: after one step of the grid, every n-th of its times for each n named."""
    updates: int = Field(default=1, ge=1)
    """Optimiser steps for each trained step, each on its share of the prompts."""
    ddof: Literal[0, 1] = 1
    """Sample (1) or population (0) standard deviation."""
    std_eps: float = Field(default=1e-8, gt=0)
    """Added to the standard deviation."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference."""


class G2RPO(PolicyGradient[Config]):
    """An ODE anchor per prompt; at every trained step a group of noisy steps off it, compared after completion."""

    def __init__(self, config: Config, task: Task) -> None:
        if isinstance(task.model.process, MaskedProcess):
            raise UserError(f"{task.name} has tokens, which no ODE samples: use flow-grpo with kernel unmasking")
        super().__init__(config, task)
        steps = len(self.grid) - 1
        chosen = range(max(steps // 2, 1)) if config.trained_steps is None else config.trained_steps
        self.trained = tuple(sorted(chosen))
        _check(config, self.trained, steps)
        self.weights = task.reward.weights if isinstance(task.reward, WeightedSum) else {task.reward.name: 1.0}

    def collect(self, run: Run) -> Experience:
        """Anchors, then G noisy steps off each of their trained states; a group is the samples of one such state."""
        config, count = self.config, len(self.trained)
        batch = run.prompts(config.groups, count * config.group_size)
        batch = replace(batch, group=batch.index // config.group_size)
        first, place = distinct(batch.group // count)
        anchor, moments = self._anchor(run, take(batch, first))
        branches = {k: self._branch(run, batch, place, moments[k]) for k in self.trained}
        x_0, views = scored_views(run, batch, branches, self.grid, config.granularities)
        anchored = run.score(run.samples(anchor.x_0, take(batch, first))).components
        experience = Experience(
            index=batch.index,
            group=batch.group,
            prompt=batch.prompt,
            condition=batch.condition,
            x_0=x_0,
            rewards=views[0].total,
            components={**views[0].components, **{f"anchor/{name}": r[place] for name, r in anchored.items()}},
            edges=join([edges for edges, _ in branches.values()]),
        )
        advantage = self._advantage(run, batch.group, views)
        return with_advantage(experience, broadcast(advantage, experience.edges.sample))

    def _anchor(self, run: Run, prompts: PromptBatch) -> tuple[Trajectory, dict[int, Moment]]:
        """The ODE of the current weights from one noise per prompt, and its moments at the trained steps."""
        model, moments = run.task.model, dict[int, Moment]()

        def keep(moment: Moment, x_s: Tensor) -> None:
            if int(moment.position) in self.trained:
                moments[int(moment.position)] = moment

        key = prompts.group // len(self.trained)
        x = start_state(model.process, run.noise, key, model.shape, prompts.condition)
        path = rollout(
            run.denoiser("current"),
            ODE,
            self.grid,
            x,
            prompts.condition,
            noise=run.noise,
            index=prompts.index,
            plan=Plan(output="x0"),
            observe=keep,
        )
        return path, moments

    def _branch(
        self, run: Run, batch: PromptBatch, place: Int[Tensor, " samples"], anchor: Moment
    ) -> tuple[Edges, Condition]:
        """The stochastic step of all groups at one trained step, by the prediction that the anchor has paid for.

        ``place`` is the row of each sample's prompt among the anchors.
        """
        position = int(anchor.position)
        mine = batch.group % len(self.trained) == self.trained.index(position)
        rows = mine.nonzero()[:, 0]
        here = take(anchor, place[rows])
        step = self.preset.step(here.prediction, here.x_t, here.t, here.s)
        x_s = step.draw(step_noise(step, run.noise, batch.index[rows], position))
        edges = Edges(
            sample=rows,
            step=torch.full_like(rows, position),
            t=here.t,
            s=here.s,
            start=Pooled(anchor.x_t, place[rows]),
            end=Pooled.of(x_s),
            log_prob=self.preset.log_prob(step, x_s),
            mean=step.mean if self.config.objective == "guard" and isinstance(step, GaussianStep) else None,
            parent=torch.full_like(rows, -1),
        )
        return edges, here.condition

    def _advantage(
        self, run: Run, group: Int[Tensor, " samples"], views: Sequence[Scores]
    ) -> Float[Tensor, " samples"]:
        """Of the samples of this process, from the rewards of all."""
        names, config = list(self.weights), self.config

        def credit(group: Tensor, *columns: Tensor) -> Tensor:
            blocks = [columns[start : start + len(names)] for start in range(0, len(columns), len(names))]
            named = [dict(zip(names, block, strict=True)) for block in blocks]
            return multi_view_advantage(
                named, self.weights, group, normaliser=config.normaliser, clip=config.advantage_clip
            )

        return run.jointly(credit, group, *(scores.components[name] for scores in views for name in names))

    def phases(self, run: Run) -> Sequence[Phase]:
        """One update for each trained step in order of time; the network sees the state of a group once."""
        updates = len(self.trained) * self.config.updates
        loss = partial(self._loss, run)
        return [Phase("current", loss, unit="group", updates=updates, part=self._part, one_state=True, guided=True)]

    def _part(self, experience: Experience) -> Int[Tensor, " edges"]:
        group, count = experience.group[experience.edges.sample], len(self.trained)
        share = group // count * self.config.updates // self.config.groups
        return group % count * self.config.updates + share

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        return surrogate_loss(self.config, self.preset, run, rows, state=rows.group)


def _check(config: Config, trained: tuple[int, ...], steps: int) -> None:
    """Refuse what cannot work, with the setting that would."""
    if trained[-1] > steps - 2:
        raise UserError(
            f"method.trained_steps: step {trained[-1]} of {steps} leaves no evaluation after its noise, so the reward "
            f"would not depend on it: use steps up to {steps - 2}, or raise method.steps"
        )
    for name, values in (("trained_steps", trained), ("granularities", config.granularities)):
        if len(set(values)) < len(values):
            raise UserError(f"method.{name} = {list(values)} names one twice: name each once")
    if config.updates > config.groups:
        raise UserError(
            f"method.updates = {config.updates} shares out the prompts of an iteration: use at most "
            f"groups = {config.groups}"
        )
