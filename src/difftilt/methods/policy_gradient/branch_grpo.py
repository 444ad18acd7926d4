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
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as Settings
from difftilt.credit.tree import Width, depth_advantage, kept_leaves, path_fusion, width_mask
from difftilt.errors import UserError
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.noise import Siblings
from difftilt.sampling.protocol import NoiseSource, Trajectory
from difftilt.sampling.rollout import Plan, rollout, start_state
from difftilt.sampling.windows import drifting_start, window_mask
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.policy_gradient import (
    PolicyGradient,
    PolicyGradientConfig,
    Window,
    experience_of,
    with_advantage,
)
from difftilt.training.protocol import Phase, Run, Task
from difftilt.trees import take

CARD = Card(
    name="branch-grpo",
    entry="BranchGRPO",
    paper="Li et al. 2025, BranchGRPO: Stable and Efficient GRPO with Structured Branching in Diffusion Models, "
    "arXiv 2509.06040",
    needs=("gaussian process", "stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)


class DepthPruning(Settings):
    """A moving window of steps that carry no gradient."""

    size: int = Field(default=4, ge=1)
    """Steps without a gradient."""
    every: int = Field(default=30, ge=1)
    """Iterations between moves, by one step."""
    direction: Literal["later", "earlier"] = "later"
    """From the last split to the data (paper), or from the data back to the last split (released code)."""
    start: int | None = Field(default=None, ge=0)
    """First step of the first window; None is the last split, or where the window ends with the last trained step."""
    stop: int | None = Field(default=None, ge=0)
    """First step of the last window, which then stays; None is the other of the two."""

    def ends(self, last_split: int, steps: int) -> tuple[int, int]:
        """First steps of the first and of the last window on a grid of ``steps``."""
        near, far = last_split, steps - 1 - self.size
        first, last = (near, far) if self.direction == "later" else (far, near)
        return first if self.start is None else self.start, last if self.stop is None else self.stop


class Config(PolicyGradientConfig):
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
    width: Width = "none"
    """After the last split train all chains, the best child of each split, or the best and worst leaves of a tree."""
    extreme: int = Field(default=4, ge=1)
    """So many best and so many worst leaves where ``width`` is ``extreme``."""
    depth: DepthPruning | None = None
    """Window of steps without a gradient; None trains all."""
    prune_iterations: int | None = Field(default=None, ge=0)
    """First iterations, in which pruning acts; None is all."""
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
        _check(config, self.splits, self.steps)

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

    def grow(self, run: Run, batch: PromptBatch) -> Trajectory:
        """One tree for each group of the batch; its leaves stand where the batch has the group's rows."""
        roots = take(batch, torch.arange(0, len(batch.index), self.config.group_size))
        key = torch.zeros_like(roots.index) if self.config.same_start else roots.index
        return rollout(
            run.denoiser("current"),
            self.preset,
            self.grid,
            start_state(run.task.model.process, run.noise, key, run.task.model.shape),
            roots.condition,
            noise=run.noise,
            index=roots.index,
            plan=self.plan(run.iteration, run.noise),
        )

    def collect(self, run: Run) -> Experience:
        """Grow, score the leaves, fuse, compare, prune. A tree lives in one process, and so do its statistics."""
        batch = run.prompts(self.config.groups, self.config.group_size)
        tree = self.grow(run, batch)
        experience = experience_of(batch, tree, run.score(run.samples(tree.x_0, batch)))
        edges = experience.edges
        rewards, parent, log_prob = experience.rewards, edges.parent, edges.log_prob
        assert rewards is not None
        assert parent is not None
        assert log_prob is not None
        value = path_fusion(rewards, tree.last_edge, parent, edges.step, log_prob, self.config.fusion_beta)
        advantage = depth_advantage(value, batch.group[edges.sample], edges.step, clip=self.config.advantage_clip)
        pruned = replace(experience, edges=replace(edges, mask=self.kept(run.iteration, experience)))
        return with_advantage(pruned, advantage[:, None])

    def kept(self, iteration: int, experience: Experience) -> Bool[Tensor, " edges"]:
        """False for pruned edges."""
        config, edges = self.config, experience.edges
        assert experience.rewards is not None
        if config.prune_iterations is not None and iteration >= config.prune_iterations:
            return torch.ones_like(edges.step, dtype=torch.bool)
        leaves = kept_leaves(
            experience.rewards, experience.group, config.width, children=config.children, extreme=config.extreme
        )
        mask = width_mask(leaves, edges.sample, edges.step, self.splits[-1])
        if config.depth is None:
            return mask
        start = drifting_start(iteration, *config.depth.ends(self.splits[-1], self.steps), config.depth.every)
        return mask & ((edges.step < start) | (edges.step >= start + config.depth.size))

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


def _check(config: Config, splits: tuple[int, ...], steps: int) -> None:
    """Refuse pruning and windows that leave nothing to compare, with the setting that would work."""
    if config.width == "parent_top1" and len(splits) < 2:
        raise UserError("method.width = parent_top1 leaves one leaf of a tree with one split: raise method.group_size")
    if config.width == "extreme" and 2 * config.extreme > config.group_size:
        raise UserError(f"method.extreme = {config.extreme}: a tree has {config.group_size} leaves, use at most half")
    if config.window is not None:
        config.window.check(len(_others(splits, steps)) + 1)
    if config.depth is None:
        return
    first, last = config.depth.ends(splits[-1], steps)
    low, high = min(first, last), max(first, last) + config.depth.size
    if low < 0 or high > steps - 1:
        raise UserError(
            f"method.depth covers steps {low} to {high - 1}, and 0 to {steps - 2} are trained: make depth.size "
            "smaller, or move depth.start and depth.stop"
        )
    if (last - first) * (1 if config.depth.direction == "later" else -1) < 0:
        raise UserError(
            f"method.depth goes {config.depth.direction}, but stops at {last} and starts at {first}: exchange them, or "
            "change depth.direction"
        )
    if config.depth.size >= steps - 1 - splits[0]:
        raise UserError(f"method.depth.size = {config.depth.size} prunes every trained step: make it smaller")
