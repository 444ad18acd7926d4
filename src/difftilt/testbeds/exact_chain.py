"""A ring of Gaussians with its exact reverse chain: x_0 has the clean law on any grid, and tilted laws closed forms.

Eight modes on a circle of radius 4 with standard deviation 0.3, variance-preserving levels
abar_t = max(cos(π t/2)², 1e-4), x_1 drawn from its exact marginal, steps drawn from p(x_s | x_t) itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.models.mixture import GaussianMixture, MixtureVelocity
from difftilt.models.protocol import GenerativeModel
from difftilt.process.gaussian import VariancePreserving
from difftilt.process.grid import uniform_grid
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Capabilities
from difftilt.sampling.exact import ExactAncestral
from difftilt.sampling.protocol import Sampler
from difftilt.testbeds.mixtures import ring
from difftilt.training.protocol import Task


@dataclass(frozen=True, eq=False)
class ExactStart(VariancePreserving):
    """The process whose x_1 is drawn from the marginal of a mixture, the trace of data included."""

    mixture: GaussianMixture

    def prior(self, noise: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """x_1 ~ p_1, from noise of the sample's own shape: the first coordinate also picks the component.

        Its level u = Φ(z) falls into one of the components' intervals and, stretched to (0, 1), is uniform again.
        """
        level = torch.special.ndtr(noise[:, 0].double())
        edges = torch.cat([torch.zeros(1), self.mixture.weights.cumsum(0)]).double()
        pick = (edges[1:-1] <= level[:, None]).sum(-1)
        inner = (level - edges[pick]) / (edges[pick + 1] - edges[pick])
        fresh = torch.special.ndtri(inner.clamp(1e-12, 1 - 1e-12)).to(noise)
        both = torch.cat([fresh[:, None], noise[:, 1:]], 1)
        t = torch.ones(len(noise), device=noise.device)
        scale, std = self.alpha(t), ((self.alpha(t) * self.mixture.std) ** 2 + self.sigma(t) ** 2).sqrt()
        return scale[:, None] * self.mixture.means.to(noise)[pick] + std[:, None] * both


def ring_mixture(weights: Sequence[float] | None = None) -> GaussianMixture:
    """Eight modes on a circle of radius 4, the first at angle 0, std 0.3; equal weights by default."""
    means = ring(8, 4.0, 2)
    return GaussianMixture(means, 0.3, torch.full((8,), 1 / 8) if weights is None else torch.tensor(weights))


def ring_levels(steps: int) -> Float[Tensor, " steps"]:
    """Abar at t = 1/steps, ..., 1."""
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    return ((t * math.pi / 2).cos() ** 2).clamp(min=1e-4)


def exact_chain(mixture: GaussianMixture, reward: Callable[[Tensor], Tensor], steps: int = 16) -> Task:
    """A task whose sampler is the exact chain of ``steps`` steps; ``reward`` is a function of the points (batch, 2)."""
    process = ExactStart(ring_levels(steps), mixture)
    model = GenerativeModel(
        network=MixtureVelocity(mixture, process, residual=False),
        process=process,
        output="velocity",
        shape=(mixture.means.shape[1],),
        encode=lambda prompts: None,
        decode=lambda x: x,
    )
    sampler = Sampler(uniform_grid(steps), ExactAncestral())
    scored = FunctionReward("points", lambda samples: reward(samples.media), Capabilities(differentiable=True))
    return Task("exact-chain", model, scored, ("",), ("",), sampler)


def nearest_mode(mixture: GaussianMixture, x: Float[Tensor, "batch dim"]) -> Tensor:
    """Index of the nearest mode of each point."""
    return torch.cdist(x, mixture.means.to(x)).argmin(-1)
