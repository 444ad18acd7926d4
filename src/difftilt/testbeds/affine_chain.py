"""A chain of affine Gaussian steps whose best policy has a closed form.

Data N(0, 1), 20 DDPM steps, reward -(x - 2)²/2. The mean of step k is (slope_k + gain_k)·x + offset_k, with trained
gains and offsets and a fixed std: to maximise E[r] - beta·KL over them is a linear-quadratic control problem.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftilt.models.protocol import GenerativeModel
from difftilt.process.gaussian import GaussianProcess
from difftilt.process.grid import uniform_grid
from difftilt.process.protocol import Condition
from difftilt.rewards.base import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.kernels import DDIM
from difftilt.sampling.protocol import Sampler
from difftilt.training.protocol import Task

STEPS, TARGET = 20, 2.0
PROMPTS = ("one", "two")


@dataclass(frozen=True)
class Arc(GaussianProcess):
    """alpha = cos(angle·t), sigma = sin(angle·t): variance preserving, abar = ``last`` at t = 1."""

    last: float

    @property
    def angle(self) -> float:
        return math.acos(math.sqrt(self.last))

    def alpha(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return (self.angle * t).cos()

    def sigma(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return (self.angle * t).sin()

    def alpha_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return -self.angle * self.sigma(t)

    def sigma_dot(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return self.angle * self.alpha(t)


@dataclass(frozen=True)
class Chain:
    """The reference: x_s = slope·x_t + std·noise, from the noise end; the last std is 0.

    Attributes:
        from_x0: factor of the x0-prediction in the mean of each step.
    """

    slope: Float[Tensor, " steps"]
    std: Float[Tensor, " steps"]
    from_x0: Float[Tensor, " steps"]


@cache
def chain(last: float) -> Chain:
    """By the posterior of DDPM with the exact x0-prediction sqrt(abar_t)·x_t of N(0, 1)."""
    abar = Arc(last).alpha(uniform_grid(STEPS)) ** 2
    abar_t, abar_s = abar[:-1], abar[1:]
    kept = abar_t / abar_s
    from_x0 = abar_s.sqrt() * (1 - kept) / (1 - abar_t)
    slope = from_x0 * abar_t.sqrt() + kept.sqrt() * (1 - abar_s) / (1 - abar_t)
    return Chain(slope, ((1 - kept) * (1 - abar_s) / (1 - abar_t)).sqrt(), from_x0)


class AffineSteps(nn.Module):
    """x0-prediction whose DDPM step has mean (slope_k + da_k)·x + b_k."""

    def __init__(self, last: float) -> None:
        super().__init__()
        self.gain, self.offset = (nn.Parameter(torch.zeros(STEPS)) for _ in range(2))
        # from the data end, as the clock of the process counts
        self.register_buffer("from_x0", chain(last).from_x0.flip(0).float())
        self.last = last

    def forward(self, x_t: Float[Tensor, "batch 1"], t: Float[Tensor, " batch"], condition: Condition) -> Tensor:
        place = (t * STEPS).round().long() - 1
        gain, offset = (own[place][:, None] for own in (self.gain, self.offset))
        exact, scale = Arc(self.last).alpha(t)[:, None], self.get_buffer("from_x0")[place][:, None]
        return exact * x_t + (gain * x_t + offset) / scale


def linear_task(last: float = 1e-4, offset: float = 0.0) -> Task:
    """Reward -(x - 2)²/2; the second prompt's is higher by ``offset``."""

    def score(samples: Samples) -> Tensor:
        extra = [offset * (prompt == PROMPTS[1]) for prompt in samples.prompts]
        return -((samples.media[:, 0] - TARGET) ** 2) / 2 + samples.media.new_tensor(extra)

    model = GenerativeModel(
        network=AffineSteps(last),
        process=Arc(last),
        output="x0",
        shape=(1,),
        encode=lambda prompts: None,
        decode=lambda x: x,
    )
    sampler = Sampler(uniform_grid(STEPS), DDIM(1.0))
    return Task("affine-chain", model, as_reward(score, name="parabola"), PROMPTS, PROMPTS, sampler)


def network_moments(network: nn.Module, last: float = 1e-4) -> tuple[float, float]:
    """Exact mean and variance of x_0 under trained steps."""
    assert isinstance(network, AffineSteps)
    gain, offset = (own.detach().double().flip(0) for own in (network.gain, network.offset))
    return moments(gain, offset, last)


def moments(gain: Tensor, offset: Tensor, last: float) -> tuple[float, float]:
    """Exact mean and variance of x_0 for the given changes of each step, from the noise end."""
    own, mean, variance = chain(last), torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for k in range(STEPS):
        slope = own.slope[k] + gain[k]
        mean, variance = slope * mean + offset[k], slope**2 * variance + own.std[k] ** 2
    return float(mean), float(variance)


def unmoved(last: float = 1e-4) -> tuple[float, float]:
    """Of the reference."""
    none = torch.zeros(STEPS, dtype=torch.float64)
    return moments(none, none, last)


def best_moments(temperature: float, last: float = 1e-4) -> tuple[float, float]:
    """Of the policy that maximises E[r] - beta·KL among affine steps of these std: a Riccati recursion.

    With value -(p·x² - 2q·x)/2 after a step of std σ the best push of its mean m = slope·x is
    u = (q - p·m)/(w + p), w = beta/σ², and before it p <- slope²·p·w/(w + p), q <- slope·q·w/(w + p).
    """
    own = chain(last)
    p, q = own.slope[-1] ** 2, TARGET * own.slope[-1]
    gain, offset = torch.zeros_like(own.slope), torch.zeros_like(own.slope)
    for k in reversed(range(STEPS - 1)):
        w = temperature / own.std[k] ** 2
        gain[k], offset[k] = -p * own.slope[k] / (w + p), q / (w + p)
        p, q = own.slope[k] ** 2 * p * w / (w + p), own.slope[k] * q * w / (w + p)
    return moments(gain, offset, last)
