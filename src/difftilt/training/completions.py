"""Rewards along a chain: what the ODE would make of each of its states (DenseGRPO, TP-GRPO)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difftilt.credit.gains import per_step
from difftilt.errors import UserError
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Scores
from difftilt.sampling.completion import Ahead, Grid, Schedule, Start, complete, remaining
from difftilt.sampling.protocol import Observe, Trajectory
from difftilt.statistics.folds import distinct
from difftilt.training.advantages import NormaliserConfig
from difftilt.training.experience import Experience, PromptBatch, scored_experience
from difftilt.training.policy_gradient import with_advantage
from difftilt.training.protocol import Run, Task
from difftilt.trees import take


def rewards_along(
    run: Run, batch: PromptBatch, starts: Sequence[Start], *, one_first_state: bool = False
) -> Float[Tensor, "samples states"]:
    """Reward of the completion of each start by the current weights; no gradient.

    Args:
        run: completes with ``current`` and scores.
        batch: whose chains they are, one row per row of a start.
        starts: states of the same chains at several times, one column each.
        one_first_state: the chains of a group have the first of these states in common, which is then completed and
            scored once for the group.
    """
    every = torch.arange(len(batch.index), device=batch.index.device)
    once = distinct(batch.group) if one_first_state else (every, every)
    kept = [once, *[(every, every)] * (len(starts) - 1)]
    x_0 = complete(run.denoiser("current"), [take(start, rows) for start, (rows, _) in zip(starts, kept, strict=True)])
    columns = [
        run.score(run.samples(x, take(batch, rows))).total[again] for x, (rows, again) in zip(x_0, kept, strict=True)
    ]
    return torch.stack(columns, 1)


Roll = Callable[[Observe], Trajectory]
"""Makes a rollout, watched by what it is handed."""


@dataclass(frozen=True)
class ScoredChains:
    """Chains with the reward of every state that a stochastic step left or reached.

    Attributes:
        batch: whose chains they are.
        trajectory: of the rollout.
        scores: of its samples.
        rewards: R_0..R_K, (samples, states): R_k of the completion of the state before stochastic step k, R_K of the
            sample. What follows the last stochastic step is the ODE (or nothing), so the sample is the completion of
            the state that this step reached.
        first: place of stochastic step 0 on the grid.
    """

    batch: PromptBatch
    trajectory: Trajectory
    scores: Scores
    rewards: Float[Tensor, "samples states"]
    first: int

    def experience(
        self,
        run: Run,
        credit: Callable[[Float[Tensor, "samples states"]], Float[Tensor, "samples steps"]],
        config: NormaliserConfig,
    ) -> Experience:
        """The record, every edge with its step's credit, compared per step and group over all processes."""

        def compare(rewards: Tensor, group: Tensor) -> Tensor:
            advantage = per_step(credit(rewards), group, config.normaliser)
            return advantage.clamp(-config.advantage_clip, config.advantage_clip).float()

        advantage: Tensor = run.jointly(compare, self.rewards, self.batch.group)
        edges = self.trajectory.edges
        own = advantage[edges.sample, edges.step - self.first]
        return with_advantage(
            scored_experience(self.batch, self.trajectory.x_0, self.trajectory.edges, self.scores), own[:, None]
        )


def score_along(
    run: Run,
    batch: PromptBatch,
    roll: Roll,
    grid: Grid,
    stochastic: Bool[Tensor, " steps"] | None,
    *,
    schedule: Schedule = remaining,
    one_first_state: bool = False,
) -> ScoredChains:
    """Roll out, complete the state before every stochastic step by the ODE of the current weights, score all.

    T steps, all stochastic, cost T + T(T - 1)/2 evaluations and T + 1 rewards per chain with the whole completion: the
    rollout's own prediction is the first step of each.

    Args:
        run: completes with ``current`` and scores.
        batch: whose chains they are.
        roll: makes the rollout.
        grid: of the rollout.
        stochastic: its stochastic steps, consecutive; None is all.
        schedule: times of a completion.
        one_first_state: the chains of a group share the state before the first stochastic step.
    """
    places = range(len(grid) - 1) if stochastic is None else stochastic.nonzero()[:, 0].tolist()
    ahead = Ahead(grid, schedule, frozenset(places))
    trajectory = roll(ahead)
    scores = run.score(run.samples(trajectory.x_0, batch))
    starts = [ahead.starts[place] for place in places]
    before = rewards_along(run, batch, starts, one_first_state=one_first_state)
    return ScoredChains(batch, trajectory, scores, torch.cat([before, scores.total[:, None]], 1), places[0])


def check_completions(task: Task) -> None:
    """Refuse what has no ODE, and rewards of several states that would not be on one scale."""
    if isinstance(task.model.process, MaskedProcess):
        raise UserError(f"{task.name} has tokens, whose states no ODE completes: take a Gaussian process, or flow-grpo")
    check_scale(task, "a step's gain compares two batches")


def check_scale(task: Task, because: str) -> None:
    """Refuse a reward that has another unit in every batch where ``because`` one unit is needed."""
    if isinstance(task.reward, WeightedSum) and task.reward.normalise is not None:
        raise UserError(
            f"reward.normalise = {task.reward.normalise} scales every batch anew, and {because}: leave it out and "
            "weigh the rewards instead"
        )
