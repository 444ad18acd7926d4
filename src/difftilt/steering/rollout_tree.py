"""Trees of whole rollouts: the loop that DTS and DTS* share.

A round selects ``batch`` nodes in every tree, completes a rollout below each, scores the finished samples and backs
their rewards up; every state becomes a node that later rollouts can start from. One rollout is plain sampling bit for
bit, and a tree so wide that it branches at its root alone is best-of-n.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.errors import RewardError, quoted
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.budget import Meter, price, spend
from difftilt.steering.frontier import Frontier
from difftilt.steering.particles import bind, start
from difftilt.steering.protocol import Progress, Steered
from difftilt.steering.store import NodeStore
from difftilt.steering.tree import Forest, Ids, Rule, Statistic
from difftilt.steering.tree_rules import Widening, Widths
from difftilt.training.protocol import Task
from difftilt.values.estimates import LatentReward


class TreeConfig(Config):
    """Settings of a tree of rollouts."""

    rollouts: int = Field(default=64, ge=1)
    """Whole rollouts for each prompt, the paper's M; a budget may end earlier."""
    batch: int = Field(default=8, ge=1)
    """Rollouts of one tree that are under way together; 1 is the sequential method, more is faster."""
    temperature: float = Field(default=1.0, gt=0)
    """β of the soft values, in units of the reward; the paper's λ is its inverse."""
    widening: float = Field(default=1.0, gt=0)
    """A node visited N times may have max(1, ceil(widening·N^exponent)) children: the paper's C."""
    exponent: float = Field(default=0.5, gt=0, lt=1)
    """The paper's α: near 1 the tree is a flat list of rollouts, near 0 few branches are tried."""
    root_widening: float | None = Field(default=None, gt=0)
    """``widening`` of the root, which decides how many initial noises are tried; None is the same."""
    root_exponent: float | None = Field(default=None, gt=0, lt=1)
    """``exponent`` of the root; None is the same."""
    store: Literal["full", "half"] = "full"
    """Precision in which states and predictions are kept, on the CPU. Half perturbs what is drawn below a stored state
    by up to 1 part in 2048; finished samples are always kept as they were scored."""
    predictions: Literal["cached", "recomputed"] = "cached"
    """Keep the prediction of each node that may branch, or evaluate it again when it does: less memory, one evaluation
    more for each branching."""
    most_predictions: int = Field(default=16384, ge=0)
    """Predictions kept at a time, of all prompts together. Beyond them those of the least visited nodes give way, and
    are evaluated again where such a node branches."""


@dataclass
class Search:
    """The trees of all prompts while they grow and when they are done.

    Attributes:
        config: settings.
        rule: chooses children.
        statistic: values of nodes from those of their children.
        scorer: the reward of latents.
        prompts: global index of each prompt.
        forest: the nodes; the root of prompt i is node i.
        frontier: what the nodes carry.
        done: rollouts so far, of each prompt.
        best: finished sample with the highest reward of each prompt.
        invalid: missing rewards of each prompt.
        complete: False if time or the user ended the growth.
    """

    config: TreeConfig
    rule: Rule
    statistic: Statistic
    scorer: LatentReward
    prompts: Int[Tensor, " prompts"]
    forest: Forest
    frontier: Frontier
    done: int
    best: Ids
    invalid: Ids
    complete: bool = True

    @classmethod
    def begin(
        cls,
        config: TreeConfig,
        rule: Rule,
        statistic: Statistic,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        index: Int[Tensor, " prompts"] | None = None,
    ) -> "Search":
        """Trees with nothing but their roots; arguments from ``task`` on as in :meth:`Steerer.steer`."""
        scorer = bind(reward, task, prompts, denoise)
        chain, roots = start(task, denoise, prompts, 1, noise, index)
        # steps without a length would leave nodes without a state
        chain = replace(chain, grid=chain.grid.unique_consecutive())
        count, point = len(prompts), task.model.process.point_prior
        forest = Forest(count, 0 if point else -1, chain.steps)
        half, cached = config.store == "half", config.predictions == "cached"
        frontier = Frontier(
            forest, chain, roots.condition, task.model.shape, None, NodeStore[Tensor](half), NodeStore(half)
        )
        frontier.plant(chain.slots)
        nobody = np.full(count, -1), np.zeros(count, np.int64)
        search = cls(config, rule, statistic, scorer, chain.slots, forest, frontier, 0, *nobody)
        frontier.kept = search.may_branch if cached else None
        return search

    def __post_init__(self) -> None:
        config = self.config
        inner = Widening(config.widening, config.exponent)
        root = Widening(config.root_widening or config.widening, config.root_exponent or config.exponent)
        self._widths, self._swept = Widths(self.forest, inner, root), config.rollouts

    def grow(self, meter: Meter | None, progress: Progress | None) -> None:
        """Rounds until the rollouts or the budget are spent.

        Raises:
            UserError: if not even one rollout fits the budget.
            RewardError: if no sample of a prompt has a reward.
        """
        config = self.config
        _, self.complete = spend(config.rollouts, config.batch, self._price, self.advance, meter, progress)
        lost = (self.forest.value[self.best, 0] == -np.inf).nonzero()[0]
        if len(lost):
            shown = self.scorer.prompts[int(lost[0])]
            raise RewardError(
                f"all {int(self.invalid[lost[0]])} rewards of prompt {quoted(shown)} are missing (of {len(lost)} of "
                f"{len(self.best)} prompts): there is nothing to search for; mend the reward"
            )

    def _price(self, batch: int) -> Ledger:
        """The most that a round can cost."""
        rows = batch * len(self.best)
        return price(self.frontier.chain.denoise, self.scorer.reward, rows * self.forest.last, rows)

    def advance(self, batch: int) -> bool:
        """One round: select, complete, score, back up; a tree is never finished."""
        forest, device = self.forest, self.frontier.device
        self._widths.reach(self.done + batch)
        count = torch.arange(self.done, self.done + batch, device=device)
        index = (self.prompts[:, None] * self.config.rollouts + count).flatten()
        noise = self.frontier.chain.noise
        levels: list[list[float]] = noise.uniform(index, (forest.last + 1,), purpose="select").tolist()
        root = np.repeat(np.arange(len(self.prompts)), batch)
        pairs = zip(root.tolist(), levels, strict=True)
        at = np.array([forest.select(tree, self.rule, self._widths.now, level) for tree, level in pairs])
        self.done += batch
        new = forest.depth[at] < forest.last
        leaves = at.copy()
        if new.any():
            leaves[new] = self._rollouts(at[new], root[new], index[torch.from_numpy(new).to(device)])
        forest.settle(at, leaves)
        forest.backup(at[new], self.statistic)
        self._sweep()
        return True

    def _rollouts(self, at: Ids, root: Ids, index: Int[Tensor, " rows"]) -> Ids:
        """Hang a scored rollout below each node; returns the finished samples."""
        forest, length = self.forest, self.forest.last - self.forest.depth[at]
        first = forest.grow(at, length)
        leaves = first + length - 1
        x_0 = self.frontier.complete(at, first, root, index)
        samples = self.scorer.samples(x_0, torch.from_numpy(root).to(x_0.device))
        rewards = self.scorer.score(samples).double().cpu().numpy()
        missing = np.isnan(rewards)
        np.add.at(self.invalid, root[missing], 1)
        rewards = np.where(missing, -np.inf, rewards)
        # a chain of single children has the reward of its end at every node
        forest.value[first[0] : leaves[-1] + 1, 0] = np.repeat(rewards, length)
        for tree, leaf, reward in zip(root.tolist(), leaves.tolist(), rewards.tolist(), strict=True):
            if self.best[tree] < 0 or reward > forest.value[self.best[tree], 0]:
                self.best[tree] = leaf
        return leaves

    def may_branch(self, nodes: Ids) -> NDArray[np.bool_]:
        """Whether a node that is no root can have another child before the rollouts are over."""
        return self._widths.ever(nodes, self.config.rollouts - self.done)

    def _sweep(self) -> None:
        """Drop predictions that no child can be drawn from any more; looked for whenever the rollouts left halve.

        Of what is then still too many those of the least visited nodes go, a quarter at once.
        """
        left, kept, most = self.config.rollouts - self.done, self.frontier.predictions, self.config.most_predictions
        nodes = np.arange(len(self.prompts), self.forest.size)
        if kept.rows and left <= self._swept // 2:
            self._swept = left
            kept.drop(nodes[~self.may_branch(nodes)])
        if kept.rows > most:
            there = nodes[kept.has(nodes)]
            order = np.argsort(self.forest.visits[there], kind="stable")
            kept.drop(there[order[: max(len(there) - most * 3 // 4, 0)]])

    def descend(self, rule: Rule, levels: Float[Tensor, "prompts size depth"]) -> Int[Tensor, "prompts size"]:
        """Finished samples that descents by a rule end at; nothing is evaluated."""
        rows: list[list[list[float]]] = levels.tolist()
        found = [[self.forest.descend(root, rule, level) for level in one] for root, one in enumerate(rows)]
        return torch.tensor(found)

    def outcome(
        self,
        leaves: Int[Tensor, "prompts size"],
        weight: Float[Tensor, "prompts size"],
        log_z: Float[Tensor, " prompts"],
        ess: Float[Tensor, "times prompts"],
    ) -> Steered:
        """The record of a call: some finished samples of every prompt with their weights."""
        forest, device, count = self.forest, self.frontier.device, len(leaves)
        group = torch.arange(count, device=device).repeat_interleave(leaves.shape[1])
        nodes = leaves.flatten().numpy()
        x_0 = self.frontier.samples.get(nodes, device)
        rewards = torch.from_numpy(forest.value[nodes, 0]).float()
        best = rewards.reshape(leaves.shape).argmax(1) + torch.arange(count) * leaves.shape[1]
        start = torch.from_numpy(forest.branch(nodes)).reshape(leaves.shape)
        ancestors = torch.tensor([[len(row.unique()) for row in start]])
        return Steered(
            x_0,
            self.scorer.samples(x_0, group).media,
            group,
            weight.flatten().to(device),
            rewards.to(device),
            best.to(device),
            log_z.to(device),
            ess.to(device),
            ancestors[: len(ess)].to(device),
            self.frontier.chain.ledger,
            invalid=torch.from_numpy(self.invalid).to(device),
            complete=self.complete,
        )
