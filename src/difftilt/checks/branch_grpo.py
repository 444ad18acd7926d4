"""BranchGRPO: what a tree costs, the law of its leaves, its fusion on a tree by hand, and what it learns."""

import math
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.trial import loop_of, perturbed, trained
from difftilt.credit.tree import kept_leaves, path_fusion, width_mask
from difftilt.process.grid import uniform_grid
from difftilt.sampling.noise import Noise, Siblings
from difftilt.sampling.presets import dance_sde
from difftilt.sampling.protocol import Moment, Trajectory
from difftilt.sampling.rollout import Plan, rollout, start_state
from difftilt.sampling.steps import GaussianStep
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures

SPLITS = {0: 2, 3: 2, 6: 2, 9: 2}
GAUSSIAN = MixturesConfig(means=((1.0,),), std=0.5, steps=20, shift=3.0)
"""N(1, 0.5²): its velocity is exact."""


def _walk(roots: int, plan: Plan, eta: float = 0.3) -> Trajectory:
    """Rollouts of the exact Gaussian, 20 steps, shift 3."""
    task = Mixtures(GAUSSIAN).task()
    denoise, noise = loop_of("flow-grpo", task, 1024).run.denoiser("current"), Noise(3)
    index = torch.arange(roots) * plan.leaves
    with torch.no_grad():
        x = start_state(task.model.process, noise, index, (1,))
        return rollout(denoise, dance_sde(eta), uniform_grid(20, 3.0), x, None, noise=noise, index=index, plan=plan)


def evaluations() -> float:
    """Of one tree by the method with its default settings on 20 steps."""
    loop = loop_of("branch-grpo", Mixtures(MixturesConfig(steps=20)).task(), groups=1)
    with torch.no_grad():
        loop.method.collect(loop.run)
    return float(loop.run.ledger.nfe)


def kept_edges() -> float:
    """Of the 218 edges of that tree, all recorded, after pruning by the best child of the last splits."""
    tree = _walk(1, Plan(record=torch.ones(20, dtype=torch.bool), branch=SPLITS, spread=4.0))
    if len(tree.edges.step) != 218:
        return math.nan
    rewards = tree.x_0[:, 0]
    kept = kept_leaves(rewards, torch.zeros_like(tree.root), "parent_top1", children=2, extreme=1)
    return float(width_mask(kept, tree.edges.sample, tree.edges.step, 9).sum())


@cache
def _leaves(eta: float, mode: Siblings) -> Float[Tensor, "trees leaves"]:
    return _walk(3000, Plan(branch=SPLITS, spread=4.0, siblings=mode), eta).x_0.double().reshape(3000, 16)


def leaf_law(eta: float, mode: Siblings) -> float:
    """Gap between mean and variance (about 1) of leaves and of chains, in standard errors over trees and chains."""
    leaves, chains = _leaves(eta, mode) - 1, _walk(24000, Plan(), eta).x_0.double()[:, 0] - 1
    worst = 0.0
    for power in (1, 2):
        trees, single = (leaves**power).mean(1), chains**power
        error = (trees.var() / len(trees) + single.var() / len(single)).sqrt()
        worst = max(worst, float((trees.mean() - single.mean()).abs() / error))
    return worst


def sibling_covariance(spread: float) -> float:
    """Gap of the covariance of the noise that two children drew from 1/(1 + spread²), in standard errors."""
    seen: list[Tensor] = []

    def watch(moment: Moment, x_s: Tensor) -> None:
        assert isinstance(moment.step, GaussianStep)
        if moment.position == 0:
            seen.append(((x_s - moment.step.mean) / moment.step.std[:, None]).double().reshape(-1, 2))

    loop = loop_of("flow-grpo", Mixtures(GAUSSIAN).task(), 1024)
    noise, index = Noise(5), torch.arange(20000) * 2
    plan = Plan(branch={0: 2}, spread=spread)
    with torch.no_grad():
        x = start_state(loop.run.task.model.process, noise, index, (1,))
        grid, denoise = uniform_grid(20, 3.0)[:2], loop.run.denoiser("current")
        rollout(denoise, dance_sde(), grid, x, None, noise=noise, index=index, plan=plan, observe=watch)
    value, product = 1 / (1 + spread**2), seen[0].prod(1)
    return float((product.mean() - value).abs()) * math.sqrt(len(product) / (1 + value**2))


def hand_tree(beta: float) -> float:
    """Root of a tree by hand: leaves 1, 2 | 3, 5 below edges of log-probability (-1, -3 | -1, -1) and (-1, -2)."""
    parent, step = torch.tensor([-1, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 2, 2])
    log_prob = torch.tensor([0.0, -1, -2, -1, -3, -1, -1])
    rewards = torch.tensor([1.0, 2, 3, 5], dtype=torch.float64)
    return float(path_fusion(rewards, torch.tensor([3, 4, 5, 6]), parent, step, log_prob, beta)[0])


def signal(name: str, **settings: Any) -> tuple[float, float]:
    """(mean of the gradient, squared, over its variance; evaluations of a rollout), from 50 rollouts of the ring."""
    task = Mixtures(MixturesConfig(steps=10, shift=3.0)).task()
    common: dict[str, Any] = {"groups": 4, "group_size": 16, "updates": 1, "kl_weight": 0.0, "ema": 0.0}
    surrogate: dict[str, Any] = {"kernel": "flow_sde", "noise_level": 0.7, "clip_range": 0.2}
    loop = loop_of(name, task, 1024, **common, **surrogate, **settings)
    found: list[Tensor] = []
    cost = 0.0
    for repeat in range(50):
        loop.run.begin(repeat)
        before = loop.run.ledger.copy()
        with torch.no_grad():
            experience = loop.method.collect(loop.run)
        cost = float((loop.run.ledger - before).nfe)
        for phase in loop.method.phases(loop.run):
            loop.updater.run_phase(phase, experience, loop.run.noise)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in loop.run.roles.parameters("current")]
        found.append(torch.cat([part.reshape(-1) for part in parts]).double())
    drawn = torch.stack(found)
    variance = drawn.var(0).sum()
    # the square of the mean of 50 holds a 50th of the variance
    ratio = float((drawn.mean(0).square().sum() - variance / len(drawn)) / variance)
    return ratio, cost


def signal_at_equal_cost(**settings: Any) -> float:
    """Signal over noise per evaluation of the rollout, of trees over that of chains."""
    (tree, tree_cost), (chain, chain_cost) = signal("branch-grpo", **settings), signal("flow-grpo")
    return tree / tree_cost / (chain / chain_cost)


@cache
def _ring(name: str, **settings: Any) -> tuple[float, float]:
    """Mean reward of the last five of 60 iterations on the ring, and evaluations of one rollout."""
    task = Mixtures(MixturesConfig(steps=10, shift=3.0)).task()
    common: dict[str, Any] = {"groups": 8, "group_size": 16, "updates": 1, "ema": 0.0, "kl_weight": 0.0}
    surrogate: dict[str, Any] = {"kernel": "flow_sde", "noise_level": 0.7, "clip_range": 0.2}
    rows = trained(name, task, 60, 1e-3, **common, **surrogate, **settings).rows
    return sum(row["reward_mean"] for row in rows[-5:]) / 5, rows[0]["nfe"]


def pruned_advantage_gap() -> float:
    """Largest change of an advantage or a reward by pruning, of edges that both keep; NaN where nothing is pruned."""
    task = perturbed(Mixtures(MixturesConfig(steps=20)).task())
    pair = []
    for width in ("none", "parent_top1"):
        loop = loop_of("branch-grpo", task, groups=2, width=width)
        with torch.no_grad():
            pair.append(loop.method.collect(loop.run))
    whole, pruned = pair
    if int(whole.edges.mask.sum()) <= int(pruned.edges.mask.sum()):
        return math.nan
    gap = (whole.edges.advantage - pruned.edges.advantage).abs().max()
    return float(gap + (whole.rewards - pruned.rewards).abs().max())


PROOFS = (
    Proof("splits at 0, 3, 6, 9 of 20 steps cost 203 evaluations, where 16 chains cost 320", evaluations, 203, 203),
    Proof("keeping the best child of the last splits leaves 138 of that tree's 218 edges", kept_edges, 138, 138),
    Proof("pruning changes no reward and no advantage: largest change", pruned_advantage_gap, at_most=0.0),
    Proof(
        "leaves of a tree have the mean and variance of chains, eta 0.3, in standard errors",
        lambda: leaf_law(0.3, "correlated"),
        at_most=4,
    ),
    Proof("the same at eta 1", lambda: leaf_law(1.0, "correlated"), at_most=4, long=True),
    Proof(
        "noise of 4 times the scale, as released, breaks the law of the leaves, eta 0.3, in standard errors",
        lambda: leaf_law(0.3, "scaled"),
        at_least=5,
        long=True,
    ),
    Proof(
        "siblings of spread 4 have noise of covariance 1/17, in standard errors",
        lambda: sibling_covariance(4.0),
        at_most=4,
    ),
    Proof("the root of the tree by hand is the mean of its leaves at beta 0", lambda: hand_tree(0.0), 2.75, 2.75),
    # 1.894 by a softmax of each level's edges alone
    Proof("by the path softmax it is 2.252 at beta 1", lambda: hand_tree(1.0), 2.2515, 2.2525),
    Proof(
        "signal of the gradient over its noise at equal evaluations: trees of 16 leaves over groups of 16 chains",
        signal_at_equal_cost,
        at_least=1.0,
        long=True,
    ),
    Proof(
        "on the ring of eight modes the reward -|x - (2, 0)| rises from -2.49 in 60 iterations",
        lambda: _ring("branch-grpo")[0],
        at_least=-1.2,
        long=True,
    ),
    Proof(
        "its rollouts cost this share of those of as many chains, splits at 0, 2, 4, 6 of 10 steps",
        lambda: _ring("branch-grpo")[1] / _ring("flow-grpo")[1],
        at_most=0.56,
        long=True,
    ),
    Proof(
        "training only the best child of each last split climbs as well",
        lambda: _ring("branch-grpo", width="parent_top1")[0],
        at_least=-1.4,
        long=True,
    ),
)
