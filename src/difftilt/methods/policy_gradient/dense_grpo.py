"""DenseGRPO: every step is paid for what it changed, and gets as much noise as its gains stay balanced under.

The ODE completes every state of a rollout, R_k is the reward of the completion of state k, and the gain of step k

    d_k = R_{k+1} - R_k,        Σ_k d_k = (reward of the sample) - R_0,

compared with those of the same step in the group, is the advantage of that step in the clipped surrogate of Flow-GRPO.
Before training the noise rate psi of every step is raised while positive and negative gains of the base model balance,
lowered where they do not, and then kept.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.credit.gains import gains
from difftilt.sampling.completion import Strides, remaining
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import Observe, Trajectory
from difftilt.sampling.rollout import Plan
from difftilt.sampling.windows import window_mask
from difftilt.training.advantages import NormaliserConfig
from difftilt.training.calibration import Calibration, CalibrationConfig, calibrate, calibrated_preset
from difftilt.training.completions import Roll, ScoredChains, check_completions, score_along
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.policy_gradient import ChainConfig, ChainPolicyGradient
from difftilt.training.protocol import Run, Task

CARD = Card(
    name="dense-grpo",
    entry="DenseGRPO",
    paper="DenseGRPO: From Sparse to Dense Reward for Flow Matching Model Alignment, arXiv 2601.20218",
    needs=("gaussian process", "stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)


class Config(ChainConfig, NormaliserConfig, CalibrationConfig):
    """Rollout, completions, calibration and update."""

    credit: Literal["gain", "next"] = "gain"
    """What a step is compared by: its gain, or the reward of the state that it reached (the paper's ablation)."""
    completion_steps: int | None = Field(default=None, ge=1)
    """Evaluations of a completion; None takes all steps that are left, 1 is the x0-prediction."""


class DenseGRPO(ChainPolicyGradient[Config]):
    """Roll out, complete every state, compare gains step by step."""

    def __init__(self, config: Config, task: Task) -> None:
        check_completions(task)
        super().__init__(config, task)
        config.check(self.preset.kernel)
        self.uncalibrated = self.preset
        self.calibration = Calibration.none(len(self.grid) - 1)

    def collect(self, run: Run) -> Experience:
        """Calibrate before the first rollout; roll out, score every state's completion, compare."""
        config = self.config
        if config.calibrated and not self.calibration.done:
            self._calibrate(run)
        batch = run.prompts(config.groups, config.group_size)

        def roll(observe: Observe) -> Trajectory:
            return self.roll(run, batch, observe=observe)

        chains = self._along(run, batch, roll, self.plan(run.iteration, run.noise).stochastic)
        return chains.experience(run, gains if config.credit == "gain" else _reached, config)

    def _along(
        self, run: Run, batch: PromptBatch, roll: Roll, stochastic: Bool[Tensor, " steps"] | None
    ) -> ScoredChains:
        count, shared = self.config.completion_steps, self.config.share_start
        schedule = remaining if count is None else Strides(count)
        return score_along(run, batch, roll, self.grid, stochastic, schedule=schedule, one_first_state=shared)

    def gains_under(self, run: Run, batch: PromptBatch, preset: Preset) -> Float[Tensor, "samples gains"]:
        """Gains of all steps but the last under another kernel, window or not; the last step follows the ODE."""
        stochastic = window_mask(len(self.grid) - 1, 0, len(self.grid) - 2)
        plan = Plan(stochastic=stochastic, output=self.config.output)

        def roll(observe: Observe) -> Trajectory:
            return self.roll(run, batch, observe=observe, plan=plan, preset=preset)

        return gains(self._along(run, batch, roll, stochastic).rewards)

    def _calibrate(self, run: Run) -> None:
        used = self.config.groups * self.config.group_size
        measure = partial(self.gains_under, run)
        self.calibration = calibrate(run, self.config, self.grid, self.uncalibrated.kernel, measure, used)
        self.preset = calibrated_preset(self.grid, self.calibration)

    def state_dict(self) -> dict[str, Tensor]:
        """The rates of the steps, NaN before they are calibrated, and the signs they were last judged by."""
        return {"psi": self.calibration.rates, "signs": self.calibration.signs}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.calibration = Calibration(state["psi"], state["signs"])
        calibrated = self.calibration.done
        self.preset = calibrated_preset(self.grid, self.calibration) if calibrated else self.uncalibrated


def _reached(rewards: Float[Tensor, "samples states"]) -> Float[Tensor, "samples steps"]:
    return rewards[:, 1:]
