"""CRD: what the weights imply of a reward is regressed on the reward, both centred per prompt (arXiv 2603.14128).

The difference of two denoising errors on one re-noised sample estimates log(p/p_old) and so, up to a constant of the
prompt, the reward that the present weights are optimal for. Within a prompt that constant cancels:

    s = error_old - error_current,   loss = (beta·(s - mean s) - (a - mean a))²,   a = clamp(A/(2·A_max) + 1/2, 0, 1).

Three devices hold the drift: samples come from one lagging copy, s is measured against another, and the velocity is
drawn to that of the *guided* pretrained model, the more so the better the sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.credit.group import Scale, group_advantage
from difftilt.credit.optimality import optimality
from difftilt.errors import UserError
from difftilt.models.protocol import Lagging, RoleSpec
from difftilt.objectives.centred import Baselines, Form, cell_baselines, centred_loss
from difftilt.objectives.denoising import implicit_reward
from difftilt.objectives.kl import velocity_gap
from difftilt.process.gaussian import GaussianPrediction
from difftilt.sampling.protocol import NoiseSource
from difftilt.training.drawing import drawn
from difftilt.training.experience import Experience, scored_experience
from difftilt.training.protocol import Loss, Phase, Run, Task, Term
from difftilt.training.renoising import (
    ForwardConfig,
    ForwardProcess,
    frozen,
    lagging,
    predicted,
    renoised,
    stratified_levels,
)
from difftilt.training.two_pass import in_pieces

CARD = Card(
    name="crd",
    entry="CRD",
    paper="Zhu et al. 2026, Diffusion Reinforcement Learning via Centered Reward Distillation, arXiv 2603.14128",
    needs=("gaussian process", "per-sample reward"),
    laws=("constant_reward", "batch_split"),
)

SMALLEST_ANCHOR = 1e-4
"""Weight of the anchor at the worst samples, where it grows with the reward."""

Steps = Annotated[int, Field(ge=0)]
Slope = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Schedule = tuple[Steps, Share, Slope, Share]
"""(steps, first, slope, last) of d in ``copy <- d·copy + (1 - d)·current``; 0 copies, 1 keeps. After n optimiser steps
d is ``first`` while n < steps, and then min(first + slope·(n - steps), last)."""


class Config(ForwardConfig):
    """Defaults of the paper's setting for OCR in the authors' code, but for the number of samples and of times."""

    updates: int = Field(default=2, ge=1)
    """Optimiser steps per iteration."""
    beta: float = Field(default=1.0, gt=0)
    """Scale of the implicit against the external reward; the loss is multiplied by max_advantage/beta."""
    max_advantage: float = Field(default=5.0, gt=0)
    """Advantage at which a sample is certainly good; also multiplies the loss."""
    advantage_std: Scale = "global"
    """What a centred reward is divided by."""
    form: Form = "mse"
    """Squared error, or binary cross entropy."""
    centre: Literal["prompt", "batch", "none"] = "prompt"
    """What the baselines are averages over: the samples of one prompt at one time, or all samples of the update at one
    time; or no baselines. Only the first has the right optimum; the others are there to compare."""
    temperature: float | None = Field(default=None, ge=0)
    """Of the baselines' weights; None is uniform, otherwise the loss is averaged over baselines of good and of bad
    samples, at 0 those of positive and of negative advantage."""
    self_normalised: bool = True
    """Divide the errors of the implicit reward by their own mean absolute value."""
    draws: int | None = Field(default=None, ge=1)
    """Times that every sample is trained at, the same for all, stratified; None is as many as the solver's own."""
    timestep_fraction: float = Field(default=0.99, gt=0, le=1)
    """Share of the solver's times, from the noise end, that are trained at."""
    old_decay: Schedule = (0, 0.25, 0.005, 0.999)
    """Of the weights that the implicit reward is measured against."""
    sampling_decay: Schedule = (75, 0.0, 0.0075, 0.999)
    """Of the weights that are sampled from."""
    kl_weight: float = Field(default=0.1, ge=0)
    """Weight of the mean squared velocity difference to the guided reference."""
    kl_guidance: float = Field(default=4.5, ge=0)
    """Guidance scale of the reference; the trained model has none. 1 where there is no unconditional branch."""
    kl_adaptive: bool = True
    """The weight grows from 1e-4 at the worst sample to ``kl_weight`` at the best."""


def decay(n: int, schedule: Schedule) -> float:
    """D after n optimiser steps, see :data:`Schedule`."""
    steps, first, slope, last = schedule
    return first if n < steps else min(first + slope * (n - steps), last)


class CRD(ForwardProcess[Config]):
    """Sample with ``sampling``, score, re-noise, regress the implicit reward against ``old``."""

    sampled_role = "sampling"

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task, CARD.name)
        if config.kl_weight and config.kl_guidance != 1 and task.model.null_condition is None:
            raise UserError(
                f"kl_guidance={config.kl_guidance:g} needs a model with an unconditional branch, and this one has no "
                "null condition: use kl_guidance=1"
            )

    def roles(self) -> Mapping[str, RoleSpec]:
        """``old`` and ``sampling`` follow at the end of an iteration, each by its own schedule."""
        config = self.config
        return {
            "old": Lagging("current", partial(decay, schedule=config.old_decay)),
            "sampling": Lagging("current", partial(decay, schedule=config.sampling_decay)),
            **super().roles(),
        }

    def collect(self, run: Run) -> Experience:
        """Draw groups from ``sampling``; all samples are trained at the same times."""
        config = self.config
        batch = run.prompts(config.groups, config.group_size)
        x_0, samples, scores = drawn(run, batch, partial(self.finished, run))
        edges = stratified_levels(run.noise, self.grid, config.timestep_fraction, config.draws, batch.index)
        experience = scored_experience(batch, x_0, edges, scores, samples.media)
        credit = partial(group_advantage, std=config.advantage_std, eps=1e-6)
        assert experience.rewards is not None
        advantage: Tensor = run.jointly(credit, experience.rewards, experience.group)
        label = optimality(advantage, config.max_advantage)
        return replace(experience, label=label, extras={"advantage": advantage})

    def phases(self, run: Run) -> Sequence[Phase]:
        """One: the regression. A prompt at one time stays in one microbatch, where its averages are taken."""
        before = partial(self._with_baselines, run) if self.config.centre == "batch" else None
        return [
            Phase("current", partial(self._loss, run), unit="level", updates=self.config.updates, before=before),
        ]

    def _loss(self, run: Run, rows: Experience, _: NoiseSource) -> Loss:
        config = self.config
        assert rows.label is not None
        x_t = renoised(run.denoiser("current").process, rows, run.noise)
        # frozen passes come first, so that nothing stands between the forward pass with gradient and its backward pass
        anchor = frozen(run, "reference", x_t, rows, config.kl_guidance) if config.kl_weight else None
        old = lagging(run, "old", x_t, rows)
        prediction = predicted(run, "current", x_t, rows)
        implicit = self._implicit(prediction, old, rows)
        baselines = self._baselines(implicit.detach(), rows)
        centred = centred_loss(implicit, rows.label, baselines, beta=config.beta, form=config.form)
        terms = {"policy": Term(config.max_advantage / config.beta * centred)}
        if anchor is not None:
            terms["kl"] = Term(self._strength(rows.label) * velocity_gap(prediction, anchor), config.kl_weight)
        return Loss(terms, {"optimality": rows.label, "implicit_reward": implicit.detach().abs()})

    def _implicit(
        self, prediction: GaussianPrediction, old: GaussianPrediction | None, rows: Experience
    ) -> Float[Tensor, " rows"]:
        assert rows.x_0 is not None
        return implicit_reward(
            prediction, prediction if old is None else old, rows.x_0, normalised=self.config.self_normalised
        )

    def _measured(self, run: Run, rows: Experience) -> Float[Tensor, " rows"]:
        x_t = renoised(run.denoiser("current").process, rows, run.noise)
        return self._implicit(predicted(run, "current", x_t, rows), lagging(run, "old", x_t, rows), rows)

    def _baselines(self, implicit: Float[Tensor, " rows"], rows: Experience) -> Baselines:
        """Of the cells of these rows, or those that were found for the whole update."""
        if "baselines" in rows.extras:
            return rows.extras["baselines"]
        if self.config.centre == "none":
            nothing = torch.zeros(len(implicit), 1, dtype=torch.float64, device=implicit.device)
            return Baselines(nothing, nothing)
        assert rows.label is not None
        return cell_baselines(implicit, rows.label, rows.extras["advantage"], cells(rows), self.config.temperature)

    def _with_baselines(self, run: Run, rows: Experience) -> Experience:
        """The rows of an update with averages over all of them at one time, on all processes."""
        assert rows.label is not None
        same = run.roles.same("old", "current")
        implicit = torch.zeros_like(rows.label) if same else in_pieces(run, partial(self._measured, run), rows)
        average = partial(cell_baselines, temperature=self.config.temperature)
        found = run.jointly(average, implicit, rows.label, rows.extras["advantage"], rows.edges.step)
        return rows.changed(extras={**rows.extras, "baselines": found})

    def _strength(self, label: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Factor of the anchor of each row: m + a·(1 - m), m such that the weight is nowhere below 1e-4."""
        if not self.config.kl_adaptive:
            return torch.ones_like(label)
        least = min(SMALLEST_ANCHOR / self.config.kl_weight, 1.0)
        return least + label * (1 - least)


def cells(rows: Experience) -> Int[Tensor, " rows"]:
    """One label for the rows of one prompt at one draw of a time."""
    draws = int(rows.edges.step.max()) + 1
    return rows.group * draws + rows.edges.step
