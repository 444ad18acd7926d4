"""B²-DiffuRL: train the last steps of the chain first, and compare chains that share everything before them.

A stage samples with the present weights. Chains of a group share their steps up to T - L, then split into b that run on
with noise of their own; L grows from stage to stage until the whole chain is trained. Rewards are normalised per prompt
over this stage and the ones before it, z = (r - mean)/std; of each group the best chain is kept if z >= 0.5 and
the worst if z < -0.5. Their steps inside the interval are trained with A = clip(z, ±5): by the clipped ratio, by the
likelihood with a KL (DPOK), or as a pair (D3PO).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.credit.history import Stages, stage_scores
from difftilt.credit.selection import Contrast, contrast
from difftilt.errors import UserError
from difftilt.objectives.preference import step_preference
from difftilt.process.gaussian import GaussianProcess
from difftilt.sampling.protocol import NoiseSource, Trajectory
from difftilt.sampling.rollout import Plan, replay, rollout, start_state
from difftilt.sampling.windows import interval_length, window_mask
from difftilt.training.drawing import rolled
from difftilt.training.experience import Experience, PromptBatch, scored_experience
from difftilt.training.policy_gradient import PolicyGradient, PolicyGradientConfig, with_advantage
from difftilt.training.protocol import Loss, Phase, Run, Task, Term
from difftilt.training.surrogate import surrogate_loss
from difftilt.trees import take

CARD = Card(
    name="b2-diffurl",
    entry="B2DiffuRL",
    paper="Hu et al. 2025, B²-DiffuRL: Training Diffusion Models with Reinforcement Learning Against "
    "Sparse Rewards, arXiv 2503.11240",
    needs=("stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)


class Config(PolicyGradientConfig):
    """Interval, selection and update; ``group_size`` is the number of branches of one prefix."""

    group_size: int = Field(default=5, ge=2)
    """Branches of a prefix."""
    kernel: Literal["flow_sde", "dance_sde", "cps", "ddim", "unmasking"] = "ddim"
    """Stochastic step and its log-probability convention."""
    noise_level: float = Field(default=1.0, gt=0)
    """``eta`` of ddim and dance_sde, ``a`` of flow_sde and cps."""
    clip_range: float | None = Field(default=0.1, gt=0)
    """c; None takes the preset's, made for images."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference (DPOK: above 0)."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Largest decay of the averaged weights that are evaluated, updated every 8 steps; 0 evaluates the trained ones."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the kept chains of a stage."""
    stages: int = Field(default=100, ge=1)
    """Iterations over which the interval grows; then it stays."""
    shortest: int | None = Field(default=None, ge=1)
    """Steps of the first interval; None is 70 % of the grid (14 of 20)."""
    longest: int | None = Field(default=None, ge=1)
    """Steps of the last interval; None is the whole chain."""
    train_last: bool = False
    """Train the last step of the chain as well, as the paper's code does; its std must not be 0."""
    threshold_best: float = 0.5
    """Least z of a best chain."""
    threshold_worst: float = -0.5
    """A worst chain has a smaller z."""
    history: int = Field(default=8, ge=0)
    """Earlier stages whose rewards count in the statistics of a prompt."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """Bound of the absolute z in the advantage."""
    positive_weight: float = Field(default=1.0, ge=0)
    """Factor of a positive advantage."""
    negative_weight: float = Field(default=1.0, ge=0)
    """Factor of a negative advantage."""
    preference_beta: float | None = Field(default=None, gt=0)
    """Train best and worst of a group as a pair of this sharpness (D3PO: 0.1), without ``objective`` and weights."""


class B2DiffuRL(PolicyGradient[Config]):
    """Branch at the interval, select by contrast, train the interval."""

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        self.steps = len(self.grid) - 1
        self.shortest = round(0.7 * self.steps) if config.shortest is None else config.shortest
        self.longest = self.steps if config.longest is None else config.longest
        _check(config, self.shortest, self.longest, self.steps)
        if config.train_last:
            _check_last(config, task, float(self.grid[-1]))
        self.memory = Stages.empty()

    def length(self, iteration: int) -> int:
        """L: steps of the interval, which ends at the data."""
        return interval_length(iteration, self.config.stages, self.shortest, self.longest)

    def plan(self, iteration: int) -> Plan:
        """Branches where the interval begins; its steps are recorded, the last one only where it is trained."""
        first, last = self.steps - self.length(iteration), self.steps if self.config.train_last else self.steps - 1
        return Plan(
            stochastic=window_mask(self.steps, 0, self.steps - 1) if self.clean_end else None,
            record=window_mask(self.steps, first, last - first),
            means=self.config.objective == "guard",
            branch={first: self.config.group_size},
        )

    def roll(self, run: Run, batch: PromptBatch) -> Trajectory:
        """One prefix for each group, once; its branches stand where the batch has the group's rows."""
        prefix = take(batch, torch.arange(0, len(batch.index), self.config.group_size))
        return rollout(
            run.denoiser("current"),
            self.preset,
            self.grid,
            start_state(run.task.model.process, run.noise, prefix.index, run.task.model.shape, prefix.condition),
            prefix.condition,
            noise=run.noise,
            index=prefix.index,
            plan=self.plan(run.iteration),
        )

    def collect(self, run: Run) -> Experience:
        """Sample the stage, normalise per prompt, keep the best and the worst of each group."""
        batch = run.prompts(self.config.groups, self.config.group_size)
        path, samples, scores = rolled(run, batch, partial(self.roll, run))
        experience = scored_experience(batch, path.x_0, path.edges, scores, samples.media)
        assert experience.rewards is not None
        z: Tensor = run.jointly(partial(self._scores, run.iteration), experience.rewards, batch.prompt)
        chosen = contrast(z, batch.group, self.config.threshold_best, self.config.threshold_worst)
        edges = replace(experience.edges, mask=self._kept(chosen)[experience.edges.sample])
        experience = replace(experience, edges=edges, pair=chosen.partner)
        return with_advantage(experience, self._advantage(z, chosen)[edges.sample][:, None])

    def _scores(self, stage: int, rewards: Tensor, prompt: Tensor) -> Float[Tensor, " samples"]:
        """Z of the rewards of all processes, which are remembered."""
        # the memory stays on the CPU, whatever the device of the rewards
        values, prompts = rewards.cpu(), prompt.cpu()
        self.memory = self.memory.push(values, prompts, stage, self.config.history)
        return stage_scores(self.memory, values, prompts).to(rewards.device)

    def _kept(self, chosen: Contrast) -> Bool[Tensor, " samples"]:
        """Chains that are trained: those that passed, as pairs only where both did."""
        return chosen.kept if self.config.preference_beta is None else chosen.partner >= 0

    def _advantage(self, z: Tensor, chosen: Contrast) -> Float[Tensor, " samples"]:
        """A = clip(z)·weight; of pairs the sign of the preference."""
        config = self.config
        if config.preference_beta is not None:
            return chosen.best.to(z) - chosen.worst.to(z)
        weight = torch.where(z > 0, config.positive_weight, config.negative_weight)
        return z.clamp(-config.advantage_clip, config.advantage_clip) * weight

    def phases(self, run: Run) -> Sequence[Phase]:
        """The surrogate on whole chains, or on whole pairs."""
        unit = "sample" if self.config.preference_beta is None else "group"
        return [replace(phase, unit=unit, epochs=self.config.epochs) for phase in super().phases(run)]

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        if self.config.preference_beta is None:
            return surrogate_loss(self.config, self.preset, run, rows)
        edges = rows.edges
        assert edges.x_s is not None
        assert edges.log_prob is not None
        assert edges.advantage is not None
        assert rows.pair is not None
        step = replay(run.denoiser("current"), self.preset, edges, rows.condition).step
        log_ratio = self.preset.log_prob(step, edges.x_s) - edges.log_prob
        value = step_preference(log_ratio, rows.pair, edges.advantage[:, 0], self.config.preference_beta)
        return Loss({"preference": Term(value)}, {"ratio": log_ratio.detach().exp()})

    def state_dict(self) -> dict[str, Tensor]:
        """The rewards of the newest stages."""
        return {"values": self.memory.values, "prompt": self.memory.prompt, "stage": self.memory.stage}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.memory = Stages(state["values"], state["prompt"], state["stage"])


def _check(config: Config, shortest: int, longest: int, steps: int) -> None:
    """Refuse what cannot work, with the setting that would."""
    if not shortest <= longest <= steps:
        raise UserError(
            f"method.shortest = {shortest} and method.longest = {longest} do not rise inside a grid of {steps} steps: "
            f"use at most {steps}, and a shortest that is not above the longest"
        )
    if shortest == 1 and not config.train_last:
        raise UserError("method.shortest = 1 is the last step alone, which is not trained: use 2, or train_last")
    if config.threshold_worst > config.threshold_best:
        raise UserError(
            f"method.threshold_worst = {config.threshold_worst} is above threshold_best = {config.threshold_best}: "
            "exchange them"
        )
    if config.preference_beta is not None and (config.objective != "clipped" or config.kl_weight):
        raise UserError(
            "method.preference_beta takes the place of the objective and of the KL: leave objective at clipped and "
            "kl_weight at 0, or leave preference_beta out"
        )


def _check_last(config: Config, task: Task, end: float) -> None:
    """Refuse to train a last step that has no density."""
    process = task.model.process
    if task.sampler.clean_end:
        raise UserError(f"{task.name} ends its chains by the ODE, so the last step has no density: unset train_last")
    if not isinstance(process, GaussianProcess) or config.kernel not in ("ddim", "cps"):
        return
    if float(process.sigma(torch.tensor([end]))) == 0:
        raise UserError(
            f"method.train_last: the last step of {config.kernel} ends without noise and has std 0: use flow_sde, or "
            "unset train_last"
        )
