"""TurningPoint-GRPO: a step is paid for what it changed, and one that turns the trend for all that follows from it.

Inside a window of stochastic steps R_k is the reward of the ODE completion of state k; the steps outside follow the
ODE, so R_0 is that of the ODE from the very same noise, and R_K = F that of the sample. Step k gains d_k = R_{k+1} -
R_k. A turning point reverses the local trend into that of the whole chain; its gain is replaced by F - R_k:

    A_k = group advantage of (F - R_k at a turning point, else d_k),

each step on its own, in the clipped surrogate of Flow-GRPO.
"""

from dataclasses import replace
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.credit.gains import Assignment, Definition, step_rewards, turning_points
from difftilt.sampling.protocol import NoiseSource, Observe, Trajectory
from difftilt.sampling.rollout import Plan
from difftilt.training.advantages import NormaliserConfig
from difftilt.training.completions import ScoredChains, check_completions, score_along
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.policy_gradient import ChainConfig, ChainPolicyGradient
from difftilt.training.protocol import Run, Task

CARD = Card(
    name="tp-grpo",
    entry="TPGRPO",
    paper="Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO, "
    "arXiv 2602.06422",
    needs=("gaussian process", "stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)


class Config(ChainConfig, NormaliserConfig):
    """Rollout, turning points and update."""

    kernel: Literal["flow_sde", "dance_sde", "cps", "ddim", "unmasking"] = "cps"
    """Stochastic step and its log-probability convention."""
    kl_weight: float = Field(default=4e-4, ge=0)
    """Weight of the KL to the reference."""
    definition: Definition = "consistent"
    """Turning points: ``consistent``, ``basic``, or every ``reversal`` of the gain's sign."""
    assignment: Assignment = "replace"
    """Their credit: F - R_k; d_k and a ``bonus`` F - R_k; or as ``released``: F - R_0 everywhere, here d_k on top."""
    bonus_weight: float = Field(default=1.0, gt=0)
    """Weight of what ``bonus`` and ``released`` add."""
    balance: bool = True
    """Keep as many positive as negative turning points, those of the largest assigned value."""
    dead_zone: float = Field(default=0.0, ge=0)
    """Differences of rewards up to this size have no sign: of noisy or quantised rewards."""


class TPGRPO(ChainPolicyGradient[Config]):
    """Roll out, complete every state, credit gains and turning points, compare step by step."""

    def __init__(self, config: Config, task: Task) -> None:
        check_completions(task)
        super().__init__(config, task)

    def plan(self, iteration: int, noise: NoiseSource) -> Plan:
        """A window, or all steps but the last; the others follow the ODE."""
        plan = super().plan(iteration, noise)
        return replace(plan, stochastic=plan.record) if plan.stochastic is None else plan

    def collect(self, run: Run) -> Experience:
        """Roll out, score every state's completion, find turning points, compare."""
        batch = run.prompts(self.config.groups, self.config.group_size)
        return self.chains(run, batch).experience(run, self.credit, self.config)

    def chains(self, run: Run, batch: PromptBatch) -> ScoredChains:
        """Rollouts with the reward of every state."""

        def roll(observe: Observe) -> Trajectory:
            return self.roll(run, batch, observe=observe)

        stochastic = self.plan(run.iteration, run.noise).stochastic
        return score_along(run, batch, roll, self.grid, stochastic, one_first_state=self.config.share_start)

    def credit(self, rewards: Float[Tensor, "samples states"]) -> Float[Tensor, "samples steps"]:
        """What the steps of all samples of the iteration are compared by."""
        config = self.config
        turning = turning_points(rewards, config.definition, config.dead_zone)
        return step_rewards(rewards, turning, config.assignment, config.bonus_weight, config.balance)
