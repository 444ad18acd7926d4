"""Rewards of vectors: linear and quadratic ones, whose tilted laws have closed forms, distance, and bumps."""

from typing import Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.card import Card
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Capabilities, Samples

CARD = Card(
    name="vector",
    entry="vector",
    paper="Closed-form rewards: a Gaussian mixture tilted by a linear or quadratic reward is a Gaussian mixture.",
    needs=("vectors",),
)

VectorKind = Literal["linear", "quadratic", "distance"]


class VectorReward:
    """Linear b·x, quadratic -|x - c|², or distance -|x - c|; differentiable.

    Attributes:
        kind: which of the three; also the name in reports.
        point: b or c, (dim,).
    """

    capabilities = Capabilities(differentiable=True)

    def __init__(self, kind: VectorKind, point: Float[Tensor, " dim"]) -> None:
        self.kind: VectorKind = kind
        self.point = point

    @property
    def name(self) -> str:
        return self.kind

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        x = samples.media
        if x.dim() != 2 or x.shape[1] != len(self.point):
            raise ValueError(f"this reward scores vectors of dimension {len(self.point)}, not shape {tuple(x.shape)}")
        point = self.point.to(x)
        match self.kind:
            case "linear":
                return x @ point
            case "quadratic":
                return -(x - point).square().sum(1)
            case "distance":
                # the norm's gradient at the centre itself is 0, not NaN
                return -torch.linalg.vector_norm(x - point, dim=1)
            case _:
                assert_never(self.kind)


def linear(b: Float[Tensor, " dim"]) -> VectorReward:
    """b·x: tilting shifts a Gaussian by covariance·b/temperature."""
    return VectorReward("linear", b)


def quadratic(c: Float[Tensor, " dim"]) -> VectorReward:
    """-|x - c|²: tilting multiplies by a Gaussian about c with variance temperature/2."""
    return VectorReward("quadratic", c)


def distance(c: Float[Tensor, " dim"]) -> VectorReward:
    """-|x - c|."""
    return VectorReward("distance", c)


def bumps() -> FunctionReward:
    """sin(1.7·x_1 + 0.5)·cos(1.3·x_2) + 0.15·x_1: hills and valleys, of which a blurred prediction says little."""

    def score(samples: Samples) -> Float[Tensor, " batch"]:
        first, second = samples.media[:, 0], samples.media[:, 1]
        return (1.7 * first + 0.5).sin() * (1.3 * second).cos() + 0.15 * first

    return FunctionReward("bumps", score, Capabilities(differentiable=True))


def vector(kind: VectorKind, point: list[float]) -> VectorReward:
    """The reward from plain values, as a recipe writes it."""
    return VectorReward(kind, torch.tensor(point, dtype=torch.float32))
