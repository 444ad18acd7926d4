"""Pruning of trees: edges that carry no gradient, while rollout, rewards and advantages stay as they are.

In width, after the last split, chains are left out; in depth a moving window of steps (BranchGRPO, arXiv 2509.06040).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.credit.tree import Width, kept_leaves, width_mask
from difftilt.errors import UserError
from difftilt.sampling.windows import drifting_start
from difftilt.training.experience import Experience


class DepthPruning(Config):
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

    def check(self, splits: Sequence[int], steps: int) -> None:
        """Refuse a window that leaves the trained steps, goes the wrong way, or covers them all."""
        first, last = self.ends(splits[-1], steps)
        low, high = min(first, last), max(first, last) + self.size
        if low < 0 or high > steps - 1:
            raise UserError(
                f"method.depth covers steps {low} to {high - 1}, and 0 to {steps - 2} are trained: make depth.size "
                "smaller, or move depth.start and depth.stop"
            )
        if (last - first) * (1 if self.direction == "later" else -1) < 0:
            raise UserError(
                f"method.depth goes {self.direction}, but stops at {last} and starts at {first}: exchange them, or "
                "change depth.direction"
            )
        if self.size >= steps - 1 - splits[0]:
            raise UserError(f"method.depth.size = {self.size} prunes every trained step: make it smaller")


class PruningConfig(Config):
    """What is left out, and how long."""

    width: Width = "none"
    """After the last split train all chains, the best child of each split, or the best and worst leaves of a tree."""
    extreme: int = Field(default=4, ge=1)
    """So many best and so many worst leaves where ``width`` is ``extreme``."""
    depth: DepthPruning | None = None
    """Window of steps without a gradient; None trains all."""
    prune_iterations: int | None = Field(default=None, ge=0)
    """First iterations, in which pruning acts; None is all."""


def unpruned(
    config: PruningConfig, iteration: int, experience: Experience, *, splits: Sequence[int], children: int, steps: int
) -> Bool[Tensor, " edges"]:
    """False for pruned edges.

    Args:
        config: what to prune.
        iteration: of the run.
        experience: scored leaves, those of one tree and of one split side by side.
        splits: steps that split.
        children: of a node that splits.
        steps: of the grid.
    """
    edges = experience.edges
    assert experience.rewards is not None
    if config.prune_iterations is not None and iteration >= config.prune_iterations:
        return torch.ones_like(edges.step, dtype=torch.bool)
    leaves = kept_leaves(experience.rewards, experience.group, config.width, children=children, extreme=config.extreme)
    mask = width_mask(leaves, edges.sample, edges.step, splits[-1])
    if config.depth is None:
        return mask
    start = drifting_start(iteration, *config.depth.ends(splits[-1], steps), config.depth.every)
    return mask & ((edges.step < start) | (edges.step >= start + config.depth.size))


def check_pruning(config: PruningConfig, *, splits: Sequence[int], leaves: int, steps: int) -> None:
    """Refuse pruning that leaves nothing to compare, with the setting that would work."""
    if config.width == "parent_top1" and len(splits) < 2:
        raise UserError("method.width = parent_top1 leaves one leaf of a tree with one split: raise method.group_size")
    if config.width == "extreme" and 2 * config.extreme > leaves:
        raise UserError(f"method.extreme = {config.extreme}: a tree has {leaves} leaves, use at most half")
    if config.depth is not None:
        config.depth.check(splits, steps)
