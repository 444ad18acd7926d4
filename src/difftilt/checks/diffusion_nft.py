"""DiffusionNFT: one pass lands on v_old + (2/beta)·Delta; the anchor trades reward for coverage."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.trial import trained
from difftilt.models.mixture import GaussianMixture
from difftilt.models.mlp import MLP
from difftilt.objectives.nft import nft_loss
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.sampling.noise import Noise
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures

PROCESS = RectifiedFlow()
PAIR = GaussianMixture(torch.tensor([[-2.0], [2.0]]), 0.5, torch.tensor([0.5, 0.5]))
NODES, WEIGHTS = (torch.from_numpy(part) for part in leggauss(400))
"""Gauss-Legendre on (-1, 1)."""


def optimality_of(x_0: Tensor) -> Tensor:
    """r(x_0) = sigmoid(2·x_0): the probability that a sample is good, used as the label itself."""
    return torch.sigmoid(2 * x_0[:, 0])


def posterior(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quadrature weights (batch, nodes) of x_0 given x_t, r at the nodes, and the velocities (x_t - x_0)/t; float64."""
    x_t, t = x_t.double(), t.double()[:, None]
    x_0 = 6 * NODES[None, :]
    prior = torch.exp(-((x_0 - 2) ** 2) / 0.5) + torch.exp(-((x_0 + 2) ** 2) / 0.5)
    weight = WEIGHTS * prior * torch.exp(-((x_t - (1 - t) * x_0) ** 2) / (2 * t**2))
    return weight / weight.sum(1, keepdim=True), torch.sigmoid(2 * x_0), (x_t - x_0) / t


def towards_positive(x_t: Float[Tensor, "batch 1"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch 1"]:
    """v_pi+ - v_old, where pi+ is proportional to r·pi_old: what the optimum is not."""
    weight, r, velocity = posterior(x_t, t)
    good = weight * r
    return (good * velocity).sum(1, keepdim=True) / good.sum(1, keepdim=True) - (weight * velocity).sum(1, keepdim=True)


def increment(x_t: Float[Tensor, "batch 1"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch 1"]:
    """2·E[r·(v - v_old) | x_t] by quadrature over x_0, v = (x_t - x_0)/t: the optimum's step for beta = 1, float64."""
    weight, r, velocity = posterior(x_t, t)
    centred = velocity - (weight * velocity).sum(1, keepdim=True)
    return 2 * (weight * r * centred).sum(1, keepdim=True)


class Landed:
    """One regression on exact samples of the pair, in velocity space: v = v_old + a small network."""

    def __init__(self, nft_beta: float, steps: int = 2500, batch: int = 1024) -> None:
        self.network = MLP(1, hidden=64, zero=True)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        index = torch.arange(batch)
        for step in range(steps):
            noise = Noise(0).at(step)
            x_0 = PAIR.sample(noise.normal(index, (2,), purpose="x_0"))
            t = 0.02 + 0.96 * noise.uniform(index, (1,), purpose="t")[:, 0]
            x_t = PROCESS.corrupt(x_0, t, noise.normal(index, (1,), purpose="eps"))
            old = PROCESS.predict(PAIR.velocity(PROCESS, x_t, t), x_t, t, "velocity")
            current = PROCESS.predict(old.velocity + self(x_t, t), x_t, t, "velocity")
            loss = nft_loss(
                current, old, x_0, optimality_of(x_0), nft_beta=nft_beta, max_advantage=1.0, space="velocity"
            )
            optimizer.zero_grad()
            loss.value.mean().backward()
            optimizer.step()
            schedule.step()

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The learnt increment."""
        return self.network(x_t, t)

    def sample(self, count: int = 4000, steps: int = 100) -> Tensor:
        """Euler samples of v_old plus the learnt increment, (count, 1)."""
        return integrate(self, count, steps)


def integrate(extra: Callable[[Tensor, Tensor], Tensor], count: int = 4000, steps: int = 100) -> Tensor:
    """Euler from noise to data along v_old + extra(x_t, t)."""
    # quantiles in place of draws: the start law has no sampling error
    x = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None].float()
    with torch.no_grad():
        for t, s in pairwise(uniform_grid(steps).float()):
            times = t.clamp(0.02, 0.98).expand(count)
            x = x + (s - t) * (PAIR.velocity(PROCESS, x, times) + extra(x, times).float())
    return x


def relative_error(nft_beta: float) -> float:
    """|learnt - (1/beta)·increment|² / |increment|²·beta² over x_t of the pair's own marginals."""
    landed = Landed(nft_beta)
    index = torch.arange(4000)
    noise = Noise(5)
    t = 0.05 + 0.9 * noise.uniform(index, (1,), purpose="t")[:, 0]
    x_t = PROCESS.corrupt(
        PAIR.sample(noise.normal(index, (2,), purpose="x_0")), t, noise.normal(index, (1,), purpose="eps")
    )
    exact = increment(x_t, t) / nft_beta
    with torch.no_grad():
        learnt = landed(x_t, t).double()
    return float((learnt - exact).square().sum() / exact.square().sum())


def reward_gap() -> float:
    """|mean r of samples along the learnt field - along the closed-form field|."""
    learnt = optimality_of(Landed(1.0).sample()).mean()
    exact = optimality_of(integrate(increment)).mean()
    return float((learnt - exact).abs())


def hacked(kl_weight: float) -> tuple[float, float]:
    """(mean reward, share of samples on a mode) after training on the unbounded reward x_1 on the ring."""
    bed = MixturesConfig(radius=1.0, std=0.1, reward="linear", steps=10, shift=1.0)
    settings: dict[str, Any] = {"groups": 8, "group_size": 32, "updates": 8, "ema": 0.0, "behaviour_decay": 1}
    result = trained("diffusion-nft", Mixtures(bed).task(), 60, 1e-3, kl_weight=kl_weight, **settings)
    return result.after["reward"], result.after["on_mode"]


def smallest_step_of_the_trade() -> float:
    """Smallest fall of the reward between anchors 0, 0.1 and 0.3: positive if the trade is monotone."""
    rewards = [hacked(weight)[0] for weight in (0.0, 0.1, 0.3)]
    return min(rewards[0] - rewards[1], rewards[1] - rewards[2])


def ring_reward() -> float:
    """Mean -|x - (2, 0)| of samples after 60 iterations on the ring with anchor 0.1; -2.49 before."""
    settings: dict[str, Any] = {"groups": 8, "group_size": 16, "updates": 8, "ema": 0.0, "kl_weight": 0.1}
    return trained("diffusion-nft", Mixtures(MixturesConfig()).task(), 60, 1e-3, **settings).after["reward"]


PROOFS = (
    Proof(
        "one exact pass in velocity space lands on v_old + (2/beta)·Delta: relative squared error, beta 1",
        lambda: relative_error(1.0),
        at_most=0.01,
        long=True,
    ),
    Proof(
        "the same for beta 0.5, whose increment is twice as large",
        lambda: relative_error(0.5),
        at_most=0.01,
        long=True,
    ),
    Proof(
        "the closed-form field moves the mean r from 0.50 to 0.84",
        lambda: float(optimality_of(integrate(increment)).mean()),
        at_least=0.83,
        at_most=0.85,
        long=True,
    ),
    Proof(
        "the field of pi+, proportional to r·pi_old, gives 0.95: the optimum is not pi+",
        lambda: float(optimality_of(integrate(towards_positive)).mean()),
        at_least=0.93,
        at_most=0.97,
        long=True,
    ),
    Proof(
        "samples of the learnt field score as those of the closed-form field (0.84)",
        reward_gap,
        at_most=0.02,
        long=True,
    ),
    Proof(
        "on the ring of eight modes the reward -|x - (2, 0)| rises from -2.49 in 60 iterations",
        ring_reward,
        at_least=-1.2,
        long=True,
    ),
    Proof(
        "without the anchor an unbounded reward is hacked: share of samples left on a mode",
        lambda: hacked(0.0)[1],
        at_most=0.3,
        long=True,
    ),
    Proof(
        "an anchor of 0.3 keeps the samples on the modes",
        lambda: hacked(0.3)[1],
        at_least=0.8,
        long=True,
    ),
    Proof(
        "reward falls with every step of the anchor from 0 to 0.1 to 0.3: the smallest fall",
        smallest_step_of_the_trade,
        at_least=0.02,
        long=True,
    ),
)
