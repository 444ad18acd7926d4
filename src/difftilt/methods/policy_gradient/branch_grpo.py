"""BranchGRPO: one tree of chains per prompt, its leaf rewards fused upwards and compared at every depth.

All leaves of a tree share their first noise and split at a few steps into children whose noise is correlated, so that
each leaf has the law of a chain while early steps are computed once. A node is worth the path-weighted mean of its
leaves; nodes of one depth of one tree are compared, and the edge that leads to a node gets its advantage:

    A(n) = (v(n) - mean of its depth)/(std of its depth),  L = mean over kept edges max(-A·rho, -A·clip(rho, 1 ± c))

Pruning leaves edges out of the loss, and changes neither rollout nor advantages.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.credit.tree import depth_advantage, path_fusion
from difftilt.errors import UserError
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.noise import Siblings
from difftilt.sampling.protocol import Moment, NoiseSource, Trajectory
from difftilt.sampling.rollout import Plan, rollout, start_state
from difftilt.sampling.steps import GaussianStep
from difftilt.sampling.windows import window_mask
from difftilt.training.experience import Experience, PromptBatch, scored_experience
from difftilt.training.policy_gradient import (
    PolicyGradient,
    PolicyGradientConfig,
    Window,
    with_advantage,
)
from difftilt.training.protocol import Phase, Run, Task
from difftilt.training.pruning import PruningConfig, check_pruning, unpruned
from difftilt.trees import take

CARD = Card(
    name="branch-grpo",
    entry="BranchGRPO",
    paper="Li et al. 2025, BranchGRPO: Stable and Efficient GRPO with Structured Branching in Diffusion Models, "
    "arXiv 2509.06040",
    needs=("gaussian process", "stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)


class Config(PolicyGradientConfig, PruningConfig):
    """The tree, its fusion and its pruning; ``group_size`` is the number of leaves."""

    kernel: Literal["flow_sde", "dance_sde", "cps", "ddim", "unmasking"] = "dance_sde"
    """Stochastic step and its log-probability convention; tokens have no correlated noise."""
    noise_level: float = Field(default=0.3, gt=0)
    """``eta`` of dance_sde and ddim, ``a`` of flow_sde and cps."""
    clip_range: float | None = Field(default=1e-3, gt=0)
    """c, the paper's for images; None takes the preset's. With 2 to 64 dimensions use 0.05 to 0.2."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference; the paper has none."""
    ema: float = Field(default=0.995, ge=0, lt=1)
    """Largest decay of the averaged weights that are evaluated, updated every 8 steps; 0 evaluates the trained ones."""
    children: int = Field(default=2, ge=2)
    """Children of a node that splits."""
    splits: tuple[int, ...] | None = None
    """Steps that split, rising. None: step 0 and every third, or as far apart as the grid allows."""
    spread: float = Field(default=4.0, gt=0)
    """s of the siblings' noise (shared + s·own)/sqrt(1 + s²)."""
    noise_mode: Siblings = "correlated"
    """``scaled`` is s·own, as released: it breaks the law of the leaves, and is there for comparison."""
    same_start: bool = False
    """One initial noise for all trees of an iteration."""
    fusion_beta: float = Field(default=1.0, ge=0)
    """Weight of a leaf in its ancestors is softmax of beta·log p(path), log p per dimension; 0 is the plain mean."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """Bound of the absolute advantage."""
    window: Window | None = None
    """BranchGRPO-Mix: only the splits and a window over the other steps are stochastic and trained. None: all steps."""


class BranchGRPO(PolicyGradient[Config]):
    """Grow trees with ``current``, fuse, compare per depth, prune, climb the clipped surrogate."""

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        if isinstance(task.model.process, MaskedProcess):
            raise UserError(f"{task.name} has tokens: the correlated noise of siblings needs a Gaussian process")
        self.steps = len(self.grid) - 1
        self.splits = _splits(config, self.steps)
        check_pruning(config, splits=self.splits, leaves=config.group_size, steps=self.steps)
        if config.window is not None:
            config.window.check(len(_others(self.splits, self.steps)) + 1)

    def plan(self, iteration: int, noise: NoiseSource) -> Plan:
        """The tree; its last step is never trained, and the x0-prediction before it is the sample."""
        trained = window_mask(self.steps, self.splits[0], self.steps - 1 - self.splits[0])
        stochastic = window_mask(self.steps, 0, self.steps - 1)
        if self.config.window is not None:
            others = _others(self.splits, self.steps)
            start = self.config.window.start(len(others) + 1, iteration, noise)
            stochastic = torch.zeros_like(stochastic)
            stochastic[[*self.splits, *others[start : start + self.config.window.width]]] = True
        return Plan(
            stochastic=stochastic,
            record=stochastic & trained,
            means=self.config.objective == "guard",
            branch=dict.fromkeys(self.splits, self.config.children),
            spread=self.config.spread,
            siblings=self.config.noise_mode,
            output="x0",
        )

    def grow(self, run: Run, batch: PromptBatch) -> tuple[Trajectory, Float[Tensor, " edges"]]:
        """One tree for each group, and the log-density of every edge, a mean over dimensions.

        Leaves stand where the batch has the group's rows. The density is that of the Gaussian step under any kernel:
        what the ratio scores need be none (cps: a squared error), and no path has a probability by that.
        """
        roots = take(batch, torch.arange(0, len(batch.index), self.config.group_size))
        key = torch.zeros_like(roots.index) if self.config.same_start else roots.index
        plan, densities = self.plan(run.iteration, run.noise), list[Tensor]()
        recorded = plan.record

        def weigh(moment: Moment, x_s: Tensor) -> None:
            assert recorded is not None
            if bool(recorded[int(moment.position)]):
                assert isinstance(moment.step, GaussianStep)
                densities.append(moment.step.log_prob(x_s, reduce="mean"))

        tree = rollout(
            run.denoiser("current"),
            self.preset,
            self.grid,
            start_state(run.task.model.process, run.noise, key, run.task.model.shape, roots.condition),
            roots.condition,
            noise=run.noise,
            index=roots.index,
            plan=plan,
            observe=weigh,
        )
        return tree, torch.cat(densities)

    def collect(self, run: Run) -> Experience:
        """Grow, score the leaves, fuse, compare, prune. A tree lives in one process, and so do its statistics."""
        batch = run.prompts(self.config.groups, self.config.group_size)
        tree, density = self.grow(run, batch)
        samples = run.samples(tree.x_0, batch)
        experience = scored_experience(batch, tree.x_0, tree.edges, run.score(samples), samples.media)
        edges = experience.edges
        assert experience.rewards is not None
        assert edges.parent is not None
        value = path_fusion(
            experience.rewards, tree.last_edge, edges.parent, edges.step, density, self.config.fusion_beta
        )
        advantage = depth_advantage(value, batch.group[edges.sample], edges.step, clip=self.config.advantage_clip)
        kept = unpruned(
            self.config,
            run.iteration,
            experience,
            splits=self.splits,
            children=self.config.children,
            steps=self.steps,
        )
        return with_advantage(replace(experience, edges=replace(edges, mask=kept)), advantage[:, None])

    def phases(self, run: Run) -> Sequence[Phase]:
        """The surrogate on single edges, shuffled: the mean over edges does not depend on the size of a tree."""
        return [replace(phase, unit="edge") for phase in super().phases(run)]


def _others(splits: Sequence[int], steps: int) -> list[int]:
    """Trained steps that do not split."""
    return [step for step in range(steps - 1) if step not in splits]


def _splits(config: Config, steps: int) -> tuple[int, ...]:
    """Steps that split; refuses those that do not fit the leaves or the grid."""
    count, leaves = 0, 1
    while leaves < config.group_size:
        count, leaves = count + 1, leaves * config.children
    if leaves != config.group_size:
        raise UserError(
            f"method.group_size = {config.group_size} is no power of children = {config.children}: a tree has "
            f"{leaves // config.children} or {leaves} leaves"
        )
    if config.splits is None:
        if count > steps - 1:
            raise UserError(f"{count} splits do not fit before the last of {steps} steps: lower method.group_size")
        apart = min(3, (steps - 2) // max(count - 1, 1))
        return tuple(range(0, count * apart, apart)) if count > 1 else (0,)
    if len(config.splits) != count:
        raise UserError(
            f"method.splits = {list(config.splits)} makes {config.children ** len(config.splits)} leaves: set "
            f"method.group_size to that, or give {count} splits"
        )
    if any(one >= other for one, other in pairwise(config.splits)):
        raise UserError(f"method.splits = {list(config.splits)} must rise: put the steps in order, each once")
    if config.splits[0] < 0 or config.splits[-1] > steps - 2:
        raise UserError(
            f"method.splits = {list(config.splits)} leaves the grid: of {steps} steps, 0 to {steps - 2} may split, "
            "the last is never trained"
        )
    return config.splits
