"""Laws of the initial noise where the best one is known: the bowl, and mixtures under a linear reward.

The bowl has the identity for a generator, in 16 dimensions: r = 5 - |z - c|²/16, c equally spaced in [-1, 1], so the
expected reward of a law is 5 - (|mean - c|² + |std|²)/16: 3.62 of the prior. The ODE of a mixture of one Gaussian is
affine, so under a linear reward the tilted law of its noise is N(G'·b/temperature, I), G' the slope of the sampler.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from difftilt.models.denoiser import denoiser
from difftilt.models.protocol import Denoiser, GenerativeModel
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.process.protocol import Condition
from difftilt.rewards.base import FunctionReward
from difftilt.sampling.diagonal import DiagonalGaussian
from difftilt.sampling.kernels import Euler
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.rollout import sample
from difftilt.steering.find import FIND, FINDConfig
from difftilt.steering.learned_noise import Learned
from difftilt.testbeds.mixtures import Config, Mixtures
from difftilt.training.protocol import Task

DIMENSIONS, TOP = 16, 5.0
CENTRE = torch.linspace(-1, 1, DIMENSIONS)


class Identity:
    """A solver that leaves the noise as it is, and asks no network."""

    def __call__(self, denoise: Denoiser, x: Tensor, condition: Condition, grid: Tensor) -> Tensor:
        return x


def bowl_task() -> Task:
    """The bowl: noise is the sample."""
    model = GenerativeModel(
        lambda x, t, condition: x, RectifiedFlow(), "velocity", (DIMENSIONS,), lambda prompts: None, lambda x: x
    )
    reward = FunctionReward("bowl", lambda samples: TOP - (samples.media - CENTRE).square().mean(1))
    return Task("bowl", model, reward, ("",), ("",), Sampler(uniform_grid(1), Euler(), Identity()))


def expected(learned: Learned) -> Float[Tensor, " prompts"]:
    """Expected reward of each law on the bowl, in closed form."""
    return TOP - ((learned.policy.mean - CENTRE).square() + learned.policy.std**2).mean(1)


@cache
def bowl(prompts: int, iterations: int, **settings: Any) -> Learned:
    """What is learned on the bowl."""
    config = {"iterations": iterations, "value_hidden": 16, "learning_rate": 0.02, "samples": 1, **settings}
    find, task = FIND(FINDConfig.model_validate(config)), bowl_task()
    find.fit(task, denoiser(task.model), task.reward, [""] * prompts, Noise(0))
    assert find.fitted is not None
    return find.fitted


@cache
def on_mixture(testbed: Mixtures, prompts: int, **settings: Any) -> DiagonalGaussian:
    """Laws learned on a mixture at temperature 1, with the exact penalty unless told otherwise."""
    config = {"reward_weight": 1.0, "kl_weight": 1.0, "penalty": "exact", "value_hidden": 16, "samples": 1, **settings}
    find, task = FIND(FINDConfig.model_validate(config)), testbed.task()
    find.fit(task, denoiser(task.model), task.reward, [""] * prompts, Noise(0))
    assert find.fitted is not None
    return find.fitted.policy


def _samples(testbed: Mixtures, z: Float[Tensor, "draws dim"]) -> Float[Tensor, "draws dim"]:
    """What the sampler makes of noise."""
    task = testbed.task()
    return sample(denoiser(task.model), task.sampler, z, None, noise=Noise(0), index=torch.arange(len(z)))


def slope_gap() -> float:
    """Largest distance of mean and std, averaged over 4 repetitions, from the tilted law of the noise."""
    b = (0.8, -0.4)
    one = Config(means=((1.0, -0.5),), std=1.0, reward="linear", direction=b, steps=5, shift=1.0)
    law = on_mixture(Mixtures(one), 4, iterations=120, rollouts=64, learning_rate=0.02)
    with torch.no_grad():
        x = _samples(Mixtures(one), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    mean = (x[1, 0] - x[0, 0]) * torch.tensor(b)
    return float(torch.cat([law.mean.mean(0) - mean, law.std.mean(0) - 1]).abs().max())


MODES = Mixtures(Config(reward="linear", steps=10, shift=1.0))
"""Eight modes on a ring, temperature 1."""


def _objective(mean: Float[Tensor, "2"], std: Float[Tensor, "2"]) -> Float[Tensor, ""]:
    """E[r] - KL(law || N(0, I)) on the ring, by 32 x 32 Gauss-Hermite nodes."""
    nodes, weight = (torch.as_tensor(part, dtype=torch.float32) for part in hermegauss(32))
    z = mean + std * torch.cartesian_prod(nodes, nodes)
    reward = torch.outer(weight, weight).flatten() / weight.sum() ** 2 @ _samples(MODES, z)[:, 0]
    return reward - DiagonalGaussian(mean[None], std[None]).kl_to_prior(reduce="sum")[0]


@cache
def best_objective() -> float:
    """Its largest value over diagonal Gaussians: by gradients through the sampler, which the learner never has."""
    place = torch.zeros(4, requires_grad=True)
    adam = torch.optim.Adam([place], lr=0.05)
    for _ in range(120):
        adam.zero_grad()
        (-_objective(place[:2], place[2:].exp())).backward()
        adam.step()
    with torch.no_grad():
        return float(_objective(place[:2], place[2:].exp()))


@torch.no_grad()
def short_of_best(**settings: Any) -> float:
    """Nats between the best diagonal Gaussian of the noise on the ring and what was learned, mean of 6 repetitions."""
    law = on_mixture(MODES, 6, iterations=150, rollouts=32, learning_rate=0.03, **settings)
    found = [float(_objective(mean, std)) for mean, std in zip(law.mean, law.std, strict=True)]
    with torch.enable_grad():
        return best_objective() - sum(found) / len(found)
