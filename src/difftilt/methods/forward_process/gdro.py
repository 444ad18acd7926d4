"""GDRO: the implicit rewards of a stored group are made to follow its explicit ones (Wang et al., arXiv 2601.02036).

Fully offline: groups of k samples of the reference are drawn and scored once. A group is re-noised to one common time,
and the soft ranking by what the model implies is regressed on the one by the rewards, with v = eps - x_0:

    s_i = -beta·( |v_i - v_theta|² - |v_i - v_ref|² ),
    L = Σ_i CE( softmax(r/tau), softmax(s) over the suffix i..k of the ranked group ) + gamma·|v_1 - v_theta|²

The loss is least where s_i - s_j = (r_i - r_j)/tau, which tilts the reference by exp(r/(tau·beta')). The last term, of
the best sample alone, keeps the likelihood of all samples from falling together. Not distributionally robust
optimisation, which has the same acronym.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.objectives.denoising import denoising_error, implicit_reward
from difftilt.objectives.ranking import Suffixes, best_members, spread, suffix_cross_entropy
from difftilt.sampling.protocol import Edges, NoiseSource, Reduction, Sampler
from difftilt.statistics.folds import compact, segment_softmax
from difftilt.training.experience import Experience
from difftilt.training.offline import Groups, from_tensors, gathered, learnable, scored, to_tensors
from difftilt.training.protocol import Loss, Phase, Run, Task, Term
from difftilt.training.renoising import (
    ForwardConfig,
    ForwardProcess,
    frozen,
    levels,
    predicted,
    random_levels,
    renoised,
)

CARD = Card(
    name="gdro",
    entry="GDRO",
    paper="Wang et al. 2026, GDRO: Group-level Reward Post-training Suitable for Diffusion Models, arXiv 2601.02036",
    needs=("gaussian process", "per-sample reward", "offline data"),
    laws=("offset_per_prompt", "batch_split"),
)

ONE = 1e-9
"""Share of the solver's times of which at least one is always taken."""


class Config(ForwardConfig):
    """Defaults of the paper's OCR task, but for the number of groups."""

    groups: int = Field(default=16, ge=1)
    """Stored groups per iteration."""
    group_size: int = Field(default=6, ge=2)
    """k: samples of each group that are trained on, the first ones where more are stored."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Largest decay of the averaged weights that are evaluated; 0 evaluates the trained weights themselves."""
    collect: int | None = Field(default=None, ge=1)
    """Groups that the reference draws once, before the first update, where the task has no data."""
    tau: float = Field(default=0.05, ge=0)
    """Temperature of the soft ranking, in units of the reward; 0 keeps the ranking alone and leaves out ties."""
    beta: float = Field(default=12.0, gt=0)
    """Stiffness: implicit reward per unit of denoising error. A number of one ``reduction``."""
    gamma: float = Field(default=0.5, ge=0)
    """Weight of the denoising error of the best sample of a group."""
    suffixes: Suffixes = "all"
    """``all`` is the full loss; ``first`` the top-1 version, the cross-entropy over the whole group alone."""
    reduction: Reduction = "sum"
    """Of the squared errors over the dimensions of a latent."""
    times: Literal["uniform", "grid"] = "uniform"
    """Where a group is re-noised to: anywhere in (0, 1), or at a time of the solver's grid."""
    shared_noise: bool = False
    """One noise for all samples of a group in place of one for each."""


class GDRO(ForwardProcess[Config]):
    """Draw stored groups, re-noise them, regress the soft ranking."""

    sampled_role = "reference"

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task, CARD.name)
        if task.data is None and config.collect is None:
            raise UserError(
                f"gdro needs offline data, which {task.name!r} does not offer: make some with `difftilt collect` and "
                "name them with data=DIR, or set method.collect to the number of groups to draw before training"
            )
        if task.data is not None and config.steps is not None and config.times == "uniform":
            raise UserError(
                f"method.steps = {config.steps} says how groups are drawn, and the data of {task.name!r} are drawn "
                "already: leave steps and shift out, or set method.times to grid, which re-noises to their times"
            )
        self.task = task
        self.groups: Groups | None = None
        if task.data is not None:
            self.groups = learnable(task.data, task, config.group_size)
        self._own = task.data is None

    def sampler(self, task: Task) -> Sampler:
        """The task's, guidance included: so are the loss and the evaluation."""
        return task.sampler

    def collect(self, run: Run) -> Experience:
        """Groups of the data in their turn, each with one time; before the first ones the data, if there are none."""
        if self.groups is None:
            self.groups = self._drawn(run)
        config = self.config
        drawn = run.stored(self.groups.data, self.groups.rows, config.groups)
        return replace(drawn, edges=self._times(run, drawn.group), label=self._top_target(drawn))

    def _drawn(self, run: Run) -> Groups:
        """The offline stage: groups of the reference, scored once, of all processes."""
        config = self.config
        assert config.collect is not None
        batch = run.prompts(config.collect, config.group_size)
        data = gathered(run, scored(run, batch, partial(self.finished, run)))
        return learnable(data, run.task, config.group_size)

    def _times(self, run: Run, group: Int[Tensor, " samples"]) -> Edges:
        """One edge for each sample, at a time that its group shares."""
        if self.config.times == "grid":
            return random_levels(run.noise, self.grid, ONE, group)
        t = run.noise.uniform(group, (1,), purpose="training time")
        return levels(torch.zeros_like(group)[:, None], t)

    def _top_target(self, drawn: Experience) -> Float[Tensor, " samples"]:
        """q_1: what the whole group's cross-entropy asks of each sample."""
        assert drawn.rewards is not None
        if self.config.tau == 0:
            return best_members(drawn.rewards, drawn.group).float()
        return segment_softmax(drawn.rewards.double() / self.config.tau, *compact(drawn.group)).float()

    def phases(self, run: Run) -> Sequence[Phase]:
        """One: the regression; the loss is a mean over groups."""
        before = partial(per_group, run)
        return [Phase("current", partial(self._loss, run), unit="group", updates=self.config.updates, before=before)]

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        config = self.config
        assert rows.x_0 is not None
        assert rows.rewards is not None
        assert rows.weight is not None
        key = rows.group if config.shared_noise else None
        x_t = renoised(run.denoiser("current").process, rows, noise, key)
        # the policy that drew the data, and that is evaluated, is the guided one
        guidance = run.task.sampler.guidance
        reference = frozen(run, "reference", x_t, rows, guidance)
        current = predicted(run, "current", x_t, rows, guidance)
        gain = implicit_reward(current, reference, rows.x_0, reduce=config.reduction)
        ranking = suffix_cross_entropy(
            config.beta * gain, rows.rewards, rows.group, tau=config.tau, suffixes=config.suffixes
        )
        best = rows.weight * best_members(rows.rewards, rows.group)
        terms = {"ranking": Term(rows.weight * ranking)}
        if config.gamma:
            terms["best"] = Term(best * denoising_error(current, rows.x_0, reduce=config.reduction), config.gamma)
        return Loss(terms, self._metrics(rows, gain.detach(), best))

    def _metrics(
        self, rows: Experience, gain: Float[Tensor, " rows"], best: Float[Tensor, " rows"]
    ) -> dict[str, Tensor]:
        """Means over groups: displacement of the best sample, spread of s and the one that it is to reach."""
        assert rows.rewards is not None
        assert self.groups is not None
        metrics = {
            "displacement": -gain * best,
            "implicit_spread": self.config.beta * spread(gain, rows.group) * best,
            "dropped_groups": torch.full_like(gain, float(self.groups.dropped)),
        }
        if self.config.tau:
            metrics["target_spread"] = spread(rows.rewards, rows.group) / self.config.tau * best
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """The data that the method has drawn itself."""
        return {} if self.groups is None or not self._own else to_tensors(self.groups.data)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Data that were drawn before an interruption are read back, not drawn again."""
        if state and self._own:
            self.groups = learnable(from_tensors(state), self.task, self.config.group_size)


def per_group(run: Run, rows: Experience) -> Experience:
    """The rows of an update with the weight rows/groups: a mean over rows of weighted rows is one over groups."""

    def ratio(group: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        return torch.full((len(group),), len(group) / max(1, len(group.unique())), device=group.device)

    return rows.changed(weight=run.jointly(ratio, rows.group))
