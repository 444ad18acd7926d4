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
from difftilt.credit.group import broadcast
from difftilt.credit.history import History
from difftilt.errors import UserError
from difftilt.models.mlp import MLP
from difftilt.models.protocol import RoleSpec, Trained
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.protocol import NoiseSource, Trajectory
from difftilt.sampling.solvers import DPMSolverPP
from difftilt.sampling.windows import compressed
from difftilt.training.advantages import AdvantageConfig, Advantages, check_best_worst, drawn_steps
from difftilt.training.drawing import rolled
from difftilt.training.experience import Experience, PromptBatch, scored_experience
from difftilt.training.policy_gradient import ChainConfig, ChainPolicyGradient
from difftilt.training.protocol import Loss, Phase, Run, Task, Term

CARD = Card(
    name="flow-grpo",
    entry="FlowGRPO",
    paper="Liu et al. 2025, Flow-GRPO: Training Flow Matching Models via Online RL, arXiv 2505.05470",
    needs=("stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)


class Config(ChainConfig, AdvantageConfig):
    """Rollout and update; the comparison of rewards and the objective are shared by the whole family."""

    flash_steps: int | None = Field(default=None, ge=1)
    """Steps of a second-order solver from the window's end to the data, on a compressed grid (MixGRPO-Flash)."""
    step_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the trainable steps that is trained, drawn for each sample (DanceGRPO: 0.6)."""
    value_baseline: bool = False
    """Subtract a learned value V(x_t, t, prompt) from the advantage (optional in DPOK)."""
    unit: Literal["sample", "edge"] = "sample"
    """What the updates share out: whole samples with all their steps, or single steps shuffled (DDPO)."""


class FlowGRPO(ChainPolicyGradient[Config]):
    """Roll out with ``current``, compare in groups, climb the clipped surrogate."""

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        _check(config, task)
        self.advantages = Advantages(config, len(task.prompts))
        self.values = MLP(prod(task.model.shape), 1, classes=len(task.prompts)) if config.value_baseline else None

    def roles(self) -> Mapping[str, RoleSpec]:
        """``ema`` for evaluation, ``value`` for the learned baseline."""
        roles = dict(super().roles())
        if self.values is not None:
            roles["value"] = Trained(source=None, network=self.values)
        return roles

    def collect(self, run: Run) -> Experience:
        """Roll out groups, score, compare; the trained steps become edges with their sample's advantage."""
        batch = run.prompts(self.config.groups, self.config.group_size)
        trajectory, samples, scores = rolled(run, batch, partial(self.finished, run))
        experience = scored_experience(batch, trajectory.x_0, trajectory.edges, scores, samples.media)
        advantage = self.advantages(run, experience)
        mask = self._trained(run, experience, advantage)
        edges = replace(experience.edges, advantage=broadcast(advantage, experience.edges.sample), mask=mask)
        return replace(experience, edges=edges)

    def finished(self, run: Run, batch: PromptBatch) -> Trajectory:
        """Chains along the whole grid, or with ``flash_steps`` to the window's end and by a fast solver from there."""
        flash, last = self.config.flash_steps, len(self.grid) - 1
        stochastic = self.plan(run.iteration, run.noise).stochastic
        if flash is None or stochastic is None:
            return self.roll(run, batch)
        end = int(stochastic.nonzero().max()) + 1
        trajectory = self.roll(run, batch, end=end)
        rest = compressed(self.grid[end:], min(flash, last - end))
        x_0 = DPMSolverPP()(run.denoiser("current"), trajectory.x_0, batch.condition, rest)
        return replace(trajectory, x_0=x_0)

    def _trained(self, run: Run, experience: Experience, advantage: Tensor) -> Bool[Tensor, " edges"]:
        """False for samples that teach nothing or were not selected, and for steps not drawn."""
        kept = self.advantages.selected(run, advantage, experience.group)[experience.edges.sample]
        return kept & drawn_steps(run, experience, self.config.step_fraction)

    def phases(self, run: Run) -> Sequence[Phase]:
        """The surrogate with its KL, and the regression of the value where there is one."""
        phases = [replace(phase, unit=self.config.unit) for phase in super().phases(run)]
        return phases if self.values is None else [*phases, Phase("value", partial(self._value_loss, run))]

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        if self.values is not None:
            assert rows.edges.advantage is not None
            advantage = rows.edges.advantage - self._value(run, rows).detach()[:, None]
            rows = replace(rows, edges=replace(rows.edges, advantage=advantage))
        return super()._loss(run, rows, noise)

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


def _check(config: Config, task: Task) -> None:
    """Refuse what cannot work, with the setting that would."""
    tokens = isinstance(task.model.process, MaskedProcess)
    if tokens and config.value_baseline:
        raise UserError(f"{task.name} has tokens: method.value_baseline reads continuous states")
    if config.flash_steps is not None and config.window is None:
        raise UserError("method.flash_steps replaces the steps after a window: set method.window, or leave it out")
    if config.flash_steps is not None and config.output == "x0":
        raise UserError("method.flash_steps needs the state at the window's end: set method.output to state")
    if config.aggregation is not None and config.advantage != "group":
        raise UserError(f"method.aggregation compares in groups: set method.advantage to group, not {config.advantage}")
    if config.component_weights and config.aggregation is None:
        raise UserError(
            "method.component_weights belong to method.aggregation: set it, or weigh the rewards themselves"
        )
    check_best_worst(config.best_worst, config.group_size)
