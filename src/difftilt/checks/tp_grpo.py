"""TP-GRPO: turning points on random walks, learning from small batches, and a reward that saturates early."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.dense_grpo import UNCALIBRATED, learnt, ring_task, scored
from difftilt.checks.proof import Proof
from difftilt.checks.trial import loop_of, perturbed, with_reward
from difftilt.credit.gains import balanced, gains, per_step, step_rewards, turning_points
from difftilt.credit.group import Normaliser
from difftilt.methods.policy_gradient.tp_grpo import TPGRPO
from difftilt.sampling.presets import cps
from difftilt.training.policy_gradient import Window

HAND = torch.tensor([[1.0, 0.8, 1.1, 1.0, 1.4]], dtype=torch.float64)


def hand_sequence() -> float:
    """Largest error of the step rewards of R = (1, .8, 1.1, 1, 1.4) and of its mirror image."""
    expected = torch.tensor([[-0.2, 0.6, -0.1, 0.4]], dtype=torch.float64)
    worst = 0.0
    for side in (1, -1):
        found = step_rewards(side * HAND, turning_points(side * HAND, "consistent"))
        worst = max(worst, float((found - side * expected).abs().max()))
    return worst


@cache
def walks(count: int = 10_000, steps: int = 6) -> Float[Tensor, "count states"]:
    """Random walks in place of rewards."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, steps + 1, generator=generator, dtype=torch.float64).cumsum(1)


def shrunk_or_turned(definition: str) -> float:
    """Share of the turning points whose credit F - R_k is no larger than the gain, or of another sign."""
    rewards = walks()
    turning = turning_points(rewards, "consistent" if definition == "consistent" else "basic")
    d, onwards = gains(rewards), rewards[:, -1:] - rewards[:, :-1]
    fine = (onwards.abs() > d.abs()) & (onwards.sign() == d.sign())
    return float((~fine)[turning].double().mean())


def outside_basic() -> float:
    """Consistent turning points that are not basic ones."""
    rewards = walks()
    return float((turning_points(rewards, "consistent") & ~turning_points(rewards, "basic")).sum())


def affine_change() -> float:
    """Turning points that a positive scale and an offset of all rewards change."""
    rewards = walks()
    return float((turning_points(rewards, "consistent") != turning_points(3 * rewards + 2, "consistent")).sum())


def imbalance() -> float:
    """|#positive - #negative| of the balanced turning points of walks that mostly rise."""
    rewards = walks() + 0.5 * torch.arange(7)
    assigned = rewards[:, -1:] - rewards[:, :-1]
    kept = balanced(turning_points(rewards, "consistent"), assigned)
    return float((assigned.sign() * kept).sum().abs())


@cache
def saturating() -> tuple[Float[Tensor, "samples steps"], Float[Tensor, "samples steps"], Tensor, Tensor]:
    """(gains, credit with turning points, groups, rewards of the samples) under tanh(3·x_1) on the ring.

    Early steps choose the side; what later steps gain is small.
    """
    task = with_reward(ring_task(), lambda samples: torch.tanh(3 * samples.media[:, 0]))
    _, chains = scored(64, 24, task=task)
    rewards = chains.rewards
    credit = step_rewards(rewards, turning_points(rewards, "consistent"), balance=True)
    return gains(rewards), credit, chains.batch.group, rewards[:, -1]


def early_share_gained() -> float:
    """Share of Σ|A| that the first three steps have with turning points, less that with gains alone."""
    shares: list[float] = []
    for credit in saturating()[:2]:
        size = per_step(credit, saturating()[2], Normaliser()).abs().sum(0)
        shares.append(float(size[:3].sum() / size.sum()))
    return shares[1] - shares[0]


def first_step_correlation(turning: bool) -> float:
    """Of the first step's credit with the reward of the sample."""
    found = saturating()
    return float(torch.corrcoef(torch.stack([found[turning][:, 0], found[3].double()]))[0, 1])


def noiseless(level: float, window: Window | None = None) -> tuple[float, float]:
    """(largest, smallest) absolute gain of chains whose stochastic steps have the noise level ``level``."""
    loop = loop_of("tp-grpo", perturbed(ring_task()), groups=4, group_size=4, window=window)
    run, method = loop.run, loop.method
    assert isinstance(method, TPGRPO)
    method.preset = cps(level)
    run.begin(1)
    with torch.no_grad():
        size = method.chains(run, run.prompts(4, 4)).rewards.diff(dim=1).abs()
    return float(size.max()), float(size.min())


WINDOW = Window(width=4, motion="sliding", every=1)

PROOFS = (
    Proof(
        "without noise in its steps a sample is the ODE's from its own noise: largest gain",
        lambda: noiseless(0.0)[0],
        at_most=0.0,
    ),
    Proof("the same in a window of four steps", lambda: noiseless(0.0, WINDOW)[0], at_most=0.0),
    Proof("with it no gain is 0: smallest", lambda: min(noiseless(0.7)[1], noiseless(0.7, WINDOW)[1]), at_least=1e-12),
    Proof("the hand sequence (1, .8, 1.1, 1, 1.4) and its mirror: largest error", hand_sequence, at_most=1e-12),
    Proof("consistent turning points of random walks that are not basic ones", outside_basic, at_most=0.0),
    Proof(
        "at a consistent one F - R_k is larger than the gain, with its sign: share of exceptions",
        lambda: shrunk_or_turned("consistent"),
        at_most=0.0,
    ),
    Proof(
        "ablation: the same of basic turning points",
        lambda: shrunk_or_turned("basic"),
        at_least=0.1,
    ),
    Proof("turning points that a positive scale and an offset change", affine_change, at_most=0.0),
    Proof("balancing leaves as many positive as negative ones: difference", imbalance, at_most=0.0),
    Proof(
        "one group of 8 per update: reward after 60 updates less that of flow-grpo, mean of 3 seeds; spread 0.1",
        lambda: learnt("tp-grpo", 60, 3, kernel="flow_sde") - learnt("flow-grpo", 60, 3),
        at_least=0.0,
        long=True,
    ),
    Proof(
        "the same less gains only, under their kernel: not worse by more than 3 standard errors of 0.05",
        lambda: learnt("tp-grpo", 60, 3, kernel="flow_sde") - learnt("dense-grpo", 60, 3, **UNCALIBRATED),
        at_least=-0.15,
        long=True,
    ),
    Proof(
        "reward tanh(3 x_1): share of the sum of |A| on the first three of ten steps, more than with gains alone by",
        early_share_gained,
        at_least=0.0,
    ),
    Proof(
        "and the correlation of the first step's credit with the reward of the sample, more than with gains alone by",
        lambda: first_step_correlation(True) - first_step_correlation(False),
        at_least=0.05,
    ),
)
