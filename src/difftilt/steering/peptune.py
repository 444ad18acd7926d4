"""PepTune's guidance (Tang, Zhang, Chatterjee 2025): a Monte Carlo tree over unmasking steps, for several objectives.

The reward of a sequence is a vector: for every objective the share of an archive of the best trade-offs so far that the
sequence is at least as good as. Nothing is ever added up over objectives; the archive is what comes out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.process.masked import MaskedProcess
from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Reward
from difftilt.sampling.noise import Still, copies
from difftilt.sampling.protocol import NoiseSource, Step
from difftilt.sampling.rollout import Plan, rollout, step_noise
from difftilt.steering.archive import Archives, Goals
from difftilt.steering.budget import Meter, price, spend
from difftilt.steering.chain import Chain
from difftilt.steering.particles import bind, start
from difftilt.steering.protocol import Progress, Steered
from difftilt.steering.store import NodeStore
from difftilt.steering.tree import Forest, Ids, Reals, Rule
from difftilt.steering.tree_rules import ParetoFront
from difftilt.training.needs import check_needs
from difftilt.training.protocol import Task
from difftilt.trees import take

CARD = Card(
    name="peptune",
    entry="PepTune",
    paper="Tang et al. 2025, PepTune: De Novo Generation of Therapeutic Peptides with Multi-Objective-Guided Discrete "
    "Diffusion, arXiv 2412.17780",
    needs=("masked process", "per-sample reward"),
)


class PepTuneConfig(Config):
    """Settings of the search."""

    iterations: int = Field(default=128, ge=1)
    """Expansions of each prompt's tree; a budget may end earlier."""
    children: int = Field(default=50, ge=1)
    """Drawn from the one evaluation of an expanded node, and completed: the paper's M."""
    exploration: float = Field(default=0.1, ge=0)
    """Weight c of the exploration term."""
    invalid_penalty: float = Field(default=0.5, ge=0)
    """Taken along the path for the invalid share of an expansion: the paper's κ."""
    backup: Literal["mean", "sum"] = "mean"
    """What a path is paid for an expansion: the mean reward of the children, or as published their sum."""
    completion: Literal["stochastic", "greedy"] = "stochastic"
    """How children are completed: by the sampler's steps, or by the most likely symbols of each step."""
    objectives: tuple[str, ...] = ()
    """Components of the task's weighted reward that are traded off; empty is all of them."""
    begin_at: tuple[int, ...] = ()
    """Iteration from which each objective counts, one for each; empty is 0 for all."""


class PepTune:
    """Select by Pareto fronts, expand, complete, rank against the archive, back up."""

    Config = PepTuneConfig

    def __init__(self, config: PepTuneConfig) -> None:
        if config.begin_at and not config.objectives:
            raise UserError(
                f"begin_at = {config.begin_at} says from when on each objective counts: name the objectives as well, "
                "objectives = (NAME, NAME), in the same order"
            )
        if config.begin_at and (len(config.begin_at) != len(config.objectives) or min(config.begin_at) != 0):
            raise UserError(
                f"begin_at = {config.begin_at} must name one iteration for each of objectives = {config.objectives}, "
                "and one of them must be 0"
            )
        self.config = config

    @torch.no_grad()
    def steer(
        self,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        *,
        index: Int[Tensor, " prompts"] | None = None,
        progress: Progress | None = None,
        meter: Meter | None = None,
    ) -> Steered:
        """Search for every prompt; arguments as in the protocol."""
        search = ParetoSearch.begin(self.config, task, denoise, reward, prompts, noise, index)
        _, complete = spend(self.config.iterations, 1, search.price, lambda _: search.advance(), meter, progress)
        return replace(search.archives.outcome(search.chain.ledger, search.chain.slots.device), complete=complete)


@dataclass
class ParetoSearch:
    """The trees and archives of all prompts.

    Attributes:
        config: settings.
        chain: kernel, grid and noise.
        condition: one row for each prompt.
        forest: nodes; the root of prompt i is node i. Visits begin at 1.
        archives: of each prompt, with the objectives.
        states: of all nodes.
        done: iterations so far.
    """

    config: PepTuneConfig
    chain: Chain
    condition: Condition
    forest: Forest
    archives: Archives
    states: NodeStore[Tensor] = field(default_factory=NodeStore[Tensor])
    done: int = 0

    @classmethod
    def begin(
        cls,
        config: PepTuneConfig,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        index: Int[Tensor, " prompts"] | None = None,
    ) -> "ParetoSearch":
        """Roots alone, and empty archives; arguments as in :meth:`Steerer.steer`.

        Raises:
            UserError: for a task whose process is not masked, and for a reward that is no sum or scores sets.
        """
        scorer, goals = bind(reward, task, prompts, denoise), Goals.of(reward, config.objectives)
        check_needs(PepTune, replace(task, reward=reward), config)
        chain, roots = start(task, denoise, prompts, 1, noise, index)
        chain, count = replace(chain, grid=chain.grid.unique_consecutive()), len(prompts)
        forest = Forest(count, 0, chain.steps, width=len(goals.objectives))
        forest.visits[:count] = 1
        archives = Archives.empty(goals, scorer, task, roots.x.shape[1])
        search = cls(config, chain, roots.condition, forest, archives)
        search.states.put(np.arange(count), roots.x)
        return search

    def price(self, iterations: int) -> Ledger:
        """The most that so many iterations can cost."""
        nodes = iterations * len(self.archives.members)
        rows = nodes * self.config.children
        evaluations = nodes + rows * (self.forest.last - 1)
        return price(self.chain.denoise, self.archives.goals.reward, evaluations, rows)

    def advance(self) -> bool:
        """One expansion of every tree that is not used up; False if all are."""
        roots = (~self.forest.closed[: len(self.archives.members)]).nonzero()[0]
        if len(roots):
            self.expand(roots, self.select(roots))
        self.done += 1
        return len(roots) > 0

    @property
    def active(self) -> Int[Tensor, " active"]:
        """Which objectives count in this iteration, by their place among the objectives."""
        begin = torch.tensor(self.config.begin_at or [0] * len(self.archives.goals.objectives))
        return (begin <= self.done).nonzero()[:, 0]

    @property
    def rule(self) -> Rule:
        """Chooses among open siblings in this iteration."""
        return ParetoFront(self.config.exploration, self.active.numpy())

    def select(self, roots: Ids, purpose: str = "select") -> Ids:
        """The node of each tree that is expanded next; levels of another purpose choose anew."""
        rule = self.rule
        index = self.chain.slots[torch.from_numpy(roots)] * self.config.iterations + self.done
        levels: list[list[float]] = self.chain.noise.uniform(index, (self.forest.last,), purpose=purpose).tolist()
        pairs = zip(roots.tolist(), levels, strict=True)
        return np.array([self.forest.descend(root, rule, level, self.unexpanded) for root, level in pairs])

    def unexpanded(self, node: int) -> bool:
        """Whether a node has no children yet."""
        return len(self.forest.children(node)) == 0

    def expand(self, roots: Ids, at: Ids) -> None:
        """Children of each node from one evaluation, completed, scored, ranked and backed up."""
        forest, count, place = self.forest, self.config.children, torch.from_numpy(roots)
        rows, index = copies(self.chain.slots[place] * self.config.iterations + self.done, count)
        root = place[rows.cpu()]
        x, step, whole = self._children(at, take(self.condition, place), rows, index)
        nodes = forest.grow(np.repeat(at, count), np.ones(len(x), np.int64))
        # among siblings; the raw probability of a long sequence underflows. Visible tokens are sure and add nothing
        likely = step.log_prob(x, reduce="sum").double().reshape(-1, count).softmax(1)
        forest.prior[nodes], forest.visits[nodes] = likely.flatten().cpu().numpy(), 1
        self.states.put(nodes, x)
        used = whole.cpu().numpy() | (forest.depth[nodes] == forest.last)
        first = np.where(used, forest.last, forest.depth[nodes])
        noise = self.chain.noise if self.config.completion == "stochastic" else Still()
        x_0 = rollout(
            self.chain.denoise, self.chain.preset, self.chain.grid, x, take(self.condition, root), noise=noise,
            index=index, plan=Plan(first=torch.from_numpy(first)),
        ).x_0  # fmt: skip
        ranks, scored = self.archives.add(x_0, root, self.active)
        self._backup(at, nodes.reshape(-1, count), ranks.numpy().reshape(len(at), count, -1), scored)
        self.retire(nodes[used])

    def retire(self, nodes: Ids) -> None:
        """Whole sequences leave the selection, and with them every node that has no other children left.

        Scores change by expansions only, so a walk that ended at a whole sequence could be walked again for ever.
        """
        self.forest.close(nodes)

    def _children(
        self, at: Ids, condition: Condition, rows: Int[Tensor, " children"], index: Int[Tensor, " children"]
    ) -> tuple[Shaped[Tensor, "children position"], Step, Bool[Tensor, " children"]]:
        """Draws of one step from each node, the step of each, and which of them have no mask left."""
        x, depth = self.states.get(at, self.chain.slots.device), torch.from_numpy(self.forest.depth[at])
        t, s = (self.chain.grid[depth + more].to(x.device, torch.float32) for more in (0, 1))
        condition = self.chain.denoise.prepare(x, t, condition)
        step = take(self.chain.preset.step(self.chain.denoise(x, t, condition), x, t, s), rows)
        drawn = step.draw(step_noise(step, self.chain.noise, index, depth.to(x.device)[rows]))
        process = self.chain.denoise.process
        assert isinstance(process, MaskedProcess)
        return drawn, step, ~process.is_masked(drawn).any(1)

    def _backup(self, at: Ids, nodes: Ids, ranks: Reals, scored: Bool[Tensor, " rows"]) -> None:
        """W and N of the children, and along the way of every expanded node what its expansion is worth."""
        forest, config = self.forest, self.config
        forest.value[nodes] = ranks
        failed = 1 - scored.reshape(nodes.shape).double().mean(1).numpy()
        paid = ranks.mean(1) if config.backup == "mean" else ranks.sum(1)
        paid = paid - config.invalid_penalty * failed[:, None]
        for node, worth in zip(at.tolist(), paid, strict=True):
            for way in forest.climb(np.array([node])):
                forest.value[way] += worth
                forest.visits[way] += 1
